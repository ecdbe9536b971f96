"""Document memories: read once, named by an id, asked many times. The text never travels with the messages."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakValueDictionary

from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document as LangChainDocument
from langchain_core.documents.base import Blob

from qllm_integrations.bar import reading_bar
from qllm_runtime import types
from qllm_runtime.documents import document_from_bytes, document_from_text
from qllm_runtime.errors import ClosedError, DocumentError, InvalidRequestError
from qllm_runtime.folders import load_path

if TYPE_CHECKING:
    from qllm_runtime.document_memory import DocumentMemory
    from qllm_runtime.engine import QLLM

_PAGE_BREAK = "\n\n"
_handles: WeakValueDictionary[str, DocumentHandle] = WeakValueDictionary()
_closed: set[str] = set()
_lock = threading.Lock()


class DocumentHandle:
    """Names documents that a model has read; made by `QLLMChat.add_documents` and `load_documents`.

    The memory lives in this process until `close()` (of the handle or of the chat model), or until both the handle and
    the chat model are gone, and holds the keys and values of every token, so close what you no longer ask; a block or
    an id alone does not keep it. Usable as a context manager. It shows neither text nor titles in
    `repr` and refuses to be pickled.

    Attributes:
        id: Name of the memory; what `file_id` of a content block refers to.
    """

    def __init__(self, engine: QLLM, engine_key: str, memory: DocumentMemory) -> None:
        self.id = memory.id
        self.engine = engine
        self.engine_key = engine_key
        self.memory = memory
        with _lock:
            _handles[self.id] = self
            _closed.discard(self.id)

    @property
    def documents(self) -> tuple[types.Document, ...]:
        """The documents, as they were read."""
        return self.memory.documents

    @property
    def n_tokens(self) -> int:
        """Tokens read."""
        return self.memory.n_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and summaries held."""
        return self.memory.nbytes

    @property
    def closed(self) -> bool:
        """Whether the memory was given back."""
        return self.memory.closed

    def block(self) -> dict[str, Any]:
        """A content block that stands for the documents: `HumanMessage([handle.block(), {"type": "text", ...}])`."""
        return {"type": "text-plain", "mime_type": "text/plain", "file_id": self.id}

    def save(self, path: str | Path, *, show_progress: bool = False) -> None:
        """Write what was read to a folder, texts included; `QLLMChat.load_documents` takes it up without reading again.

        Args:
            path: The folder. A reading that is there already is replaced when the new one is whole.
            show_progress: Show a bar on stderr.

        Raises:
            SavedReadingError: The folder cannot be written, holds something else, or does not fit on the disk.
            InvalidRequestError: Metadata of a document that JSON cannot hold.
            ClosedError: The memory was given back.
        """
        self.memory.save(path, progress=reading_bar("Saving", "layers") if show_progress else None)

    def close(self) -> None:
        """Give the memory back. Requests that name it then fail with `ClosedError`."""
        with _lock:
            if _handles.get(self.id) is self:
                del _handles[self.id]
                _closed.add(self.id)
        self.memory.close()

    def __enter__(self) -> DocumentHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return f"DocumentHandle(id={self.id!r}, closed)"
        return f"DocumentHandle(id={self.id!r}, documents={len(self.documents)}, tokens={self.n_tokens})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "A DocumentHandle names memory of this process and cannot be pickled; save() it and load_documents() elsewhere."
        )


def find_handle(memory_id: str, engine_key: str) -> DocumentHandle:
    """The open handle of this id, made for this model and configuration.

    Raises:
        ClosedError: It was closed.
        InvalidRequestError: There is none in this process, or it belongs to another model or configuration.
    """
    with _lock:
        handle = _handles.get(memory_id)
        if memory_id in _closed or (handle is not None and handle.closed):
            raise ClosedError(
                f"The document memory {memory_id!r} was closed; read the documents again with add_documents()."
            )
    if handle is None:
        raise InvalidRequestError(
            f"There is no document memory {memory_id!r} in this process; file_id takes the id of a handle that "
            "add_documents() returned, for as long as the handle or the chat model that read it is there."
        )
    if handle.engine_key != engine_key:
        raise InvalidRequestError(
            f"The document memory {memory_id!r} was read by another model or memory configuration; "
            "keys and values can't be shared between models: read the documents with this one."
        )
    return handle


Documents = str | Path | types.Document | LangChainDocument | Blob | BaseLoader
"""What can be read: text, a path (of a file that can be read, or of a folder), a document, a blob, a loader."""


def to_documents(source: Documents | Iterable[Documents]) -> list[types.Document]:
    """Documents of any kind as the engine reads them. Pages of one PDF, as loaders return them, become one again.

    Raises:
        DocumentError: Nothing to read, or a source of an unknown kind.
    """
    loose: list[types.Document | LangChainDocument] = []
    for item in _each(source):
        if isinstance(item, BaseLoader):
            loose += item.load()
        elif isinstance(item, types.Document | LangChainDocument):
            loose.append(item)
        elif isinstance(item, Path):
            loose += load_path(item)
        else:
            loose.append(_read(item))
    documents: list[types.Document] = []
    for origin, group in groupby(loose, key=_page_of):
        members = list(group)
        if origin is None:
            documents += [doc if isinstance(doc, types.Document) else _convert(doc) for doc in members]
        else:
            documents.append(_rejoin([page for page in members if isinstance(page, LangChainDocument)]))
    if not documents:
        raise DocumentError("There are no documents to read.")
    return documents


def _each(source: Documents | Iterable[Documents]) -> Iterable[Documents]:
    single = isinstance(source, str | bytes | Path | types.Document | LangChainDocument | Blob | BaseLoader)
    if not single and (isinstance(source, Mapping) or not isinstance(source, Iterable)):
        raise DocumentError(
            f"A {type(source).__name__} is not a document; pass text, a Path, a Document, a loader or several of them."
        )
    return [source] if single else source  # type: ignore[list-item,return-value]


def _read(item: Any) -> types.Document:
    if isinstance(item, Blob):
        title = Path(str(item.path)).name if item.path else None
        read = document_from_bytes(item.as_bytes(), item.mimetype, title)
        return types.Document(
            read.text,
            read.title,
            {**read.metadata, **item.metadata, **({"source": item.source} if item.source else {})},
        )
    if not isinstance(item, str):
        raise DocumentError(f"A {type(item).__name__} is not a document; pass text, a Path, a Document or a loader.")
    return document_from_text(item)


def _title(metadata: Mapping[str, Any]) -> str | None:
    if title := metadata.get("title"):
        return str(title)
    source = metadata.get("source")
    return str(source).replace("\\", "/").rstrip("/").rpartition("/")[2] or None if source else None


def _convert(document: LangChainDocument) -> types.Document:
    return types.Document(document.page_content, _title(document.metadata), dict(document.metadata))


def _page_of(document: types.Document | LangChainDocument) -> str | None:
    """The source that a page belongs to; None for anything that is not a page."""
    if isinstance(document, types.Document) or "page" not in document.metadata or "source" not in document.metadata:
        return None
    return str(document.metadata["source"])


def _rejoin(pages: list[LangChainDocument]) -> types.Document:
    starts: list[int] = []
    text = ""
    for page in pages:
        text += _PAGE_BREAK if starts else ""
        starts.append(len(text))
        text += page.page_content
    metadata = {key: value for key, value in pages[0].metadata.items() if key not in ("page", "page_label")}
    metadata["page_starts"] = starts
    numbers = [page.metadata["page"] for page in pages]  # loaders count from 0, and may be asked for some pages only
    if all(isinstance(number, int) for number in numbers):
        metadata["page_numbers"] = [number + 1 for number in numbers]
    if all("page_label" in page.metadata for page in pages):
        metadata["page_labels"] = [str(page.metadata["page_label"]) for page in pages]
    return types.Document(text, _title(metadata), metadata)
