"""Passages behind a draft are read again; what comes back belongs to the original documents."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from qllm_runtime import answering, rereading
from qllm_runtime.document_memory import DocumentMemory
from qllm_runtime.engine import QLLM
from qllm_runtime.prompt import build_prompt
from qllm_runtime.request import Request
from qllm_runtime.samples import story
from qllm_runtime.sources import trace_back
from qllm_runtime.types import Document, Piece, Source, Turn

FACT = "The code of the polite fence is 437396."
QUESTION = "What is the code of the polite fence?"


@pytest.fixture(scope="module")
def reader() -> QLLM:
    return QLLM.from_pretrained("reader")


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    prose = story(random.Random("reread"), 12_000)
    half = len(prose) // 2
    return [Document("\n\n".join(prose[:half]), "first"), Document("\n\n".join([FACT, *prose[half:]]), "second")]


@pytest.fixture(scope="module")
def memory(reader: QLLM, documents: list[Document]) -> Iterator[DocumentMemory]:
    with reader.read(documents) as memory:
        yield memory


@pytest.mark.parametrize("mode", ["query_aware", "read_once"])
def test_passages_are_read_again_and_belong_to_the_original(reader: QLLM, documents: list[Document], mode: str) -> None:
    told: list[tuple[int, int]] = []
    answer = reader.ask(QUESTION, documents, mode=mode, max_tokens=40, progress=lambda *count: told.append(count))
    assert (answer.mode, answer.reread) == (mode, True)
    assert "437396" in answer.text
    for source in answer.sources:
        assert source.text == documents[source.document].text[source.start : source.end]
        assert source.title == documents[source.document].title
    assert FACT in answer.sources[0].text
    once = reader.ask(QUESTION, documents, mode=mode, reread=False, max_tokens=40)
    assert not once.reread
    assert answer.usage.prompt_tokens == once.usage.prompt_tokens  # what the caller gave, each token once
    assert answer.usage.cache_read_tokens == 0
    assert [count for count, _ in told] == sorted({count for count, _ in told})  # one reading, counted once
    assert told[-1] == (once.usage.prompt_tokens, once.usage.prompt_tokens)


def test_memory_and_stream_give_the_same(reader: QLLM, documents: list[Document], memory: DocumentMemory) -> None:
    inline = reader.ask(QUESTION, documents, mode="read_once", max_tokens=40)
    asked = reader.ask(QUESTION, memory, max_tokens=40)
    *pieces, last = list(reader.stream(QUESTION, memory, max_tokens=40))
    assert asked.reread
    assert asked.text == inline.text
    assert asked.usage.cache_read_tokens == memory.n_tokens
    assert last.answer is not None
    assert "".join(piece.text for piece in pieces) == last.answer.text == asked.text
    assert [(s.document, s.start, s.end) for s in asked.sources] == [
        (s.document, s.start, s.end) for s in inline.sources
    ]


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What drafts and answers were written for."""
    seen: list[Request] = []
    answer_request = answering.answer_request

    def watch(request: Request, *args: Any) -> Iterator[Piece]:
        seen.append(request)
        return answer_request(request, *args)

    monkeypatch.setattr(answering, "answer_request", watch)
    return seen


def test_passages_that_fill_the_window_are_read_by_themselves(
    reader: QLLM,
    documents: list[Document],
    memory: DocumentMemory,
    requests: list[Request],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rereading, "WORTH_FINDING", 0)  # more passages
    history = [Turn("user", ("Who is there?",)), Turn("assistant", ("The text does not say.",))]
    answer = reader.ask(QUESTION, memory, history=history, max_tokens=40)
    draft, last = requests[-2:]
    assert draft.reading is not None
    assert last.reading is None
    assert "437396" in answer.text
    assert answer.reread
    assert answer.usage.cache_read_tokens == memory.n_tokens
    assert [turn.role for turn in last.turns] == ["user", "assistant", "user"]
    assert last.turns[0].content == history[0].content
    passages = {document.text for document in last.documents}
    assert any(FACT in passage for passage in passages)
    for source in answer.sources:
        assert source.text == documents[source.document].text[source.start : source.end]
        assert source.title == documents[source.document].title
        assert any(source.text in passage for passage in passages)


def test_elsewhere_the_whole_text_stays_within_reach(
    reader: QLLM, documents: list[Document], requests: list[Request]
) -> None:
    wide = QLLM(reader.model, reader.tokenizer, memory=reader.memory.replace(n_local=512))
    lookups: list[int] = []
    answer = wide.ask(QUESTION, documents, max_tokens=4, on_lookup=lambda _, record: lookups.append(record.n_blocks))
    draft, last = requests
    assert last.reading is draft.reading is not None
    assert last.excerpts
    assert last.documents == tuple(documents)
    blocks = (answer.usage.prompt_tokens - wide.memory.n_local - wide.memory.n_init) // wide.memory.block_size
    assert lookups[-1] >= blocks - 1


@pytest.mark.parametrize(("n", "alone"), [(20, False), (30, True)])
def test_passages_are_by_themselves_where_they_fill_half_of_the_window(
    llm: QLLM, requests: list[Request], monkeypatch: pytest.MonkeyPatch, n: int, alone: bool
) -> None:
    text = "It was Ann who came. " * 15
    monkeypatch.setattr(rereading, "in_order", lambda *_: (Source(0, None, 0, n, 0.0, text[:n]),))
    llm.ask("Who?", text, max_tokens=1)
    assert llm.memory.n_local == 48
    assert (requests[-1].reading is None) is alone


def test_documents_of_tools_are_never_left_out() -> None:
    asks, document = Turn("user", (QUESTION,)), Document(FACT)
    for turns, alone in (
        ([Turn("user", (document, QUESTION))], True),
        ([asks, Turn("assistant", ("",)), Turn("tool", (document,))], False),
        ([Turn("user", (document,)), Turn("assistant", ("Yes?",)), asks], False),
        ([Turn("user", (document, "Read.")), Turn("assistant", ("Yes?",)), asks], True),
    ):
        assert rereading._can_be_alone(cast(Request, SimpleNamespace(turns=turns))) is alone


def test_a_conversation_reads_passages_for_its_last_question(reader: QLLM, memory: DocumentMemory) -> None:
    history = [Turn("user", ("Who is there?",)), Turn("assistant", ("The text does not say.",))]
    answer = reader.ask(QUESTION, memory, history=history, max_tokens=40)
    assert answer.reread
    assert "437396" in answer.text
    assert FACT in answer.sources[0].text


def test_nothing_is_read_again_without_need(reader: QLLM, documents: list[Document]) -> None:
    short = reader.ask(QUESTION, FACT, max_tokens=20)
    assert "437396" in short.text
    assert not short.reread  # all of it is in the window
    assert not reader.chat([Turn("user", ("Who are you?",))], max_tokens=4).reread
    llm = QLLM(reader.model, reader.tokenizer, memory=reader.memory.replace(policy="streaming"))
    assert not llm.ask(QUESTION, documents, max_tokens=4).reread  # nothing is looked up


def test_mass_of_a_passage_moves_to_its_document(reader: QLLM) -> None:
    text = f"It rained. {FACT} It rained again."
    start = text.index(FACT)
    excerpt = Source(0, None, start, start + len(FACT), 1.0, FACT)
    turns = [Turn("user", (Document(text), Document(FACT), QUESTION))]
    prompt = build_prompt(reader.tokenizer, turns, query=QUESTION, mode="read_once")
    home, again = prompt.document_spans
    mass = np.zeros(len(prompt.ids))
    mass[again.start : again.end] = np.arange(1, again.end - again.start + 1)
    moved, whole = trace_back(mass, prompt, [excerpt])
    assert whole.document_spans == (home,)
    there = moved[home.start : home.end]
    near = mass[again.start : again.end]
    prominence = np.maximum(near - near.mean(), 0)
    assert there.sum() == pytest.approx(prominence.sum())
    inside = (home.offsets[:, 0] < start + len(FACT)) & (home.offsets[:, 1] > start)
    assert there[~inside].sum() == 0
    last = int(np.flatnonzero(inside)[-1])
    assert there[last] == prominence.max()
    passages_of_two = [excerpt, Source(0, None, 0, len("It rained."), 1.0, "It rained.")]
    turns = [Turn("user", (Document(text), Document(FACT), Document("It rained."), QUESTION))]
    prompt = build_prompt(reader.tokenizer, turns, query=QUESTION, mode="read_once")
    home, first, second = prompt.document_spans
    mass = np.zeros(len(prompt.ids))
    mass[first.start : first.end], mass[second.start : second.end] = 1.0, 3.0
    moved, _ = trace_back(mass, prompt, passages_of_two)
    assert moved[home.start : home.start + 3].max() > 0  # more than the mean ...
    assert (
        moved[home.start + int(np.flatnonzero(home.offsets[:, 0] >= start)[0]) :][: len(prominence)].max() == 0
    )  # ... or not
