"""Benchmarks of the memory policies: quality and speed, with figures. `qllm bench` is the command over them."""
