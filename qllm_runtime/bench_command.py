"""The command `qllm bench`: hands its arguments to the package of benchmarks, which is loaded only then."""

from __future__ import annotations

from importlib.util import find_spec

import typer

from qllm_runtime.errors import QLLMError


class BenchNotInstalledError(QLLMError):
    """The package of benchmarks isn't installed."""


def bench(context: typer.Context) -> None:
    """Measure quality and speed: needle, infinite, policies, speed, rag. `qllm bench COMMAND --help` tells more."""
    if find_spec("qllm_bench") is None:
        raise BenchNotInstalledError("The benchmarks are not installed; run `pip install 'qllm-integrations[bench]'`.")
    from qllm_bench.app import app

    status = app(args=context.args or ["--help"], prog_name="qllm bench", standalone_mode=False)
    if status:
        raise typer.Exit(int(status))
