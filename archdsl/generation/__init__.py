"""Text from a trained model: prompts, sampling, decoding with a cache, and the think map.

``generate`` is the public function.
"""
