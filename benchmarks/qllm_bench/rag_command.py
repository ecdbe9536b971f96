"""The command `qllm bench rag`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from qllm_bench import app as root
from qllm_bench import arguments
from qllm_runtime.errors import InvalidRequestError

if TYPE_CHECKING:
    from qllm_bench.subject import Order


@root.app.command()
def rag(
    model: root.Model = "reader",
    revision: root.Revision = None,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, e.g. 4k,64k.")] = "4k,16k",
    order: Annotated[
        str,
        typer.Option(
            help="How whole documents are read: last (once for all questions), both (for each); with a comma."
        ),
    ] = "last,both",
    chunks: Annotated[str, typer.Option(help="Sizes of chunks in tokens, with commas.")] = "64,128",
    embeddings: Annotated[
        str | None,
        typer.Option(help="Also retrieve by a sentence-embedding model: a folder or a Hugging Face hub id."),
    ] = None,
    families: Annotated[str, typer.Option(help="Kinds of questions with commas, or all.")] = "all",
    documents: Annotated[int, typer.Option(help="Documents per length.")] = 4,
    distractors: Annotated[int, typer.Option(help="Further facts of the same kind per question.")] = 4,
    text: root.Text = None,
    split: root.SplitName = "test",
    seed: root.Seed = 0,
    out: root.Out = Path("bench-results"),
    n_init: root.NInit = None,
    n_local: root.NLocal = None,
    block_size: root.BlockSize = None,
    topk: root.TopK = None,
    query_weight: root.Weight = None,
    selection: root.SelectionName = None,
    summary: root.SummaryName = None,
    device: root.Device = "auto",
    dtype: root.Dtype = "auto",
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

    orders = arguments.choices(order, ("last", "both"), "order")
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
    library = Library(root._split(split), text)
    memory = {
        "n_init": n_init, "n_local": n_local, "block_size": block_size, "topk": topk, "query_weight": query_weight,
        "selection": selection, "summary": summary,
    }  # fmt: skip
    subject = root.open_subject(model, revision, device, dtype, memory)
    loading = {"revision": revision, "device": device, "dtype": dtype}
    sizes = list(dict.fromkeys(sizes))
    compared = bench.systems(subject, cast("list[Order]", orders), sizes, embeddings, loading)
    chosen = {"orders": orders, "chunks": sizes, "embeddings": embeddings}
    root.show(bench.bench(subject, library, plan, compared, chosen, out).path)
