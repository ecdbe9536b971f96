"""What ends a request: its time, a handler's error, cancelling; and what does not: closing the chat model."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import pytest
from fake_engine_lc import FakeEngine
from ishmael import REPLY
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableLambda

from qllm_integrations.langchain import QLLMChat
from qllm_integrations.langchain.progress import Reporter
from qllm_runtime.errors import CancelledError, ClosedError

CHUNKS = 200
BOOK = "Call me Ishmael."
ASKED = [
    HumanMessage(
        [{"type": "text-plain", "mime_type": "text/plain", "text": BOOK}, {"type": "text", "text": "Who speaks?"}]
    )
]


class Hangs(AsyncCallbackHandler):
    """Never done with the first event; knows whether it was left alone."""

    def __init__(self) -> None:
        self.freed = asyncio.Event()

    async def on_custom_event(self, *_: Any, **__: Any) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            self.freed.set()


class Refuses(AsyncCallbackHandler):
    """Raises when so many tokens are read."""

    raise_error = True

    def __init__(self, at: int) -> None:
        self.at = at

    async def on_custom_event(self, name: str, data: Any, **_: Any) -> None:
        if data["tokens_read"] == self.at:
            raise ArithmeticError("no")


async def invoke(llm: QLLMChat, handler: AsyncCallbackHandler, **options: Any) -> AIMessage:
    return await llm.ainvoke(ASKED, {"callbacks": [handler]}, **options)


async def stream(llm: QLLMChat, handler: AsyncCallbackHandler, **options: Any) -> AIMessage:
    return reduce(add, [chunk async for chunk in llm.astream(ASKED, {"callbacks": [handler]}, **options)])


async def read(llm: QLLMChat, handler: AsyncCallbackHandler) -> Any:
    return await RunnableLambda(llm.aadd_documents).ainvoke(BOOK, {"callbacks": [handler]})


@pytest.mark.parametrize("run", [invoke, stream])
async def test_a_handler_cannot_hold_a_request_beyond_its_time(run: Callable[..., Any]) -> None:
    handler = Hangs()
    async with asyncio.timeout(30):
        with pytest.raises(TimeoutError, match=r"timeout=0\.2"):
            await run(QLLMChat.from_engine(FakeEngine()), handler, timeout=0.2)
        await handler.freed.wait()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("run", [invoke, stream])
async def test_an_answer_that_takes_too_long_is_given_up(run: Callable[..., Any], streaming: bool) -> None:
    engine = FakeEngine(reply="x" * CHUNKS, step=0.01)
    llm = QLLMChat.from_engine(engine, max_tokens=CHUNKS, streaming=streaming)
    with pytest.raises(TimeoutError, match=r"timeout=0\.3"):
        await run(llm, AsyncCallbackHandler(), timeout=0.3)
    assert 0 < engine.tokens_written < CHUNKS


@pytest.mark.parametrize("run", [invoke, stream, read])
async def test_cancelling_does_not_wait_for_a_handler(run: Callable[..., Any]) -> None:
    handler = Hangs()
    task = asyncio.create_task(run(QLLMChat.from_engine(FakeEngine()), handler))
    await asyncio.sleep(0.1)
    task.cancel()
    async with asyncio.timeout(30):
        with pytest.raises(asyncio.CancelledError):
            await task
        await handler.freed.wait()


@pytest.mark.parametrize("run", [invoke, stream, read])
async def test_a_handlers_error_stops_the_reading(run: Callable[..., Any]) -> None:
    engine = FakeEngine(n_chunks=CHUNKS, step=0.01)
    with pytest.raises(ArithmeticError, match="no"):
        await run(QLLMChat.from_engine(engine), Refuses(at=3))
    assert 3 <= engine.n_read < CHUNKS / 2


@pytest.mark.parametrize("run", [invoke, stream])
async def test_a_handlers_error_at_the_end_of_the_reading_stops_the_answer(run: Callable[..., Any]) -> None:
    engine = FakeEngine(reply="x" * 200, step=0.01)
    with pytest.raises(ArithmeticError, match="no"):
        await run(QLLMChat.from_engine(engine, max_tokens=200), Refuses(at=1))
    assert engine.tokens_written < 100


async def test_reading_ahead_ends_with_what_the_last_event_raised() -> None:
    with pytest.raises(ArithmeticError, match="no"):
        await read(QLLMChat.from_engine(FakeEngine()), Refuses(at=1))


def test_cancelling_is_not_running_out_of_time() -> None:
    cancel = threading.Event()
    call = QLLMChat.from_engine(FakeEngine(n_chunks=CHUNKS, step=0.01))._prepare(
        ASKED, None, {"timeout": 60}, Reporter(), cancel
    )
    threading.Timer(0.05, cancel.set).start()
    with pytest.raises(CancelledError):
        call.answer()


def test_nothing_waits_for_the_time_limit_of_an_answered_request() -> None:
    llm = QLLMChat.from_engine(FakeEngine(), timeout=60)
    llm.invoke("hi")
    list(llm.stream("hi"))
    timers = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    ends = time.monotonic() + 10
    for timer in timers:
        timer.join(max(0, ends - time.monotonic()))
    assert not any(timer.is_alive() for timer in timers)


@pytest.mark.parametrize("how", ["invoke", "stream"])
def test_closing_lets_answers_under_way_finish(tiny_path: str, how: str) -> None:
    llm = QLLMChat(model=tiny_path)

    class Closes(BaseCallbackHandler):
        raise_error = True

        def on_custom_event(self, *_: Any, **__: Any) -> None:
            llm.close()

    config: Any = {"callbacks": [Closes()]}
    ai = llm.invoke(ASKED, config) if how == "invoke" else reduce(add, llm.stream(ASKED, config))
    assert ai.text == REPLY
    assert ai.response_metadata["qllm"]["query_tokens"] == len("Who speaks?")
    with pytest.raises(ClosedError):
        llm.invoke("hi")
