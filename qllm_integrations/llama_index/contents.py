"""What an index of whole documents holds: how it is stored, and how it changes."""
# mypy: disallow-subclassing-any=False

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama_index.core.data_structs.data_structs import IndexList, IndexStruct
from llama_index.core.data_structs.registry import INDEX_STRUCT_TYPE_TO_INDEX_STRUCT_CLASS
from llama_index.core.indices.base import BaseIndex
from llama_index.core.indices.registry import INDEX_STRUCT_TYPE_TO_INDEX_CLASS
from llama_index.core.schema import BaseNode, Document
from llama_index.core.storage.docstore.types import RefDocInfo
from llama_index.core.storage.storage_context import StorageContext

from qllm_integrations.aio import run_in_thread
from qllm_integrations.llama_index.documents import (
    WholeDocument,
    by_file,
    check_ids,
    engine_document,
    is_whole,
    lasting_metadata,
)
from qllm_integrations.llama_index.handle import MemoryShelf
from qllm_integrations.llama_index.pages import join, pages_of, renewed, without
from qllm_runtime.errors import InvalidRequestError

#: Under which an index of whole documents is stored; LlamaIndex's enumeration of types cannot grow.
STRUCT_TYPE = "qllm_whole_documents"


@dataclass
class WholeDocumentList(IndexList):
    """Ids of whole nodes, in order."""

    @classmethod
    def get_type(cls) -> str:
        """Name of the type in storage."""
        return STRUCT_TYPE


class IndexContents(BaseIndex[WholeDocumentList]):
    """The documents of a `WholeDocumentIndex`: insert, update, refresh, delete."""

    index_struct_cls = WholeDocumentList
    _shelf: MemoryShelf

    def whole_nodes(self) -> list[BaseNode]:
        """The documents as nodes, in order."""
        return list(self.docstore.get_nodes(list(self.index_struct.nodes)))

    @property
    def ref_doc_info(self) -> dict[str, RefDocInfo]:
        """The documents of this index by id."""
        ids = [node.ref_doc_id for node in self.whole_nodes()]
        infos = {ref: self.docstore.get_ref_doc_info(ref) for ref in ids if ref is not None}
        return {ref: info for ref, info in infos.items() if info is not None}

    def _build_index_from_nodes(self, nodes: Sequence[BaseNode], **build_kwargs: Any) -> WholeDocumentList:
        struct = WholeDocumentList()
        for node in nodes:
            struct.add_node(node)
        return struct

    def _insert(self, nodes: Sequence[BaseNode], **insert_kwargs: Any) -> None:
        for node in nodes:
            if node.node_id not in self.index_struct.nodes:
                self.index_struct.add_node(node)
        self._forget()

    def _delete_node(self, node_id: str, **delete_kwargs: Any) -> None:
        self.index_struct.nodes = [held for held in self.index_struct.nodes if held != node_id]
        self._forget()

    def _forget(self) -> None:
        held = {(document.title, document.text) for document in map(engine_document, self.whole_nodes())}
        self._shelf.retain(lambda document: (document.title, document.text) in held)

    def insert(self, document: Document, **insert_kwargs: Any) -> None:
        """Add a document after the others.

        Raises:
            InvalidRequestError: The index holds another document of this id.
        """
        self._check_new(document)
        super().insert(document, **insert_kwargs)

    async def ainsert(self, document: Document, **insert_kwargs: Any) -> None:
        """As `insert`."""
        self._check_new(document)
        await super().ainsert(document, **insert_kwargs)

    def _check_new(self, document: Document) -> None:
        known = self._known([document], by_path=False)
        if known is None:
            return
        [new] = WholeDocument()([document])
        if known.get_content() != new.get_content() or not _same_metadata(known, new):
            raise InvalidRequestError(
                f"The index holds another document of the id {document.id_!r}; replace it with update_ref_doc or "
                "refresh_ref_docs, or give the new one an id_ of its own."
            )

    def refresh_ref_docs(self, documents: Sequence[Document], **update_kwargs: Any) -> list[bool]:
        """Bring the index up to date: insert new documents, update changed ones in their place, leave the rest alone.

        A document is recognised by its id, or by its `file_path` (readers give new ids each time). Says which were
        new or changed. What was read of unchanged texts is kept. Pages that are known by their ids take the place of what
        they were, and pages that are not given stay; pages of a known file with new ids are taken for the whole file.

        Raises:
            InvalidRequestError: Two documents share an id, or which pages of a file were given cannot be told.
        """
        refreshed = [False] * len(documents)
        groups = by_file(documents)
        check_ids([documents[positions[0]] for positions in groups])
        for positions in groups:
            given = [documents[position] for position in positions]
            known = self._known(given)
            if known is None:
                self.insert(join(given))
            else:
                document = renewed(known, given)
                if known.get_content() == document.text and _same_metadata(known, document):
                    continue
                self._replace(document)
            for position in positions:
                refreshed[position] = True
        return refreshed

    async def arefresh_ref_docs(self, documents: Sequence[Document], **update_kwargs: Any) -> list[bool]:
        """As `refresh_ref_docs`, without blocking the event loop."""
        return await run_in_thread(lambda cancel: self.refresh_ref_docs(documents, **update_kwargs))

    def update_ref_doc(self, document: Document, **update_kwargs: Any) -> None:
        """Replace a document, or the page of a file that has its id; it keeps its place among the others.

        Raises:
            InvalidRequestError: It is a page of a known file, and which cannot be told.
        """
        self._replace(self._updated(document), **update_kwargs)

    async def aupdate_ref_doc(self, document: Document, **update_kwargs: Any) -> None:
        """As `update_ref_doc`."""
        order = list(self.index_struct.nodes)
        await super().aupdate_ref_doc(self._updated(document), **update_kwargs)
        self._restore(order)

    def delete_ref_doc(self, ref_doc_id: str, delete_from_docstore: bool = False, **delete_kwargs: Any) -> None:
        """Delete a document, by an id in `ref_doc_info` (of a file in pages: its first one's), or one further page of a file.

        Raises:
            DocumentError: The other pages have no text.
        """
        document = self._page_taken_out(ref_doc_id)
        if document is None:
            super().delete_ref_doc(ref_doc_id, delete_from_docstore, **delete_kwargs)
        else:
            self._replace(document)

    async def adelete_ref_doc(self, ref_doc_id: str, delete_from_docstore: bool = False, **delete_kwargs: Any) -> None:
        """As `delete_ref_doc`."""
        document = self._page_taken_out(ref_doc_id)
        if document is None:
            await super().adelete_ref_doc(ref_doc_id, delete_from_docstore, **delete_kwargs)
        else:
            order = list(self.index_struct.nodes)
            await super().aupdate_ref_doc(document)
            self._restore(order)

    def _updated(self, document: Document) -> Document:
        known = self._known([document])
        if known is None or (known.ref_doc_id != document.id_ and len(pages_of(known)) <= 1):
            return document
        return renewed(known, [document], by_id=True)

    def _page_taken_out(self, ref_doc_id: str) -> Document | None:
        nodes = self.whole_nodes()
        if any(node.ref_doc_id == ref_doc_id for node in nodes):
            return None
        owner = next((node for node in nodes if any(page.id == ref_doc_id for page in pages_of(node))), None)
        return None if owner is None else without(owner, ref_doc_id)

    def _replace(self, document: Document, **update_kwargs: Any) -> None:
        order = list(self.index_struct.nodes)
        super().update_ref_doc(document, **update_kwargs)
        self._restore(order)

    def _restore(self, order: list[str]) -> None:
        places = {node_id: place for place, node_id in enumerate(order)}
        self.index_struct.nodes.sort(key=lambda node_id: places.get(node_id, len(order)))
        self._storage_context.index_store.add_index_struct(self.index_struct)

    def _known(self, given: Sequence[Document], by_path: bool = True) -> BaseNode | None:
        """The whole document that these are, or are parts of."""
        nodes = self.whole_nodes()
        ids = {document.id_ for document in given}
        path = given[0].metadata.get("file_path") if by_path else None
        same_part = (node for node in nodes if any(page.id in ids for page in pages_of(node)))
        same_id = (node for node in nodes if node.ref_doc_id in ids)
        same_path = (node for node in nodes if path and node.metadata.get("file_path") == path)
        return next(same_part, None) or next(same_id, None) or next(same_path, None)


def stored_struct(storage_context: StorageContext, place: str, index_id: str | None) -> WholeDocumentList:
    """The index of whole documents in a storage.

    Args:
        storage_context: Where it is.
        place: Name of that place, for messages.
        index_id: Which one (None: the only one).

    Raises:
        InvalidRequestError: There is none, or several and no `index_id`.
    """
    structs = [
        struct
        for struct in storage_context.index_store.index_structs()
        if index_id is None or struct.index_id == index_id
    ]
    found = [struct for struct in structs if _holds_wholes(struct, storage_context)]
    if structs and not found:
        classes = sorted({_class_of(struct) for struct in structs})
        raise InvalidRequestError(
            f"{place!r} holds no index of whole documents{f' {index_id!r}' if index_id else ''}, but what "
            f"{', '.join(classes)} wrote; load that with load_index_from_storage, or build a WholeDocumentIndex with "
            "from_documents."
        )
    if len(found) != 1:
        what = f"index {index_id!r}" if index_id else "single index"
        raise InvalidRequestError(
            f"{place!r} holds {len(found)} indices of whole documents, no {what}; name one by index_id."
        )
    struct = found[0]
    if isinstance(struct, WholeDocumentList):
        return struct
    return WholeDocumentList(index_id=struct.index_id, summary=struct.summary, nodes=list(struct.nodes))


def _holds_wholes(struct: IndexStruct, storage_context: StorageContext) -> bool:
    if isinstance(struct, WholeDocumentList) or not isinstance(struct, IndexList):
        return isinstance(struct, WholeDocumentList)
    # before it had a type of its own this package stored a plain IndexList, as SummaryIndex does
    nodes = storage_context.docstore.get_nodes(list(struct.nodes), raise_error=False)
    return len(nodes) == len(struct.nodes) and all(map(is_whole, nodes))


def _class_of(struct: IndexStruct) -> str:
    kind = INDEX_STRUCT_TYPE_TO_INDEX_CLASS.get(struct.get_type())
    return kind.__name__ if kind is not None else type(struct).__name__


def _same_metadata(known: BaseNode, document: BaseNode) -> bool:
    return bool(lasting_metadata(known.metadata) == lasting_metadata(document.metadata))


INDEX_STRUCT_TYPE_TO_INDEX_STRUCT_CLASS[STRUCT_TYPE] = WholeDocumentList
