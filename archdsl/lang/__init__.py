"""The language: YAML text becomes a tree, search leaves are filled, a validated spec comes out.

``load`` is the public function. Nothing here needs torch, and no block is known by name: kinds
come from the registry.
"""
