"""The command `qllm bench speed`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from qllm_bench import arguments
from qllm_bench.command_options import (
    MemoryOptions,
    show,
)
from qllm_runtime.command_options import takes_options

POLICIES = ("qllm", "infllm", "streaming", "sdpa")


@partial(takes_options, kind=MemoryOptions)
def speed(
    options: MemoryOptions,
    model: Annotated[
        str,
        typer.Option(help="random, random-1b, random-8b (Llamas of random weights), reader, a folder, or a hub id."),
    ] = "random",
    lengths: Annotated[str, typer.Option(help="Tokens read, e.g. 32k,128k.")] = "8k,32k",
    policy: Annotated[
        str, typer.Option(help=f"With commas: {', '.join(POLICIES)}; or all. sdpa is transformers as it comes.")
    ] = "all",
    sdpa_up_to: Annotated[str, typer.Option(help="Longest text for sdpa, whose time grows quadratically.")] = "32k",
    steps: Annotated[int, typer.Option(help="Decode steps; the median counts.")] = 32,
    repeats: Annotated[int, typer.Option(help="Measurements of each kind; the median counts.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Measure reading, writing, a second question and memory against stock attention, each in a process of its own."""
    arguments.need("matplotlib")
    chosen = arguments.choices(policy, POLICIES, "policy")
    wanted = arguments.lengths(lengths)
    longest = max(arguments.lengths(sdpa_up_to))
    for value, name in ((steps, "--steps"), (repeats, "--repeats"), (threads, "--threads")):
        arguments.at_least(value, 1, name)
    from qllm_bench import speed as bench
    from qllm_bench.subject import changed

    device, base = bench.resolve(model, options.device, options.dtype)
    journal = bench.bench(
        model,
        wanted,
        chosen,
        changed(base, options.changes),
        device=device,
        dtype=options.dtype,
        steps=steps,
        threads=threads,
        repeats=repeats,
        stock_up_to=longest,
        out=options.out,
    )
    show(journal.path)
