"""Which text is the document, which the question: every input shape, down to the routed token span."""

from __future__ import annotations

import base64
from functools import reduce
from operator import add
from typing import Any

import pytest
from fake_engine_lc import FakeEngine
from ishmael import merging_tokenizer
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
)
from langchain_core.messages.content import create_plaintext_block
from pdf_by_hand import pdf_bytes

from qllm_integrations.langchain import QLLMChat
from qllm_integrations.langchain.messages import translate
from qllm_runtime.errors import DocumentError, InvalidRequestError
from qllm_runtime.types import Document

BOOK = "Call me Ishmael. Who wrote the letter? Nobody knows.\r\n\tThe sea 🌊 was calm."
ASK = "Who wrote the letter?"
TEXT = {"type": "text", "text": ASK}
CALL = {"name": "look", "args": {"at": "sea"}, "id": "c1", "type": "tool_call"}


def plain(**fields: Any) -> dict[str, Any]:
    return {"type": "text-plain", "mime_type": "text/plain", **fields}


def encode(text: str | bytes) -> str:
    return base64.b64encode(text.encode() if isinstance(text, str) else text).decode()


DOCUMENT_SHAPES: dict[str, dict[str, Any]] = {
    "text-plain": plain(text=BOOK, title="novel.txt"),
    "factory": dict(create_plaintext_block(text=BOOK, title="novel.txt", citations={"enabled": True})),
    "base64": plain(base64=encode(BOOK), title="novel.txt"),
    "file of text": {"type": "file", "mime_type": "text/plain", "base64": encode(BOOK), "filename": "novel.txt"},
    "anthropic text": {
        "type": "document",
        "source": {"type": "text", "media_type": "text/plain", "data": BOOK},
        "title": "novel.txt",
        "citations": {"enabled": True},
    },
    "anthropic base64": {
        "type": "document",
        "source": {"type": "base64", "media_type": "text/plain", "data": encode(BOOK)},
        "title": "novel.txt",
    },
    "anthropic content": {
        "type": "document",
        "source": {"type": "content", "content": [{"type": "text", "text": BOOK}]},
        "title": "novel.txt",
    },
    "search result": {
        "type": "search_result",
        "title": "novel.txt",
        "source": "x",
        "content": [{"type": "text", "text": BOOK}],
    },
    "document in a search result": {"type": "search_result", "title": "novel.txt", "content": [plain(text=BOOK)]},
    "bedrock text": {"document": {"name": "novel.txt", "format": "txt", "source": {"text": BOOK}}},
    "bedrock bytes": {"document": {"name": "novel.txt", "format": "txt", "source": {"bytes": BOOK.encode()}}},
    "non-standard": {"type": "non_standard", "value": {"document": {"name": "novel.txt", "source": {"text": BOOK}}}},
}

CONVERSATIONS: dict[str, tuple[list[BaseMessage], str, str]] = {
    "document then text": ([HumanMessage([plain(text=BOOK), TEXT])], ASK, "message"),
    "text then document": ([HumanMessage([TEXT, plain(text=BOOK)])], ASK, "message"),
    "two messages": ([HumanMessage([plain(text=BOOK)]), HumanMessage(ASK)], ASK, "message"),
    "two texts": (
        [HumanMessage([{"type": "text", "text": "Think."}, plain(text=BOOK), TEXT])],
        f"Think.\n\n{ASK}",
        "message",
    ),
    "marked block": (
        [
            HumanMessage(
                [plain(text=BOOK), {**TEXT, "extras": {"qllm_role": "query"}}, {"type": "text", "text": "Be brief."}]
            )
        ],
        ASK,
        "block",
    ),
    "marked block earlier": (
        [
            HumanMessage([plain(text=BOOK), {**TEXT, "extras": {"qllm_role": "query"}}]),
            AIMessage("?"),
            HumanMessage("Yes."),
        ],
        ASK,
        "block",
    ),
    "follow-up": (
        [HumanMessage([plain(text=BOOK), TEXT]), AIMessage("Ishmael"), HumanMessage("And who read it?")],
        "And who read it?",
        "message",
    ),
    "system prompt": ([SystemMessage("Be brief."), HumanMessage([plain(text=BOOK), TEXT])], ASK, "message"),
    "no document": ([HumanMessage(ASK)], ASK, "fallback"),
    "question ahead of a message with the document": (
        [HumanMessage(ASK), HumanMessage([plain(text=BOOK)])],
        ASK,
        "fallback",
    ),
    "tool loop": (
        [
            HumanMessage([plain(text=BOOK), TEXT]),
            AIMessage("", tool_calls=[CALL]),
            ToolMessage("waves", tool_call_id="c1"),
        ],
        ASK,
        "message",
    ),
    "tool loop in anthropic form": (
        [
            HumanMessage([plain(text=BOOK), TEXT]),
            AIMessage(
                [
                    {"type": "text", "text": "Hm."},
                    {"type": "tool_use", "id": "c1", "name": "look", "input": {"at": "sea"}},
                ]
            ),
            HumanMessage(
                [{"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "waves"}]}]
            ),
        ],
        ASK,
        "message",
    ),
    "document from a tool": (
        [HumanMessage(ASK), AIMessage("", tool_calls=[CALL]), ToolMessage([plain(text=BOOK)], tool_call_id="c1")],
        ASK,
        "fallback",
    ),
    "names and odd roles": (
        [ChatMessage(role="developer", content="Be brief."), HumanMessage(ASK, name="ann")],
        ASK,
        "fallback",
    ),
    "function message": ([HumanMessage(ASK), FunctionMessage(name="look", content="waves")], ASK, "fallback"),
    "no question": ([HumanMessage([plain(text=BOOK)])], "", "none"),
}


@pytest.mark.parametrize("block", DOCUMENT_SHAPES.values(), ids=DOCUMENT_SHAPES)
def test_documents_in_every_shape(block: dict[str, Any]) -> None:
    request = translate([HumanMessage([block, TEXT])])
    (document,) = request.documents
    assert document.text == BOOK
    assert document.title == "novel.txt"
    assert (request.query, request.query_source) == (ASK, "message")


@pytest.mark.parametrize(("messages", "query", "source"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_the_question_is_found(messages: list[BaseMessage], query: str, source: str) -> None:
    request = translate(messages)
    assert (request.query, request.query_source) == (query, source)
    assert translate(messages, query="Which?").query_source == "explicit"


@pytest.mark.parametrize("tokenizer", ["bytes", "merges"])
@pytest.mark.parametrize("mode", ["query_aware", "read_once"])
@pytest.mark.parametrize(("messages", "query", "source"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_the_routed_span_is_exactly_the_question(
    messages: list[BaseMessage], query: str, source: str, mode: str, tokenizer: str
) -> None:
    engine = FakeEngine()
    if tokenizer == "merges":
        engine.tokenizer = merging_tokenizer()
    ai = QLLMChat.from_engine(engine, mode=mode).invoke(messages)
    prompt = engine.requests[0]["prompt"]
    assert [engine.tokenizer.decode(prompt.ids[a:b]) for a, b in prompt.query_spans] == [query] * len(
        prompt.query_spans
    )
    assert bool(prompt.query_spans) == bool(query)
    assert ai.response_metadata["qllm"]["query"] == query
    assert ai.response_metadata["qllm"]["query_source"] == source
    assert ai.response_metadata["qllm"]["query_tokens"] == (
        prompt.query_spans[0][1] - prompt.query_spans[0][0] if query else 0
    )


def test_every_document_token_is_in_the_prompt() -> None:
    engine = FakeEngine()
    QLLMChat.from_engine(engine).invoke([HumanMessage([plain(text=BOOK), plain(text=BOOK[::-1]), TEXT])])
    prompt = engine.requests[0]["prompt"]
    texts = [engine.tokenizer.decode(prompt.ids[span.start : span.end]) for span in prompt.document_spans]
    assert texts == [BOOK, BOOK[::-1]]


def test_tool_calls_and_results_reach_the_template() -> None:
    messages, _, _ = CONVERSATIONS["tool loop in anthropic form"]
    _, call, result = translate(messages).turns
    assert call.text == "Hm."
    assert call.extras["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {"at": "sea"}}}
    ]
    assert (result.role, result.text, result.extras["tool_call_id"]) == ("tool", "waves", "c1")


def test_a_call_in_content_and_in_tool_calls_counts_once() -> None:
    block = {"type": "tool_use", "id": "c1", "name": "look", "input": {"at": "sea"}}
    turn = translate([HumanMessage("hi"), AIMessage([block], tool_calls=[CALL])]).turns[1]
    assert len(turn.extras["tool_calls"]) == 1


def chunk(**fields: Any) -> dict[str, Any]:
    return {"type": "tool_call_chunk", "index": 101, **fields}


@pytest.mark.parametrize(
    ("blocks", "calls"),
    [
        ([chunk(name=None, args='<tool_call>{"name": "look", "arg', id="c1")], []),
        ([chunk(name="look", args='{"at": "se', id="c1")], []),
        ([chunk(name="look", args=None, id="c1")], []),
        ([chunk(name="look", args="[1]", id="c1")], []),
        ([{"type": "invalid_tool_call", "name": "look", "args": "{}", "id": "c1", "error": "cut off"}], []),
        ([chunk(name="look", args='{"at": "sea"}', id="c1")], [CALL]),
        ([chunk(name="look", args='{"at": "sea"}', id=None)], [{**CALL, "id": None}]),
    ],
)
def test_calls_that_were_cut_off_are_passed_over(blocks: list[Any], calls: list[dict[str, Any]]) -> None:
    ai = AIMessage([{"type": "text", "text": "Hm."}, *blocks])
    turn = translate([HumanMessage("hi"), ai, HumanMessage("Go on.")]).turns[1]
    assert turn.text == "Hm."
    functions = [call["function"] for call in turn.extras.get("tool_calls", [])]
    assert functions == [{"name": call["name"], "arguments": call["args"]} for call in calls]
    if calls:
        known = translate([HumanMessage("hi"), AIMessage(blocks, tool_calls=[CALL])]).turns[1]
        assert known.extras["tool_calls"] == [{"id": "c1", "type": "function", "function": functions[0]}]
    for message in (HumanMessage(blocks), ToolMessage(blocks, tool_call_id="c1")):
        with pytest.raises(InvalidRequestError, match="no place"):
            translate([message])


@pytest.mark.parametrize("version", [None, "v1"])
def test_a_conversation_goes_on_after_a_call_that_was_cut_off(version: str | None) -> None:
    engine = FakeEngine(reply='Hm. <tool_call>{"name": "look", "arguments": {"at": "se')
    look = {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}}
    llm = QLLMChat.from_engine(engine, output_version=version).bind_tools([look])
    whole, streamed = llm.invoke("hi"), reduce(add, llm.stream("hi"))
    for ai in (whole, streamed):
        llm.invoke([HumanMessage("hi"), ai, HumanMessage("Go on.")])
        assert [turn.text for turn in engine.requests[-1]["turns"]] == ["hi", "Hm.", "Go on."]
        assert not engine.requests[-1]["turns"][1].extras
    for ai in [whole] if version else [whole, streamed]:
        assert [block["type"] for block in ai.content_blocks] == ["text", "invalid_tool_call"]
        assert ai.content_blocks[1]["args"] == ai.invalid_tool_calls[0]["args"]


def test_the_text_of_an_answer_stays_as_it_was() -> None:
    pieces = [{"type": "text", "text": "Call me"}, {"type": "text", "text": " Ishmael."}]
    ai = AIMessage(pieces)
    system, human, answer = translate([SystemMessage(pieces), HumanMessage(pieces), ai]).turns
    assert answer.text == ai.text == "Call me Ishmael."
    assert system.text == human.text == "Call me\n\n Ishmael."


def test_all_leading_system_turns_are_the_system_text() -> None:
    human = HumanMessage([plain(text=BOOK, cache_control={"type": "ephemeral"}), TEXT])
    for texts, system in ((["A"], "A"), (["A", "B"], "A\n\nB"), (["", "A"], "A"), ([""], None), ([], None)):
        messages = [*map(SystemMessage, texts), human]
        assert translate([*messages, AIMessage("Hm."), SystemMessage("Late.")]).system == system
        engine = FakeEngine()
        QLLMChat.from_engine(engine).invoke(messages)
        assert engine.requests[0]["memory"].system == system


def test_reasoning_and_cache_marks_are_passed_over() -> None:
    ai = AIMessage(
        [
            {"type": "thinking", "thinking": "secret"},
            {"type": "reasoning", "reasoning": "secret"},
            {"type": "text", "text": "Hi."},
        ]
    )
    human = HumanMessage(
        [{"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}, {"cachePoint": {"type": "default"}}]
    )
    turns = translate([HumanMessage("a"), ai, human]).turns
    assert [turn.text for turn in turns] == ["a", "Hi.", "Hello"]


def test_pdf_pages_are_known() -> None:
    data = encode(pdf_bytes("Call me Ishmael.", "The white whale."))
    for block in (
        {"type": "file", "mime_type": "application/pdf", "base64": data},
        {"type": "file", "mime_type": "text/plain", "base64": f"data:application/pdf;base64,{data}"},
    ):
        (document,) = translate([HumanMessage([block, TEXT])]).documents
        assert "Ishmael" in document.text
        assert len(document.metadata["page_starts"]) == 2


def test_context_is_shown_with_the_title() -> None:
    (document,) = translate([HumanMessage([plain(text=BOOK, title="novel.txt", context="1851"), TEXT])]).documents
    assert document.title == "novel.txt (1851)"
    assert document.metadata["title"] == "novel.txt"


def test_text_beside_the_documents_is_one_text_and_nothing_is_lost() -> None:
    (turn,) = translate([HumanMessage([{"type": "text", "text": "A"}, plain(text=BOOK), "B"])]).turns
    assert turn.content == (Document(BOOK), "A\n\nB")


@pytest.mark.parametrize(
    ("block", "names"),
    [
        ({"type": "image", "url": "https://x/y.png"}, "image"),
        ({"type": "image_url", "image_url": {"url": "https://x/y.png"}}, "image"),
        ({"type": "audio", "base64": "AA==", "mime_type": "audio/wav"}, "audio"),
        ({"type": "video", "base64": "AA==", "mime_type": "video/mp4"}, "video"),
        (plain(url="https://x/y.txt"), "URL"),
        (plain(), "file_id"),
        (plain(base64="&&&"), "base64"),
        ({"type": "mystery"}, "mystery"),
        ({"type": "document", "source": {"type": "url", "url": "https://x"}}, "url"),
        ({"type": "document"}, "source"),
        ({"type": "text", "text": "x", "extras": {"qllm_role": "qeury"}}, "qeury"),
        ({"type": ["text"]}, "'type' is of type list"),
        ({"type": "text", "text": None}, "'text' is None"),
        ({"type": "text", "text": 5}, "'text' is of type int"),
        ({"type": "text", "text": "x", "extras": "y"}, "'extras'"),
        ({"type": "refusal", "refusal": None}, "'refusal' is None"),
        ({"type": "function_call", "name": "look", "arguments": "{bad"}, "'look' are not valid JSON"),
        ({"type": "function_call", "name": "look", "arguments": "[1]"}, "'look' are of type list"),
        ({"type": "tool_use", "name": "look", "input": 5}, "'look' are of type int"),
        ({"type": "tool_use", "name": "look", "id": ["x"], "input": {}}, "'id'"),
        ({"type": "tool_result", "tool_use_id": "x", "content": 5}, "content is of type int"),
        ({"type": "tool_result", "tool_use_id": "x", "content": [5]}, "block 1: a block is a dictionary"),
        ({"type": "search_result", "content": 5}, "content is of type int"),
        ({"type": "search_result", "content": [plain(file_id="x")]}, "only text and documents"),
        (plain(text=BOOK, extras="x"), "'extras'"),
        (plain(text=BOOK, extras={"metadata": "x"}), "'metadata'"),
        (plain(base64=5), "base64 data is of type int"),
        ({"type": "file", "base64": encode(BOOK), "mime_type": 5}, "'mime_type'"),
        ({"type": "document", "source": {"type": "base64", "data": 5}}, "base64 data is of type int"),
        ({"type": "document", "source": {"type": "content", "content": 5}}, "content is of type int"),
        ({"document": "x"}, "'document'"),
        ({"document": {"source": "x"}}, "'source'"),
    ],
)
def test_unsupported_blocks_are_refused_by_name_and_place(block: dict[str, Any], names: str) -> None:
    with pytest.raises(InvalidRequestError, match=names) as caught:
        translate([SystemMessage("Be brief."), HumanMessage([TEXT, block])])
    assert "message 2 (human), block 2" in str(caught.value)


@pytest.mark.parametrize("block", [plain(text=" "), plain(base64=""), plain(base64=encode(b"\x00\x01\x02"))])
def test_documents_without_text_are_refused(block: dict[str, Any]) -> None:
    with pytest.raises(DocumentError, match="message 1"):
        translate([HumanMessage([block, TEXT])])


def test_other_bad_input() -> None:
    for messages, words in (
        ([], "no messages"),
        ([HumanMessage("")], "empty"),
        ([SystemMessage([plain(text=BOOK)]), HumanMessage(ASK)], "text only"),
        ([AIMessage([plain(text=BOOK)])], "text only"),
        ([ChatMessage(role="oracle", content="hi")], "oracle"),
        ([RemoveMessage(id="1")], "remove"),
        ([HumanMessage([plain(file_id="a"), plain(file_id="b"), TEXT])], "add_documents"),
        ([HumanMessage([{"type": "tool_use", "id": "1", "name": "f", "input": {}}])], "no place"),
    ):
        with pytest.raises(InvalidRequestError, match=words):
            translate(messages)
    with pytest.raises(InvalidRequestError, match="query= is empty"):
        translate([HumanMessage(ASK)], query=" ")


@pytest.mark.parametrize(("mode", "times"), [("query_aware", 2), ("read_once", 1)])
def test_a_format_instruction_is_read_but_not_routed(mode: Any, times: int) -> None:
    engine = FakeEngine()
    llm = QLLMChat.from_engine(engine, mode=mode).with_structured_output(
        {"title": "Writer", "type": "object", "properties": {"name": {"type": "string"}}}
    )
    llm.invoke([HumanMessage([plain(text=BOOK), TEXT])])
    call = engine.requests[0]
    assert call["query"] == ASK
    assert "JSON schema" in call["turns"][-1].content[-1]
    assert [engine.tokenizer.decode(call["prompt"].ids[a:b]) for a, b in call["prompt"].query_spans] == [ASK] * times
