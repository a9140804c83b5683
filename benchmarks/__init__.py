"""Speed and size, measured; one command each: `python -m benchmarks.NAME`."""
