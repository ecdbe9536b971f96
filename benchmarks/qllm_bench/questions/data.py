"""Documents: prose with facts hidden in it, for training and for benchmarks. Needs no torch."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qllm_bench.questions.facts import (
    WORDED_FAMILIES,
    FactMaker,
    FactSet,
    Question,
    in_json,
    merge,
)
from qllm_bench.questions.pools import Pools
from qllm_bench.questions.worded import Worded

HELD_OUT = ("dracula", "emma", "the-war-of-the-worlds")
SENTENCE_END = re.compile(r'(?<=[.!?;])["”’)]*\s+|\n\n+')


@dataclass(frozen=True)
class Prose:
    """Prose cut at its sentence ends.

    Attributes:
        text: The prose.
        cuts: Offsets in ``text`` at which a sentence starts, increasing; the first is 0, the last its length.
    """

    text: str
    cuts: tuple[int, ...]

    @classmethod
    def of(cls, text: str) -> Prose:
        """Find the sentences of a text."""
        cuts = sorted({0, len(text), *(m.end() for m in SENTENCE_END.finditer(text))})
        return cls(text, tuple(cuts))

    def sentences(self, rng: random.Random, n_chars: int) -> list[str]:
        """Consecutive sentences from a random start, ``n_chars`` in all or a little more; wraps at the end."""
        out: list[str] = []
        i, total = rng.randrange(max(1, len(self.cuts) - 1)), 0
        while total < n_chars:
            piece = self.text[self.cuts[i] : self.cuts[i + 1]]
            out.append(piece)
            total += len(piece)
            i = (i + 1) % (len(self.cuts) - 1)
        return out


def read_books(folder: Path, held_out: bool) -> dict[str, str]:
    """Texts of a folder: those held out for evaluation, or all others; line ends made uniform."""
    books = {}
    for path in sorted(folder.glob("*.txt")):
        if (path.stem in HELD_OUT) == held_out:
            books[path.stem] = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n").strip()
    return books


def unwrap(text: str) -> str:
    """Join the lines of each paragraph."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text)


def common_words(texts: Sequence[str], least: int = 3) -> list[str]:
    """Lower-case words of 4 to 9 letters that occur ``least`` times or more, sorted."""
    counts: dict[str, int] = {}
    for text in texts:
        for word in re.findall(r"\b[a-z]{4,9}\b", text):
            counts[word] = counts.get(word, 0) + 1
    return sorted(w for w, n in counts.items() if n >= least)


def weave(
    rng: random.Random,
    sentences: Sequence[str],
    statements: Sequence[str],
    depths: Sequence[float] | None = None,
    own_line: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """Insert statements between sentences.

    Args:
        rng: Source of the places when ``depths`` is omitted.
        sentences: Prose, each piece with the white space that follows it.
        statements: What to insert.
        depths: Where, from 0 (start) to 1 (end), one per statement.
        own_line: Give each statement its own line; JSON entries always have one.

    Returns:
        The document and the character span of each statement.
    """
    at = [rng.random() for _ in statements] if depths is None else list(depths)
    total = sum(map(len, sentences))
    order = sorted(range(len(statements)), key=lambda i: at[i])
    spans = [(0, 0)] * len(statements)
    parts: list[str] = []
    length, prose, queue = 0, 0, 0

    def add(part: str) -> None:
        nonlocal length
        parts.append(part)
        length += len(part)

    for i in range(len(sentences) + 1):
        while queue < len(order) and (i == len(sentences) or prose >= at[order[queue]] * total):
            n = order[queue]
            own = own_line or in_json(statements[n])
            if parts and not parts[-1][-1:].isspace():
                add("\n" if own else " ")
            elif own and parts and not parts[-1].endswith("\n"):
                add("\n")
            spans[n] = (length, length + len(statements[n]))
            add(statements[n])
            add("\n" if own else " ")
            queue += 1
        if i < len(sentences):
            add(sentences[i])
            prose += len(sentences[i])
    return "".join(parts).rstrip(), spans


@dataclass(frozen=True)
class Case:
    """A document with one question about it.

    Attributes:
        document: The text.
        question: The question.
        answer: The expected answer.
        values: Values the answer must hold; empty when the fact is absent.
        family: Family of the question.
        spans: Character spans in ``document`` of the statements the answer rests on.
    """

    document: str
    question: str
    answer: str
    values: tuple[str, ...]
    family: str
    spans: tuple[tuple[int, int], ...]


def make_facts(
    maker: FactMaker, family: str, distractors: int, one_template: bool, short: bool | None
) -> tuple[FactSet, Question]:
    """Facts for one question of a family among ``distractors`` like it; returns the set and the question."""
    rng = maker.rng
    if family in WORDED_FAMILIES:
        return worded_facts(Worded(maker.pools), family, distractors, one_template, short)
    if family == "multi":
        facts = maker.multi(rng.randint(2, 4), distractors, short)
    elif family == "two_hop":
        facts = maker.two_hop(1 + distractors, short)
    elif family == "absent":
        kind = rng.choice(("magic", "attribute", "kv", "place", "job", "code", "relation"))
        facts = maker.simple(kind, max(1, distractors), one_template, absent=1, short=short)
        return facts, facts.questions[-1]
    elif family == "passkey":
        facts = maker.simple(family, 1, one_template, short=short)
        if distractors:
            others = maker.simple(rng.choice(("magic", "attribute", "code")), distractors, one_template, short=short)
            facts = merge([facts, others])
    else:
        facts = maker.simple(family, 1 + distractors, one_template, short=short)
    return facts, facts.questions[0]


def worded_facts(
    worded: Worded, family: str, distractors: int, one_template: bool, short: bool | None
) -> tuple[FactSet, Question]:
    """Facts for one question in wordings of one side only; returns the set and the question."""
    rng = worded.rng
    while True:
        if family == "worded_multi":
            facts = worded.multi(rng.randint(2, 4), distractors, short)
        elif family == "worded_two_hop":
            facts = worded.two_hop(1 + distractors, short)
        else:
            facts = worded.simple(1 + distractors, one_template, int(family == "worded_absent"), short)
        wanted = "absent" if family == "worded_absent" else family
        found = [q for q in facts.questions if q.family == wanted]
        if found:
            return facts, replace(rng.choice(found), family=family)


def make_case(
    rng: random.Random,
    prose: Prose,
    n_chars: int,
    family: str,
    distractors: int = 3,
    depth: float | None = None,
    *,
    one_template: bool = False,
    canonical: bool = False,
    short: bool | None = None,
    evaluation: bool = True,
) -> Case:
    """Hide a fact in prose and ask for it.

    Args:
        rng: Source of all randomness; the same state makes the same case.
        prose: Prose to hide it in.
        n_chars: Characters of prose, about.
        family: One of ``FAMILIES`` or ``WORDED_FAMILIES`` of ``qllm_bench.questions.facts``.
        distractors: Facts of the same kind about other subjects, placed at random.
        depth: Place of the (first) fact asked for, 0 to 1; random when omitted.
        one_template: State the fact and its distractors in the same words.
        canonical: State facts in the first way of their relation, RULER's for magic numbers; questions still vary.
        short: Ask for the value only, or not; drawn when omitted.
        evaluation: Draw names, words and numbers from the evaluation side.
    """
    maker = FactMaker(Pools(rng, evaluation))
    maker.canonical = canonical
    facts, question = make_facts(maker, family, distractors, one_template, short)
    depths = [rng.random() for _ in facts.statements]
    if depth is not None and question.needs:
        depths[question.needs[0]] = depth
    own_line = rng.random() < 0.1
    document, spans = weave(rng, prose.sentences(rng, n_chars), facts.statements, depths, own_line)
    needed = tuple(spans[i] for i in question.needs)
    return Case(document, question.text, question.answer, question.values, question.family, needed)


def normalise(text: str) -> str:
    """White space made single, the final period and outer quotes dropped."""
    return re.sub(r"\s+", " ", text).strip().rstrip(".").strip().strip('"').strip()


def is_exact(output: str, answer: str, values: Sequence[str]) -> bool:
    """The exact-match rule.

    The output equals the expected answer up to white space, final period and outer quotes; or it is no longer than
    twice the expected answer and the expected values, in any order, are the only way it differs from a restatement:
    each value stands in it whole (with a capital where a sentence starts), and it doesn't claim the fact is absent.
    """
    got, want = normalise(output), normalise(answer)
    if got == want:
        return True
    if not values or "text does not say" in got or len(got) > 2 * len(want) + 20:
        return False
    return all(re.search(rf"(?<![\w-])(?i:{re.escape(v[:1])}){re.escape(v[1:])}(?![\w-])", got) for v in values)
