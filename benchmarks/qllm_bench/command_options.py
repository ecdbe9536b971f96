"""The options that the commands of `qllm bench` share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from qllm_bench import arguments
from qllm_runtime.command_options import quiet
from qllm_runtime.config import Selection, Summary

if TYPE_CHECKING:
    from qllm_bench.prose import Split
    from qllm_bench.subject import Order, Subject

ORDERS = ("first", "last", "both", "reread", "both-reread")
SPLITS = ("development", "test")

Families = Annotated[str, typer.Option(help="Families of facts with commas, or all; by default those with one value.")]
OrderName = Annotated[
    str,
    typer.Option(
        "--order",
        help="Where the question stands: first, last (mode read_once), both (query_aware); (both-)reread: passages again.",
    ),
]
Needles = Annotated[int, typer.Option(help="Facts asked for in each document.")]
Distractors = Annotated[int, typer.Option(help="Further facts of the same kind per fact asked for.")]
Policies = Annotated[
    str,
    typer.Option("--policy", help="Policies with commas: qllm, infllm, streaming, lm-infinite, full, oracle; or all."),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of documents and facts.")]
SplitName = Annotated[str, typer.Option("--split", help="development or test documents.")]
Text = Annotated[
    Path | None, typer.Option(help="Folder of .txt books to hide facts in; by default stories are made on the spot.")
]


@dataclass(frozen=True)
class MemoryOptions:
    """Memory settings, device and folder of results; what each one does stands in its help."""

    n_init: Annotated[int | None, typer.Option(min=0, help="Initial tokens that stay visible.")] = None
    n_local: Annotated[int | None, typer.Option(min=1, help="Local window in tokens.")] = None
    block_size: Annotated[int | None, typer.Option(min=1, help="Tokens of a memory block.")] = None
    topk: Annotated[int | None, typer.Option("--topk", min=1, help="Blocks looked up at a time.")] = None
    query_weight: Annotated[float | None, typer.Option(min=0, help="Weight of the question in a lookup.")] = None
    selection: Annotated[Selection | None, typer.Option(help="Blocks chosen per layer or per key/value head.")] = None
    summary: Annotated[Summary | None, typer.Option(help="What represents a block in a lookup.")] = None
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    dtype: Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")] = "auto"
    out: Annotated[Path, typer.Option(help="Folder of results; a run that was interrupted goes on there.")] = Path(
        "bench-results"
    )

    @property
    def changes(self) -> dict[str, Any]:
        """The memory settings that were given."""
        names = [field.name for field in fields(MemoryOptions)][:7]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class ModelOptions(MemoryOptions):
    """The same, and the model under test."""

    model: Annotated[str, typer.Option(help="reader, reader-plain, a folder, or a Hugging Face hub id.")] = "reader"
    revision: Annotated[str | None, typer.Option(help="Revision on the hub.")] = None

    def open(self) -> Subject:
        """Load the model under test."""
        quiet()
        from qllm_bench.subject import Subject

        return Subject(self.model, self.revision, self.device, self.dtype, self.changes)


def one_order(text: str) -> Order:
    """The place of the question, checked."""
    return cast("Order", arguments.one(text, ORDERS, "order"))


def one_split(text: str) -> Split:
    """The split of the documents, checked."""
    return cast("Split", arguments.one(text, SPLITS, "split"))


def orders(text: str) -> list[Order]:
    """Places of the question, checked."""
    return cast("list[Order]", arguments.choices(text, ORDERS, "order"))


def splits(text: str) -> list[Split]:
    """Splits of the documents, checked."""
    return cast("list[Split]", arguments.choices(text, SPLITS, "split"))


def show(path: Path) -> None:
    """Print the tables of a benchmark and where everything is; ``path`` is its journal."""
    print(path.with_suffix(".md").read_text(encoding="utf-8"))
    made = sorted(str(p) for p in path.parent.glob(f"{path.stem}*") if p.suffix in (".json", ".jsonl", ".md", ".png"))
    print("Written: " + ", ".join(made), flush=True)
