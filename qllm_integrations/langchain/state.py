"""What a chat model holds besides its configuration: engines and memories. Shared by its copies, never pickled."""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from qllm_runtime.errors import CancelledError, ClosedError
from qllm_runtime.types import Document
from qllm_runtime.waiting import after_fork

if TYPE_CHECKING:
    from qllm_integrations.langchain.memory import DocumentHandle
    from qllm_runtime.document_memory import DocumentMemory
    from qllm_runtime.engine import QLLM

#: Memories kept for documents marked with `cache_control`, per chat model.
MAX_KEPT = 4
_states: WeakSet[State] = WeakSet()


def _after_fork() -> None:
    for state in list(_states):
        state.forked()


after_fork(_after_fork)


class State:
    """Engines by configuration, handles, and memories kept for `cache_control`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._engines: dict[str, QLLM] = {}
        self._adopted: set[str] = set()
        self._handles: list[DocumentHandle] = []
        self._borrowed: list[DocumentHandle] = []
        self._kept: OrderedDict[str, DocumentMemory] = OrderedDict()
        self._reading: dict[str, threading.Event] = {}
        self.closed = False
        self.token: str | None = None
        _states.add(self)

    def forked(self) -> None:
        """Threads that held the lock or were reading do not live on in this process."""
        self._lock = threading.RLock()
        self._reading.clear()

    def adopt(self, engine: QLLM, key: Callable[[], str]) -> None:
        """Use an engine that the caller owns (and closes); `token` tells it apart from every other, also in `key`."""
        self.token = uuid.uuid4().hex
        self._engines[key()] = engine
        self._adopted.add(key())

    def engine(self, key: str, load: Callable[[], QLLM]) -> QLLM:
        """The engine of this configuration, loaded when it is first asked for."""
        with self._lock:
            self.check_open()
            if key not in self._engines:
                self._engines[key] = load()
            return self._engines[key]

    def check_open(self) -> None:
        """Raise `ClosedError` once closed."""
        if self.closed:
            raise ClosedError("This chat model was closed; make a new one.")

    def add(self, handle: DocumentHandle) -> DocumentHandle:
        """Remember a handle, to close it with the chat model."""
        with self._lock:
            self._handles = [other for other in self._handles if not other.closed]
            self._handles.append(handle)
        return handle

    def borrow(self, handle: DocumentHandle) -> None:
        """Keep another chat model's handle alive, and leave closing it to its owner."""
        with self._lock:
            self._borrowed = [other for other in self._borrowed if not other.closed]
            if not any(handle is other for other in (*self._handles, *self._borrowed)):
                self._borrowed.append(handle)

    def kept(
        self,
        engine_key: str,
        documents: Sequence[Document],
        system: str | None,
        read: Callable[[], DocumentMemory],
        cancel: threading.Event,
    ) -> tuple[DocumentMemory, bool]:
        """The memory kept for these documents, and whether it was read just now.

        Requests that ask for the same documents at once wait for one reading. If it fails, each of them reads.

        Raises:
            CancelledError: `cancel` was set while another request was reading.
            ClosedError: The chat model was closed.
        """
        key = _digest(engine_key, documents, system)
        while True:
            with self._lock:
                self.check_open()
                if key in self._kept:
                    self._kept.move_to_end(key)
                    return self._kept[key], False
                under_way = self._reading.get(key)
                if under_way is None:
                    done = self._reading[key] = threading.Event()
                    break
            while not under_way.wait(0.05):
                if cancel.is_set():
                    raise CancelledError("Cancelled while another request read the documents.")
        try:
            memory = read()
            with self._lock:
                if self.closed:
                    memory.close()
                self.check_open()
                self._kept[key] = memory
                while len(self._kept) > MAX_KEPT:
                    self._kept.popitem(last=False)  # not closed: a request under way may be asking it
            return memory, True
        finally:
            with self._lock:
                self._reading.pop(key, None)  # gone already in a process forked meanwhile
            done.set()

    def view(self) -> View:
        """The same engines and memories for a chat model that can be closed by itself."""
        return View(self)

    def close(self) -> None:
        """Close every handle and every engine that was loaded here."""
        with self._lock:
            self.closed = True
            for handle in self._handles:
                handle.close()
            for memory in self._kept.values():
                memory.close()
            self._handles.clear()
            self._borrowed.clear()
            self._kept.clear()
            for key, engine in self._engines.items():
                if key not in self._adopted:
                    engine.close()
            self._engines.clear()

    def __copy__(self) -> State:
        return self

    def __deepcopy__(self, _memo: dict[int, Any]) -> State:
        return self

    def __reduce__(self) -> tuple[type[State], tuple[()]]:
        return State, ()


class View(State):
    """Another chat model's engines and memories: closing it leaves those open, closing that one closes both."""

    def __init__(self, owner: State) -> None:
        super().__init__()
        self._owner = owner
        self.token = owner.token

    def engine(self, key: str, load: Callable[[], QLLM]) -> QLLM:
        """The owner's."""
        self.check_open()
        return self._owner.engine(key, load)

    def check_open(self) -> None:
        """Raise `ClosedError` once this one or its owner is closed."""
        super().check_open()
        self._owner.check_open()

    def add(self, handle: DocumentHandle) -> DocumentHandle:
        """As in `State`, for the owner."""
        return self._owner.add(handle)

    def borrow(self, handle: DocumentHandle) -> None:
        """As in `State`, for the owner."""
        self._owner.borrow(handle)

    def kept(self, *arguments: Any) -> tuple[DocumentMemory, bool]:
        """The owner's."""
        self.check_open()
        return self._owner.kept(*arguments)

    def close(self) -> None:
        """Close this one alone."""
        self.closed = True


def _digest(engine_key: str, documents: Sequence[Document], system: str | None) -> str:
    digest = hashlib.sha256(repr((engine_key, system)).encode())
    for document in documents:
        # what citations say of a document belongs to it, though the model never sees it
        digest.update(
            repr((document.title, dict(document.metadata), len(document.text))).encode("utf-8", "surrogatepass")
        )
        digest.update(document.text.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
