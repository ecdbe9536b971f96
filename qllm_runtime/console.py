"""What the command line shows: progress on stderr, answers and passages on stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qllm_runtime.documents import page_span
from qllm_runtime.types import Answer, Document, Piece, Progress, Source

#: What the embedded readers say of a question that the text does not answer.
REFUSAL = "The text does not say."
_SHOWN = 320  # characters of a passage that are printed; --json and /sources have all of it


@contextmanager
def reading(what: str = "Reading", unit: str = "tokens") -> Iterator[Progress]:
    """A bar on stderr, or a line every tenth of the way where stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield _Lines(what, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn(what),
        BarColumn(bar_width=None),
        TextColumn(f"{{task.completed:,.0f}}/{{task.total:,.0f}} {unit} {{task.fields[speed]}}"),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        task: Any = None

        def show(done: int, total: int) -> None:
            nonlocal task
            if task is None:
                task = bars.add_task("", total=total, speed="")
            speed = bars.tasks[0].finished_speed or bars.tasks[0].speed
            bars.update(task, completed=done, total=total, speed=f"{speed:,.0f}/s" if speed else "")

        yield show


class _Lines:
    def __init__(self, what: str, unit: str) -> None:
        self._what, self._unit = what, unit
        self._next = 0.0

    def __call__(self, done: int, total: int) -> None:
        if total and self._next < 2.0 and done >= min(self._next, 1.0) * total:
            print(f"{self._what}: {done:,}/{total:,} {self._unit}", file=sys.stderr, flush=True)
            self._next = done / total + 0.1 if done < total else 2.0


def write_stream(start: Callable[[Progress], Iterator[Piece]]) -> Answer:
    """Print an answer as it comes, the bar until its first words; returns the whole of it."""
    answer: Answer | None = None
    with reading() as progress:
        pieces = start(progress)
        piece = next((piece for piece in pieces if piece.text or piece.answer), None)
    while piece is not None:
        sys.stdout.write(piece.text)
        sys.stdout.flush()
        answer = piece.answer or answer
        piece = next(pieces, None)
    print(flush=True)
    assert answer is not None, "the last piece carries the answer"
    return answer


def looking_for(model: str) -> None:
    """Say that a model is looked for on the hub, which takes half a minute where the hub cannot be reached."""
    if not Path(model).expanduser().exists() and not model.startswith((".", "/", "~")):
        from huggingface_hub import constants

        if not constants.HF_HUB_OFFLINE:
            print(f"Looking for {model!r} on the Hugging Face hub ...", file=sys.stderr, flush=True)


def heading(answer: Answer) -> str:
    """What stands above the passages: those of a refusal were looked at, and are the source of nothing."""
    return "Looked at" if answer.text.strip() == REFUSAL else "Sources"


def print_sources(
    sources: Sequence[Source], documents: Sequence[Document], names: Sequence[str], *, whole: bool
) -> None:
    """Passages with their character positions; `names[i]` is what document i is called."""
    if not sources:
        print("No passage stood out.")
    for number, source in enumerate(sources, 1):
        place = f"{names[source.document]}[{source.start}:{source.end}]{_pages(documents, source)}"
        print(f"{number:3}. {place}  {100 * source.score:.0f} % of the attention")
        text = source.text.removeprefix("\ufeff")  # a byte order mark, which offsets count
        text = text if whole else " ".join(text.split())
        if not whole and len(text) > _SHOWN:
            text = text[:_SHOWN].rsplit(" ", 1)[0] + " ..."
        for line in text.splitlines():
            print(f"     {line}")
    sys.stdout.flush()


def _pages(documents: Sequence[Document], source: Source) -> str:
    span = _page_span(documents, source)
    if span is None:
        return ""
    first, last = span
    return f" page {first}" if first == last else f" pages {first}-{last}"


def _page_span(documents: Sequence[Document], source: Source) -> tuple[int, int] | None:
    starts = documents[source.document].metadata.get("page_starts")
    return page_span(starts, source.start, source.end) if starts else None


def summary(answer: Answer) -> str:
    """Tokens, speeds and peak memory in a line."""
    usage, timings = answer.usage, answer.timings
    read = usage.prompt_tokens - usage.cache_read_tokens
    parts = [f"read {read:,} tokens in {timings.read_s:.1f} s ({timings.read_tokens_per_s:,.0f} tokens/s)"]
    if usage.cache_read_tokens:
        parts.append(f"{usage.cache_read_tokens:,} tokens read before")
    if timings.reread_s:
        parts.append(f"found and read passages again in {timings.reread_s:.1f} s")
    parts.append(f"wrote {usage.completion_tokens:,} ({timings.decode_tokens_per_s:,.0f} tokens/s)")
    parts.append(f"peak memory {timings.peak_memory_bytes / 2**20:,.0f} MiB")
    if answer.finish_reason == "length":
        parts.append("stopped at --max-tokens")
    return " | ".join(parts)


def as_json(
    answer: Answer, documents: Sequence[Document], names: Sequence[str], model: str, policy: str
) -> dict[str, Any]:
    """The object that `qllm ask --json` prints."""
    sources = [
        {
            "document": names[source.document],
            "pages": _page_span(documents, source),
            "start": source.start,
            "end": source.end,
            "score": source.score,
            "text": source.text,
        }
        for source in answer.sources
    ]
    usage = {**asdict(answer.usage), "total_tokens": answer.usage.total_tokens}
    return {
        "answer": answer.text,
        "sources": sources,
        "query_source": answer.query_source,
        "usage": usage,
        "timings": asdict(answer.timings),
        "finish_reason": answer.finish_reason,
        "mode": answer.mode,
        "reread": answer.reread,
        "model": model,
        "policy": policy,
    }
