"""What `scripts/benchmark.py` measures: one file for each part, and one for each peer."""
