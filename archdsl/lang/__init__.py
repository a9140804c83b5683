"""The specification language: reads YAML text, fills open values and returns a validated spec.

`archdsl.load` is the public function. Nothing in this folder needs torch, and no block is named
here: the kinds of blocks come from the registry.
"""
