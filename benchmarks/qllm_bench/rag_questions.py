"""Documents with a question of every kind that tells retrieval from reading."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from qllm_bench.questions.data import Case, Prose, make_facts, weave
from qllm_bench.questions.facts import FactMaker, FactSet, merge
from qllm_bench.questions.pools import Pools
from qllm_bench.questions.relations import CODE, JOB, OTHERS, PLACE, Relation

#: One fact each, asked for in words of its statement and by a rare name: what retrieval is good at.
PLAIN = ("magic", "attribute", "kv", "place", "job", "code")
#: One fact asked for in other words; several statements of one subject; two statements of which the question shares words
#: with the first only; nothing stated at all.
HARD = ("paraphrase", "multi", "two_hop", "absent")
FAMILIES = (*PLAIN, *HARD)


class Paraphraser(FactMaker):
    """Makes facts of the family "paraphrase": statement and question share the subject and no other word of content."""

    def relation(self, family: str) -> Relation:
        """A relation with one statement and one question of different words."""
        relations = [PLACE, JOB, CODE, *OTHERS]
        while True:
            relation = self.rng.choice(relations)
            pairs = [(s, q) for s in relation.statements for q in relation.questions if not _stems(s) & _stems(q)]
            if pairs:
                statement, question = self.rng.choice(pairs)
                return replace(relation, family="paraphrase", statements=(statement,), questions=(question,))


def _stems(template: str) -> set[str]:
    return {word[:4] for word in re.findall(r"[a-z]{4,}", template.lower())}


def make_document(
    rng: random.Random, prose: Prose, n_chars: int, families: Sequence[str], distractors: int
) -> list[Case]:
    """One document with a fact and a question per family.

    Args:
        rng: Source of all randomness; the same state makes the same cases.
        prose: Prose to hide the facts in.
        n_chars: Characters of prose, about.
        families: Families of ``FAMILIES``.
        distractors: Facts of the same kind about other subjects, per family.

    Returns:
        A case per family, all of the same document; ``spans`` are the statements that a retriever should find.
    """
    pools = Pools(rng, evaluation=True)
    makers = {name: FactMaker(pools) for name in families} | {"paraphrase": Paraphraser(pools)}
    sets: list[FactSet] = []
    asked = []
    for family in families:
        maker = makers[family]
        maker.canonical = family != "paraphrase"
        facts, question = make_facts(maker, family, distractors, family == "paraphrase", None)
        shift = sum(len(other.statements) for other in sets)
        sets.append(facts)
        asked.append((question, [n + shift for n in question.needs]))
    document, spans = weave(rng, prose.sentences(rng, n_chars), merge(sets).statements)
    return [
        Case(document, q.text, q.answer, q.values, family, tuple(spans[n] for n in needs))
        for family, (q, needs) in zip(families, asked, strict=True)
    ]
