"""What every block builds on: the block interface, the key-value cache, rotary embeddings.

Blocks import this folder; it knows none of them.
"""
