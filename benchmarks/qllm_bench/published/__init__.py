"""Published long-context benchmarks: their prompts, rules and metrics, in our own code."""

from qllm_bench.published import babilong, infinite, longbench, ruler

SUITES = {module.SUITE.name: module.SUITE for module in (infinite, longbench, babilong, ruler)}

__all__ = ["SUITES"]
