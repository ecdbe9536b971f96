"""The commands of `qllm bench`. Nothing heavy is imported before the arguments are known to be good."""

from __future__ import annotations

import typer

from qllm_bench.infinite_command import infinite
from qllm_bench.needle_command import needle
from qllm_bench.policies_command import policies
from qllm_bench.rag_command import rag
from qllm_bench.speed_command import speed

app = typer.Typer(
    name="bench",
    help="Measure quality and speed of the memory policies on this machine. Every case is kept at once: run the same command "
    "again to go on after an interruption.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (needle, policies, infinite, rag, speed):
    app.command()(command)
