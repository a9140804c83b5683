"""Processes that train: a pool of workers that survives crashes, hangs and lack of memory."""
