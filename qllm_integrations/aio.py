"""Running the engine beside an event loop: the loop never waits, and leaving early stops the engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any, Literal, TypeVar

from qllm_runtime.worker import start

T = TypeVar("T")
_Kind = Literal["item", "error", "end"]
_THREAD = "qllm-request"  # one per request: the loop's own executor has few workers, and requests may wait long


async def run_in_thread(call: Callable[[threading.Event], T]) -> T:
    """Run `call(cancel)` in a thread of its own and wait for it without blocking the loop.

    When the awaiting task is cancelled, `cancel` is set and the task is free at once; the engine stops within one chunk
    or token.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    cancel = threading.Event()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)

    def work() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = call(cancel)
        except BaseException as raised:  # handed to the consumer, whatever it is
            error = _transportable(raised)
        _post(loop, cancel, settle, result, error)

    start(work, cancel, _THREAD)
    try:
        return await future
    finally:
        cancel.set()


async def stream_in_thread(items: Callable[[threading.Event], Iterator[T]]) -> AsyncGenerator[T, None]:
    """Iterate `items(cancel)` in a thread of its own and yield what it yields.

    Errors are raised here with their type. Closing the generator or cancelling its task sets `cancel` and closes the
    iterator. Nothing starts before the first item is asked for.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[_Kind, Any]] = asyncio.Queue()  # as long as the answer at most
    cancel = threading.Event()
    abandoned = threading.Event()  # apart from the other: `items` may set that itself, and say why by raising

    def work() -> None:
        last: tuple[_Kind, Any] = ("end", None)
        try:
            source = items(cancel)
            try:
                for item in source:
                    if abandoned.is_set() or not _post(loop, cancel, queue.put_nowait, ("item", item)):
                        break
            finally:
                close = getattr(source, "close", None)
                if close is not None:
                    close()
        except BaseException as raised:  # handed to the consumer, whatever it is
            last = ("error", _transportable(raised))
        _post(loop, cancel, queue.put_nowait, last)

    start(work, cancel, _THREAD)
    try:
        while True:
            kind, value = await queue.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        abandoned.set()
        cancel.set()


def _transportable(error: BaseException) -> BaseException:
    # a StopIteration cannot be raised out of a future or generator
    return RuntimeError(f"unexpected {error!r}") if isinstance(error, StopIteration) else error


def _post(
    loop: asyncio.AbstractEventLoop, cancel: threading.Event, call: Callable[..., object], *arguments: object
) -> bool:
    try:
        loop.call_soon_threadsafe(call, *arguments)
    except RuntimeError:  # the loop is closed: nobody listens any more
        cancel.set()
        return False
    return True
