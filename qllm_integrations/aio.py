"""Running the engine beside an event loop: the loop never waits, and leaving early stops the engine."""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any, Literal, TypeVar

T = TypeVar("T")
_Kind = Literal["item", "error", "end"]


_running: dict[threading.Thread, threading.Event] = {}


def _start(target: Callable[[], None], cancel: threading.Event) -> None:
    # a thread per request: the loop's default executor has few workers, and requests may wait long for the model
    context = contextvars.copy_context()

    def run() -> None:
        try:
            context.run(target)
        finally:
            _running.pop(thread, None)

    thread = threading.Thread(target=run, name="qllm-request", daemon=True)
    _running[thread] = cancel
    thread.start()


@atexit.register
def _stop_all() -> None:
    """Let no thread be inside the model when the interpreter goes away: that would abort the process."""
    threads = list(_running)
    for thread in threads:
        _running.get(thread, threading.Event()).set()
    for thread in threads:
        thread.join(timeout=30)


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

    _start(work, cancel)
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

    def work() -> None:
        last: tuple[_Kind, Any] = ("end", None)
        try:
            source = items(cancel)
            try:
                for item in source:
                    if cancel.is_set() or not _post(loop, cancel, queue.put_nowait, ("item", item)):
                        break
            finally:
                close = getattr(source, "close", None)
                if close is not None:
                    close()
        except BaseException as raised:  # handed to the consumer, whatever it is
            last = ("error", _transportable(raised))
        _post(loop, cancel, queue.put_nowait, last)

    _start(work, cancel)
    try:
        while True:
            kind, value = await queue.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
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
