"""Proofs about a model as it runs: no later token is seen, and decoding equals one parallel pass.

``check`` is the public function. A failure names the block and the step that it comes from.
"""
