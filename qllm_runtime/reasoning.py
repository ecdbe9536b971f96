"""Thoughts of reasoning models: what they write between two marks ahead of the answer, kept apart from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor

from qllm_runtime.decoding import TextStream
from qllm_runtime.grammar import GrammarProcessor
from qllm_runtime.tokenization import THOUGHT_MARKS

#: With a limit below this, and one for structured answers, a model that can do without a thought is asked to.
ROOM_FOR_THOUGHTS = 64
ROOM_AHEAD_OF_GRAMMAR = 1024


@dataclass(frozen=True)
class Marks:
    """Tokens between which a model thinks."""

    begin: int
    end: int


def marks_of(tokenizer: Any) -> Marks | None:
    """The marks a tokenizer knows; None for models that do not think."""
    known = tokenizer.get_added_vocab() if hasattr(tokenizer, "get_added_vocab") else {}
    for begin, end in THOUGHT_MARKS:
        if begin in known and end in known:
            return Marks(int(known[begin]), int(known[end]))
    return None


def opening(template: Sequence[int], marks: Marks) -> bool | None:
    """Whether an answer begins within a thought (True), may not begin with one (False), or may (None).

    Args:
        template: What the chat template wrote after the last content.
        marks: Between which the model thinks.
    """
    for token in reversed([int(token) for token in template]):
        if token in (marks.begin, marks.end):
            return token == marks.begin
    return None


def lacks_room(tokenizer: Any, max_tokens: int, processors: Sequence[LogitsProcessor]) -> bool:
    """Whether a model that thinks would have too little room for a thought and an answer."""
    held = any(isinstance(processor, GrammarProcessor) for processor in processors)
    return marks_of(tokenizer) is not None and max_tokens < (ROOM_AHEAD_OF_GRAMMAR if held else ROOM_FOR_THOUGHTS)


def after_thoughts(tokenizer: Any, processors: Sequence[LogitsProcessor]) -> tuple[LogitsProcessor, ...]:
    """The processors of a request, those of grammars without effect on thoughts."""
    marks = marks_of(tokenizer)
    return tuple(
        AfterThought(processor, marks) if marks is not None and isinstance(processor, GrammarProcessor) else processor
        for processor in processors
    )


class AnswerStream:
    """Tokens to text as they come, thoughts apart from the answer.

    A thought stands ahead of the answer; marks elsewhere are text like any other.

    Args:
        tokenizer: Decodes the tokens.
        stop: Strings that end the answer; a thought may hold them.
        marks: Between which the model thinks, if it does.
        thinking: Whether the first token belongs to a thought.
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str] = (), marks: Marks | None = None, thinking: bool = False
    ) -> None:
        self._marks = marks
        self._answer, self._thought = TextStream(tokenizer, stop), TextStream(tokenizer)
        self._thought.lead()
        self._gap = ""  # white space that belongs to the thought if it goes on
        self._may_begin = marks is not None and not thinking
        self.thinking = thinking

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the answer."""
        return self._answer.stopped

    def push(self, token: int) -> tuple[str, str]:
        """The thought and the text that are certain after this token."""
        if self.thinking:
            if self._marks is None or token != self._marks.end:
                return self._think(self._thought.push(token)), ""
            self.thinking = False
            self._answer.lead()
            return self._think(self._thought.finish()), ""
        if self._may_begin and self._marks is not None and token == self._marks.begin:
            self.thinking, self._may_begin = True, False
            return "", ""
        text = self._answer.push(token)
        self._may_begin = self._may_begin and not text.strip()
        return "", text

    def finish(self) -> tuple[str, str]:
        """What is held back so far, of a thought that was cut off and of the answer."""
        return self._think(self._thought.finish()) if self.thinking else "", self._answer.finish()

    def _think(self, text: str) -> str:
        """A piece of the thought, white space at the end held back."""
        text = self._gap + text
        kept = text.rstrip()
        self._gap = text[len(kept) :]
        return kept


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
        if self._may_begin and not written and int(scores.argmax()) == self._marks.begin:
            masked[0, self._marks.begin] = scores[0, self._marks.begin]
        return masked
