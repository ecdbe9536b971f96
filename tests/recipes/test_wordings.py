"""The wordings: what stands in their files, and the facts and questions drawn from them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from qllm_bench.questions.data import Prose, is_exact, make_case
from qllm_bench.questions.facts import ABSENT, WORDED_FAMILIES, FactSet, in_json
from qllm_bench.questions.kinds import Kinds, called
from qllm_bench.questions.pools import Pools
from qllm_bench.questions.worded import Worded, dress
from qllm_bench.questions.wordings import SLOT, Wording, fill, parse, wordings

ALL = (*wordings(False), *wordings(True))
WORDS = ["pond", "gate", "hill", "river", "copper", "kettle"]


def slots(text: str) -> list[str]:
    return [slot.lower() for slot in SLOT.findall(text)]


def drawn(evaluation: bool, count: int) -> list[FactSet]:
    rng = random.Random(f"wordings-{evaluation}")
    worded = Worded(Pools(rng, evaluation, WORDS))
    makers = (lambda: worded.simple(3, rng.random() < 0.5, 1), lambda: worded.multi(3, 2), lambda: worded.two_hop(2))
    return [makers[i % 3]() for i in range(count)]


def test_there_are_many_and_an_eighth_is_kept_for_evaluation() -> None:
    assert len(ALL) > 1000
    assert 0.1 < len(wordings(True)) / len(ALL) < 0.16
    assert not {w.name for w in wordings(True)} & {w.name for w in wordings(False)}
    assert not {s for w in wordings(True) for s in w.statements} & {s for w in wordings(False) for s in w.statements}


@pytest.mark.parametrize("side", [False, True])
def test_every_relation_is_well_formed(side: bool) -> None:
    kinds = Kinds(Pools(random.Random(0), side, WORDS))
    for w in wordings(side):
        assert len(w.statements) >= 2 and len(w.questions) >= 4, w.name
        common = set.intersection(*(set(slots(s)) for s in w.statements)) - {"s", "v"}
        for told in (*w.statements, *filter(None, [w.answer, w.plural_answer])):
            assert slots(told).count("v") == 1, (w.name, told)
            assert w.subject == "none" or "s" in slots(told), (w.name, told)
        for asked in (*w.questions, *w.plural, *filter(None, [w.noun])):
            assert "v" not in slots(asked) and (w.subject != "none") == ("s" in slots(asked)), (w.name, asked)
        for text in (*w.questions, *w.plural, w.answer, w.noun, w.plural_answer):
            assert set(slots(text)) - {"s", "v"} <= common, (w.name, text)
        json = any(in_json(fill(s, {"s": "a", "v": "b"})) for s in w.statements)
        assert bool(w.answer) == json and bool(w.plural_answer) == (json and bool(w.plural)), w.name
        for kind in {w.subject, w.value, *(k for s in w.statements for k in slots(s))} - {"s", "v", "none"}:
            assert kinds.draw(kind), (w.name, kind)


@pytest.mark.parametrize("evaluation", [False, True])
def test_values_stand_in_the_statements_a_question_rests_on(evaluation: bool) -> None:
    families = set()
    for facts in drawn(evaluation, 300):
        for question in facts.questions:
            families.add(question.family)
            assert not SLOT.search(question.text) and not SLOT.search(question.answer)
            held = " ".join(facts.statements[i] for i in question.needs).lower()
            assert all(value.lower() in held for value in question.values)
            if question.values:
                # Who answers as expected is right; who declines is not.
                assert is_exact(question.answer, question.answer, question.values)
                assert not is_exact(ABSENT, question.answer, question.values)
            else:
                assert question.answer == ABSENT and question.family == "absent"
            if question.middle and not question.short:
                assert question.middle.lower() in question.answer.lower()
    assert families == {"worded", "worded_multi", "worded_two_hop", "absent"}


def test_short_answers_are_the_values_alone() -> None:
    questions = [q for facts in drawn(False, 300) for q in facts.questions if q.values]
    assert all(q.answer == ", ".join(q.values) for q in questions if q.short)
    assert 0.3 < sum(q.short for q in questions) / len(questions) < 0.5


def test_the_facts_of_a_document_differ_in_more_than_their_values() -> None:
    for facts in drawn(False, 300):
        bare = [(q.text, q.needs) for q in facts.questions if q.family == "worded"]
        assert len({text for text, _ in bare}) == len(bare)


@pytest.mark.parametrize("family", WORDED_FAMILIES)
def test_cases_are_deterministic_and_their_spans_hold_the_values(family: str) -> None:
    prose = Prose.of("It rained all day. The road was long. " * 60)
    for seed in range(12):
        case = make_case(random.Random(seed), prose, 1500, family, 2)
        assert case == make_case(random.Random(seed), prose, 1500, family, 2)
        assert case.family == family and bool(case.values) == (family != "worded_absent")
        held = " ".join(case.document[a:b] for a, b in case.spans).lower()
        assert all(value.lower() in held for value in case.values)


def test_a_file_is_read_as_written() -> None:
    text = "# note\n\n== home: person -> town\nS: {S} lives in {v}.\nQ: Where does {s} live?\n"
    home = Wording("home", "person", "town", ("{S} lives in {v}.",), ("Where does {s} live?",))
    assert parse(text) == [home]
    assert parse(text + "N: the town of {s}\n") == [replace(home, noun="the town of {s}")]


def test_restated_answers_quote_the_statements() -> None:
    asked = [q for facts in drawn(False, 300) for q in facts.questions]
    assert all(len(q.quotes) == len(q.needs) for q in asked if q.values)
    assert not any(q.quotes for q in asked if not q.values)
    restated = [q for q in asked if q.values and not q.short]
    assert sum(q.answer == " ".join(q.quotes) for q in restated) > 0.9 * len(restated)
    assert all(q.answer for q in asked)


@pytest.mark.parametrize(
    ("template", "parts", "text"),
    [
        ("{S} keeps a {v}.", {"s": "the porter", "v": "otter"}, "The porter keeps an otter."),
        ("A {v} was {s}.", {"s": "Ada", "v": "owl"}, "An owl was Ada."),
        ('{"{s}": {v}}', {"s": "a_b", "v": "12"}, '{"a_b": 12}'),
        ("{s} = {v}", {"s": "limit", "v": "{v}"}, "limit = {v}"),
    ],
)
def test_fill(template: str, parts: dict[str, str], text: str) -> None:
    assert fill(template, parts) == text


@pytest.mark.parametrize(
    ("subject", "ways"),
    [
        ("Captain Ann Bell", {"Ann Bell"}),
        ("the Ashby bridge", {"the bridge of Ashby", "the bridge at Ashby", "the bridge in Ashby"}),
        ("the porter's lamp", {"the lamp of the porter"}),
        ("the chapel near Ashby", {"the Ashby chapel"}),
        ("Ann Bell", {"Ann Bell"}),
    ],
)
def test_things_are_called_in_other_ways(subject: str, ways: set[str]) -> None:
    assert {called(random.Random(i), subject) for i in range(20)} == ways


def test_questions_are_dressed() -> None:
    texts = {dress(random.Random(i), "Where is it?", "town", several=False, short=True) for i in range(400)}
    assert len(texts) > 100
    assert all("here is it" in text for text in texts)
    assert any(text.endswith("Just the place, please.") for text in texts)
