"""The command `qllm bench infinite`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qllm_bench import arguments
from qllm_bench.command_options import ModelOptions, OrderName, Policies, orders, show
from qllm_runtime.command_options import takes_options
from qllm_runtime.errors import InvalidRequestError

if TYPE_CHECKING:
    from qllm_bench.published.suite import Suite

_QUESTIONS = 14  # two of each of Math.Find's seven
_LONGEST_FILES = 10 * 1024 * 1024  # of BABILong


@partial(takes_options, kind=ModelOptions)
def infinite(
    options: ModelOptions,
    suite: Annotated[str, typer.Option(help="infinite (∞-Bench), longbench, babilong or ruler.")] = "infinite",
    task: Annotated[
        str, typer.Option(help="Tasks with commas, or all; by default those that can be made by rule, with --data all.")
    ] = "",
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Prompt lengths in tokens, e.g. 1k,16k,1M; of BABILong's files, e.g. 4k. [default: 1k,4k,16k; of RULER 4k,16k]"
        ),
    ] = None,
    questions: Annotated[
        int | None, typer.Option(help=f"Questions per task and length [default: {_QUESTIONS}; of files all].")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Folder of the published files, or `hub` to fetch them; by default tasks are made by rule."),
    ] = None,
    policy: Policies = "qllm,infllm,streaming",
    order: OrderName = "both",
    seed: Annotated[int, typer.Option(min=0, help="Seed of tasks made by rule.")] = 0,
) -> None:
    """Answer tasks of ∞-Bench, LongBench, BABILong and RULER, with their prompts and metrics.

    The synthetic tasks (PassKey, Number, KV, Math.Find; RULER's needles, variable tracking, common words) are made at any
    length. The others are read from the published files, which are checked before any work starts.
    """
    arguments.need("matplotlib")
    from qllm_bench import infinite as bench
    from qllm_bench import published
    from qllm_bench.subject import POLICIES

    chosen = published.SUITES[arguments.one(suite, list(published.SUITES), "suite")]
    policies = arguments.choices(policy, POLICIES, "policy")
    places = orders(order)
    names = list(chosen.tasks)
    if questions is not None:
        arguments.at_least(questions, 1, "--questions")
    plan = bench.Plan(
        suite=chosen,
        tasks=arguments.choices(task or ("all" if data else ",".join(chosen.rules) or "all"), names, "task"),
        lengths=_lengths(chosen, lengths, data),
        questions=questions or (None if data else _QUESTIONS),
        data="hub" if data == "hub" else Path(data) if data else None,
        seed=seed,
    )
    if isinstance(plan.data, Path) and not plan.data.is_dir():
        raise InvalidRequestError(f"{data!r} is not a folder; --data takes the folder of the published files, or hub.")
    files = bench.read_files(plan)
    subject = options.open()
    show(bench.bench(subject, plan, files, policies, places, options.out).path)


def _lengths(suite: Suite, lengths: str | None, data: str | None) -> list[int]:
    if data is None:
        # the published lengths of RULER begin at 4k
        usual = "4k,16k" if suite.name == "ruler" else "1k,4k,16k"
        return arguments.lengths(usual if lengths is None else lengths)
    if suite.by_length:
        return arguments.lengths("4k" if lengths is None else lengths, least=0, most=_LONGEST_FILES)
    if lengths is not None:
        raise InvalidRequestError(f"The files of {suite.title} have the lengths they have; leave --lengths out.")
    return []
