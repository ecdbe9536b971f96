"""What a benchmark shows while it runs, on stderr: cases, tokens, speed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

_EVERY = 15.0  # seconds between lines where stderr is not a terminal


class Bar(Protocol):
    """Where progress is shown."""

    def show(self, case: int, tokens: int, label: str) -> None:
        """``case`` cases are done and ``tokens`` tokens read in all; ``label`` says what is under way."""


@contextmanager
def bar(title: str, cases: int, tokens: int) -> Iterator[Bar]:
    """A bar on a terminal, else a line now and then.

    Args:
        title: Name of the benchmark.
        cases: Cases to do.
        tokens: Tokens they will read, about.
    """
    if not sys.stderr.isatty():
        yield _Lines(title, cases, tokens)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[case]}/{task.fields[cases]} cases, {task.completed:,.0f}/{task.total:,.0f} tokens"),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[label]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(title, total=tokens, case=0, cases=cases, label="", speed="")
        yield _Rich(bars, task)


class _Rich:
    def __init__(self, bars: Any, task: Any) -> None:
        self._bars, self._task = bars, task

    def show(self, case: int, tokens: int, label: str) -> None:
        speed = self._bars.tasks[0].speed
        text = f"{speed:,.0f} tokens/s" if speed else ""
        self._bars.update(self._task, completed=tokens, case=case, label=label, speed=text)


class _Lines:
    def __init__(self, title: str, cases: int, tokens: int) -> None:
        self._title, self._cases, self._tokens = title, cases, tokens
        self._began = time.monotonic()
        self._next = self._began

    def show(self, case: int, tokens: int, label: str) -> None:
        now = time.monotonic()
        if now < self._next and case < self._cases:
            return
        self._next = now + _EVERY
        speed = tokens / max(now - self._began, 1e-9)
        print(
            f"{self._title}: {case}/{self._cases} cases, {tokens:,}/{self._tokens:,} tokens, {speed:,.0f} tokens/s {label}",
            file=sys.stderr,
            flush=True,
        )
