"""Documents with several facts at chosen depths, each with its question."""

from __future__ import annotations

import random
from collections.abc import Sequence

from qllm_bench.questions.data import Case, Prose, make_facts, weave
from qllm_bench.questions.facts import FactMaker, FactSet, merge
from qllm_bench.questions.pools import Pools

_TRIES = 200


def make_haystack(
    rng: random.Random,
    prose: Prose,
    n_chars: int,
    families: Sequence[str],
    depths: Sequence[float],
    distractors: int = 3,
    *,
    canonical: bool = True,
    short: bool | None = None,
) -> list[Case]:
    """Hide one fact per family in the same document, and ask for each.

    Every fact comes with ``distractors`` facts of its kind about other subjects (said in the same words when
    ``canonical``), placed at random. No two facts of a document differ in their values only, so every question has one
    answer.

    Args:
        rng: Source of all randomness; the same state makes the same cases.
        prose: Prose to hide them in.
        n_chars: Characters of prose, about.
        families: Families of the facts, of ``qllm_bench.questions.facts``; at most one "passkey".
        depths: Where each stands, 0 (start) to 1 (end); facts of several statements begin there.
        distractors: Further facts of the same kind for each.
        canonical: State facts in the first way of their relation; otherwise in any, and questions always vary.
        short: Ask for the value only, or not; drawn when omitted.

    Returns:
        One case per family; all have the same document.
    """
    maker = FactMaker(Pools(rng, evaluation=True))
    maker.canonical = canonical
    sets: list[FactSet] = []
    asked = []
    taken: set[str] = set()
    for family in families:
        for _ in range(_TRIES):
            facts, question = make_facts(maker, family, distractors, False, short)
            heads = _heads(facts)
            if not heads & taken:
                break
        else:
            raise ValueError(f"no further fact of family {family!r} fits the {len(sets)} others of the document")
        taken |= heads
        shift = sum(len(other.statements) for other in sets)
        sets.append(facts)
        asked.append((question, tuple(n + shift for n in question.needs)))
    statements = merge(sets).statements
    places = [rng.random() for _ in statements]
    for (_, needs), depth in zip(asked, depths, strict=True):
        if needs:
            places[needs[0]] = depth
    document, spans = weave(rng, prose.sentences(rng, n_chars), statements, places, rng.random() < 0.1)
    return [Case(document, q.text, q.answer, q.values, q.family, tuple(spans[n] for n in needs)) for q, needs in asked]


def _heads(facts: FactSet) -> set[str]:
    """The statements without the values that are asked for."""
    values = {value for question in facts.questions for value in question.values}
    heads = set()
    for statement in facts.statements:
        for value in values:
            statement = statement.replace(value, "")
        heads.add(statement)
    return heads
