"""The published suites: which tasks there are, and where their questions come from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qllm_bench.published.example import DatasetError, Example, Row, Task
from qllm_bench.published.files import hub_rows, read_rows
from qllm_runtime.errors import QLLMError

#: Tokens of a text under the tokenizer at hand.
Count = Callable[[str], int]


#: Prompts below 4,096 tokens, less those of template and separators.
_SHORT = 4_000


class LengthError(QLLMError, ValueError):
    """A length too short for a task."""


@dataclass(frozen=True)
class Rule:
    """How a synthetic task is made.

    Attributes:
        size: The largest size whose prompt fits a number of tokens is used; a size is the number of noise lines, pairs, ...
        make: Makes a question from a source of randomness, its number and a size.
        least: Smallest size that makes sense.
        brief: The same as `make` for prompts of less than 4k tokens, where that differs.
    """

    make: Callable[[random.Random, int, int], Example]
    least: int = 1
    brief: Callable[[random.Random, int, int], Example] | None = None

    def maker(self, n_tokens: int) -> Callable[[random.Random, int, int], Example]:
        """What makes a question whose prompt has this many tokens."""
        return self.brief if self.brief is not None and n_tokens < _SHORT else self.make


@dataclass(frozen=True, eq=False)
class Suite:
    """A published benchmark.

    Attributes:
        name: Its name on the command line.
        title: Its name and paper.
        tasks: Its tasks by name.
        rules: The tasks that can be made by rule.
        parse: A row of a file as an example.
        file: Path of a task's file below the folder of the data; also takes the length, where files differ by it.
        hub: The same on the Hugging Face hub, as `datasets` takes it; None where nothing is published.
        by_length: Whether there is a file per length.
    """

    name: str
    title: str
    tasks: Mapping[str, Task]
    rules: Mapping[str, Rule]
    parse: Callable[[Task, Row], Example]
    file: Callable[[str, str], str]
    hub: Callable[[str, str], str] | None
    by_length: bool = False

    def read(self, task: str, length: str, folder: Path | None) -> list[Example]:
        """All questions of a task from its file.

        Args:
            task: Name of the task.
            length: Length as the files name it, e.g. "4k", for suites with a file per length.
            folder: Folder of the data; None: the hub.

        Raises:
            DatasetError: The file, a line or a field is not as published; nothing else was done by then.
        """
        if folder is not None:
            path = folder / self.file(task, length)
            if not path.is_file():
                raise DatasetError(f"{folder} has no {self.file(task, length)}, the file of {self.title} {task}.")
            rows: Iterator[Row] = read_rows(path)
        elif self.hub is not None:
            rows = hub_rows(self.hub(task, length))
        else:
            raise DatasetError(f"{self.title} publishes no files for {task}; give those you made with --data.")
        found = [self.parse(self.tasks[task], row) for row in rows]
        if not found:
            raise DatasetError(f"{self.title} {task} has no questions there.")
        return found

    def shortest(self, task: str, number: int, n_tokens: int, count: Count, seed: str = "") -> Example:
        """Question `number` of a synthetic task in its least text.

        Raises:
            LengthError: Even that is longer than `n_tokens`.
        """
        rule = self.rules[task]
        example = rule.maker(n_tokens)(random.Random(f"{self.name}-{task}-{number}-{seed}"), number, rule.least)
        tokens = example.tokens(count)
        if tokens > n_tokens:
            raise LengthError(
                f"{self.title} {task} needs at least {tokens} tokens; {n_tokens} are too few. Choose a greater length."
            )
        return example

    def make(self, task: str, number: int, n_tokens: int, count: Count, seed: str = "") -> Example:
        """Question `number` of a synthetic task, its prompt filling `n_tokens` tokens as far as whole parts allow.

        The question counts twice: the paper's layout has it ahead of the text as well.

        Raises:
            LengthError: `n_tokens` is too short for the task.
        """
        rule = self.rules[task]
        make = rule.maker(n_tokens)

        def build(size: int) -> Example:
            return make(random.Random(f"{self.name}-{task}-{number}-{seed}"), number, size)

        def tokens(size: int) -> int:
            return build(size).tokens(count)

        size = largest(tokens, n_tokens, rule.least)
        if size is None:
            return self.shortest(task, number, n_tokens, count, seed)
        return build(size)


def largest(tokens: Callable[[int], int], limit: int, least: int) -> int | None:
    """The largest size found whose text has at most `limit` tokens; None when not even `least` fits.

    Texts grow almost evenly with their size, so a few counts suffice; the result is within a few parts of the limit.
    """
    base = tokens(least)
    if base > limit:
        return None
    step = 32
    each = max(0.01, (tokens(least + step) - base) / step)
    best, size = least, least + int((limit - base) / each)
    for _ in range(8):
        if size <= best:
            break
        used = tokens(size)
        if used <= limit:
            best = size
            size += int((limit - used) / each)
        else:
            size -= max(1, -int((limit - used) // each))
    return best
