"""Jobs done one after another, those done before left out."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qllm_bench.journal import Journal
from qllm_bench.progress import Bar, bar
from qllm_runtime.types import Progress

Label = str | int | float | bool | None


@dataclass(frozen=True)
class Job:
    """One case under one setting: the unit of resuming.

    Attributes:
        key: Names it permanently within its benchmark: everything that changes its result and isn't in the journal's subject.
        labels: Columns its row can be grouped by.
        tokens: Tokens it will read, about; for the progress bar.
        work: Does it and returns further columns; called with a function to report (tokens read, tokens in all) to.
    """

    key: str
    labels: Mapping[str, Label]
    tokens: int
    work: Callable[[Progress], Mapping[str, Any]]


def run(journal: Journal, jobs: Sequence[Job]) -> None:
    """Do the jobs whose keys the journal doesn't hold; each row is on disk before the next job begins.

    Ctrl-C (or any error) loses the job under way and nothing else.

    Raises:
        ValueError: Two jobs have the same key.
    """
    twice = [key for key, count in Counter(job.key for job in jobs).items() if count > 1]
    if twice:
        raise ValueError(f"two jobs are called {twice[0]!r}")
    left = [job for job in jobs if job.key not in journal.keys]
    if len(left) < len(jobs):
        print(f"{journal.name}: {len(jobs) - len(left)} of {len(jobs)} cases are done already.", file=sys.stderr)
    if not left:
        return
    done = 0
    try:
        with bar(journal.name, len(left), sum(job.tokens for job in left)) as shown:
            read = 0
            for job in left:
                label = " ".join(str(value) for value in job.labels.values())
                began = time.perf_counter()

                shown.show(done, read, label)
                result = job.work(_Reading(shown, done, read, job.tokens, label))
                seconds = round(time.perf_counter() - began, 3)
                journal.append({"key": job.key, **job.labels, **result, "seconds": seconds})
                done, read = done + 1, read + job.tokens
                shown.show(done, read, label)
    except BaseException:
        print(
            f"{journal.name}: stopped with {len(jobs) - len(left) + done} of {len(jobs)} cases in {journal.path}; the same "
            "command goes on from there.",
            file=sys.stderr,
        )
        raise


class _Reading:
    """The progress of one job as part of all."""

    def __init__(self, shown: Bar, done: int, read: int, share: int, label: str) -> None:
        self._shown, self._done, self._read, self._share, self._label = shown, done, read, share, label

    def __call__(self, tokens: int, total: int) -> None:
        self._shown.show(self._done, self._read + round(self._share * tokens / max(1, total)), self._label)
