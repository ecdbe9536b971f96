"""What a chat model holds besides its configuration: engines and memories. Shared by its copies, never pickled."""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from qllm_integrations.langchain.memory import DocumentHandle
from qllm_runtime.errors import ClosedError
from qllm_runtime.types import Document

if TYPE_CHECKING:
    from qllm_runtime.engine import QLLM

#: Memories kept for documents marked with `cache_control`, per chat model.
MAX_CACHED = 4


class State:
    """Engines by configuration, handles, and memories kept for `cache_control`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._engines: dict[str, QLLM] = {}
        self._adopted: set[str] = set()
        self._handles: list[DocumentHandle] = []
        self._cached: OrderedDict[str, DocumentHandle] = OrderedDict()
        self.closed = False
        self.token: str | None = None

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

    def cached(
        self, engine_key: str, documents: Sequence[Document], system: str | None, read: Callable[[], DocumentHandle]
    ) -> tuple[DocumentHandle, bool]:
        """The memory kept for these documents, and whether it was made just now."""
        digest = hashlib.sha256(repr((engine_key, system)).encode())
        for document in documents:
            digest.update(repr((document.title, len(document.text))).encode())
            digest.update(document.text.encode("utf-8", "surrogatepass"))
        key = digest.hexdigest()
        with self._lock:
            handle = self._cached.get(key)
            if handle is not None and not handle.closed:
                self._cached.move_to_end(key)
                return handle, False
        handle = read()
        with self._lock:
            self._cached[key] = handle
            while len(self._cached) > MAX_CACHED:
                self._cached.popitem(last=False)[1].close()
        return handle, True

    def close(self) -> None:
        """Close every handle and every engine that was loaded here."""
        with self._lock:
            self.closed = True
            for handle in (*self._handles, *self._cached.values()):
                handle.close()
            self._handles.clear()
            self._cached.clear()
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
