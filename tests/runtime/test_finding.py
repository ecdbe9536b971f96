"""The layer whose lookups find facts, and the passages that they name."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny
from transformers import LlamaConfig, LlamaForCausalLM

from qllm_runtime import finding, rereading
from qllm_runtime.engine import QLLM
from qllm_runtime.prompt import build_prompt
from qllm_runtime.samples import story
from qllm_runtime.sources import in_order, surroundings
from qllm_runtime.types import Document, Source, Turn

FACTS = [f"One of the special magic numbers for walrus-lamp is: {number}." for number in (4127, 902833, 51604)]
QUESTION = "What are all the special magic numbers for walrus-lamp mentioned in the provided text?"


@pytest.fixture(scope="module")
def reader() -> QLLM:
    return QLLM.from_pretrained("reader")


@pytest.fixture(scope="module")
def document() -> Document:
    paragraphs = story(random.Random("finding"), 30_000)
    for n, fact in enumerate(FACTS):
        at = (2 * n + 1) * len(paragraphs) // 7
        paragraphs[at] = f"{paragraphs[at]} {fact}"
    return Document("\n\n".join(paragraphs), "story")


@pytest.fixture
def excerpts(monkeypatch: pytest.MonkeyPatch) -> list[list[Source]]:
    """Passages that were read again, of each answer."""
    seen: list[list[Source]] = []

    def watch(*args: Any) -> tuple[Source, ...]:
        found = in_order(*args)
        seen.append(list(found))
        return found

    monkeypatch.setattr(rereading, "in_order", watch)
    return seen


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[np.ndarray]]:
    """What models were asked about the story; nothing is known of them ahead of a test or behind it."""
    mrr: list[np.ndarray] = []
    ask = finding._mean_reciprocal_rank

    def watch(*args: Any) -> np.ndarray:
        mrr.append(ask(*args))
        return mrr[-1]

    monkeypatch.setattr(finding, "_mean_reciprocal_rank", watch)
    monkeypatch.setattr(rereading, "WORTH_FINDING", 0)
    finding._known.clear()
    yield mrr
    finding._known.clear()


def test_all_values_of_a_key_are_found(
    reader: QLLM,
    document: Document,
    excerpts: list[list[Source]],
    asked: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rereading, "BESIDE_NAMED", 0)  # nothing by attention
    reader.ask(QUESTION, document, max_tokens=2)
    passages = excerpts.pop()
    assert all(any(fact in passage.text for passage in passages) for fact in FACTS)
    assert len(passages) <= rereading.NAMED_BLOCKS
    assert all(passage.score == 0 for passage in passages)
    for passage in passages:
        assert passage.text == document.text[passage.start : passage.end]
        assert passage.title == "story"
    assert [p.start for p in passages] == sorted(p.start for p in passages)


def test_a_model_is_asked_once(reader: QLLM, document: Document, asked: list[np.ndarray]) -> None:
    first = reader.ask(QUESTION, document, max_tokens=8)
    second = reader.ask(QUESTION, document, max_tokens=8)
    assert first.text == second.text
    (mrr,) = asked
    assert mrr.shape == (reader.model.config.num_hidden_layers,)
    assert mrr.max() > 0.8  # one layer finds, and which is beyond doubt
    assert np.sort(mrr)[-2] < mrr.max() - 0.25


def test_reading_the_story_is_told_and_done_once(
    reader: QLLM, document: Document, asked: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    totals = []
    for changes in ({}, {"chunk_size": 1024}, {"device_blocks": 64}):
        other = QLLM(reader.model, reader.tokenizer, memory=reader.memory.replace(**changes))
        counts: list[tuple[int, int]] = []
        other.ask(QUESTION, document, max_tokens=2, progress=lambda *count, counts=counts: counts.append(count))
        assert [done for done, _ in counts] == sorted(done for done, _ in counts)
        assert counts[-1][0] == counts[-1][1]
        totals.append(counts[-1][1])
    assert len(asked) == 1
    assert totals[0] > totals[1] + 1000 and totals[1] == totals[2]


def test_a_model_that_finds_nothing_goes_by_attention(
    llm: QLLM, excerpts: list[list[Source]], asked: list[np.ndarray]
) -> None:
    llm = QLLM(llm.model, llm.tokenizer, llm.memory.replace(n_local=96))
    text = "\n\n".join(story(random.Random("tiny"), 1_500))
    answer = llm.ask("Who?", text, max_tokens=2)
    assert answer.reread
    (mrr,) = asked
    assert mrr.max() < finding.MIN_MRR
    drafted = [source for source in excerpts[0] if source.score > 0]
    assert drafted == excerpts[0]


def test_the_story_is_read_in_no_wider_window_than_documents_are(asked: list[np.ndarray]) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    changes = {"max_position_embeddings": 256, "rope_parameters": rope}  # refuses to have more in view
    model = LlamaForCausalLM(LlamaConfig(**{**tiny.model().config.to_dict(), **changes})).eval()
    for n_local in (96, 48):  # the story's questions have more tokens than the latter
        llm = QLLM(model, tiny.tokenizer(), tiny.MEMORY.replace(n_local=n_local))
        assert llm.ask("Who?", "It was Ann who came to the house. " * 9, max_tokens=2).reread
    assert len(asked) == 1


def test_lookups_without_a_question_name_nothing(
    reader: QLLM, document: Document, excerpts: list[list[Source]], asked: list[np.ndarray]
) -> None:
    for changes in ({"policy": "infllm"}, {"query_weight": 0.0}):
        other = QLLM(reader.model, reader.tokenizer, memory=reader.memory.replace(**changes))
        assert other.ask(QUESTION, document, max_tokens=2).reread
        assert all(source.score > 0 for source in excerpts.pop())
    assert not asked


def test_a_block_between_two_documents_gives_a_passage_of_each(reader: QLLM) -> None:
    documents = (Document("It rained. The end came soon."), Document("A new day began. Nobody was there."))
    turns = [Turn("user", (*documents, QUESTION))]
    prompt = build_prompt(reader.tokenizer, turns, query=QUESTION, mode="read_once")
    first, second = prompt.document_spans
    found = surroundings(first.end - 2, second.start + 2, prompt, documents)
    assert [(source.document, source.text) for source in found] == [(0, "The end came soon."), (1, "A new day began.")]
    assert surroundings(0, first.start, prompt, documents) == []


def test_passages_that_touch_become_one() -> None:
    text = "One came. Two went.\n\nThree stayed. Four slept."
    documents = (Document(text), Document(text))

    def passage(document: int, part: str, score: float) -> Source:
        start = text.index(part)
        return Source(document, None, start, start + len(part), score, part)

    given = [
        passage(1, "One came.", 0.1),
        passage(0, "Three stayed.", 0.2),
        passage(0, "One came.", 0.1),
        passage(0, "Two went.\n\nThree stayed.", 0.0),
    ]
    joined = in_order(given, documents)
    whole = "One came. Two went.\n\nThree stayed."
    assert joined == (Source(0, None, 0, len(whole), 0.2, whole), given[0])
