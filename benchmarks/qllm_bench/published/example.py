"""One question of a published benchmark, and rows of its files read with checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qllm_runtime.errors import QLLMError


class DatasetError(QLLMError, ValueError):
    """A file of a benchmark is missing, or holds something else than its published form."""


@dataclass(frozen=True)
class Example:
    """One question with the text it is about.

    Attributes:
        task: Name of the task.
        instruction: What the published prompt says ahead of the text, to stand there as system text; "" for nothing.
        document: The text.
        closing: What the published prompt says after the text; holds the question.
        question: The part of `closing` that routes the lookup.
        answers: Accepted answers, or all parts of the answer, as the metric takes them.
        max_tokens: Longest answer, in tokens.
        labels: Every label there is, for metrics of classification.
        leads: Whether `question` says what is asked when it stands ahead of the text; not where the task asks nothing but what
            the instruction says, and `question` is the end of the prompt ("Summary:").
    """

    task: str
    instruction: str
    document: str
    closing: str
    question: str
    answers: tuple[str, ...]
    max_tokens: int
    labels: tuple[str, ...] = ()
    leads: bool = True

    def tokens(self, count: Callable[[str], int]) -> int:
        """Tokens of the prompt but for the template; the question counts twice, as it may stand ahead of the text, too."""
        return sum(map(count, (self.instruction, self.document, self.closing, self.question)))


#: Share of the answer that is right, 0 to 1.
Metric = Callable[[str, Example], float]


@dataclass(frozen=True)
class Task:
    """A task of a suite.

    Attributes:
        name: Its name in the published files.
        title: Its name in the paper.
        template: The published prompt with its fields in braces; `{context}` is the text.
        metric: The published metric.
        max_tokens: Published limit of generated tokens.
    """

    name: str
    title: str
    template: str
    metric: Metric
    max_tokens: int

    def example(
        self,
        document: str,
        question: str,
        answers: Sequence[str],
        *,
        fields: Mapping[str, str],
        labels: Sequence[str] = (),
        max_tokens: int | None = None,
    ) -> Example:
        """Fill the template.

        Args:
            document: The text at `{context}`.
            question: What routes the lookup; the whole closing text, or the instruction, when empty.
            answers: Accepted answers.
            fields: The other fields of the template.
            labels: Every label there is.
            max_tokens: Where the published limit does not suit the tokenizer.
        """
        before, _, after = self.template.partition("{context}")
        instruction, closing = before.format(**fields).strip(), after.format(**fields).strip()
        leads = bool(question.strip()) or not closing
        if not closing:
            instruction, closing = "", instruction
        return Example(
            task=self.name,
            instruction=instruction,
            document=document,
            closing=closing,
            question=question.strip() or closing,
            answers=tuple(answers),
            max_tokens=max_tokens or self.max_tokens,
            labels=tuple(labels),
            leads=leads,
        )


@dataclass(frozen=True)
class Row:
    """A row of a file.

    Attributes:
        values: Its fields.
        where: File and line, for errors.
    """

    values: Mapping[str, Any]
    where: str

    def _get(self, field: str) -> Any:
        if field not in self.values:
            has = ", ".join(map(repr, sorted(self.values))) or "none"
            raise DatasetError(f"{self.where}: field {field!r} is missing (fields: {has}).")
        return self.values[field]

    def text(self, field: str) -> str:
        """A field that holds text.

        Raises:
            DatasetError: It is missing or something else.
        """
        value = self._get(field)
        if not isinstance(value, str):
            raise DatasetError(f"{self.where}: field {field!r} holds {_kind(value)} where text is expected.")
        return value

    def document(self, field: str) -> str:
        """A field that holds text with more than white space.

        Raises:
            DatasetError: It is missing, blank or something else.
        """
        text = self.text(field)
        if not text.strip():
            raise DatasetError(f"{self.where}: field {field!r}, the text the question is about, is empty.")
        return text

    def numbers(self, field: str, kind: type[int] | type[float] = int) -> tuple[str, ...]:
        """A field that holds a number or a list of them, as they are written.

        Args:
            field: Its name.
            kind: Whether they are whole.

        Raises:
            DatasetError: It is missing, empty or something else.
        """
        found = self.texts(field)
        for text in found:
            try:
                good = math.isfinite(kind(text))
            except (ValueError, OverflowError):
                good = False
            if not good:
                what = "whole numbers" if kind is int else "numbers"
                raise DatasetError(f"{self.where}: field {field!r} holds {text[:40]!r}, the task's answers are {what}.")
        return found

    def flat(self, field: str) -> Row:
        """The row with a list of lists in a field as one list; any other value stays as it is."""
        value = self.values.get(field)
        if not isinstance(value, list) or not all(isinstance(item, list) for item in value):
            return self
        return replace(self, values={**self.values, field: [item for part in value for item in part]})

    def texts(self, field: str) -> tuple[str, ...]:
        """A field that holds a text or number, or a list of them; never empty.

        Raises:
            DatasetError: It is missing, empty or something else.
        """
        value = self._get(field)
        items = list(value) if isinstance(value, list | tuple) else [value]
        for item in items:
            if isinstance(item, bool) or not isinstance(item, str | int | float):
                raise DatasetError(
                    f"{self.where}: field {field!r} holds {_kind(item)} where text, a number or a list of them is expected."
                )
        if not items:
            raise DatasetError(f"{self.where}: field {field!r} is an empty list.")
        return tuple(map(str, items))


def _kind(value: Any) -> str:
    kinds = {
        dict: "an object",
        list: "a list",
        bool: "true or false",
        type(None): "null",
        int: "a number",
        float: "a number",
    }
    return kinds.get(type(value), type(value).__name__)
