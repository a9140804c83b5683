"""Text generation: prompts, sampling, decoding with a KV cache, and the think map.

``archdsl.generate`` is the public function. It takes a model and prompts and returns one
``Generation`` per prompt.
"""
