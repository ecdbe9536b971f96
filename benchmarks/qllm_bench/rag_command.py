"""The command `qllm bench rag`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, cast

import typer

from qllm_bench import arguments
from qllm_bench.command_options import ModelOptions, Seed, SplitName, Text, one_split, show
from qllm_runtime.command_options import takes_options
from qllm_runtime.errors import InvalidRequestError

if TYPE_CHECKING:
    from qllm_bench.subject import Order


@partial(takes_options, kind=ModelOptions)
def rag(
    options: ModelOptions,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, e.g. 4k,64k.")] = "4k,16k",
    order: Annotated[
        str,
        typer.Option(
            help="How whole documents are read: last (once for all questions), reread (once, then passages again), both "
            "(for each); with commas."
        ),
    ] = "last,reread,both",
    chunks: Annotated[str, typer.Option(help="Sizes of chunks in tokens, with commas.")] = "64,128",
    embeddings: Annotated[
        str | None,
        typer.Option(help="Also retrieve by a sentence-embedding model: a folder or a Hugging Face hub id."),
    ] = None,
    families: Annotated[str, typer.Option(help="Kinds of questions with commas, or all.")] = "all",
    documents: Annotated[int, typer.Option(help="Documents per length.")] = 4,
    distractors: Annotated[int, typer.Option(help="Further facts of the same kind per question.")] = 4,
    text: Text = None,
    split: SplitName = "test",
    seed: Seed = 0,
) -> None:
    """Compare reading whole documents with the usual pipeline: splitter, retriever, and the same model over the chunks.

    Same documents, same questions, and no more tokens before the model than the attention window of the whole-document rows.
    Every size of chunks is retrieved by BM25, by embeddings where given, and by a perfect retriever, which separates what
    retrieval misses from what the model misreads.
    """
    for package in ("matplotlib", "bm25s", "langchain_text_splitters"):
        arguments.need(package)
    from qllm_bench import rag as bench
    from qllm_bench.prose import Library
    from qllm_bench.rag_questions import FAMILIES

    orders = arguments.choices(order, ("last", "reread", "both", "both-reread"), "order")
    sizes = [int(size) for size in arguments.split_list(chunks) if size.isdigit() and int(size) >= 16]
    if not sizes or len(sizes) < len(arguments.split_list(chunks)):
        raise InvalidRequestError(f"--chunks takes sizes of at least 16 tokens, e.g. 64,128; it is {chunks!r}.")
    plan = bench.Plan(
        lengths=arguments.lengths(lengths),
        documents=arguments.at_least(documents, 1, "--documents"),
        families=arguments.choices(families, FAMILIES, "family"),
        distractors=arguments.at_least(distractors, 0, "--distractors"),
        seed=seed,
    )
    library = Library(one_split(split), text)
    subject = options.open()
    loading = {"revision": options.revision, "device": options.device, "dtype": options.dtype}
    sizes = list(dict.fromkeys(sizes))
    compared = bench.systems(subject, cast("list[Order]", orders), sizes, embeddings, loading)
    chosen = {"orders": orders, "chunks": sizes, "embeddings": embeddings}
    show(bench.bench(subject, library, plan, compared, chosen, options.out).path)
