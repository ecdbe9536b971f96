"""The engine behind one `QLLM`: loaded on first use, with the document memories it keeps."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from qllm_runtime.errors import CancelledError, ClosedError, InvalidConfigError, SavedReadingError
from qllm_runtime.types import Document, Progress
from qllm_runtime.waiting import after_fork

if TYPE_CHECKING:
    from qllm_runtime.document_memory import DocumentMemory
    from qllm_runtime.engine import QLLM as Engine  # noqa: N811


_locking: WeakSet[MemoryShelf | EngineHandle] = WeakSet()


def _after_fork() -> None:
    """Threads that hold locks do not live on in a forked process."""
    for holder in list(_locking):
        holder.renew_locks()


after_fork(_after_fork)


@dataclass(frozen=True)
class Reading:
    """A memory as one request gets it.

    Attributes:
        memory: Of the documents.
        tokens: How many of its tokens were read for this request; the others were there.
        seconds: How long that took.
    """

    memory: DocumentMemory
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class _Kept:
    engine: Engine
    memory: DocumentMemory
    until: float | None

    @property
    def family(self) -> tuple[int, str | None, str]:
        return id(self.engine), self.memory.system, repr(self.memory.template_kwargs)


class MemoryShelf:
    """Document memories by what was read, so that the same text is read once.

    A memory that holds the first of the documents asked for is continued: only the others are read. A pickle carries no
    memories.

    Attributes:
        saved: A reading on disk that is taken up by the first request it serves, if its model and documents are those asked
            for; None: there is none.

    Args:
        limit: How many are kept; the one unused for longest goes first. None keeps all.
        steps: Read several documents in about this many steps and keep the memory after each, so that a change
            costs the documents from there on. Each one kept holds a local window of its own and shares the rest.
        families: For how many ways of reading (engine, system text and template variables) memories are kept; those of the one
            unused for longest go first. None keeps all.
    """

    def __init__(self, limit: int | None = None, steps: int = 1, families: int | None = None) -> None:
        self._limit = limit
        self._families = families
        self._steps = steps
        self._kept: list[_Kept] = []  # last used last
        self.saved: Path | None = None
        self.renew_locks()
        _locking.add(self)

    def renew_locks(self) -> None:
        """Nobody holds them."""
        self._lock = threading.Lock()
        self._reading = threading.Lock()  # apart from the other: changing an index must not wait for a reading

    def get(
        self,
        engine: Engine,
        documents: Sequence[Document],
        system: str | None,
        *,
        template_kwargs: Mapping[str, Any] | None = None,
        ttl: float | None = None,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> Reading:
        """The memory of these documents, read now as far as none of them is kept. One reading at a time.

        Raises:
            CancelledError: `cancel` was set, also while waiting for another reading.
        """
        wanted, variables = tuple(documents), dict(template_kwargs or {})
        until = None if ttl is None else time.monotonic() + ttl
        turn = self._reading  # `progress` may fork, which renews it
        while not turn.acquire(timeout=0.05):
            if cancel is not None and cancel.is_set():
                raise CancelledError("Cancelled while waiting for the documents.")
        try:
            began = time.perf_counter()
            if self.saved is not None:
                self._take_up(self.saved, engine, cancel)
            memory = self._longest(engine, wanted, system, variables)
            done, known = (len(memory.documents), memory.n_tokens) if memory is not None else (0, 0)
            if memory is not None and done == len(wanted):
                self._keep(_Kept(engine, memory, until))
                return Reading(memory)
            stride = max(1, -(-len(wanted) // self._steps))
            while done < len(wanted):
                end = min(len(wanted), (done // stride + 1) * stride)
                step = _scaled(progress, wanted, end)
                memory = engine.read(
                    wanted[done:end],
                    system=system,
                    template_kwargs=variables,
                    after=memory,
                    progress=step,
                    cancel=cancel,
                )
                self._keep(_Kept(engine, memory, until))
                done = end
            assert memory is not None
            return Reading(memory, memory.n_tokens - known, time.perf_counter() - began)
        finally:
            turn.release()

    def _take_up(self, saved: Path, engine: Engine, cancel: threading.Event | None) -> None:
        """Load the reading on disk; one that does not fit the model is left alone, and the documents are read again."""
        try:
            self._keep(_Kept(engine, engine.load_memory(saved, cancel=cancel), None))
        except SavedReadingError as error:
            warnings.warn(f"{error} They are read again now.", stacklevel=2)
        self.saved = None

    def retain(self, keep: Callable[[Document], bool]) -> None:
        """Drop the memories that hold a document `keep` refuses."""
        with self._lock:
            self._kept = [kept for kept in self._kept if all(map(keep, kept.memory.documents))]

    def close(self) -> None:
        """Free all memories now."""
        with self._lock:
            for kept in self._kept:
                kept.memory.close()
            self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)

    def __reduce__(self) -> tuple[type[MemoryShelf], tuple[int | None, int, int | None]]:
        return MemoryShelf, (self._limit, self._steps, self._families)

    def _keep(self, new: _Kept) -> None:
        """Put a memory last, and let those unused for longest go where there are too many."""
        with self._lock:
            self._kept = [kept for kept in self._kept if kept.memory is not new.memory]
            self._kept.append(new)
            # what goes is freed with the last user of each
            if self._limit is not None:
                del self._kept[: -self._limit]
            if self._families is not None:
                recent = list(dict.fromkeys(kept.family for kept in reversed(self._kept)))[: self._families]
                self._kept = [kept for kept in self._kept if kept.family in recent]

    def _longest(
        self, engine: Engine, wanted: tuple[Document, ...], system: str | None, variables: dict[str, Any]
    ) -> DocumentMemory | None:
        """The memory that holds most of the first of these documents."""
        with self._lock:
            now = time.monotonic()
            self._kept = [
                kept for kept in self._kept if not kept.memory.closed and (kept.until is None or kept.until > now)
            ]
            fitting = [
                kept.memory
                for kept in self._kept
                if kept.engine is engine
                and (kept.memory.system, kept.memory.template_kwargs) == (system, variables)
                and wanted[: len(kept.memory.documents)] == kept.memory.documents
            ]
        return max(fitting, key=lambda memory: len(memory.documents), default=None)


def _scaled(progress: Progress | None, wanted: Sequence[Document], end: int) -> Progress | None:
    """Progress in all documents while those before `end` are read: the others' tokens are estimated from their lengths."""
    if progress is None or end == len(wanted):
        return progress
    share = sum(len(document.text) for document in wanted) / sum(len(document.text) for document in wanted[:end])
    return lambda done, total: progress(done, round(total * share))


class EngineHandle:
    """An engine that loads on first use, and again when the settings it was loaded with change.

    A copy shares it and keeps documents of its own; a pickle carries no weights and loads them again.

    Args:
        engine: An engine that stays the caller's: `close` leaves it open.
        settings: What `engine` was loaded with; it serves no others.
        shelf_limit: Documents kept, see `MemoryShelf`.
    """

    def __init__(
        self, engine: Engine | None = None, settings: Mapping[str, Any] | None = None, shelf_limit: int = 2
    ) -> None:
        self._engine = engine
        self._settings = dict(settings or {})
        self._borrowed = engine is not None
        self._closed = False
        self._sharing: WeakSet[EngineHandle] = WeakSet((self,))  # open handles of this engine
        self.renew_locks()
        self.shelf = MemoryShelf(shelf_limit)
        _locking.add(self)

    def renew_locks(self) -> None:
        """Nobody holds it."""
        self._lock = threading.Lock()

    def loaded(self, settings: Mapping[str, Any]) -> Engine | None:
        """The engine if it is there already, with these settings."""
        engine = self._engine  # no lock: planning must not wait for a model that loads
        return None if self._changed(settings) else engine

    def get(self, settings: Mapping[str, Any], token: str | None = None) -> Engine:
        """The engine, loaded with `settings` if need be (weights are shared within the process).

        Args:
            settings: Keyword arguments of `QLLM.from_pretrained`.
            token: Access token of the hub.

        Raises:
            ClosedError: After `close`.
            InvalidConfigError: The engine is the caller's and has other settings.
        """
        with self._lock:
            if self._closed:
                raise ClosedError("This QLLM was closed; construct a new one.")
            changed = self._changed(settings)
            if self._engine is not None and changed and self._borrowed:
                raise InvalidConfigError(
                    f"{', '.join(changed)} cannot change: this QLLM was made of an engine that is loaded. Make another one, "
                    "with QLLM(model=...) or with from_engine of an engine that has these settings."
                )
            if self._engine is not None and changed:
                self._leave()
            if self._engine is None:
                from qllm_runtime.engine import QLLM as Engine  # noqa: N811

                self._engine = Engine.from_pretrained(**settings, token=token)
                self._settings = dict(settings)
            return self._engine

    def _changed(self, settings: Mapping[str, Any]) -> list[str]:
        """Names of settings that are others than the engine was loaded with."""
        if self._engine is None:
            return []
        return [name for name, value in settings.items() if self._settings.get(name) != value]

    def _leave(self) -> None:
        """Let go of the engine and what it has read; requests that use them now finish, then all is freed."""
        self._engine = None
        self._sharing.discard(self)
        self._sharing = WeakSet((self,))
        self.shelf.retain(lambda document: False)

    def close(self) -> None:
        """Free memories, and an engine loaded here with its last copy; every later use raises ClosedError."""
        with self._lock:
            self._closed = True
            engine, self._engine = self._engine, None
            self._sharing.discard(self)
        self.shelf.close()
        if engine is not None and not self._borrowed and not self._sharing:
            engine.close()

    def __copy__(self) -> EngineHandle:
        with self._lock:
            copied = EngineHandle(self._engine, self._settings)
            copied._closed = self._closed
            if self._engine is not None:
                copied._borrowed = self._borrowed
                copied._sharing = self._sharing
                copied._sharing.add(copied)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineHandle:
        return self.__copy__()

    def __reduce__(self) -> tuple[type[EngineHandle], tuple[()]]:
        return EngineHandle, ()
