"""Thoughts of reasoning models: what they write between two marks ahead of the answer, kept apart from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor

from qllm_runtime.decoding import TextStream
from qllm_runtime.grammar import GrammarProcessor

#: Pairs of marks, each a token of its own in the vocabulary of the models that use them.
MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>"))
#: With a limit below this, answers of models that can do without a thought are written without one.
ROOM_FOR_THOUGHTS = 96
_TAIL = 8  # tokens of a generation prompt that may hold marks


@dataclass(frozen=True)
class Marks:
    """Tokens between which a model thinks."""

    begin: int
    end: int


def marks_of(tokenizer: Any) -> Marks | None:
    """The marks a tokenizer knows; None for models that do not think."""
    known = tokenizer.get_added_vocab() if hasattr(tokenizer, "get_added_vocab") else {}
    for begin, end in MARKS:
        if begin in known and end in known:
            return Marks(int(known[begin]), int(known[end]))
    return None


def opening(prompt: Sequence[int], marks: Marks) -> bool | None:
    """Whether the answer to a prompt begins within a thought (True), may not begin with one (False), or may (None)."""
    for token in reversed([int(token) for token in prompt[-_TAIL:]]):
        if token in (marks.begin, marks.end):
            return token == marks.begin
    return None


def apart(
    tokenizer: Any,
    max_tokens: int,
    processors: Sequence[LogitsProcessor],
    template_kwargs: Mapping[str, Any] | None,
) -> tuple[tuple[LogitsProcessor, ...], Mapping[str, Any] | None]:
    """Processors and template variables of a request whose model may think: no grammar in thoughts, no thought without room."""
    marks = marks_of(tokenizer)
    if marks is None:
        return tuple(processors), template_kwargs
    if max_tokens < ROOM_FOR_THOUGHTS:
        template_kwargs = {"enable_thinking": False, **(template_kwargs or {})}
    return tuple(AfterThought(p, marks) if isinstance(p, GrammarProcessor) else p for p in processors), template_kwargs


class AnswerStream:
    """Tokens to text as they come, thoughts apart from the answer.

    Args:
        tokenizer: Decodes the tokens.
        stop: Strings that end the answer; a thought may hold them.
        marks: Between which the model thinks, if it does.
        thinking: Whether the first token belongs to a thought.
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str] = (), marks: Marks | None = None, thinking: bool = False
    ) -> None:
        self._tokenizer, self._marks = tokenizer, marks
        self._answer = TextStream(tokenizer, stop)
        self._thought = TextStream(tokenizer) if thinking else None
        self._fresh = False  # a thought has just ended, and no text of the answer has come yet

    @property
    def thinking(self) -> bool:
        """Whether the next token belongs to a thought."""
        return self._thought is not None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the answer."""
        return self._answer.stopped

    def push(self, token: int) -> tuple[str, str]:
        """The thought and the text that are certain after this token."""
        if self._marks is not None and token in (self._marks.begin, self._marks.end):
            ended = self._thought.finish() if self._thought is not None else ""
            self._thought = TextStream(self._tokenizer) if token == self._marks.begin else None
            self._fresh = True
            return ended, ""
        if self._thought is not None:
            return self._thought.push(token), ""
        return "", self._lead(self._answer.push(token))

    def finish(self) -> tuple[str, str]:
        """What is held back so far, of a thought that was cut off and of the answer."""
        return "" if self._thought is None else self._thought.finish(), self._lead(self._answer.finish())

    def _lead(self, text: str) -> str:
        """Text without the white space that parts it from a thought."""
        if self._fresh:
            text = text.lstrip()
            self._fresh = not text
        return text


class AfterThought(LogitsProcessor):  # type: ignore[misc]
    """Holds the answer to a grammar, but not the thought ahead of it.

    Args:
        grammar: Masks the scores of the answer.
        marks: Between which the model thinks.
    """

    def __init__(self, grammar: LogitsProcessor, marks: Marks) -> None:
        self._grammar, self._marks = grammar, marks
        self._may_begin = True
        self._answer_from: int | None = 0

    def prompted(self, opened: bool | None) -> None:
        """Tell how the prompt ends, see `opening`; before the first token."""
        self._may_begin = opened is None
        self._answer_from = None if opened else 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask `scores` [1, vocab] given the tokens generated so far, `input_ids` [1, n]."""
        written = input_ids[0].tolist()
        if self._may_begin and written == [self._marks.begin]:
            self._answer_from = None
        if self._answer_from is None:
            if self._marks.end not in written:
                return scores
            self._answer_from = written.index(self._marks.end) + 1
        masked: torch.Tensor = self._grammar(input_ids[:, self._answer_from :], scores)
        if self._may_begin and not written:
            masked[0, self._marks.begin] = scores[0, self._marks.begin]
        return masked
