"""Text and generated tasks as batches of tokens: reading files, tokenizing, caching, splitting.

``load_data`` is the public function. It returns `Data`, which training and evaluation read.
"""
