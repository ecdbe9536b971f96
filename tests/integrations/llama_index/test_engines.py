"""Retriever, query engine, chat engine and synthesizer, alone and inside LlamaIndex's own engines and agents."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from llama_index.core import Document, SummaryIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import CitableBlock, TextBlock
from llama_index.core.base.response.schema import AsyncStreamingResponse, PydanticResponse, Response, StreamingResponse
from llama_index.core.chat_engine import CondensePlusContextChatEngine, CondenseQuestionChatEngine, SimpleChatEngine
from llama_index.core.instrumentation.events.query import QueryEndEvent, QueryStartEvent
from llama_index.core.instrumentation.events.retrieval import RetrievalEndEvent
from llama_index.core.instrumentation.events.synthesis import SynthesizeEndEvent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import ChatPromptTemplate, PromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine, RouterQueryEngine, SubQuestionQueryEngine
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.schema import QueryBundle
from llama_index.core.selectors import LLMSingleSelector, PydanticSingleSelector
from llama_index.core.tools import QueryEngineTool
from pydantic import BaseModel, Field

from qllm_integrations.llama_index import (
    QLLM,
    LookupEvent,
    QLLMSynthesizer,
    WholeDocumentChatEngine,
    WholeDocumentIndex,
)
from qllm_runtime.errors import CancelledError, InvalidRequestError
from tests.integrations.llama_index.fake_engine import FakeEngine

BOOK = "The lamp was lit at dusk. The secret number of the harbour is 4711. Nobody spoke."
OTHER = "A second volume. The secret colour of the bridge is green. The end."
QUESTION = "What is the secret number?"


class Number(BaseModel):
    """A number."""

    value: int = Field(ge=0, le=9999)


@pytest.fixture
def index(llm: QLLM) -> WholeDocumentIndex:
    documents = [Document(text=BOOK, id_="book", metadata={"file_name": "book.txt"}), Document(text=OTHER, id_="other")]
    return WholeDocumentIndex.from_documents(documents, llm=llm)


# query engine


def test_query(index: WholeDocumentIndex, engine: FakeEngine, recorder: Any) -> None:
    response = index.as_query_engine().query(QUESTION)
    assert isinstance(response, Response)
    assert response.response == "It is 4711."
    best = response.source_nodes[0]
    assert best.node.get_content() == "The secret number of the harbour is 4711"
    assert best.node.ref_doc_id == "book"
    assert BOOK[best.node.start_char_idx : best.node.end_char_idx] == best.node.get_content()
    assert response.metadata[best.node.node_id] == {"file_name": "book.txt"}
    told = response.metadata["qllm"]
    assert (told["query"], told["query_source"], told["mode"]) == (QUESTION, "explicit", "read_once")
    assert told["usage"]["prompt_tokens"] > 0
    assert engine.requests[-1]["turns"][-1].text == QUESTION
    assert (recorder.count(QueryStartEvent), recorder.count(QueryEndEvent), recorder.count(LookupEvent)) == (1, 1, 1)
    assert "Source" in response.get_formatted_sources()


async def test_async_query(index: WholeDocumentIndex) -> None:
    response = await index.as_query_engine().aquery(QUESTION)
    assert str(response) == "It is 4711."
    assert response.source_nodes


def test_streaming_query(index: WholeDocumentIndex, capsys: pytest.CaptureFixture[str]) -> None:
    response = index.as_query_engine(streaming=True).query(QUESTION)
    assert isinstance(response, StreamingResponse)
    assert "".join(response.response_gen) == "It is 4711."
    assert response.source_nodes
    assert response.metadata["qllm"]["finish_reason"] == "stop"
    ahead = index.as_query_engine(streaming=True).query(QUESTION)
    assert ahead.source_nodes[0].node.ref_doc_id == "book"
    ahead.print_response_stream()
    assert capsys.readouterr().out == "It is 4711."
    assert str(ahead) == ahead.get_response().response == "It is 4711."


async def test_async_streaming_query(index: WholeDocumentIndex) -> None:
    response = await index.as_query_engine(streaming=True).aquery(QUESTION)
    assert isinstance(response, AsyncStreamingResponse)
    assert "".join([text async for text in response.async_response_gen()]) == "It is 4711."
    assert response.source_nodes[0].node.ref_doc_id == "book"
    assert response.metadata["qllm"]["query"] == QUESTION


async def test_output_cls(index: WholeDocumentIndex, llm: QLLM) -> None:
    response = index.as_query_engine(output_cls=Number).query(QUESTION)
    assert isinstance(response, PydanticResponse)
    assert isinstance(response.response, Number)
    assert response.source_nodes
    assert isinstance((await index.as_query_engine(output_cls=Number).aquery(QUESTION)).response, Number)
    assert isinstance(index.as_query_engine(llm=llm.as_structured_llm(Number)).query(QUESTION).response, Number)
    streamed = str(index.as_query_engine(output_cls=Number, streaming=True).query(QUESTION))
    assert Number.model_validate_json(streamed) == response.response
    with pytest.raises(InvalidRequestError, match="max_tokens=2"):
        index.as_query_engine(output_cls=Number, max_tokens=2).query(QUESTION)


@pytest.mark.parametrize("mode", ["compact", "simple_summarize", "tree_summarize"])
def test_modes_of_one_answer(index: WholeDocumentIndex, engine: FakeEngine, mode: str) -> None:
    assert str(index.as_query_engine(response_mode=mode).query(QUESTION)) == "It is 4711."
    assert len(engine.requests) == 1


async def test_other_modes(index: WholeDocumentIndex, engine: FakeEngine) -> None:
    accumulated = index.as_query_engine(response_mode="accumulate").query(QUESTION)
    assert str(accumulated) == "Response 1: It is 4711.\n---------------------\nResponse 2: It is 4711."
    assert {found.node.ref_doc_id for found in accumulated.source_nodes} == {"book", "other"}
    assert str(await index.as_query_engine(response_mode="accumulate").aquery(QUESTION)) == str(accumulated)
    assert len(engine.requests) == 4
    no_text = index.as_query_engine(response_mode="no_text").query(QUESTION)
    assert (no_text.response, bool(no_text.source_nodes)) == ("", True)
    assert "4711" in str(index.as_query_engine(response_mode="context_only").query(QUESTION))
    index.as_query_engine(response_mode="generation").query(QUESTION)
    assert not engine.requests[-1]["turns"][-1].documents


@pytest.mark.parametrize("mode", ["refine", "compact_accumulate", "shout"])
def test_modes_without_sense(index: WholeDocumentIndex, mode: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"{mode}.*compact"):
        index.as_query_engine(response_mode=mode)


def test_streaming_accumulate(index: WholeDocumentIndex) -> None:
    with pytest.raises(InvalidRequestError, match="streamed"):
        index.as_query_engine(response_mode="accumulate", streaming=True)
    with pytest.raises(InvalidRequestError, match="output_cls"):
        index.as_query_engine(response_mode="no_text", output_cls=Number)


def test_settings_of_the_query_engine(index: WholeDocumentIndex, engine: FakeEngine) -> None:
    template = PromptTemplate("Read this: {context_str} Reply in one word: {query_str}")
    query_engine = index.as_query_engine(
        text_qa_template=template,
        system_prompt="Be brief.",
        similarity_top_k=1,
        max_tokens=9,
        temperature=0.5,
        mode="read_once",
    )
    response = query_engine.query(QUESTION)
    request = engine.requests[-1]
    assert [turn.text for turn in request["turns"]] == ["Be brief.", f"Read this:\nReply in one word: {QUESTION}"]
    assert (request["sampling"].max_tokens, request["sampling"].temperature) == (9, 0.5)
    assert request["memory"].system == "Be brief."
    assert request["query"] == QUESTION
    assert len(response.source_nodes) == 1
    assert query_engine.get_prompts() == {"text_qa_template": template}
    query_engine.update_prompts({"text_qa_template": PromptTemplate("{query_str}")})
    query_engine.query(QUESTION)
    assert engine.requests[-1]["turns"][-1].text == QUESTION
    with pytest.warns(UserWarning, match="similarity_top_k"):
        index.as_query_engine(similarity_topk=3)


def test_template_with_a_system_message_reads_under_it(index: WholeDocumentIndex, engine: FakeEngine) -> None:
    template = ChatPromptTemplate(
        [ChatMessage("Read closely.", role="system"), ChatMessage("{context_str} {query_str}")]
    )
    query_engine = index.as_query_engine(text_qa_template=template, system_prompt="Be brief.", mode="read_once")
    for _ in range(2):
        query_engine.query(QUESTION)
    assert [memory.system for memory in engine.readings] == ["Be brief.\n\nRead closely."] * 2  # one per document
    assert engine.requests[-1]["turns"][0].text == "Be brief.\n\nRead closely."


async def test_empty_index(llm: QLLM) -> None:
    index = WholeDocumentIndex(nodes=[], llm=llm)
    assert str(index.as_query_engine().query(QUESTION)) == "Empty Response"
    assert str(index.as_query_engine(streaming=True).query(QUESTION)) == "Empty Response"
    assert str(await index.as_query_engine().aquery(QUESTION)) == "Empty Response"
    assert index.as_retriever().retrieve(QUESTION) == []


async def test_errors_keep_their_type(index: WholeDocumentIndex, engine: FakeEngine) -> None:
    def fail(query: str, documents: Sequence[Any]) -> str:
        raise MemoryError("full")

    engine.script = fail
    with pytest.raises(MemoryError):
        index.as_query_engine().query(QUESTION)
    with pytest.raises(MemoryError):
        await index.as_query_engine().aquery(QUESTION)
    with pytest.raises(MemoryError):
        str(index.as_query_engine(streaming=True).query(QUESTION))
    response = await index.as_query_engine(streaming=True).aquery(QUESTION)
    with pytest.raises(MemoryError):
        [text async for text in response.async_response_gen()]
    chat = index.as_chat_engine()
    with pytest.raises(MemoryError):
        list(chat.stream_chat(QUESTION).response_gen)
    with pytest.raises(MemoryError):
        chat.chat(QUESTION)
    with pytest.raises(MemoryError):
        await chat.achat(QUESTION)
    assert chat.chat_history == []


async def test_cancelled_query_stops_the_model(index: WholeDocumentIndex, engine: FakeEngine) -> None:
    engine.script, engine.step = (lambda query, documents: "word " * 100), 0.01
    task = asyncio.create_task(index.as_query_engine().aquery(QUESTION))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises((asyncio.CancelledError, CancelledError)):
        await task
    await asyncio.sleep(0.05)
    written = engine.tokens_written
    await asyncio.sleep(0.1)
    assert engine.tokens_written == written


# retriever


async def test_retriever(index: WholeDocumentIndex, engine: FakeEngine, recorder: Any) -> None:
    found = index.as_retriever().retrieve(QUESTION)
    assert found[0].node.get_content() == "The secret number of the harbour is 4711"
    assert found[0].score >= found[1].score > 0
    assert engine.requests[-1]["sampling"].max_tokens == 32
    assert len(await index.as_retriever(similarity_top_k=1, max_tokens=8).aretrieve(QUESTION)) == 1
    assert engine.requests[-1]["sampling"].max_tokens == 8
    assert recorder.count(RetrievalEndEvent) == 2


# chat engine


async def test_chat_engine(index: WholeDocumentIndex, engine: FakeEngine) -> None:
    chat = index.as_chat_engine()
    assert isinstance(chat, WholeDocumentChatEngine)
    answer = chat.chat(QUESTION)
    assert (str(answer), answer.source_nodes[0].node.ref_doc_id) == ("It is 4711.", "book")
    second = await chat.achat("Which secret colour has the bridge?")
    assert second.source_nodes[0].node.ref_doc_id == "other"
    assert [request["query"] for request in engine.requests] == [QUESTION, "Which secret colour has the bridge?"]
    assert engine.requests[0]["memory"] is engine.requests[1]["memory"]
    assert [turn.text for turn in engine.requests[1]["turns"]] == [
        QUESTION,
        "It is 4711.",
        "Which secret colour has the bridge?",
    ]
    assert [message.content for message in chat.chat_history][-1] == "It is 4711."
    chat.reset()
    assert chat.chat_history == []
    history = [ChatMessage("A"), ChatMessage("B", role="assistant")]
    chat.chat("Hi", chat_history=history)
    assert [message.content for message in chat.chat_history] == ["A", "B", "Hi", "It is 4711."]
    await chat.achat("Ho", chat_history=history)
    assert [message.content for message in chat.chat_history] == ["A", "B", "Ho", "It is 4711."]


def test_documents_of_the_history_are_no_sources_of_the_index(index: WholeDocumentIndex, engine: FakeEngine) -> None:
    letter = CitableBlock(title="letter", source="", content="My secret number is 4712.")
    history = [ChatMessage(blocks=[letter, TextBlock(text="Thank you.")]), ChatMessage("Yes.", role="assistant")]
    answer = index.as_chat_engine(chat_history=history).chat(QUESTION)
    assert [document.text for document in engine.requests[-1]["turns"][0].documents] == ["My secret number is 4712."]
    assert {found.node.ref_doc_id for found in answer.source_nodes} == {"book", "other"}


async def test_streaming_chat(index: WholeDocumentIndex, engine: FakeEngine) -> None:
    chat = index.as_chat_engine(max_tokens=50)
    answer = chat.stream_chat(QUESTION)
    assert "".join(answer.response_gen) == "It is 4711."
    assert answer.source_nodes[0].node.ref_doc_id == "book"
    answer = await chat.astream_chat("And the secret colour?")
    assert "".join([text async for text in answer.async_response_gen()]) == "It is 4711."
    assert answer.source_nodes[0].node.ref_doc_id == "other"
    assert [message.role.value for message in chat.chat_history] == ["user", "assistant"] * 2
    assert engine.requests[-1]["sampling"].max_tokens == 50


def test_chat_reads_under_each_message_on_demand(index: WholeDocumentIndex, engine: FakeEngine) -> None:
    chat = index.as_chat_engine(mode="query_aware", system_prompt="Be brief.")
    chat.chat(QUESTION)
    chat.chat("And then?")
    turns = engine.requests[-1]["turns"]
    assert [len(turn.documents) for turn in turns] == [0, 2, 0, 0]
    assert (engine.requests[-1]["query"], engine.requests[-1]["mode"]) == ("And then?", "query_aware")


@pytest.mark.parametrize("mode", ["read_once", "query_aware"])
def test_chat_that_opens_with_a_greeting(index: WholeDocumentIndex, engine: FakeEngine, mode: Any) -> None:
    greeting = [ChatMessage("Be brief.", role="system"), ChatMessage("How can I help?", role="assistant")]
    chat = index.as_chat_engine(mode=mode, chat_history=greeting, system_prompt="Be kind.")
    assert chat.chat(QUESTION).source_nodes
    turns = engine.requests[-1]["turns"]
    assert [turn.role for turn in turns if turn.role != "system"] == ["user", "assistant", "user"]
    opening = [turn.text for turn in turns if turn.role == "system"]
    assert opening == (["Be kind.\n\nBe brief."] if mode == "query_aware" else ["Be kind.", "Be brief."])
    assert len(turns[len(opening)].documents) == (2 if mode == "query_aware" else 0)


def test_other_chat_modes(index: WholeDocumentIndex) -> None:
    kinds = {
        "context": WholeDocumentChatEngine,
        "condense_question": CondenseQuestionChatEngine,
        "condense_plus_context": CondensePlusContextChatEngine,
        "simple": SimpleChatEngine,
    }
    for mode, kind in kinds.items():
        chat = index.as_chat_engine(chat_mode=mode)
        assert isinstance(chat, kind)
        assert str(chat.chat(QUESTION)) == "It is 4711."


# synthesizer


async def test_synthesizer_in_a_retriever_query_engine(llm: QLLM, engine: FakeEngine, recorder: Any) -> None:
    summary = SummaryIndex.from_documents([Document(text=BOOK, id_="book", metadata={"file_name": "book.txt"})])
    query_engine = RetrieverQueryEngine(summary.as_retriever(), response_synthesizer=QLLMSynthesizer(llm))
    response = query_engine.query(QUESTION)
    assert str(response) == "It is 4711."
    assert engine.requests[-1]["turns"][-1].documents[0].text == BOOK
    best = response.source_nodes[0].node
    assert (best.ref_doc_id, BOOK[best.start_char_idx : best.end_char_idx]) == ("book", best.get_content())
    assert str(await query_engine.aquery(QUESTION)) == "It is 4711."
    assert recorder.count(SynthesizeEndEvent) == 2
    streaming = summary.as_query_engine(llm=llm, response_synthesizer=QLLMSynthesizer(llm, streaming=True))
    streamed = streaming.query(QUESTION)
    assert (str(streamed), bool(streamed.source_nodes)) == ("It is 4711.", True)
    streamed = await streaming.aquery(QUESTION)
    assert "".join([text async for text in streamed.async_response_gen()]) == "It is 4711."
    assert streamed.source_nodes
    structured = summary.as_query_engine(llm=llm, response_synthesizer=QLLMSynthesizer(llm, output_cls=Number))
    assert isinstance(structured.query(QUESTION).response, Number)


async def test_synthesizer_by_itself(llm: QLLM, engine: FakeEngine) -> None:
    synthesizer = QLLMSynthesizer(llm, system_prompt="Be brief.", options={"max_tokens": 50})
    assert synthesizer.get_response(QUESTION, [BOOK, OTHER]) == "It is 4711."
    assert await synthesizer.aget_response(QUESTION, [BOOK]) == "It is 4711."
    assert str(synthesizer.synthesize(QUESTION, [])) == "Empty Response"
    found = SummaryIndex.from_documents([Document(text="Nothing here.")]).as_retriever().retrieve(QUESTION)
    assert synthesizer.synthesize(QUESTION, found).source_nodes == found


# inside LlamaIndex's own


def tools(index: WholeDocumentIndex, **kwargs: Any) -> list[QueryEngineTool]:
    query_engine = index.as_query_engine(**kwargs)
    return [
        QueryEngineTool.from_defaults(query_engine, name="book", description="The book."),
        QueryEngineTool.from_defaults(query_engine, name="other", description="The other."),
    ]


async def test_query_engine_tool(index: WholeDocumentIndex) -> None:
    tool = tools(index)[0]
    assert tool(QUESTION).content == "It is 4711."
    output = await tool.acall(input=QUESTION)
    assert output.raw_output.source_nodes


@pytest.mark.parametrize("selector", [PydanticSingleSelector, LLMSingleSelector, None])
async def test_router(index: WholeDocumentIndex, llm: QLLM, engine: FakeEngine, selector: Any) -> None:
    chosen: list[str] = []

    def script(query: str, documents: Sequence[Any]) -> str:
        if documents:
            return "It is 4711."
        chosen.append(query)
        if selector is LLMSingleSelector:
            return '[{"choice": 2, "reason": "fits"}]'
        return '<tool_call>\n{"name": "SingleSelection", "arguments": {"index": 2, "reason": "fits"}}\n</tool_call>'

    engine.script = script
    picked = selector.from_defaults(llm=llm) if selector else None
    router = RouterQueryEngine.from_defaults(tools(index), llm=llm, selector=picked)
    response = router.query(QUESTION)
    assert str(response) == "It is 4711."
    assert response.metadata["selector_result"].selections[0].index == 1
    assert str(await router.aquery(QUESTION)) == "It is 4711."
    if selector is LLMSingleSelector:
        assert chosen == [QUESTION, QUESTION]


@pytest.mark.parametrize("use_async", [False, True])
def test_sub_questions(index: WholeDocumentIndex, llm: QLLM, engine: FakeEngine, use_async: bool) -> None:
    def script(query: str, documents: Sequence[Any]) -> str:
        if documents:
            return "It is 4711."
        items = [{"sub_question": "Which secret number?", "tool_name": "book"}]
        return json.dumps({"items": items})

    engine.script = script
    sub = SubQuestionQueryEngine.from_defaults(
        tools(index),
        llm=llm,
        question_gen=LLMQuestionGenerator.from_defaults(llm=llm),
        response_synthesizer=QLLMSynthesizer(llm),
        use_async=use_async,
        verbose=False,
    )
    response = sub.query(QUESTION)
    assert str(response) == "It is 4711."
    assert any(found.node.ref_doc_id == "book" for found in response.source_nodes)
    assert [request["query"] for request in engine.requests] == [QUESTION, "Which secret number?", QUESTION]


async def test_function_agent(index: WholeDocumentIndex, llm: QLLM, engine: FakeEngine) -> None:
    steps = iter(
        [
            'I will look. <tool_call>\n{"name": "book", "arguments": {"input": "Which secret number?"}}\n</tool_call>',
            "It is 4711.",
            "The number is 4711.",
        ]
    )
    engine.script = lambda query, documents: next(steps)
    agent = FunctionAgent(tools=tools(index)[:1], llm=llm, system_prompt="Use the tool.")
    result = await agent.run(QUESTION)
    assert str(result) == "The number is 4711."
    assert [call.tool_name for call in result.tool_calls] == ["book"]
    # the tool's answer is looked up for its own input, the agent's for what the human asked
    assert [request["query"] for request in engine.requests] == [QUESTION, "Which secret number?", QUESTION]
    last = engine.requests[-1]["turns"]
    assert [turn.role for turn in last] == ["system", "user", "assistant", "tool"]


def test_selectors_and_sub_questions_keep_to_what_there_is(
    index: WholeDocumentIndex, llm: QLLM, engine: FakeEngine
) -> None:
    engine.script = lambda query, documents: "It is 4711." if documents else '[{"choice": 7, "reason": "why not"}]'
    router = RouterQueryEngine.from_defaults(tools(index), llm=llm, selector=LLMSingleSelector.from_defaults(llm=llm))
    assert str(router.query(QUESTION)) == "It is 4711."
    items = '{"items": [{"sub_question": "Which?", "tool_name": "nonsense"}]}'
    engine.script = lambda query, documents: items
    metadata = [tool.metadata for tool in tools(index)]
    (asked,) = LLMQuestionGenerator.from_defaults(llm=llm).generate(metadata, QueryBundle(QUESTION))
    assert asked.tool_name in ("book", "other")


async def test_calls_cut_off_are_told_as_such(index: WholeDocumentIndex, llm: QLLM) -> None:
    for few in (1, 6, 12):  # not even the beginning of a call
        first = QLLM.from_engine(llm.engine, max_tokens=few)
        with pytest.raises(InvalidRequestError, match=f"max_tokens={few} "):
            first.chat_with_tools(tools(index), user_msg=QUESTION, tool_required=True)
        with pytest.raises(InvalidRequestError, match=f"max_tokens={few} "):
            list(first.stream_chat_with_tools(tools(index), user_msg=QUESTION, tool_required=True))
    short = QLLM.from_engine(llm.engine, max_tokens=30)
    router = RouterQueryEngine.from_defaults(tools(index), llm=short)
    with pytest.raises(InvalidRequestError, match="max_tokens=30"):
        router.query(QUESTION)
    with pytest.raises(InvalidRequestError, match="max_tokens=30"):
        await short.achat_with_tools(tools(index), user_msg=QUESTION, tool_required=True)
    with pytest.raises(InvalidRequestError, match="max_tokens=30"):
        list(short.stream_chat_with_tools(tools(index), user_msg=QUESTION, tool_required=True))
    with pytest.raises(InvalidRequestError, match="max_tokens=30"):
        LLMQuestionGenerator.from_defaults(llm=short).generate(
            [tool.metadata for tool in tools(index)], QueryBundle(QUESTION)
        )
