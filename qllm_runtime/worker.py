"""Streaming from a worker thread: the consumer may stop, pause or vanish without holding the model."""

from __future__ import annotations

import atexit
import contextvars
import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")
_DONE = object()
_running: dict[threading.Thread, threading.Event] = {}


@atexit.register
def _stop_all() -> None:
    """Let no thread be inside the model when the interpreter goes away: that would abort the process."""
    for event in list(_running.values()):
        event.set()
    for thread in list(_running):
        thread.join(timeout=30)


def start(target: Callable[[], None], cancel: threading.Event, name: str) -> None:
    """Run `target` in a thread of its own, with the caller's context variables; `cancel` is set when the process ends."""
    context = contextvars.copy_context()

    def run() -> None:
        try:
            context.run(target)
        finally:
            _running.pop(thread, None)

    thread = threading.Thread(target=run, name=name, daemon=True)
    _running[thread] = cancel
    try:
        thread.start()
    except RuntimeError:  # the system has no room for another thread
        _running.pop(thread, None)
        raise


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def stream(
    work: Callable[[Callable[[T], None], Callable[[], bool]], None], cancel: threading.Event | None
) -> Iterator[T]:
    """Run `work(emit, cancelled)` in a thread and yield what it emits.

    Exceptions of `work` are raised in the consumer with their own type. Closing the iterator cancels the work.

    Args:
        work: Called with a function to emit an item and one that returns True once it should give up.
        cancel: Set by the caller to cancel from outside.
    """
    items: queue.SimpleQueue[object] = queue.SimpleQueue()
    abandoned = threading.Event()

    def cancelled() -> bool:
        return abandoned.is_set() or (cancel is not None and cancel.is_set())

    def run() -> None:
        try:
            work(items.put, cancelled)
        except BaseException as error:
            items.put(_Failure(error))
        else:
            items.put(_DONE)

    start(run, abandoned, "qllm-stream")
    try:
        while (item := items.get()) is not _DONE:
            if isinstance(item, _Failure):
                raise item.error
            yield item  # type: ignore[misc]
    finally:
        abandoned.set()
