"""Reading is reported: custom events reach callback handlers and `astream_events`, a function is called."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import UUID

import pytest
from fake_engine_lc import FakeEngine
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableLambda

from qllm_integrations.langchain import DocumentQA, QLLMChat
from qllm_integrations.langchain.progress import READING_EVENT

CHUNKS = 4
STEPS = [{"documents": 1, "tokens_read": n, "tokens_total": CHUNKS} for n in range(1, CHUNKS + 1)]
ASKED = [
    HumanMessage(
        [
            {"type": "text-plain", "mime_type": "text/plain", "text": "Call me Ishmael."},
            {"type": "text", "text": "Who speaks?"},
        ]
    )
]


class Told:
    """What a handler heard, in order."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.started: list[UUID] = []
        self.runs: set[UUID] = set()

    def custom(self, name: str, data: Any, run_id: UUID) -> None:
        assert name == READING_EVENT
        self.events.append(data)
        self.runs.add(run_id)


class Handler(Told, BaseCallbackHandler):
    raise_error = True

    def on_chat_model_start(self, *_: Any, run_id: UUID, **__: Any) -> None:
        self.started.append(run_id)

    def on_custom_event(self, name: str, data: Any, *, run_id: UUID, **_: Any) -> None:
        self.custom(name, data, run_id)

    def on_llm_new_token(self, token: str, **_: Any) -> None:
        self.events.append("token")


class AsyncHandler(Told, AsyncCallbackHandler):
    raise_error = True

    def __init__(self) -> None:
        super().__init__()
        self.loops: set[asyncio.AbstractEventLoop] = set()

    async def on_chat_model_start(self, *_: Any, run_id: UUID, **__: Any) -> None:
        self.started.append(run_id)

    async def on_custom_event(self, name: str, data: Any, *, run_id: UUID, **_: Any) -> None:
        await asyncio.sleep(0.02 if data["tokens_read"] == 1 else 0)  # a slow one must not be overtaken
        self.loops.add(asyncio.get_running_loop())
        self.custom(name, data, run_id)

    async def on_llm_new_token(self, token: str, **_: Any) -> None:
        self.events.append("token")


@pytest.fixture
def llm() -> QLLMChat:
    return QLLMChat.from_engine(FakeEngine(n_chunks=CHUNKS))


def check(handler: Told) -> None:
    """All steps once and in order, ahead of the answer, told as the chat model's own run."""
    assert handler.events[:CHUNKS] == STEPS
    assert set(map(str, handler.events[CHUNKS:])) <= {"token"}
    assert handler.runs == set(handler.started)
    assert len(handler.started) == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_handlers_hear_of_it(llm: QLLMChat, streaming: bool) -> None:
    handler = Handler()
    llm.model_copy(update={"streaming": streaming}).invoke(ASKED, {"callbacks": [handler]})
    check(handler)
    handler = Handler()
    assert len(list(llm.stream(ASKED, {"callbacks": [handler]}))) > 1
    check(handler)
    handler = Handler()
    llm.model_copy(update={"callbacks": [handler]}).invoke(ASKED)
    check(handler)
    handler = Handler()
    llm.generate([ASKED], callbacks=[handler])
    check(handler)


@pytest.mark.parametrize("streaming", [False, True])
async def test_handlers_hear_of_it_in_their_loop(llm: QLLMChat, streaming: bool) -> None:
    handler, plain = AsyncHandler(), Handler()
    await llm.model_copy(update={"streaming": streaming}).ainvoke(ASKED, {"callbacks": [handler, plain]})
    check(handler)
    check(plain)
    assert handler.loops == {asyncio.get_running_loop()}
    handler = AsyncHandler()
    assert [chunk async for chunk in llm.astream(ASKED, {"callbacks": [handler]})]
    check(handler)


@pytest.mark.parametrize("chained", [False, True])
async def test_astream_events(llm: QLLMChat, chained: bool) -> None:
    runnable = RunnableLambda(lambda _: ASKED) | llm if chained else llm
    events = [event async for event in runnable.astream_events(ASKED, version="v2")]
    told = [event for event in events if event["event"] == "on_custom_event"]
    assert [(event["name"], event["data"]) for event in told] == [(READING_EVENT, step) for step in STEPS]
    model = next(event for event in events if event["event"] == "on_chat_model_start")
    assert {event["run_id"] for event in told} == {model["run_id"]}
    kinds = [event["event"] for event in events if event["event"].startswith(("on_custom", "on_chat_model"))]
    last = len(kinds) - kinds[::-1].index("on_custom_event")
    assert last < kinds.index("on_chat_model_stream") + 1
    hidden = llm.invoke

    def ask(_: Any, config: Any) -> Any:  # invoked, it streams for whoever listens
        return hidden(ASKED, config)

    events = [event async for event in RunnableLambda(ask).astream_events("", version="v2")]
    assert [event["data"] for event in events if event["event"] == "on_custom_event"] == STEPS
    assert any(event["event"] == "on_chat_model_stream" for event in events)


def test_each_run_of_a_batch_hears_its_own(llm: QLLMChat) -> None:
    handlers = [Handler() for _ in range(3)]
    llm.batch([ASKED] * 3, [{"callbacks": [handler]} for handler in handlers])
    for handler in handlers:
        check(handler)


def test_nothing_to_report_without_documents(llm: QLLMChat) -> None:
    handler = Handler()
    llm.invoke("Who speaks?", {"callbacks": [handler]})
    assert handler.events == []


async def test_a_handlers_error_ends_the_run(llm: QLLMChat) -> None:
    class Refuses(AsyncCallbackHandler):
        raise_error = True

        async def on_custom_event(self, *_: Any, **__: Any) -> None:
            raise ArithmeticError("no")

    with pytest.raises(ArithmeticError):
        await llm.ainvoke(ASKED, {"callbacks": [Refuses()]})
    assert llm.invoke(ASKED).text


def test_reading_ahead_calls_a_function(llm: QLLMChat) -> None:
    calls: list[tuple[int, int]] = []
    with llm.add_documents("Call me Ishmael.", progress=lambda *step: calls.append(step)):
        assert calls == [(n, CHUNKS) for n in range(1, CHUNKS + 1)]
    with DocumentQA.from_documents("Call me Ishmael.", llm=llm, progress=lambda *step: calls.append(step)):
        assert len(calls) == 2 * CHUNKS


async def test_reading_ahead_inside_a_run_is_reported_there(llm: QLLMChat) -> None:
    handler = Handler()
    RunnableLambda(lambda text: llm.add_documents(text).id).invoke("Call me Ishmael.", {"callbacks": [handler]})
    assert handler.events == STEPS

    async def read(text: str) -> str:
        return (await llm.aadd_documents(text)).id

    events = [event async for event in RunnableLambda(read).astream_events("Call me Ishmael.", version="v2")]
    assert [event["data"] for event in events if event["event"] == "on_custom_event"] == STEPS
