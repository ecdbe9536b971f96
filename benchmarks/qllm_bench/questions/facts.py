"""Facts drawn from the relations, with the questions that ask for them."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qllm_bench.questions.pools import Pools
from qllm_bench.questions.relations import (
    ATTRIBUTE,
    ATTRIBUTES,
    CODE,
    JOB,
    KEY_VALUE,
    MAGIC,
    OTHERS,
    PASSKEY,
    PLACE,
    TWO_HOPS,
    Relation,
)
from qllm_runtime.samples import article

ABSENT = "The text does not say."
FAMILIES = ("passkey", "magic", "attribute", "kv", "place", "job", "code", "relation", "multi", "two_hop", "absent")
# In wordings that training never had: one fact, several values, two hops, and a fact that is not told.
WORDED_FAMILIES = ("worded", "worded_multi", "worded_two_hop", "worded_absent")
SIMPLE = {
    "passkey": PASSKEY,
    "magic": MAGIC,
    "attribute": ATTRIBUTE,
    "kv": KEY_VALUE,
    "place": PLACE,
    "job": JOB,
    "code": CODE,
}
VALUE_FIRST = tuple(relation for relation in OTHERS if relation.value_first)
SHORT_SUFFIXES = (
    "Answer with the value only.", "Answer with the value only.", "Answer in one word.", "Give only the value.",
    "Reply with just the answer.", "Short answer only.", "Answer briefly.", "Just the value, please.",
)  # fmt: skip
LONG_SUFFIXES = ("", "", "", "", "Answer in a full sentence.", "Answer in one sentence.")
PREFIXES = (
    "", "", "", "", "", "According to the text, ", "Based on the document, ", "Question: ", "Please tell me: ",
    "From the text: ", "In this document, ", "I have a question. ",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question with its expected answer.

    Attributes:
        text: The question as asked.
        answer: The expected answer.
        values: The values the answer must hold; empty when the fact is absent.
        family: Family it is reported under.
        short: Whether only the value is asked for.
        needs: Indices of the statements it rests on.
        middle: What is found on the way to the value; a restated answer names it. Empty with one hop.
        quotes: What the text says about it, in the order of ``needs``.
    """

    text: str
    answer: str
    values: tuple[str, ...]
    family: str
    short: bool
    needs: tuple[int, ...]
    middle: str = ""
    quotes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FactSet:
    """Statements to place in one document, with the questions about them."""

    statements: tuple[str, ...]
    questions: tuple[Question, ...]


def fill(template: str, **parts: str) -> str:
    """Fill a template; ``{S}`` is ``{s}`` with a capital first letter, and "a" agrees with what follows it."""
    caps = {k.upper(): v[:1].upper() + v[1:] for k, v in parts.items()}
    for k, v in parts.items():
        if v:
            template = template.replace(f" a {{{k}}}", f" {article(v)} {{{k}}}")
    return template.format(**parts, **caps)


def draw(pools: Pools, kind: str) -> str:
    """Draw a subject or value of a kind of the relations."""
    rng = pools.rng
    if kind == "owner":
        return ""
    if kind == "entity":
        roll = rng.random()
        if roll < 0.35:
            return pools.name() if roll < 0.2 else pools.invented()
        if roll < 0.55:
            return f"the {pools.thing()}"
        if roll < 0.65:
            return f"the {pools.noun()} of {pools.place()}"
        if roll < 0.75:
            return pools.place()
        return (
            pools.word()
            if roll < 0.9
            else f"{rng.choice(('Project', 'Station', 'Model', 'Unit', 'Ship'))} {pools.invented()}"
        )
    if kind == "keyword":
        return pools.word() if rng.random() < 0.8 else f"{pools.rng.choice(pools.adjectives)}-{pools.noun()}"
    if kind == "magic_value":
        return pools.number(4, 10) if rng.random() < 0.8 else (pools.uuid() if rng.random() < 0.5 else pools.word())
    if kind == "json_value":
        roll = rng.random()
        return pools.uuid() if roll < 0.2 else pools.hexadecimal() if roll < 0.4 else pools.value()
    if kind == "door":
        place = rng.choice(("door", "gate", "safe", "locker", "vault", "cabinet", "room", "cellar"))
        return f"{pools.word()} {place}" if rng.random() < 0.7 else f"{place} of {pools.place()}"
    if kind == "option":
        return "_".join(pools.word() for _ in range(rng.randint(1, 3)))
    if kind == "event":
        return f"{rng.choice(('battle', 'fair', 'wedding', 'trial', 'council', 'race'))} of {pools.place()}"
    result: str = getattr(pools, kind)()
    return result


def related(pools: Pools, kind: str, other: str) -> str:
    """A subject that shares a part with ``other`` where its kind has parts."""
    new = draw(pools, kind)
    for joint in (" ", "_", "-"):
        a, b = other.split(joint), new.split(joint)
        if len(a) == len(b) and len(a) > 1:
            keep = pools.rng.randrange(len(a))
            b[keep] = a[keep]
            return joint.join(b)
    return new


def attribute(rng: random.Random) -> str:
    """The name of an attribute."""
    return rng.choice(ATTRIBUTES).replace("_", " ")


def ask(
    rng: random.Random,
    question: str,
    answer: str,
    values: tuple[str, ...],
    family: str,
    needs: tuple[int, ...],
    short: bool | None = None,
) -> Question:
    """Dress a question up and settle the form of its answer."""
    if short is None:
        short = rng.random() < 0.4
    suffix = rng.choice(SHORT_SUFFIXES if short else LONG_SUFFIXES)
    prefix = rng.choice(PREFIXES)
    if prefix.endswith(", ") and question.split(" ")[0] in (
        "What",
        "Where",
        "Which",
        "Who",
        "When",
        "How",
        "What's",
        "In",
        "Whom",
    ):
        question = question[0].lower() + question[1:]
    text = f"{prefix}{question} {suffix}".strip() if rng.random() < 0.8 else f"{prefix}{question}\n{suffix}".strip()
    if suffix and rng.random() < 0.4:
        # The order for the form of the answer may come first; the subject then stands next to the answer.
        text = f"{suffix} {prefix}{question}"
    if values and short:
        answer = ", ".join(values)
    return Question(text, answer, values, family, short, needs)


def in_json(statement: str) -> bool:
    """Whether a statement is an entry or an object of JSON."""
    return re.match(r'\{ ?"|"[^"]*":', statement) is not None


def quoting(question: Question, statements: Sequence[str]) -> Question:
    """Add what the text says about a question; a restated answer quotes it word for word.

    Entries of JSON and lists of several values are put in words.
    """
    if not question.values:
        return question
    quotes = [statements[i] for i in question.needs]
    for n, quote in enumerate(quotes):
        # Of "The pass key is 12. Remember it." the first sentence will do.
        ends = [end + len(v) + 1 for v in question.values if (end := quote.find(f"{v}. ")) >= 0]
        quotes[n] = quote[: min(ends)] if ends else quote
    question = replace(question, quotes=tuple(quotes))
    listed = len(question.values) > 1 and question.answer
    return (
        question
        if question.short or listed or any(map(in_json, quotes))
        else replace(question, answer=" ".join(quotes))
    )


def told(statements: Sequence[str], questions: Sequence[Question]) -> FactSet:
    """Statements with their questions, each with what the text says about it."""
    return FactSet(tuple(statements), tuple(quoting(q, statements) for q in questions))


class FactMaker:
    """Draws sets of facts of one split.

    Args:
        pools: Where names, words and numbers come from.

    Attributes:
        canonical: State every fact in the first way of its relation and answer mostly in full sentences.
        value_first: Share of the relations of no family of their own that are drawn from those whose statements may
            name the value ahead of the subject.
        practice: Share of the chains of two hops whose hops are asked for one by one as well, and whose things may share
            a word with those of another chain.
    """

    def __init__(self, pools: Pools) -> None:
        self.pools = pools
        self.rng = pools.rng
        self.canonical = False
        self.value_first = 0.0
        self.practice = 0.0

    def relation(self, family: str) -> Relation:
        """A relation of a family."""
        if family in SIMPLE:
            return SIMPLE[family]
        if self.value_first and self.rng.random() < self.value_first:
            return self.rng.choice(VALUE_FIRST)
        return self.rng.choice(OTHERS)

    def simple(
        self, family: str, count: int, one_template: bool, absent: int = 0, short: bool | None = None
    ) -> FactSet:
        """``count`` facts of one family, every one with its question, and ``absent`` questions without a fact.

        Args:
            family: A family of one-sentence facts.
            count: Number of facts.
            one_template: State all with the same words and, where there is one, the same attribute.
            absent: Number of questions about subjects that are not stated.
            short: Form of the answers; drawn when omitted.
        """
        rng, pools = self.rng, self.pools
        relation = self.relation(family)
        if relation is PASSKEY:
            count, absent = (0, 1) if absent and not count else (1, 0)
        template = rng.choice(relation.statements[:1] if self.canonical else relation.statements)
        one_template = one_template or self.canonical
        short = rng.random() < 0.35 if self.canonical and short is None else short
        shared = attribute(rng) if (one_template and not self.canonical) or rng.random() < 0.3 else ""
        seen: set[tuple[str, str]] = set()
        statements: list[str] = []
        questions: list[Question] = []
        subject = draw(pools, relation.subject)
        for i in range(count + absent):
            while True:
                name = shared or attribute(rng)
                if seen and relation is ATTRIBUTE and not shared and rng.random() < 0.4:
                    pass
                elif seen and rng.random() < 0.3:
                    subject = related(pools, relation.subject, subject)
                else:
                    subject = draw(pools, relation.subject)
                if (name, subject) not in seen:
                    break
            seen.add((name, subject))
            value = draw(pools, relation.value)
            question = fill(rng.choice(relation.questions), s=subject, a=name)
            if i >= count:
                questions.append(ask(rng, question, ABSENT, (), "absent", (), short))
                continue
            usual = rng.random() < 0.3
            statement = (
                template if one_template else relation.statements[0] if usual else rng.choice(relation.statements)
            )
            statements.append(fill(statement, s=subject, a=name, v=value))
            answer = fill(relation.answer, s=subject, a=name, v=value)
            questions.append(ask(rng, question, answer, (value,), relation.family, (i,), short))
        return told(statements, questions)

    def multi(self, values: int, distractors: int, short: bool | None = None) -> FactSet:
        """One subject with several values among others with one; the question asks for all."""
        rng, pools = self.rng, self.pools
        relation = MAGIC if rng.random() < 0.6 else ATTRIBUTE
        template = rng.choice(relation.statements[:1] if self.canonical else relation.statements)
        name = attribute(rng)
        subject = draw(pools, relation.subject)
        kind = relation.value if relation is ATTRIBUTE else "number"
        found: list[str] = []
        while len(found) < values:
            value = draw(pools, kind)
            if value not in found:
                found.append(value)
        statements = [fill(template, s=subject, a=name, v=v) for v in found]
        answer = fill(relation.plural_answer, s=subject, a=name, v=", ".join(found))
        question = fill(rng.choice(relation.plural), s=subject, a=name)
        questions = [ask(rng, question, answer, tuple(found), "multi", tuple(range(values)), short)]
        for _ in range(distractors):
            other = draw(pools, relation.subject)
            if other == subject:
                continue
            value = draw(pools, kind)
            statements.append(fill(template, s=other, a=name, v=value))
            question = fill(rng.choice(relation.questions), s=other, a=name)
            answer = fill(relation.answer, s=other, a=name, v=value)
            questions.append(ask(rng, question, answer, (value,), relation.family, (len(statements) - 1,), short))
        return told(statements, questions)

    def two_hop(self, chains: int, short: bool | None = None) -> FactSet:
        """Several chains of one kind, each with its question."""
        rng, pools = self.rng, self.pools
        hop = rng.choice(TWO_HOPS)
        role, kind = rng.choice(hop.roles)
        statements: list[str] = []
        questions: list[Question] = []
        seen: set[str] = set()
        middle = ""
        for _ in range(chains):
            practice = self.practice > 0 and rng.random() < self.practice
            key = draw(pools, hop.key)
            middle = related(pools, hop.middle, middle) if practice else draw(pools, hop.middle)
            value = draw(pools, kind)
            if key in seen or middle in seen:
                continue
            seen |= {key, middle}
            of = fill(hop.of, x=middle)
            n = len(statements)
            statements.append(fill(rng.choice(hop.links[:1] if self.canonical else hop.links), k=key, x=middle))
            statements.append(f"The {role} of {of} is {value}.")
            word = "Who" if kind == "name" else "What"
            question = f"{word} is the {role} of {fill(hop.phrase, k=key)}?"
            asked = ask(rng, question, "", (value,), "two_hop", (n, n + 1), short)
            questions.append(replace(asked, middle=middle))
            if practice:
                question = f"What is {fill(hop.phrase, k=key)}?"
                questions.append(ask(rng, question, "", (middle,), "relation", (n,), short))
                question = f"{word} is the {role} of {of}?"
                questions.append(ask(rng, question, "", (value,), "attribute", (n + 1,), short))
        return told(statements, questions)


def merge(sets: list[FactSet]) -> FactSet:
    """Join fact sets into one, renumbering what the questions need."""
    statements: list[str] = []
    questions: list[Question] = []
    for facts in sets:
        shift = len(statements)
        statements.extend(facts.statements)
        for q in facts.questions:
            needs = tuple(n + shift for n in q.needs)
            questions.append(replace(q, needs=needs))
    return FactSet(tuple(statements), tuple(questions))
