"""The command `qllm bench needle`."""

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
    Policies,
    Seed,
    SplitName,
    Text,
    one_split,
    orders,
    show,
)
from qllm_runtime.command_options import takes_options


@partial(takes_options, kind=ModelOptions)
def needle(
    options: ModelOptions,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, e.g. 512,4k,1M.")] = "512,1k,4k,16k",
    policy: Policies = "qllm,infllm,streaming,oracle",
    order: OrderName = "both",
    families: Families = "",
    documents: Annotated[
        str, typer.Option(help="Documents per length: a number, or one for each, e.g. 4,16k=25,1M=1.")
    ] = "4",
    needles: Needles = 4,
    depths: Annotated[int, typer.Option(help="Depths, evenly from start to end.")] = 5,
    distractors: Distractors = 2,
    text: Text = None,
    split: SplitName = "test",
    seed: Seed = 0,
) -> None:
    """Find facts at every depth of documents of every length: a heat map per policy.

    Accuracy is exact match. "oracle" is qllm with the blocks of the right fact forced into every lookup: what a better
    lookup could reach. Lengths within the model's window show what its reading alone can do.
    """
    arguments.need("matplotlib")
    from qllm_bench import needle as bench
    from qllm_bench.prose import Library
    from qllm_bench.questions.facts import FAMILIES, WORDED_FAMILIES
    from qllm_bench.subject import POLICIES

    policies = arguments.choices(policy, POLICIES, "policy")
    places = orders(order)
    sizes = arguments.lengths(lengths)
    counts = arguments.by_length(documents, sizes, "--documents")
    plan = bench.Plan(
        lengths=sizes,
        documents=max(counts.values()),
        needles=arguments.at_least(needles, 1, "--needles"),
        depths=arguments.at_least(depths, 1, "--depths"),
        distractors=arguments.at_least(distractors, 0, "--distractors"),
        families=arguments.choices(families, (*FAMILIES, *WORDED_FAMILIES), "family") if families else bench.SIMPLE,
        seed=seed,
    )
    library = Library(one_split(split), text)
    show(bench.bench(options.open(), library, plan, counts, policies, places, options.out).path)
