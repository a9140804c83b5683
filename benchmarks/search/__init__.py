"""The search itself, measured; one command each: `python -m benchmarks.search.NAME`."""
