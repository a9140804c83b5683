"""Benchmarks of speed and memory, each with a command: `python -m benchmarks.NAME`."""
