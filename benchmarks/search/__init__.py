"""Benchmarks of the search strategies. Run one with `python -m benchmarks.search.NAME`."""
