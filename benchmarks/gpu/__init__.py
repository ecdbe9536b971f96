"""Benchmarks that need a GPU; `run.sh` runs all of them."""
