"""What of a call's arguments and messages goes to the engine, and in which form."""

from __future__ import annotations

import json
import warnings

import pytest
from llama_index.core import Document
from llama_index.core.base.llms.types import (
    CacheControl,
    CachePoint,
    ChatMessage,
    CitableBlock,
    CitationBlock,
    TextBlock,
)

from qllm_integrations.llama_index import QLLM
from qllm_runtime import types
from qllm_runtime.errors import InvalidRequestError
from tests.integrations.llama_index.fake_engine import FakeEngine

BOOK = "The lamp was lit at dusk. The secret number of the harbour is 4711. Nobody spoke."
QUESTION = "What is the secret number?"


def citable(text: str) -> CitableBlock:
    return CitableBlock(title="", source="", content=text)


def test_the_mode_of_the_model_is_for_documents_in_messages(engine: FakeEngine) -> None:
    llm = QLLM.from_engine(engine, mode="query_aware")
    llm.complete(QUESTION, memory=llm.read(BOOK))
    llm.complete(QUESTION)
    assert [request["mode"] for request in engine.requests] == [None, "query_aware"]


def test_without_a_mode_the_engine_chooses(llm: QLLM, engine: FakeEngine) -> None:
    llm.complete(QUESTION)
    llm.complete(QUESTION, mode="query_aware")
    assert [request["mode"] for request in engine.requests] == [None, "query_aware"]


def test_template_variables_of_the_call_outweigh_the_models(engine: FakeEngine) -> None:
    llm = QLLM.from_engine(engine, template_kwargs={"effort": "high", "think": True})
    llm.complete("Hi", template_kwargs={"effort": "low"})
    assert engine.requests[-1]["template_kwargs"] == {"effort": "low", "think": True}


def test_a_document_behind_the_cache_point_stays_in_its_message(llm: QLLM, engine: FakeEngine) -> None:
    point = CachePoint(cache_control=CacheControl(type="ephemeral"))
    llm.chat([ChatMessage(blocks=[citable(BOOK), point, citable("A letter."), TextBlock(text=QUESTION)])])
    assert [document.text for document in engine.requests[-1]["memory"].documents] == [BOOK]
    assert [document.text for document in engine.requests[-1]["turns"][-1].documents] == ["A letter."]


def test_a_kept_document_is_cited_as_the_message_names_it(llm: QLLM, engine: FakeEngine) -> None:
    point = CachePoint(cache_control=CacheControl(type="ephemeral"))
    for source in ("old.txt", "new.txt"):
        document = CitableBlock(title="log", source=source, content=BOOK)
        response = llm.chat([ChatMessage(blocks=[document, point, TextBlock(text=QUESTION)])])
        cited = {block.source for block in response.message.blocks if isinstance(block, CitationBlock)}
        assert cited == {source}
    assert len(engine.readings) == 1


def test_documents_are_read_in_the_order_given(llm: QLLM) -> None:
    def page(text: str, path: str) -> Document:
        return Document(text=text, metadata={"file_path": path, "page_label": "1"})

    document = Document(text="lone")
    memory = llm.read(
        ["text", page("a1", "a"), document.model_copy(), page("b1", "b"), types.Document("own"), page("a2", "a"), "end"]
    )
    assert [document.text for document in memory.documents] == ["text", "a1\n\na2", "lone", "b1", "own", "end"]


def test_json_that_ends_with_the_last_token_is_whole(llm: QLLM, engine: FakeEngine) -> None:
    schema = {"type": "object", "properties": {"number": {"type": "integer", "maximum": 9}}, "required": ["number"]}
    text = llm.complete(QUESTION, response_schema=schema).text
    response = llm.complete(QUESTION, response_schema=schema, max_tokens=len(text))
    assert (response.text, response.raw["finish_reason"]) == (text, "length")
    assert isinstance(json.loads(text)["number"], int)
    with pytest.raises(InvalidRequestError, match="JSON"):
        llm.complete(QUESTION, response_schema=schema, max_tokens=len(text) - 1)


def test_a_message_is_too_long_for_a_query_in_tokens_only(
    llm: QLLM, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "count_tokens", lambda text: len(text.split()))
    limit = engine.memory.n_local
    assert llm.complete("word " * limit).raw["query_source"] == "fallback"
    assert llm.complete("word " * (limit + 1)).raw["query_source"] == "none"


def test_false_shows_no_tools(llm: QLLM, engine: FakeEngine) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    for choice in (False, "none"):
        llm.complete(QUESTION, tools=tools, tool_choice=choice)
        assert engine.requests[-1]["tools"] is None


def test_documents_without_a_question_are_warned_about(llm: QLLM) -> None:
    message = ChatMessage(blocks=[citable(BOOK)])
    with pytest.warns(UserWarning, match="no question in the messages"):
        llm.chat([message])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm.chat([message], query="")


async def test_both_ways_of_reading_show_a_bar(llm: QLLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.read(BOOK, show_progress=True)
    assert "Reading" in capsys.readouterr().err
    await llm.aread(BOOK, show_progress=True)
    assert "Reading" in capsys.readouterr().err
