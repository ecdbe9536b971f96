"""Documents with a question of every kind that tells retrieval from reading."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from qllm_bench.questions.data import Case, Prose, make_facts, weave
from qllm_bench.questions.facts import FactMaker, FactSet, merge
from qllm_bench.questions.pools import Pools
from qllm_bench.questions.relations import CODE, JOB, OTHERS, PLACE, Relation

#: One fact each, asked for in words of its statement and by a rare name: what retrieval is good at.
PLAIN = ("magic", "attribute", "kv", "place", "job", "code")
#: One fact asked for in other words; the same about a thing whose name the prose uses, too; several statements of one subject;
#: two statements of which the question shares rare words with the first only; nothing stated at all.
HARD = ("paraphrase", "common", "multi", "two_hop", "absent")
FAMILIES = (*PLAIN, *HARD)


class Paraphraser(FactMaker):
    """Makes facts whose statement and question share the subject and no other word of content."""

    def relation(self, family: str) -> Relation:
        """A relation, of plain nouns for "common", with one statement and one question of different words."""
        relations = [PLACE, JOB, CODE, *OTHERS]
        if family == "common":
            relations = [relation for relation in OTHERS if relation.subject == "noun"]
        while True:
            relation = self.rng.choice(relations)
            pairs = [(s, q) for s in relation.statements for q in relation.questions if not _stems(s) & _stems(q)]
            if pairs:
                statement, question = self.rng.choice(pairs)
                return replace(relation, family=family, statements=(statement,), questions=(question,))


def _stems(template: str) -> set[str]:
    return {word[:4] for word in re.findall(r"[a-z]{4,}", template.lower())}


def frequent_nouns(rng: random.Random, prose: Prose, count: int) -> Pools:
    """Pools whose nouns are the ``count`` that the prose uses most."""
    pools = Pools(rng, evaluation=True)
    used = Counter(re.findall(r"[a-z]+", prose.text.lower()))
    pools.nouns = pools.words = sorted(pools.nouns, key=lambda noun: (-used[noun], noun))[:count]
    return pools


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
    common = frequent_nouns(rng, prose, 3 * (distractors + 1))
    reworded = {"paraphrase": Paraphraser(pools), "common": Paraphraser(common)}
    sets: list[FactSet] = []
    asked = []
    for family in families:
        maker = reworded.get(family) or FactMaker(pools)
        maker.canonical = family not in reworded
        facts, question = make_facts(maker, family, distractors, family in reworded, None)
        shift = sum(len(other.statements) for other in sets)
        sets.append(facts)
        asked.append((question, [n + shift for n in question.needs]))
    document, spans = weave(rng, prose.sentences(rng, n_chars), merge(sets).statements)
    return [
        Case(document, q.text, q.answer, q.values, family, tuple(spans[n] for n in needs))
        for family, (q, needs) in zip(families, asked, strict=True)
    ]
