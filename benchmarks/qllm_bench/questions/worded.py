"""Facts and questions drawn from the wordings."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, groupby
from operator import attrgetter

from qllm_bench.questions.facts import ABSENT, LONG_SUFFIXES, FactSet, Question, told
from qllm_bench.questions.kinds import Kinds, called
from qllm_bench.questions.pools import Pools
from qllm_bench.questions.wordings import SLOT, Wording, fill, wordings

CLUSTER = attrgetter("cluster")
# Words that are no part of a name.
SMALL = frozenset(("the", "of", "at", "in", "near", "and"))
# How a user asks for the value alone; {k} is what the value is.
SHORT = (
    "Answer with the value only.", "Answer with the value only.", "Just the {k}, please.", "Just the {k}.",
    "{K} only.", "Reply with the {k} only.", "Reply with the {k} and nothing else.", "Give only the {k}.",
    "Only the {k}.", "The {k} only, please.", "Answer with just the {k}.", "Short answer.", "Short answer, please.",
    "One word is enough.", "Answer briefly.", "Nothing more.", "Reply with the value alone.", "No full sentence.",
    "Value only.", "Answer with the {k} only.", "Give me just the {k}.",
)  # fmt: skip
SHORT_SEVERAL = (
    "Answer with the values only.", "Just list them.", "Only the {k}s, separated by commas.", "List the {k}s only.",
    "No sentence, just the values.", "Just the {k}s, please.", "Values only.", "Reply with a list.",
)  # fmt: skip
NOUNS = {
    "person": ("name",), "role": ("name", "person"), "pet": ("name",), "town": ("name", "place", "place name"),
    "building": ("place",), "room": ("place", "room"), "ship": ("name", "ship"), "company": ("name",),
    "landmark": ("name",), "work": ("title",), "name": ("name", "word"), "number": ("number", "digits"),
    "count": ("number",), "year": ("year", "number"), "date": ("date",), "time": ("time",), "weekday": ("day",),
    "month": ("month",), "money": ("amount", "sum"), "length": ("figure", "length"), "weight": ("figure", "weight"),
    "colour": ("colour",), "code": ("code",), "password": ("word", "password"), "job": ("job", "word"),
    "language": ("language",), "metal": ("metal",), "key": ("key",),
}  # fmt: skip
OPENINGS = (
    "", "", "", "", "", "", "", "According to the text, ", "In the text, ", "Question: ", "Please tell me: ",
    "From the document: ", "I have a question. ", "Quick question: ", "Do you know this? ", "Look it up in the text: ",
)  # fmt: skip


def dress(rng: random.Random, question: str, kind: str, several: bool, short: bool) -> str:
    """Put a question as a user would: with an opening, with what the answer is to look like, now and then carelessly.

    Args:
        rng: Source of the choices.
        question: The bare question.
        kind: Kind of the value.
        several: Whether there are several values.
        short: Whether the value alone is asked for.
    """
    noun = rng.choice(NOUNS.get(kind, ("answer",)))
    suffix = rng.choice((SHORT_SEVERAL if several else SHORT) if short else LONG_SUFFIXES)
    suffix = fill(suffix, {"k": noun.rstrip("s") if several else noun})
    opening = rng.choice(OPENINGS)
    if opening.endswith(", ") or rng.random() < 0.08:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.06:
        question = question.rstrip("?.")
    question = opening + question
    if not suffix:
        return question
    return f"{suffix} {question}" if rng.random() < 0.2 else f"{question}{rng.choice('   ' + chr(10))}{suffix}"


@dataclass(frozen=True)
class Relations:
    """The relations of one split.

    Attributes:
        every: All of them.
        several: Those that may have several values.
        about: Those about a kind of subject.
        clusters: Those of a cluster.
        first: Those whose value others are about: first hops.
        chains: Chains of two hops up to and including those of each of ``first``.
        second: Second hops about a kind of subject.
    """

    every: tuple[Wording, ...]
    several: tuple[Wording, ...]
    about: Mapping[str, tuple[Wording, ...]]
    clusters: Mapping[str, tuple[Wording, ...]]
    first: tuple[Wording, ...]
    chains: tuple[int, ...]
    second: Mapping[str, tuple[Wording, ...]]


@cache
def relations(evaluation: bool) -> Relations:
    """The relations of one split, sorted by what they are drawn for."""
    every = wordings(evaluation)
    about = {kind: tuple(w for w in every if w.subject == kind) for kind in {w.subject for w in every}}
    clusters = {name: tuple(group) for name, group in groupby(sorted(every, key=CLUSTER), CLUSTER)}
    second = {kind: tuple(w for w in ws if any("{s}'s" not in q for q in w.questions)) for kind, ws in about.items()}
    first = tuple(w for w in every if w.noun and second.get(w.value))
    chains = tuple(accumulate(len(second[w.value]) for w in first))
    return Relations(every, tuple(w for w in every if w.plural), about, clusters, first, chains, second)


class Worded:
    """Draws sets of facts from the wordings of one split.

    Args:
        pools: Where names, words and numbers come from.
    """

    def __init__(self, pools: Pools) -> None:
        self.rng, self.pools, self.kinds = pools.rng, pools, Kinds(pools)
        self.relations = relations(pools.evaluation)

    def _parts(self, wording: Wording, before: Mapping[str, str] | None = None) -> dict[str, str]:
        """What the slots of a fact hold; near to those of another fact, if one is given."""
        rng = self.rng
        texts = (*wording.statements, *wording.questions)
        slots = sorted({m.lower() for t in texts for m in SLOT.findall(t)} - {"s", "v"})
        parts = {k: self.kinds.draw(k) for k in slots if hasattr(self.kinds, f"_{k}") or hasattr(self.pools, k)}
        parts["v"] = self.kinds.draw(wording.value)
        parts["s"] = "" if wording.subject == "none" else self.kinds.draw(wording.subject)
        if before and parts["s"]:
            if rng.random() < 0.5:
                parts["s"] = self._near(wording.subject, before["s"])
            if slots and rng.random() < 0.6:
                parts |= {k: before[k] for k in slots if k in before}
        return parts

    def _near(self, kind: str, other: str) -> str:
        """A member of a kind that shares a word with another."""
        for _ in range(6):
            new = self.kinds.draw(kind)
            for joint in (" ", "_", "-"):
                a, b = other.split(joint), new.split(joint)
                alike = [
                    x[:1].isupper() == y[:1].isupper() and (x in SMALL) == (y in SMALL)
                    for x, y in zip(a, b, strict=False)
                ]
                if len(a) == len(b) > 1 and all(alike):
                    free = [i for i in range(len(a)) if a[i] != b[i] and a[i] not in SMALL]
                    if len(free) > 1:
                        keep = self.rng.choice(free)
                        b[keep] = a[keep]
                        return joint.join(b)
        return self.kinds.draw(kind)

    def _ask(
        self, wording: Wording, template: str, parts: Mapping[str, str], values: tuple[str, ...], needs: tuple[int, ...],
        short: bool | None,
    ) -> Question:  # fmt: skip
        """The question of a template with its expected answer; without values the fact is not told."""
        rng = self.rng
        subject = called(rng, parts["s"]) if parts["s"] and rng.random() < 0.2 else parts["s"]
        parts = {**parts, "s": subject, "v": ", ".join(values)}
        short = rng.random() < 0.4 if short is None else short
        text = dress(rng, fill(template, parts), wording.value, len(values) > 1, short)
        if not values:
            return Question(text, ABSENT, (), "absent", short, ())
        restated = wording.plural_answer if len(values) > 1 else wording.answer
        family = "worded_multi" if len(values) > 1 else "worded"
        return Question(text, parts["v"] if short else fill(restated, parts), values, family, short, needs)

    def simple(self, count: int, one_template: bool, absent: int = 0, short: bool | None = None) -> FactSet:
        """``count`` facts of one relation, each with its question, and ``absent`` questions without a fact."""
        rng = self.rng
        wording = rng.choice(self.relations.every)
        if wording.subject == "none" and wording.slots == ["s"]:
            count, absent = 1, 0
        template = rng.choice(wording.statements)
        statements: list[str] = []
        questions: list[Question] = []
        asked: set[str] = set()
        subjects: set[str] = set()
        parts: dict[str, str] | None = None
        for i in range(count + absent):
            for _ in range(20):
                parts = self._parts(wording, parts)
                key = " ".join(parts[k] for k in wording.slots)
                if key not in asked:
                    break
            else:
                continue
            asked.add(key)
            question = rng.choice(wording.questions)
            if i >= count:
                questions.append(self._ask(wording, question, parts, (), (), short))
                continue
            statements.append(fill(template if one_template else rng.choice(wording.statements), parts))
            questions.append(self._ask(wording, question, parts, (parts["v"],), (len(statements) - 1,), short))
            if wording.subject != "none" and parts["s"] not in subjects:
                subjects.add(parts["s"])
                self._beside(wording, parts["s"], bool(absent), short, statements, questions)
        return told(statements, questions)

    def _beside(
        self, wording: Wording, subject: str, absent: bool, short: bool | None, statements: list[str],
        questions: list[Question],
    ) -> None:  # fmt: skip
        """Add what else is told of a subject that a fact was just stated of, and questions for it, told or not."""
        rng = self.rng
        siblings = [w for w in self.relations.clusters[wording.cluster] if w is not wording]
        untold = [w for w in siblings if rng.random() < 0.6]
        for other in siblings:
            if other in untold:
                continue
            parts = {**self._parts(other), "s": subject}
            statements.append(fill(rng.choice(other.statements), parts))
            if rng.random() < 0.6:
                at = (len(statements) - 1,)
                questions.append(self._ask(other, rng.choice(other.questions), parts, (parts["v"],), at, short))
        other = rng.choice(untold or self.relations.about[wording.subject])
        if absent and (untold or other.value != wording.value) and rng.random() < (0.4 if untold else 0.2):
            parts = {**self._parts(other), "s": subject}
            questions.append(self._ask(other, rng.choice(other.questions), parts, (), (), short))

    def multi(self, values: int, distractors: int, short: bool | None = None) -> FactSet:
        """One subject with several values among others with one; the question asks for all."""
        rng = self.rng
        wording = rng.choice(self.relations.several)
        parts = self._parts(wording)
        found = list(dict.fromkeys(self.kinds.draw(wording.value) for _ in range(4 * values)))[:values]
        template = rng.choice(wording.statements)
        ways = (template,) if rng.random() < 0.5 else wording.statements
        statements = [fill(rng.choice(ways), {**parts, "v": v}) for v in found]
        questions = [
            self._ask(wording, rng.choice(wording.plural), parts, tuple(found), tuple(range(len(found))), short)
        ]
        for _ in range(distractors):
            other = self._parts(wording, parts)
            if other["s"] == parts["s"]:
                continue
            statements.append(fill(template, other))
            at = (len(statements) - 1,)
            questions.append(self._ask(wording, rng.choice(wording.questions), other, (other["v"],), at, short))
        return told(statements, questions)

    def two_hop(self, chains: int, short: bool | None = None) -> FactSet:
        """Several chains of two relations, each with its question; some hops are asked for alone."""
        rng = self.rng
        first = rng.choices(self.relations.first, cum_weights=self.relations.chains)[0]
        second = rng.choice(self.relations.second[first.value])
        templates = rng.choice(first.statements), rng.choice(second.statements)
        statements: list[str] = []
        questions: list[Question] = []
        seen: set[str] = set()
        one: dict[str, str] | None = None
        for _ in range(chains):
            one = self._parts(first, one)
            middle = one["v"]
            two = {**self._parts(second), "s": middle}
            if one["s"] in seen or middle in seen:
                continue
            seen |= {one["s"], middle}
            n = len(statements)
            statements.append(fill(templates[0], one))
            through = {**two, "s": fill(first.noun, one)}
            template = rng.choice([q for q in second.questions if "{s}'s" not in q])
            if chains > 1 and rng.random() < 0.12:
                # The second half of the chain is not told.
                questions.append(self._ask(second, template, through, (), (), short))
                continue
            statements.append(fill(templates[1], two))
            question = self._ask(second, template, through, (two["v"],), (n, n + 1), short)
            questions.append(replace(question, family="worded_two_hop", middle=middle))
            for wording, parts, at in ((first, one, n), (second, two, n + 1)):
                if rng.random() < 0.4:
                    asked = rng.choice(wording.questions)
                    questions.append(self._ask(wording, asked, parts, (parts["v"],), (at,), short))
        return told(statements, questions)
