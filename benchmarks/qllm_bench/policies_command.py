"""The command `qllm bench policies`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from qllm_bench import arguments
from qllm_bench.command_options import (
    Distractors,
    Families,
    ModelOptions,
    Needles,
    OrderName,
    Seed,
    Text,
    one_order,
    show,
    splits,
)
from qllm_runtime.command_options import takes_options
from qllm_runtime.errors import InvalidRequestError

SWEEPS = ("policy", "order", "budget", "query_weight", "block_size", "summary", "selection", "piece")


@partial(takes_options, kind=ModelOptions)
def policies(
    options: ModelOptions,
    sweep: Annotated[
        str, typer.Option(help=f"What to vary, with commas: {', '.join(SWEEPS)}; or all, or none.")
    ] = "all",
    setting: Annotated[
        list[str] | None,
        typer.Option(
            help="A further setting, e.g. query_weight=2,summary=mean,policy=infllm,order=last; may be repeated."
        ),
    ] = None,
    tokens: Annotated[str, typer.Option(help="Prompt length in tokens, e.g. 4k.")] = "2k",
    order: OrderName = "both",
    families: Families = "",
    documents: Annotated[int, typer.Option(help="Documents per split.")] = 8,
    needles: Needles = 4,
    distractors: Distractors = 2,
    text: Text = None,
    split: Annotated[str, typer.Option(help="development, test, or both with a comma.")] = "development,test",
    seed: Seed = 0,
) -> None:
    """Compare settings of the memory on the same questions: policy, attention budget, query weight, blocks, summaries ...

    Choose settings by the development documents and believe the test documents. "won, lost" counts the questions that
    only the setting, and that only the base, answered rightly.
    """
    arguments.need("matplotlib")
    from qllm_bench import needle as questions
    from qllm_bench import policies as bench
    from qllm_bench.prose import Library
    from qllm_bench.questions.facts import FAMILIES
    from qllm_bench.sweeps import sweep as settings_of

    lengths = arguments.lengths(tokens)
    if len(lengths) != 1:
        raise InvalidRequestError("--tokens takes one length.")
    chosen = arguments.choices(sweep, SWEEPS, "sweep") if sweep != "none" else []
    place = one_order(order)
    plan = questions.Plan(
        lengths=lengths,
        documents=arguments.at_least(documents, 1, "--documents"),
        needles=arguments.at_least(needles, 1, "--needles"),
        depths=5,
        distractors=arguments.at_least(distractors, 0, "--distractors"),
        families=arguments.choices(families, FAMILIES, "family") if families else questions.SIMPLE,
        seed=seed,
    )
    libraries = [Library(name, text) for name in splits(split)]
    subject = options.open()
    sweeps = settings_of(subject, chosen, place, setting or ())
    if not sweeps:
        raise InvalidRequestError("Nothing to compare; give --sweep or --setting.")
    show(bench.bench(subject, libraries, plan, sweeps, options.out).path)
