"""The recipe's facts, documents and match rule."""

from __future__ import annotations

import itertools
import random

import pytest

from qllm_bench.questions.data import Prose, is_exact, make_case, weave
from qllm_bench.questions.facts import FAMILIES, FactMaker, fill
from qllm_bench.questions.pools import Pools, is_eval
from qllm_runtime.samples import sample_document, story

PROSE = Prose.of("\n\n".join(story(random.Random("test"), 20_000)))


@pytest.mark.parametrize("family", FAMILIES)
def test_case_is_deterministic_and_its_spans_hold_the_values(family: str) -> None:
    cases = [make_case(random.Random(7), PROSE, 3000, family, depth=0.5) for _ in range(2)]
    assert cases[0] == cases[1]
    case = cases[0]
    assert case.family == family
    held = " ".join(case.document[a:b] for a, b in case.spans)
    for value in case.values:
        assert value.lower() in held.lower()
        assert value in case.answer
    assert bool(case.values) == (family != "absent")


def test_depth_places_the_fact() -> None:
    for depth in (0.0, 0.5, 1.0):
        case = make_case(random.Random(3), PROSE, 12_000, "magic", 2, depth)
        assert case.spans[0][0] / len(case.document) == pytest.approx(depth, abs=0.05)


def test_training_and_evaluation_share_no_drawn_word() -> None:
    drawn = []
    for evaluation in (False, True):
        pools = Pools(random.Random(1), evaluation)
        kinds = (pools.invented, pools.place, pools.code, pools.uuid, pools.job, pools.noun)
        drawn.append({kind() for kind in kinds for _ in range(300)})
    assert not drawn[0] & drawn[1]
    assert all(is_eval(text) for text in drawn[1])


def test_facts_of_one_document_are_unambiguous() -> None:
    for seed in range(60):
        facts = FactMaker(Pools(random.Random(seed), True)).simple("attribute", 8, one_template=seed % 2 == 0)
        assert len(set(facts.statements)) == 8


def test_articles_agree_with_what_is_filled_in() -> None:
    assert fill("{S} works as a {v}.", s="ann", v="engineer") == "Ann works as an engineer."
    assert fill("{S} works as a {v}.", s="otto", v="baker") == "Otto works as a baker."


def test_hops_asked_for_one_by_one() -> None:
    maker = FactMaker(Pools(random.Random(3), False))
    assert {q.family for q in maker.two_hop(3).questions} == {"two_hop"}
    maker.practice = 1.0
    shared = 0
    for _ in range(30):
        facts = maker.two_hop(3)
        assert [q.family for q in facts.questions] == ["two_hop", "relation", "attribute"] * (len(facts.questions) // 3)
        for whole, first, second in zip(*(facts.questions[n::3] for n in range(3)), strict=True):
            assert first.values == (whole.middle,)
            assert second.values == whole.values
            assert (*first.needs, *second.needs) == whole.needs
            assert whole.middle.lower() in facts.statements[first.needs[0]].lower()
            assert whole.values[0] in facts.statements[second.needs[0]]
        words = [q.middle.split() for q in facts.questions if q.middle]
        shared += any(set(a) & set(b) for a, b in itertools.pairwise(words))
    assert shared > 3


def test_weave_reports_where_statements_are() -> None:
    text, spans = weave(random.Random(0), ["One. ", "Two. ", "Three."], ["A is b.", '"k": "v",'], [0.0, 1.0])
    assert [text[a:b] for a, b in spans] == ["A is b.", '"k": "v",']


@pytest.mark.parametrize(
    ("output", "right"),
    [
        ("The pass key is 123.", True),
        ("123", True),
        (" The pass key is  123", True),
        ("The pass key is 1234.", False),
        ("The pass key is 12.", False),
        ("The text does not say.", False),
        ("", False),
        ("123 " * 40, False),
    ],
)
def test_match_rule(output: str, right: bool) -> None:
    assert is_exact(output, "The pass key is 123.", ("123",)) is right


def test_match_rule_of_absent_facts() -> None:
    assert is_exact("The text does not say.", "The text does not say.", ())
    assert not is_exact("The pass key is 1.", "The text does not say.", ())


def test_sample_document_is_long_fixed_and_holds_its_answers() -> None:
    text, questions = sample_document(seed=1, n_facts=12, min_chars=50_000)
    assert (text, questions) == sample_document(seed=1, n_facts=12, min_chars=50_000)
    assert len(text) >= 50_000
    assert len({question for question, _ in questions}) == 12
    assert text != sample_document(seed=2, n_facts=12, min_chars=50_000)[0]
    for _, answer in questions:
        assert answer.rstrip(".").split(" is ")[-1].split(" in ")[-1].split(" as a ")[-1] in text
