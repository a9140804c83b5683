"""Data: reads text files, tokenizes and caches them, splits them, and generates synthetic tasks.

`archdsl.load_data` is the public function. It returns a `Data` object, from which training and
evaluation read batches of tokens.
"""
