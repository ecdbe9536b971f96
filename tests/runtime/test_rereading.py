"""Mode reread: passages behind a draft are read again; what comes back belongs to the original documents."""

from __future__ import annotations

import random

import pytest

from qllm_runtime.engine import QLLM
from qllm_runtime.samples import story
from qllm_runtime.types import Document, Turn

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


def test_answers_from_passages_of_the_original(reader: QLLM, documents: list[Document]) -> None:
    answer = reader.ask(QUESTION, documents, mode="reread", max_tokens=40)
    assert answer.mode == "reread"
    assert "437396" in answer.text
    assert answer.sources
    for source in answer.sources:
        assert source.text == documents[source.document].text[source.start : source.end]
        assert source.title == documents[source.document].title
    assert FACT in answer.sources[0].text
    once = reader.ask(QUESTION, documents, mode="read_once", max_tokens=40)
    assert answer.usage.prompt_tokens > once.usage.prompt_tokens  # both readings count


def test_memory_and_stream_give_the_same(reader: QLLM, documents: list[Document]) -> None:
    inline = reader.ask(QUESTION, documents, mode="reread", max_tokens=40)
    with reader.read(documents) as memory:
        asked = reader.ask(QUESTION, memory, mode="reread", max_tokens=40)
        *pieces, last = list(reader.stream(QUESTION, memory, mode="reread", max_tokens=40))
    assert asked.text == inline.text
    assert asked.usage.cache_read_tokens == memory.n_tokens
    assert last.answer is not None
    assert "".join(piece.text for piece in pieces) == last.answer.text == asked.text
    assert [(s.document, s.start, s.end) for s in asked.sources] == [
        (s.document, s.start, s.end) for s in inline.sources
    ]


def test_nothing_to_read_again(reader: QLLM) -> None:
    answer = reader.chat([Turn("user", ("Who are you?",))], mode="reread", max_tokens=4)
    assert answer.sources == ()
    assert answer.mode == "reread"
