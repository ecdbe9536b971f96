"""What a question and its answer become in training: thought, answer and the weights of their tokens."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer

from qllm_bench.questions.facts import ABSENT, Question, told
from recipes import turns
from recipes.batches import Sampler
from recipes.evaluate import MODELS, story_prose
from recipes.tokenizer import ANSWER, THINK, THOUGHTS
from recipes.turns import FIRST_WEIGHT

LAMP, HOME = "The owner of the lamp is Bob.", "The home of Bob is Bobton."
ANN = ("Ann keeps an owl.", "It is said that Ann also keeps a hare, which sleeps by the stove.")


def sampler(seed: int = 3) -> Sampler:
    tokenizer = Tokenizer.from_file(str(MODELS / "reader" / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in THOUGHTS])
    return Sampler(seed, tokenizer, story_prose(), ["pond", "gate", "hill"])


def turn(
    monkeypatch: pytest.MonkeyPatch,
    question: Question,
    statements: tuple[str, ...],
    *,
    direct: bool = False,
    depths: tuple[float, ...] = (),
) -> tuple[str, str, list[str]]:
    """The thought with its marks, the answer, and what stands ahead of each token that weighs most."""
    monkeypatch.setattr("recipes.turns.DIRECT", float(direct))
    drawn = sampler()
    depths = depths or tuple((i + 1) / 10 for i in range(len(statements)))
    question = told(statements, [question]).questions[0]
    _, ids, weights = turns.turn(drawn.rng, drawn.tokenizer, question, depths, statements)
    assert len(ids) == len(weights)
    cut = ids.index(ANSWER) + 1 if ANSWER in ids else 0
    if direct:
        assert ids[:2] == [THINK, ANSWER] and weights[:2] == [0.0, 0.0]
    start = 1 if cut > 2 else cut
    heavy = [drawn.tokenizer.decode(ids[start:i]) for i, weight in enumerate(weights) if weight == FIRST_WEIGHT]
    return drawn.tokenizer.decode(ids[:cut]), drawn.tokenizer.decode(ids[cut:-1]), heavy


@pytest.mark.parametrize("direct", [False, True])
def test_several_values_are_told_in_the_order_of_the_document(monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    statements, depths = ("A number is 4213.", "Another is pond.", "The number is 4711."), (0.2, 0.9, 0.5)
    listed, values = "The numbers are 4711, 4213, pond.", ("4711", "4213", "pond")
    question = Question("Which?", listed, values, "multi", False, (2, 0, 1))
    _, answer, heavy = turn(monkeypatch, question, statements, direct=direct, depths=depths)
    assert answer == "The numbers are 4213, 4711, pond."
    assert heavy == ["The numbers are ", "The numbers are 4213, ", "The numbers are 4213, 4711,"]
    question = Question("Which? Values only.", ", ".join(values), values, "multi", True, (2, 0, 1))
    thought, answer, _ = turn(monkeypatch, question, statements, depths=depths)
    assert thought == f"<think>{statements[0]} {statements[2]} {statements[1]}</think>"
    assert answer == "4213, 4711, pond"


@pytest.mark.parametrize("direct", [False, True])
def test_what_had_to_be_found_weighs_most(monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    """Where a statement parts from others, the end of a first hop and values, not what looks like them in the question."""
    chain = Question("?", "", ("Bobton",), "two_hop", False, (0, 1), "Bob")
    thought, answer, heavy = turn(monkeypatch, chain, (LAMP, HOME), direct=direct)
    assert (thought, answer) == ("<think></think>" if direct else "", f"{LAMP} {HOME}")
    assert heavy == [
        "", "The", "The owner of the lamp is ", f"{LAMP} ", f"{LAMP} The", f"{LAMP} The home of Bob is ",
    ]  # fmt: skip


def test_a_value_alone_is_found_in_a_thought(monkeypatch: pytest.MonkeyPatch) -> None:
    question = Question("? Value only.", "Bobton", ("Bobton",), "two_hop", True, (0, 1), "Bob")
    thought, answer, heavy = turn(monkeypatch, question, (LAMP, HOME))
    assert (thought, answer) == (f"<think>{LAMP} {HOME}</think>", "Bobton")
    assert heavy[0] == "" and heavy[-1] == f"{LAMP} The home of Bob is "
    thought, answer, heavy = turn(monkeypatch, question, (LAMP, HOME), direct=True)
    assert (thought, answer, heavy) == ("<think></think>", "Bobton", [""])


def test_quotes_are_told_in_the_order_of_the_document(monkeypatch: pytest.MonkeyPatch) -> None:
    question = Question("Which?", "", ("owl", "hare"), "worded_multi", False, (0, 1))
    thought, answer, heavy = turn(monkeypatch, question, ANN, depths=(0.9, 0.2))
    assert (thought, answer) == ("", f"{ANN[1]} {ANN[0]}")
    assert heavy == ["", "It is said that Ann also keeps a", f"{ANN[1]} ", f"{ANN[1]} Ann keeps an"]


@pytest.mark.parametrize("short", [False, True])
def test_what_is_not_told_is_declined_without_a_thought(monkeypatch: pytest.MonkeyPatch, short: bool) -> None:
    question = Question("Where is the home of Rob?", ABSENT, (), "absent", short, ())
    assert turn(monkeypatch, question, (LAMP, HOME)) == ("", ABSENT, [])


@pytest.mark.parametrize("seed", range(4))
def test_several_values_of_a_sample(seed: int) -> None:
    """Whatever a sample's text is, the values of an answer stand in it one behind the other."""
    drawn = sampler(seed)
    tokenizer, found = drawn.tokenizer, 0
    for _ in range(100):
        sample = drawn.sample(512)
        for family, (_, (a, b), places) in zip(sample.families, sample.asks, strict=True):
            if family != "multi":
                continue
            answer = tokenizer.decode(sample.ids[a:b]).rpartition(THOUGHTS[1])[2]
            stated = [tokenizer.decode(sample.ids[p:q]) for p, q in sorted(places)]
            values = [v.strip(" .") for v in answer.split(" are ")[-1].split(", ")]
            assert len(values) == len(stated)
            assert all(value.lower() in statement.lower() for value, statement in zip(values, stated, strict=True))
            found += 1
    assert found > 5
