"""Questions by two authors who had not seen the recipe: none of their wordings is used in training.

``development.json`` has been looked at to find out what the reader gets wrong; nobody has looked at the answers to
``test.json``.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from qllm_bench.questions.data import Case, Prose, weave
from qllm_bench.questions.facts import ABSENT

FILES = {"development": Path(__file__).parent / "development.json", "test": Path(__file__).parent / "test.json"}
# How the authors asked for the value alone.
SHORT = re.compile(r"\b(only|just|one word|short|nothing|briefly|alone|enough)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Written:
    """One question as its author wrote it.

    Attributes:
        family: What it is reported under.
        statements: The sentences its answer rests on, in the order of the text; none when the fact is absent.
        distractors: Sentences like them about something else.
        question: The question.
        answers: The values an answer must hold.
    """

    family: str
    statements: tuple[str, ...]
    distractors: tuple[str, ...]
    question: str
    answers: tuple[str, ...]

    def case(self, rng: random.Random, prose: Prose, n_chars: int) -> Case:
        """Hide the sentences in prose of about ``n_chars`` characters."""
        told = (*self.statements, *self.distractors)
        depths = sorted(rng.random() for _ in self.statements) + [rng.random() for _ in self.distractors]
        document, spans = weave(rng, prose.sentences(rng, n_chars), told, depths)
        short = SHORT.search(self.question) is not None
        answer = (", " if short else " ").join(self.answers if short else self.statements) or ABSENT
        return Case(document, self.question, answer, self.answers, self.family, tuple(spans[: len(self.statements)]))


def read(name: str) -> list[Written]:
    """The questions of ``development`` or ``test``."""
    rows = json.loads(FILES[name].read_text(encoding="utf-8"))
    return [
        Written(r["family"], tuple(r["statements"]), tuple(r["distractors"]), r["question"], tuple(r["answers"]))
        for r in rows
    ]
