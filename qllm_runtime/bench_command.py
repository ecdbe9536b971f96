"""The command `qllm bench`: hands its arguments to the package of benchmarks, which is loaded only then."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from importlib.util import find_spec

import typer

from qllm_runtime.errors import MissingExtraError


def bench(context: typer.Context) -> None:
    """Measure quality and speed: needle, infinite, policies, speed, rag. `qllm bench COMMAND --help` tells more."""
    if find_spec("qllm_bench") is None:
        raise MissingExtraError("The benchmarks are not installed; run `pip install 'qllm-integrations[bench]'`.")
    from qllm_bench.app import app

    if not context.args:  # as `qllm` alone
        with redirect_stdout(sys.stderr):
            app(args=["--help"], prog_name="qllm bench", standalone_mode=False)
        raise typer.Exit(2)
    status = app(args=context.args, prog_name="qllm bench", standalone_mode=False)
    if status:
        raise typer.Exit(int(status))
