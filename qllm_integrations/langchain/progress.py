"""How far a reading is: a bar on stderr, and custom events for callback handlers and `astream_events`."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from uuid import UUID

from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForLLMRun,
    CallbackManager,
    CallbackManagerForLLMRun,
)
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import (
    ensure_config,
    get_async_callback_manager_for_config,
    get_callback_manager_for_config,
)
from langchain_core.utils.uuid import uuid7

from qllm_integrations.bar import reading_bar
from qllm_runtime.errors import CancelledError
from qllm_runtime.types import Progress

#: Name of the custom event; its data are `documents`, `tokens_read` and `tokens_total`.
READING_EVENT = "qllm_reading"
_POLL_S = 0.05  # how long a cancelled request may go on waiting for handlers


class Reporter:
    """Tells the callback handlers of a run how far a reading is; this one has none to tell."""

    def __call__(self, documents: int, done: int, total: int) -> None:
        """`done` of `total` tokens of the prompt with these documents are read."""

    def settle(self) -> None:
        """Wait until everything is reported."""

    @contextmanager
    def telling(self, cancel: threading.Event) -> Iterator[None]:
        """Let an error of a handler stop what is done here, which `cancel` does; it is raised in its place."""
        yield


class SyncReporter(Reporter):
    """Tells at once, in the thread that reads."""

    def __init__(self, manager: CallbackManager, run_id: UUID) -> None:
        self._manager = manager
        self._run_id = run_id

    def __call__(self, documents: int, done: int, total: int) -> None:
        """Call the handlers."""
        self._manager.on_custom_event(READING_EVENT, _data(documents, done, total), run_id=self._run_id)


class AsyncReporter(Reporter):
    """Tells in the event loop it was made in, in order, while a thread reads."""

    def __init__(self, manager: AsyncCallbackManager, run_id: UUID) -> None:
        self._manager = manager
        self._run_id = run_id
        self._loop = asyncio.get_running_loop()
        self._order = asyncio.Lock()
        self._pending: deque[Future[None]] = deque()
        self._cancel = threading.Event()

    def __call__(self, documents: int, done: int, total: int) -> None:
        """Let the loop call the handlers; may be called from any thread."""
        if self._manager.handlers and not self._loop.is_closed():
            told = self._tell(_data(documents, done, total))
            self._pending.append(asyncio.run_coroutine_threadsafe(told, self._loop))

    async def _tell(self, data: dict[str, int]) -> None:
        async with self._order:
            try:
                await self._manager.on_custom_event(READING_EVENT, data, run_id=self._run_id)
            except Exception:  # of a handler with `raise_error`
                self._cancel.set()
                raise

    @contextmanager
    def telling(self, cancel: threading.Event) -> Iterator[None]:
        """As in `Reporter`, for the thread that reads; waits until everything is reported."""
        self._cancel = cancel
        try:
            yield
            self.settle()
        except CancelledError:
            self.settle()
            raise
        finally:
            while self._pending:
                self._pending.popleft().cancel()

    def settle(self) -> None:
        """Wait in the thread that reads until everything is reported.

        Raises:
            CancelledError: While waiting.
            Exception: What a handler with `raise_error` raised.
        """
        while self._pending:
            if wait([self._pending[0]], _POLL_S).done:
                self._pending.popleft().result()
            elif self._cancel.is_set() or self._loop.is_closed():
                raise CancelledError("Cancelled while callback handlers were told how far the reading is.")


def _data(documents: int, done: int, total: int) -> dict[str, int]:
    return {"documents": documents, "tokens_read": done, "tokens_total": total}


_NOBODY = Reporter()
# `stream`, and `invoke` where it streams, call `_stream` without a run manager: they leave the run's reporter here
_current: ContextVar[Reporter] = ContextVar("qllm_reporter", default=_NOBODY)


@contextmanager
def reporting(reporter: Reporter) -> Iterator[None]:
    """Let `current_reporter` find the reporter of this run."""
    token = _current.set(reporter)
    try:
        yield
    finally:
        _current.reset(token)


def run_reporter(llm: BaseChatModel, config: RunnableConfig | None) -> tuple[RunnableConfig, SyncReporter]:
    """The reporter of a run that is about to begin, and the configuration to begin it with: it names the run."""
    named, run_id = _named(config)
    return named, SyncReporter(CallbackManager.configure(*_configured(llm, named)), run_id)


def async_run_reporter(llm: BaseChatModel, config: RunnableConfig | None) -> tuple[RunnableConfig, AsyncReporter]:
    """As `run_reporter`, in an event loop."""
    named, run_id = _named(config)
    return named, AsyncReporter(AsyncCallbackManager.configure(*_configured(llm, named)), run_id)


def _named(config: RunnableConfig | None) -> tuple[RunnableConfig, UUID]:
    named = ensure_config(config)
    run_id = named.get("run_id") or uuid7()
    return {**named, "run_id": run_id}, run_id


def _configured(llm: BaseChatModel, config: RunnableConfig) -> tuple[Any, ...]:
    return (
        config.get("callbacks"),
        llm.callbacks,
        llm.verbose,
        config.get("tags"),
        llm.tags,
        config.get("metadata"),
        llm.metadata,
    )


def current_reporter(manager: CallbackManagerForLLMRun | None) -> Reporter:
    """The reporter of the chat model's own run, in its thread."""
    if manager is None:
        return _current.get()
    return SyncReporter(CallbackManager(**_handled(manager)), manager.run_id)


def current_async_reporter(manager: AsyncCallbackManagerForLLMRun | None) -> Reporter:
    """The reporter of the chat model's own run, in its event loop."""
    if manager is None:
        reporter = _current.get()
        return reporter if isinstance(reporter, AsyncReporter) else _NOBODY
    return AsyncReporter(AsyncCallbackManager(**_handled(manager)), manager.run_id)


def _handled(manager: CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun) -> dict[str, Any]:
    return {"handlers": manager.handlers, "tags": manager.tags, "metadata": manager.metadata}


def surrounding_reporter() -> Reporter:
    """The reporter of the run that encloses this call (a tool's, a chain's), if there is one."""
    manager = get_callback_manager_for_config(ensure_config())
    return _NOBODY if manager.parent_run_id is None else SyncReporter(manager, manager.parent_run_id)


def async_surrounding_reporter() -> Reporter:
    """As `surrounding_reporter`, in an event loop."""
    manager = get_async_callback_manager_for_config(ensure_config())
    return _NOBODY if manager.parent_run_id is None else AsyncReporter(manager, manager.parent_run_id)


def progress_of(documents: int, *, reporter: Reporter, bar: bool, own: Progress | None = None) -> Progress:
    """What to tell the engine: reports to handlers, shows a bar, calls `own`; whichever of them there are."""
    listeners: list[Progress] = [] if own is None else [own]
    if documents:
        listeners.append(lambda done, total: reporter(documents, done, total))
    if bar:
        listeners.append(reading_bar())

    def tell(done: int, total: int) -> None:
        for listener in listeners:
            listener(done, total)

    return tell
