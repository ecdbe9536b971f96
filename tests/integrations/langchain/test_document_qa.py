"""`DocumentQA`: keys, conversations, runs of its own, closing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import pytest
from fake_engine_lc import FakeEngine
from ishmael import REPLY
from langchain_core.documents import Document
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler

from qllm_integrations.langchain import DocumentQA, QLLMChat
from qllm_runtime.errors import ClosedError, DocumentError, InvalidRequestError

BOOK = "It was night. Call me Ishmael. Some years ago I went to sea."
QUESTION = "Who speaks?"


@pytest.fixture
def qa(llm: QLLMChat) -> DocumentQA:
    return DocumentQA.from_documents(BOOK, llm=llm)


def test_answers_have_the_keys_of_a_retrieval_chain(tiny_path: str) -> None:
    books = [Document(page_content=BOOK * 20, metadata={"source": "whale.txt", "year": 1851})]
    with DocumentQA.from_documents(books, llm=QLLMChat(model=tiny_path)) as qa:
        out = qa.invoke(QUESTION)
        assert list(out) == ["input", "context", "answer"]
        assert (out["input"], out["answer"]) == (QUESTION, REPLY)
        for source in out["context"]:
            start, end = source.metadata["start_char_index"], source.metadata["end_char_index"]
            assert source.page_content == (BOOK * 20)[start:end]
            assert (source.metadata["source"], source.metadata["year"]) == ("whale.txt", 1851)
        assert out["context"]
        assert reduce(add, qa.stream(QUESTION)) == out
        assert qa.invoke({"input": QUESTION}) == out
        assert qa.invoke({"question": QUESTION}) == {"question": QUESTION, **out}
        assert qa.invoke({**out, "user": 7}) == {"user": 7, **out}
        assert qa.batch([QUESTION] * 2) == [out] * 2
    with pytest.raises(ClosedError):
        qa.invoke(QUESTION)


async def test_asynchronously(llm: QLLMChat) -> None:
    with await DocumentQA.afrom_documents(BOOK, llm=llm) as qa:
        out = await qa.ainvoke(QUESTION)
        assert out["answer"] == REPLY
        assert reduce(add, [piece async for piece in qa.astream(QUESTION)]) == out


def test_what_was_said_before_is_part_of_the_conversation(qa: DocumentQA, engine: FakeEngine) -> None:
    history = [HumanMessage("Is it a novel?"), ("ai", "It is.")]
    out = qa.invoke({"input": QUESTION, "chat_history": history})
    assert [(turn.role, turn.text) for turn in engine.requests[-1]["turns"]] == [
        ("user", "Is it a novel?"),
        ("assistant", "It is."),
        ("user", QUESTION),
    ]
    assert engine.requests[-1]["query"] == QUESTION
    assert engine.requests[-1]["memory"] is qa.handle.memory
    assert out["chat_history"] is history
    assert qa.invoke({"input": QUESTION, "chat_history": []})["answer"] == REPLY


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ask": "Who?"}, "'question'"),
        ({"input": QUESTION, "chat_history": "We talked."}, "chat_history takes a list of messages, not a str"),
        ({"input": QUESTION, "chat_history": [3]}, "chat_history holds something"),
    ],
)
def test_what_is_refused(qa: DocumentQA, given: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        qa.invoke(given)
    with pytest.raises(InvalidRequestError, match=words):
        list(qa.stream(given))


def invoke(qa: DocumentQA, config: Any) -> Any:
    return qa.invoke(QUESTION, config)


def stream(qa: DocumentQA, config: Any) -> Any:
    return reduce(add, qa.stream(QUESTION, config))


def ainvoke(qa: DocumentQA, config: Any) -> Any:
    return asyncio.run(qa.ainvoke(QUESTION, config))


def astream(qa: DocumentQA, config: Any) -> Any:
    async def whole() -> Any:
        return reduce(add, [piece async for piece in qa.astream(QUESTION, config)])

    return asyncio.run(whole())


@pytest.mark.parametrize("run", [invoke, stream, ainvoke, astream])
def test_a_question_is_a_run_with_the_models_run_in_it(qa: DocumentQA, run: Callable[..., Any]) -> None:
    collector = RunCollectorCallbackHandler()
    out = run(qa, {"callbacks": [collector], "run_name": "ask the book", "tags": ["books"]})
    (chain,) = collector.traced_runs
    assert (chain.name, chain.run_type, chain.tags) == ("ask the book", "chain", ["books"])
    assert chain.inputs["input"] == QUESTION
    assert chain.outputs == out
    (model,) = chain.child_runs
    assert model.name == "QLLMChat"
    assert "books" in model.tags


@pytest.mark.parametrize("wrap", [lambda qa: qa, lambda qa: qa | RunnableLambda(lambda out: out["answer"])])
async def test_events_of_a_run_and_of_the_model_in_it(qa: DocumentQA, wrap: Callable[[DocumentQA], Any]) -> None:
    events = [event async for event in wrap(qa).astream_events(QUESTION, version="v2")]
    seen = [event["event"] for event in events]
    assert seen[0] == "on_chain_start"
    assert seen[-1] == "on_chain_end"
    assert {"on_chat_model_start", "on_chat_model_stream", "on_chat_model_end"} <= set(seen)
    own = [event for event in events if event["name"] == "DocumentQA"]
    pieces = [event["data"]["chunk"] for event in own if event["event"] == "on_chain_stream"]
    assert reduce(add, pieces)["answer"] == REPLY
    assert own[-1]["data"]["output"]["answer"] == REPLY


async def test_leaving_early_stops_the_model() -> None:
    engine = FakeEngine(reply="x" * 200, step=0.01)
    qa = DocumentQA.from_documents(BOOK, llm=QLLMChat.from_engine(engine, max_tokens=200))
    pieces = qa.astream(QUESTION)
    async for piece in pieces:
        if "answer" in piece:
            break
    await pieces.aclose()
    for piece in qa.stream(QUESTION):
        if "answer" in piece:
            break
    await asyncio.sleep(0.1)
    assert engine.tokens_written < 100


async def test_a_chat_model_of_its_own_is_closed_with_it() -> None:
    qa = DocumentQA.from_documents("The pass key is 71432.")
    with pytest.raises(DocumentError):
        await DocumentQA.afrom_documents("")
    assert qa.invoke("What is the pass key?", max_tokens=2)["answer"]
    qa.close()
    with pytest.raises(ClosedError):
        qa.llm.invoke("hi", file_id=None)


def test_a_chat_model_of_the_callers_stays_open(llm: QLLMChat) -> None:
    with DocumentQA.from_documents(BOOK, llm=llm):
        pass
    assert llm.invoke("hi").text == REPLY


async def test_reading_does_not_block_the_loop() -> None:
    llm = QLLMChat.from_engine(FakeEngine(n_chunks=200, step=0.01))
    task = asyncio.create_task(DocumentQA.afrom_documents(BOOK, llm=llm))
    await asyncio.sleep(0.1)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
