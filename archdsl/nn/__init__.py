"""What blocks build on: interfaces of blocks, loops and routers, the cache, norms, rotary angles.

Blocks import this folder; this folder imports no block.
"""
