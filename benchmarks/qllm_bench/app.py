"""The commands of `qllm bench`. Nothing heavy is imported before the arguments are known to be good."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from qllm_bench import arguments
from qllm_runtime.config import Selection, Summary
from qllm_runtime.errors import InvalidRequestError

if TYPE_CHECKING:
    from qllm_bench.prose import Split
    from qllm_bench.subject import Order, Subject

app: typer.Typer = typer.Typer(
    name="bench",
    help="Measure quality and speed of the memory policies on this machine. Every case is kept at once: run the same command "
    "again to go on after an interruption.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

ORDERS = ("first", "last", "both")
SPLITS = ("development", "test")
SPEED_POLICIES = ("qllm", "infllm", "streaming", "sdpa")
SWEEPS = ("policy", "order", "budget", "query_weight", "block_size", "summary", "selection", "piece")

Model = Annotated[str, typer.Option(help="reader, reader-plain, a folder, or a Hugging Face hub id.")]
Revision = Annotated[str | None, typer.Option(help="Revision on the hub.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Out = Annotated[Path, typer.Option(help="Folder of results; a run that was interrupted goes on there.")]
Text = Annotated[
    Path | None, typer.Option(help="Folder of .txt books to hide facts in; by default stories are made on the spot.")
]
SplitName = Annotated[str, typer.Option("--split", help="development or test documents.")]
Seed = Annotated[int, typer.Option(help="Seed of documents and facts.")]
Policies = Annotated[
    str,
    typer.Option("--policy", help="Policies with commas: qllm, infllm, streaming, lm-infinite, full, oracle; or all."),
]
NInit = Annotated[int | None, typer.Option(min=0, help="Initial tokens that stay visible.")]
NLocal = Annotated[int | None, typer.Option(min=1, help="Local window in tokens.")]
BlockSize = Annotated[int | None, typer.Option(min=1, help="Tokens of a memory block.")]
TopK = Annotated[int | None, typer.Option("--topk", min=1, help="Blocks looked up at a time.")]
Weight = Annotated[float | None, typer.Option("--query-weight", min=0, help="Weight of the question in a lookup.")]
SelectionName = Annotated[Selection | None, typer.Option("--selection", help="Blocks per layer or per key/value head.")]
SummaryName = Annotated[Summary | None, typer.Option("--summary", help="What represents a block in a lookup.")]


@app.callback()
def _root() -> None:
    """Keeps the name of the command in the command line however few there are."""


@app.command()
def needle(
    model: Model = "reader",
    revision: Revision = None,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens, e.g. 512,4k,1M.")] = "512,1k,4k,16k",
    policy: Policies = "qllm,infllm,streaming,oracle",
    order: Annotated[
        str, typer.Option(help="Where the question stands: first, last, both; several with commas.")
    ] = "both",
    families: Annotated[str, typer.Option(help="Families of facts with commas, or all.")] = "",
    documents: Annotated[int, typer.Option(help="Documents per length.")] = 4,
    needles: Annotated[int, typer.Option(help="Facts asked for in each document.")] = 4,
    depths: Annotated[int, typer.Option(help="Depths, evenly from start to end.")] = 5,
    distractors: Annotated[int, typer.Option(help="Further facts of the same kind per fact asked for.")] = 2,
    text: Text = None,
    split: SplitName = "test",
    seed: Seed = 0,
    out: Out = Path("bench-results"),
    n_init: NInit = None,
    n_local: NLocal = None,
    block_size: BlockSize = None,
    topk: TopK = None,
    query_weight: Weight = None,
    selection: SelectionName = None,
    summary: SummaryName = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Find facts at every depth of documents of every length: a heat map per policy.

    Accuracy is exact match. "oracle" is qllm with the blocks of the right fact forced into every lookup: what a better
    lookup could reach. Lengths within the model's window show what its reading alone can do.
    """
    arguments.need("matplotlib")
    from qllm_bench import needle as bench
    from qllm_bench.prose import Library
    from qllm_bench.questions.facts import FAMILIES
    from qllm_bench.subject import POLICIES

    policies = arguments.choices(policy, POLICIES, "policy")
    orders = arguments.choices(order, ORDERS, "order")
    plan = bench.Plan(
        lengths=arguments.lengths(lengths),
        documents=arguments.at_least(documents, 1, "--documents"),
        needles=arguments.at_least(needles, 1, "--needles"),
        depths=arguments.at_least(depths, 1, "--depths"),
        distractors=arguments.at_least(distractors, 0, "--distractors"),
        families=arguments.choices(families, FAMILIES, "family") if families else bench.SIMPLE,
        seed=seed,
    )
    library = Library(_split(split), text)
    memory = {
        "n_init": n_init, "n_local": n_local, "block_size": block_size, "topk": topk, "query_weight": query_weight,
        "selection": selection, "summary": summary,
    }  # fmt: skip
    subject = open_subject(model, revision, device, dtype, memory)
    journal = bench.bench(subject, library, plan, policies, cast("list[Order]", orders), out)
    show(journal.path)


@app.command()
def policies(
    model: Model = "reader",
    revision: Revision = None,
    sweep: Annotated[str, typer.Option(help=f"What to vary, with commas: {', '.join(SWEEPS)}; or all.")] = "all",
    setting: Annotated[
        list[str] | None,
        typer.Option(
            help="A further setting, e.g. query_weight=2,summary=mean,policy=infllm,order=last; may be repeated."
        ),
    ] = None,
    tokens: Annotated[str, typer.Option(help="Prompt length in tokens, e.g. 4k.")] = "4k",
    order: Annotated[str, typer.Option(help="Where the question stands: first, last or both.")] = "both",
    families: Annotated[str, typer.Option(help="Families of facts with commas, or all.")] = "",
    documents: Annotated[int, typer.Option(help="Documents per split.")] = 8,
    needles: Annotated[int, typer.Option(help="Facts asked for in each document.")] = 4,
    distractors: Annotated[int, typer.Option(help="Further facts of the same kind per fact asked for.")] = 2,
    text: Text = None,
    split: Annotated[str, typer.Option(help="development, test, or both with a comma.")] = "development,test",
    seed: Seed = 0,
    out: Out = Path("bench-results"),
    n_init: NInit = None,
    n_local: NLocal = None,
    block_size: BlockSize = None,
    topk: TopK = None,
    query_weight: Weight = None,
    selection: SelectionName = None,
    summary: SummaryName = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
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
    [place] = arguments.choices(order, ORDERS, "order")[:1]
    plan = questions.Plan(
        lengths=lengths,
        documents=arguments.at_least(documents, 1, "--documents"),
        needles=arguments.at_least(needles, 1, "--needles"),
        depths=5,
        distractors=arguments.at_least(distractors, 0, "--distractors"),
        families=arguments.choices(families, FAMILIES, "family") if families else questions.SIMPLE,
        seed=seed,
    )
    libraries = [Library(cast("Split", name), text) for name in arguments.choices(split, SPLITS, "split")]
    memory = {
        "n_init": n_init, "n_local": n_local, "block_size": block_size, "topk": topk, "query_weight": query_weight,
        "selection": selection, "summary": summary,
    }  # fmt: skip
    subject = open_subject(model, revision, device, dtype, memory)
    sweeps = settings_of(subject, chosen, cast("Order", place), setting or ())
    if not sweeps:
        raise InvalidRequestError("Nothing to compare; give --sweep or --setting.")
    show(bench.bench(subject, libraries, plan, sweeps, out).path)


@app.command()
def speed(
    model: Annotated[
        str,
        typer.Option(help="random, random-1b, random-8b (Llamas of random weights), reader, a folder, or a hub id."),
    ] = "random",
    lengths: Annotated[str, typer.Option(help="Tokens read, e.g. 32k,128k.")] = "8k,32k",
    policy: Annotated[
        str, typer.Option(help=f"With commas: {', '.join(SPEED_POLICIES)}; or all. sdpa is transformers as it comes.")
    ] = "all",
    sdpa_up_to: Annotated[
        str, typer.Option(help="Longest text for dense attention (its time grows quadratically).")
    ] = "32k",
    steps: Annotated[int, typer.Option(help="Decode steps; the median counts.")] = 32,
    repeats: Annotated[int, typer.Option(help="Measurements of each kind; the median counts.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    out: Out = Path("bench-results"),
    n_init: NInit = None,
    n_local: NLocal = None,
    block_size: BlockSize = None,
    topk: TopK = None,
    query_weight: Weight = None,
    selection: SelectionName = None,
    summary: SummaryName = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Measure reading, writing, a second question and memory against stock attention, each in a process of its own."""
    arguments.need("matplotlib")
    chosen = arguments.choices(policy, SPEED_POLICIES, "policy")
    wanted = arguments.lengths(lengths)
    [longest] = arguments.lengths(sdpa_up_to)[:1]
    for value, name in ((steps, "--steps"), (repeats, "--repeats"), (threads, "--threads")):
        arguments.at_least(value, 1, name)
    from qllm_bench import speed as bench
    from qllm_bench.subject import changed

    memory = {
        "n_init": n_init, "n_local": n_local, "block_size": block_size, "topk": topk, "query_weight": query_weight,
        "selection": selection, "summary": summary,
    }  # fmt: skip
    place, base = bench.resolve(model, device, dtype)
    base = changed(base, {name: value for name, value in memory.items() if value is not None})
    journal = bench.bench(
        model, wanted, chosen, base,
        device=place, dtype=dtype, steps=steps, threads=threads, repeats=repeats, stock_up_to=longest, out=out,
    )  # fmt: skip
    show(journal.path)


def _split(name: str) -> Split:
    return cast("Split", arguments.choices(name, SPLITS, "split")[0])


def open_subject(model: str, revision: str | None, device: str, dtype: str, memory: dict[str, Any]) -> Subject:
    """The model under test with the memory settings that were given."""
    from transformers.utils import logging

    from qllm_bench.subject import Subject

    logging.disable_progress_bar()
    changes = {name: value for name, value in memory.items() if value is not None}
    return Subject(model, revision, device, dtype, changes)


def show(path: Path) -> None:
    """Print the tables of a benchmark and where everything is."""
    print(path.with_suffix(".md").read_text(encoding="utf-8"))
    made = sorted(str(p) for p in path.parent.glob(f"{path.stem}*") if p.suffix in (".json", ".jsonl", ".md", ".png"))
    print("Written: " + ", ".join(made), flush=True)


# Commands with files of their own; they need the options above.
from qllm_bench import infinite_command as _infinite  # noqa: E402, F401
from qllm_bench import rag_command as _rag  # noqa: E402, F401
