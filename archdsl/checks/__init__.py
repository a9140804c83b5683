"""Checks of a model as it runs: it sees no later token, and decoding equals one parallel pass.

``check`` is the public function. A failure names the block and the step where it originates.
"""
