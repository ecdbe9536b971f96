"""Training samples: documents with several questions, laid out as chats and encoded."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from qllm_bench.questions.data import Prose, weave
from qllm_bench.questions.facts import FactMaker, FactSet, Question, merge
from qllm_bench.questions.pools import Pools
from qllm_bench.questions.worded import Worded
from recipes.tokenizer import ASSISTANT, BOS, END, PAD, USER, VOCABULARY
from recipes.turns import Span, token_span, turn

FAMILY_WEIGHTS = {
    "passkey": 1.2, "magic": 1.2, "attribute": 2.2, "kv": 1.2, "place": 1.2, "job": 1.6, "code": 1.0, "relation": 3.0,
    "multi": 4.6, "two_hop": 4.0,
}  # fmt: skip
# Once the others are known: what is learnt late, because it takes two steps or a value that stands ahead of its key.
LATE_WEIGHTS = {
    "passkey": 1.2, "magic": 1.0, "attribute": 2.0, "kv": 2.4, "place": 1.0, "job": 1.2, "code": 1.0, "relation": 3.5,
    "multi": 4.5, "two_hop": 5.0,
}  # fmt: skip
WORDED = 0.7  # share of the sets of facts that come from the wordings; of these, how many ask for what:
WORDED_KINDS = {"simple": 0.62, "multi": 0.14, "two_hop": 0.24}
FILLER = 0.08  # share of samples whose prose is a few short sentences said again and again
LATE_VALUE_FIRST = 0.4
LATE_PRACTICE = 0.5
TEMPTING = 0.5  # share of samples whose prose has words of the facts in it ...
MOST_TEMPTING = 0.15  # ... and the largest share of its words that are
BLOCK = 32
N_INIT = 32
MORE_SHORT = 0.4  # share of the sets of facts that are asked for the value alone throughout
# Spans of the question, of its answer and of the facts it needs.
Ask = tuple[Span, Span, list[Span]]


@dataclass(frozen=True)
class Sample:
    """One encoded sample; the fields are those of a row of :class:`Batch`, with the spans of document and facts."""

    ids: list[int]
    weights: list[float]
    value: list[int]
    families: list[str]
    asks: list[Ask]
    pinned: Span
    document: Span
    places: list[Span]


@dataclass
class Batch:
    """Encoded samples of one length.

    Attributes:
        ids: Tokens [B, T].
        positions: Positions [B, T], with gaps where prose was cut out.
        weights: Loss weight of predicting each token from those before it [B, T].
        value: Tokens that make an answer right or wrong [B, T]: the question's number from 1, else 0.
        keep: Keys that stay visible from afar [B, T].
        asks: Per sample, per question: span of the question's tokens, span of the answer's and needed document spans.
        pinned: Per sample, span of the question standing before the document; empty when it doesn't.
        families: Per sample, the family of each question.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    weights: NDArray[np.float32]
    value: NDArray[np.int64]
    keep: NDArray[np.bool_]
    asks: list[list[Ask]]
    pinned: list[Span]
    families: list[list[str]]

    @classmethod
    def empty(cls, count: int, length: int) -> Batch:
        """Padding alone; rows are added from the first on."""
        return cls(
            ids=np.full((count, length), PAD, np.int64),
            positions=np.tile(np.arange(length), (count, 1)),
            weights=np.zeros((count, length), np.float32),
            value=np.zeros((count, length), np.int64),
            keep=np.ones((count, length), np.bool_),
            asks=[],
            pinned=[],
            families=[],
        )

    def add(self, row: int, sample: Sample) -> None:
        """Add a sample as the next row."""
        n = len(sample.ids)
        self.ids[row, :n], self.weights[row, :n], self.value[row, :n] = sample.ids, sample.weights, sample.value
        self.asks.append(sample.asks)
        self.pinned.append(sample.pinned)
        self.families.append(sample.families)

    def add_repetition(self, row: int, rng: random.Random) -> None:
        """Add random tokens said twice as the next row."""
        half = (self.ids.shape[1] - 2) // 2
        run = [rng.randrange(16, VOCABULARY) for _ in range(half)]
        self.ids[row, : 2 + 2 * half] = [BOS, USER, *run, *run]
        self.weights[row, 4 + half : 2 + 2 * half] = 0.5
        self.asks.append([])
        self.pinned.append((0, 0))
        self.families.append([])

    def cut(self, row: int, sample: Sample, rng: random.Random, max_gap: int) -> None:
        """Up to three gaps in the positions of a row, as if prose had been cut out there; none inside a fact."""
        start, stop = sample.document
        for _ in range(rng.randint(1, 3)):
            at = rng.randint(start, stop)
            if not any(p < at < q for p, q in sample.places):
                self.positions[row, at:] += rng.randint(1, max_gap)

    def hide(self, row: int, sample: Sample, rng: random.Random) -> None:
        """Make most blocks of a row that hold prose alone invisible from afar."""
        start, stop = sample.document
        for s in range(N_INIT + (max(0, start - N_INIT) // BLOCK) * BLOCK, stop, BLOCK):
            clear = not any(p < s + BLOCK and q > s for p, q in sample.places)
            if s >= start and s + BLOCK <= stop and clear and rng.random() < 0.7:
                self.keep[row, s : s + BLOCK] = False


class Sampler:
    """Draws training batches.

    Args:
        seed: Seed; the same seed and calls give the same batches.
        tokenizer: The reader's tokenizer.
        prose: Prose to hide facts in.
        words: English words of the prose.
        evaluation: Draw names, words and numbers from the evaluation side.
    """

    def __init__(
        self, seed: int, tokenizer: Tokenizer, prose: Sequence[Prose], words: Sequence[str], evaluation: bool = False
    ) -> None:
        self.rng = random.Random(seed)
        self.tokenizer = tokenizer
        self.prose = prose
        self.maker = FactMaker(Pools(self.rng, evaluation, words))
        self.worded = Worded(self.maker.pools)
        self.weights = FAMILY_WEIGHTS
        self.newlines = self.encode("\n\n")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def facts(self, length: int, simple: bool = False) -> FactSet:
        """Facts and questions for a sample of ``length`` tokens; ``simple`` leaves out the hard families."""
        rng, maker = self.rng, self.maker
        budget = length * rng.uniform(0.12, 0.4)
        short = True if rng.random() < MORE_SHORT else None
        absent = 0 if simple else rng.choices((0, 1, 2), (0.35, 0.4, 0.25))[0]
        families, weights = list(self.weights), list(self.weights.values())
        if simple:
            families, weights = families[:-2], weights[:-2]
        if rng.random() < 0.4:
            if not simple and rng.random() < WORDED:
                return self.worded_facts(max(2, min(9, int(budget / 24))), True, absent, short)
            family = rng.choices(families, weights)[0]
            count = max(2, min(12, int(budget / 16)))
            if family == "multi" and rng.random() < 0.6:
                # Leaving out what was told already is learnt late; here every question asks for it.
                return merge([maker.multi(rng.randint(2, 5), 0, short) for _ in range(max(2, count // 3))])
            if family == "multi":
                return maker.multi(rng.randint(2, 5), max(1, count - 3), short)
            if family == "two_hop":
                return maker.two_hop(max(2, count // 2), short)
            return maker.simple(family, count, True, absent, short)
        sets: list[FactSet] = []
        while budget > 0:
            if not simple and rng.random() < WORDED:
                sets.append(self.worded_facts(rng.randint(1, 3), rng.random() < 0.5, absent, short))
                absent = 0
                budget -= 24 * len(sets[-1].statements)
                continue
            family = rng.choices(families, weights)[0]
            if family == "passkey" and any(q.family == family for s in sets for q in s.questions):
                continue
            if family == "multi":
                facts = maker.multi(rng.randint(2, 4), rng.randint(0, 2), short)
            elif family == "two_hop":
                facts = maker.two_hop(rng.randint(1, 2), short)
            else:
                facts = maker.simple(family, rng.randint(1, 3), False, absent, short)
            absent = 0
            sets.append(facts)
            budget -= 16 * len(facts.statements)
        return merge(sets)

    def worded_facts(self, count: int, one_template: bool, absent: int, short: bool | None) -> FactSet:
        """About ``count`` statements of one relation, or of two that make chains, from the wordings."""
        rng = self.rng
        kind = rng.choices(list(WORDED_KINDS), list(WORDED_KINDS.values()))[0]
        if kind == "multi":
            values = rng.randint(2, 4)
            return self.worded.multi(values, max(0, min(3, count - values)), short)
        if kind == "two_hop":
            return self.worded.two_hop(max(1, count // 2), short)
        return self.worded.simple(count, one_template, absent, short)

    def sample(self, length: int, simple: bool = False) -> Sample:
        """One sample of at most ``length`` tokens, but for facts that are longer by themselves."""
        rng = self.rng
        self.maker.canonical = simple
        facts = self.facts(length, simple)
        questions = list(facts.questions)
        rng.shuffle(questions)
        limit = max(1, int(length * rng.uniform(0.2, 0.7) / 32))
        questions = questions[:limit]
        own_line = rng.random() < 0.2
        ending = rng.choice((".txt", ".md", ".pdf", ".html", " " + self.maker.pools.number(1, 2)))
        title = f"[{self.maker.pools.word()}{ending}]\n"
        head = self.encode(title) if rng.random() < 0.5 else []
        pin = rng.random() < 0.45
        depths = [rng.random() for _ in facts.statements]
        turns = [turn(rng, self.tokenizer, q, depths, facts.statements) for q in questions]
        first = turns[0][0] if pin else []
        around = 8 + len(head) + len(first) + sum(len(t[0]) + len(t[1]) + 4 for t in turns)
        told = sum(len(self.encode(s)) + 1 for s in facts.statements)
        sentences = self.prose_for(length - around - told, facts.statements, questions, simple)
        encoding, spans = self.document(sentences, facts.statements, depths, own_line, length - around)
        ids = [BOS, USER]
        pinned = (len(ids), len(ids) + len(first)) if pin else (0, 0)
        if pin:
            ids += first + self.newlines
        ids += head
        start = len(ids)
        ids += encoding.ids
        places = [token_span(encoding.offsets, s, start) for s in spans]
        return self.with_turns(ids, questions, turns, pinned, (start, len(ids)), places)

    def prose_for(
        self, tokens: int, statements: Sequence[str], questions: Sequence[Question], simple: bool
    ) -> list[str]:
        """Sentences of about so many tokens to hide statements in; some say little, some have words of the facts."""
        rng = self.rng
        prose = rng.choice(self.prose)
        chars = int(tokens * 3.3)
        sentences = prose.sentences(rng, chars) if chars > 20 else []
        if sentences and rng.random() < FILLER:
            return filler(rng, self.maker.pools, sentences)
        if not simple and rng.random() < TEMPTING:
            said = " ".join([*statements, *(q.text for q in questions)])
            return tempt(rng, sentences, said, rng.uniform(0.0, MOST_TEMPTING))
        return sentences

    def document(
        self,
        sentences: list[str],
        statements: Sequence[str],
        depths: Sequence[float],
        own_line: bool,
        room: int,
    ) -> tuple[Encoding, list[Span]]:
        """Statements among as many of the sentences as fit into ``room`` tokens, and the characters of each statement."""
        rng = self.rng
        state = rng.getstate()
        while True:
            rng.setstate(state)
            document, spans = weave(rng, sentences, statements, depths, own_line)
            encoding = self.tokenizer.encode(document, add_special_tokens=False)
            over = len(encoding.ids) - room
            if over <= 0 or not sentences:
                return encoding, spans
            drop = 0
            while sentences and drop < over * 3:
                drop += len(sentences.pop())

    def with_turns(
        self,
        ids: list[int],
        questions: Sequence[Question],
        turns: Sequence[tuple[list[int], list[int], list[float]]],
        pinned: Span,
        document: Span,
        places: list[Span],
    ) -> Sample:
        """The sample that begins with ``ids``, up to its document, and goes on with the turns."""
        weights = [0.05 if self.rng.random() < 0.2 else 0.0 for _ in ids]
        value = [0] * len(ids)
        asks = []
        for n, (question, (q_ids, a_ids, a_weights)) in enumerate(zip(questions, turns, strict=True)):
            ids += [USER] if n else self.newlines
            q_span = (len(ids), len(ids) + len(q_ids))
            ids += [*q_ids, END, ASSISTANT]
            a_span = (len(ids), len(ids) + len(a_ids))
            ids += a_ids
            weights += [0.0] * (a_span[0] - len(weights)) + a_weights
            value += [0] * (a_span[0] - len(value)) + [n + 1 if w >= 1.0 else 0 for w in a_weights]
            asks.append((q_span, a_span, [places[i] for i in question.needs]))
        return Sample(ids, weights, value, [q.family for q in questions], asks, pinned, document, places)

    def batch(
        self,
        count: int,
        length: int,
        gap_share: float = 0.6,
        max_gap: int = 300,
        drop_share: float = 0.0,
        easy: float = 0.0,
        repeat: float = 0.0,
        late: bool = False,
    ) -> Batch:
        """``count`` samples padded to ``length``.

        Args:
            count: Samples.
            length: Tokens of each.
            gap_share: Share of samples with gaps in their positions, as if prose had been cut out.
            max_gap: Longest such gap, in tokens.
            drop_share: Share of samples in which blocks of plain prose are invisible from afar.
            easy: Share of samples with canonical statements only and without the hard families.
            repeat: Share of samples that are pure repetition.
            late: Draw more of what is learnt late.
        """
        rng = self.rng
        self.weights = LATE_WEIGHTS if late else FAMILY_WEIGHTS
        self.maker.value_first = LATE_VALUE_FIRST if late else 0.0
        self.maker.practice = LATE_PRACTICE if late else 0.0
        batch = Batch.empty(count, length)
        for b in range(count):
            if rng.random() < repeat:
                batch.add_repetition(b, rng)
                continue
            simple = rng.random() < easy
            while True:
                sample = self.sample(length, simple)
                if len(sample.ids) <= length:
                    break
            batch.add(b, sample)
            if rng.random() < gap_share:
                batch.cut(b, sample, rng, max_gap)
            if rng.random() < drop_share:
                batch.hide(b, sample, rng)
        return batch


def filler(rng: random.Random, pools: Pools, sentences: Sequence[str]) -> list[str]:
    """Prose of the same length that says the same few sentences again and again, as tests of long contexts do.

    Args:
        rng: Source of the choices.
        pools: Where the words come from.
        sentences: The prose whose length is filled.
    """
    said = [
        f"The {pools.noun()} is {rng.choice((*pools.adjectives, pools.noun()))}. " for _ in range(rng.randint(1, 4))
    ]
    said += [f"{rng.choice(sentences).strip()} " for _ in range(rng.randint(0, 2))]
    total, repeated = sum(map(len, sentences)), []
    while sum(map(len, said)) * len(repeated) < total * len(said):
        repeated.append(said[len(repeated) % len(said)])
    return repeated


def tempt(rng: random.Random, sentences: Sequence[str], said: str, share: float) -> list[str]:
    """Exchange words of prose for words that facts and questions are made of.

    In a whole book names and things that are asked for also stand where nothing is said about them.

    Args:
        rng: Source of the choices.
        sentences: The prose.
        said: The facts and questions.
        share: How many of the words of three letters or more are exchanged.
    """
    parts = {
        True: re.findall(r"\b[A-Z][a-z]{3,}(?: [A-Z][a-z]{3,})*", said),
        False: re.findall(r"\b[a-z]{4,}(?: [a-z]{4,})?", said),
    }

    def exchange(match: re.Match[str]) -> str:
        options = parts[match[0][0].isupper()]
        return rng.choice(options) if options and rng.random() < share else match[0]

    return [re.sub(r"[A-Za-z]{3,}", exchange, sentence) for sentence in sentences]
