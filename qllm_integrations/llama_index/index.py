"""`WholeDocumentIndex`: an index that keeps documents whole."""
# mypy: disallow-subclassing-any=False

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.chat_engine.types import BaseChatEngine, ChatMode
from llama_index.core.data_structs.data_structs import IndexList
from llama_index.core.indices.base import BaseIndex
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import BaseNode, Document, TransformComponent
from llama_index.core.storage.docstore.types import RefDocInfo
from llama_index.core.storage.storage_context import StorageContext

from qllm_integrations.aio import run_in_thread
from qllm_integrations.llama_index import options
from qllm_integrations.llama_index.asking import Asker, asking_llm
from qllm_integrations.llama_index.chat_engine import WholeDocumentChatEngine
from qllm_integrations.llama_index.documents import (
    WholeDocument,
    check_ids,
    engine_document,
    lasting_metadata,
    rejoin,
    whole_node,
)
from qllm_integrations.llama_index.handle import MemoryShelf
from qllm_integrations.llama_index.query_engine import WholeDocumentQueryEngine
from qllm_integrations.llama_index.retriever import LookupRetriever
from qllm_runtime.errors import InvalidRequestError
from qllm_runtime.types import Mode

# memories kept while several documents are read one after the other
_READING_STEPS = 8


class WholeDocumentIndex(BaseIndex[IndexList]):
    """An index of whole documents: no splitter, no embeddings, no vector store.

    Pages and sections of one file are put together again. Metadata stays beside the text, so `start_char_idx` and
    `end_char_idx` of every source slice the document's text exactly; page labels of a PDF come back in the sources'
    metadata.

    The documents are read with the first question and kept as a memory; later questions read nothing again. Mode
    "read_once" reads them when the index is built already. In mode "query_aware" each question reads them anew, with the
    question in mind. A memory holds the documents of one question, all of them or (response mode "accumulate") one; it
    stays as long as their texts do.

    Args:
        nodes: Whole nodes; most users call `from_documents`.
        llm: A `QLLM` (None: `Settings.llm` when it is needed).
        mode: "read_once" or "query_aware" (None: read once, when it is needed).
        system_prompt: Ahead of the documents in every question.

    Examples:
        Build, ask, look at the sources:

        ```python
        from llama_index.core import Document
        from qllm_integrations.llama_index import QLLM, WholeDocumentIndex

        text = "The lamp was lit at dusk. The secret number of the harbour is 4711. " * 20
        llm = QLLM(model="reader", max_tokens=32)
        index = WholeDocumentIndex.from_documents([Document(text=text, metadata={"file_name": "log.txt"})], llm=llm)
        response = index.as_query_engine().query("What is the secret number?")
        print(response)
        for found in response.source_nodes:
            print(found.score, found.node.metadata["file_name"], found.node.start_char_idx, found.node.end_char_idx)
        ```

        Read once, then chat; keep the documents on disk:

        ```python
        index = WholeDocumentIndex.from_documents([Document(text=text)], llm=llm, mode="read_once", show_progress=True)
        chat = index.as_chat_engine()
        print(chat.chat("What is the secret number?"))
        index.storage_context.persist("store")
        index = WholeDocumentIndex.load("store", llm=llm)
        ```
    """

    index_struct_cls = IndexList

    def __init__(
        self,
        nodes: Sequence[BaseNode] | None = None,
        *,
        llm: Any = None,
        mode: Mode | None = None,
        system_prompt: str | None = None,
        index_struct: IndexList | None = None,
        storage_context: StorageContext | None = None,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> None:
        self._llm = llm
        self._mode = mode
        self._system_prompt = system_prompt
        self._shelf = MemoryShelf(steps=_READING_STEPS)
        super().__init__(
            nodes=nodes,
            index_struct=index_struct,
            storage_context=storage_context,
            show_progress=show_progress,
            **{**kwargs, "transformations": [WholeDocument()]},
        )

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[Document],
        storage_context: StorageContext | None = None,
        show_progress: bool = False,
        callback_manager: Any = None,
        transformations: list[TransformComponent] | None = None,
        **kwargs: Any,
    ) -> WholeDocumentIndex:
        """Build the index; in mode "read_once" the documents are read now.

        Raises:
            DocumentError: A document without text.
            InvalidRequestError: Transformations were given (documents stay whole here), or two documents share an id.
        """
        if transformations:
            raise InvalidRequestError(
                "WholeDocumentIndex keeps documents whole and takes no transformations; for split texts use any "
                "other index with QLLMSynthesizer as its response_synthesizer."
            )
        options.warn_unknown(kwargs, ("llm", "mode", "system_prompt"), cls.__name__)
        known = {name: kwargs[name] for name in ("llm", "mode", "system_prompt") if name in kwargs}
        storage_context = storage_context or StorageContext.from_defaults()
        wholes = [document for document, _ in rejoin(documents)]
        check_ids(wholes)
        for document in wholes:
            storage_context.docstore.set_document_hash(document.id_, document.hash)
        index = cls(
            nodes=[whole_node(document) for document in wholes],
            storage_context=storage_context,
            show_progress=show_progress,
            callback_manager=callback_manager,
            **known,
        )
        if index._mode == "read_once":
            index._asker(None).memory(index.whole_nodes())
        return index

    @classmethod
    def load(
        cls,
        persist_dir: str | Path,
        *,
        llm: Any = None,
        index_id: str | None = None,
        mode: Mode | None = None,
        **kwargs: Any,
    ) -> WholeDocumentIndex:
        """Load an index that `index.storage_context.persist(persist_dir)` wrote; its texts are read anew when asked.

        Raises:
            InvalidRequestError: No index there, or several and no `index_id`.
        """
        options.warn_unknown(kwargs, ("system_prompt", "show_progress", "callback_manager"), "load")
        if not Path(persist_dir).is_dir():
            raise InvalidRequestError(
                f"There is no directory {str(persist_dir)!r}; write one with index.storage_context.persist(...)."
            )
        try:
            storage_context = StorageContext.from_defaults(persist_dir=str(persist_dir))
        except FileNotFoundError as error:
            raise InvalidRequestError(
                f"The directory {str(persist_dir)!r} holds no index (no {Path(error.filename or '').name}); write one with "
                "index.storage_context.persist(...)."
            ) from None
        found = [struct for struct in storage_context.index_store.index_structs() if isinstance(struct, IndexList)]
        if index_id is not None:
            found = [struct for struct in found if struct.index_id == index_id]
        if len(found) != 1:
            what = f"index {index_id!r}" if index_id else "single index"
            raise InvalidRequestError(
                f"{str(persist_dir)!r} holds {len(found)} indices of whole documents, no {what}; name one by index_id."
            )
        return cls(index_struct=found[0], storage_context=storage_context, llm=llm, mode=mode, **kwargs)

    # What the index holds

    def whole_nodes(self) -> list[BaseNode]:
        """The documents as nodes, in order."""
        return list(self.docstore.get_nodes(list(self.index_struct.nodes)))

    @property
    def ref_doc_info(self) -> dict[str, RefDocInfo]:
        """The documents of this index by id."""
        ids = [node.ref_doc_id for node in self.whole_nodes()]
        infos = {ref: self.docstore.get_ref_doc_info(ref) for ref in ids if ref is not None}
        return {ref: info for ref, info in infos.items() if info is not None}

    def _build_index_from_nodes(self, nodes: Sequence[BaseNode], **build_kwargs: Any) -> IndexList:
        struct = IndexList()
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

    def insert(self, document: Document, **insert_kwargs: Any) -> None:
        """Add a document behind the others.

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
        known = next((node for node in self.whole_nodes() if node.ref_doc_id == document.id_), None)
        if known is None:
            return
        [new] = WholeDocument()([document])
        if known.get_content() != new.get_content() or not _same_metadata(known, new):
            raise InvalidRequestError(
                f"The index holds another document of the id {document.id_!r}; replace it with update_ref_doc or "
                "refresh_ref_docs, or give the new one an id_ of its own."
            )

    def _forget(self) -> None:
        held = {(document.title, document.text) for document in map(engine_document, self.whole_nodes())}
        self._shelf.retain(lambda document: (document.title, document.text) in held)

    def refresh_ref_docs(self, documents: Sequence[Document], **update_kwargs: Any) -> list[bool]:
        """Bring the index up to date: insert new documents, update changed ones in their place, leave the rest alone.

        A document is recognised by its id, or by its `file_path` (readers give new ids each time). Says which were
        new or changed. What was read of unchanged texts is kept.

        Raises:
            InvalidRequestError: Two documents share an id.
        """
        refreshed = [False] * len(documents)
        wholes = rejoin(documents)
        check_ids([document for document, _ in wholes])
        for document, positions in wholes:
            known = self._known(document)
            if known is not None:
                if known.get_content() == document.text and _same_metadata(known, document):
                    continue
                document.id_ = known.ref_doc_id
                self.update_ref_doc(document)
            else:
                self.insert(document)
            for position in positions:
                refreshed[position] = True
        return refreshed

    async def arefresh_ref_docs(self, documents: Sequence[Document], **update_kwargs: Any) -> list[bool]:
        """As `refresh_ref_docs`, without blocking the event loop."""
        return await run_in_thread(lambda cancel: self.refresh_ref_docs(documents, **update_kwargs))

    def update_ref_doc(self, document: Document, **update_kwargs: Any) -> None:
        """Replace a document; it keeps its place among the others."""
        order = list(self.index_struct.nodes)
        super().update_ref_doc(document, **update_kwargs)
        self._restore(order)

    async def aupdate_ref_doc(self, document: Document, **update_kwargs: Any) -> None:
        """As `update_ref_doc`."""
        order = list(self.index_struct.nodes)
        await super().aupdate_ref_doc(document, **update_kwargs)
        self._restore(order)

    def _restore(self, order: list[str]) -> None:
        places = {node_id: place for place, node_id in enumerate(order)}
        self.index_struct.nodes.sort(key=lambda node_id: places.get(node_id, len(order)))
        self._storage_context.index_store.add_index_struct(self.index_struct)

    def _known(self, document: Document) -> BaseNode | None:
        nodes = self.whole_nodes()
        path = document.metadata.get("file_path")
        same_id = (node for node in nodes if node.ref_doc_id == document.id_)
        same_path = (node for node in nodes if path and node.metadata.get("file_path") == path)
        return next(same_id, None) or next(same_path, None)

    # Asking

    def _asker(self, llm: Any, **changes: Any) -> Asker:
        model, _ = asking_llm(self._llm if llm is None else llm)
        settings: dict[str, Any] = {
            "mode": self._mode or "read_once",
            "shelf": self._shelf,
            "system_prompt": self._system_prompt,
            "show_progress": self._show_progress,
        }
        return Asker(model, **{**settings, **{name: value for name, value in changes.items() if value is not None}})

    def as_retriever(
        self,
        llm: Any = None,
        *,
        similarity_top_k: int | None = None,
        max_tokens: int | None = None,
        mode: Mode | None = None,
        **kwargs: Any,
    ) -> BaseRetriever:
        """A retriever of the passages looked up for a question."""
        options.warn_unknown(kwargs, (*options.parameters(self.as_retriever), "verbose"), "as_retriever")
        extra = {"max_tokens": max_tokens} if max_tokens is not None else {}
        return LookupRetriever(
            self._asker(llm, mode=mode),
            self.whole_nodes,
            similarity_top_k=similarity_top_k,
            callback_manager=self._callback_manager,
            verbose=bool(kwargs.get("verbose")),
            **extra,
        )

    def as_query_engine(
        self,
        llm: Any = None,
        *,
        streaming: bool = False,
        output_cls: type[BaseModel] | None = None,
        response_mode: ResponseMode | str = ResponseMode.COMPACT,
        similarity_top_k: int | None = None,
        text_qa_template: BasePromptTemplate | None = None,
        system_prompt: str | None = None,
        mode: Mode | None = None,
        **kwargs: Any,
    ) -> BaseQueryEngine:
        """A query engine over the whole documents, see `WholeDocumentQueryEngine`.

        Sampling fields (`max_tokens=64`, `temperature=0.7`, ...) and `reread` go to each call of the model.
        """
        known = (*options.ANSWER_FIELDS, *options.parameters(self.as_query_engine), "verbose", "use_async")
        options.warn_unknown(kwargs, known, "as_query_engine")
        _, structured = asking_llm(self._llm if llm is None else llm)
        return WholeDocumentQueryEngine(
            self._asker(llm, mode=mode, template=text_qa_template, system_prompt=system_prompt),
            self.whole_nodes,
            streaming=streaming,
            output_cls=output_cls or structured,
            response_mode=response_mode,
            similarity_top_k=similarity_top_k,
            options={name: kwargs[name] for name in options.ANSWER_FIELDS if name in kwargs},
            callback_manager=self._callback_manager,
        )

    def as_chat_engine(
        self,
        chat_mode: ChatMode = ChatMode.BEST,
        llm: Any = None,
        *,
        mode: Mode | None = None,
        memory: Any = None,
        chat_history: Sequence[Any] | None = None,
        system_prompt: str | None = None,
        **kwargs: Any,
    ) -> BaseChatEngine:
        """A chat engine over the whole documents.

        "best" and "context" give a `WholeDocumentChatEngine`: one memory of the documents ("read_once" unless
        `mode` says otherwise), and each message looks up its own passages. The other modes are LlamaIndex's own
        over this index.
        """
        if ChatMode(chat_mode) not in (ChatMode.BEST, ChatMode.CONTEXT):
            own = {"memory": memory, "chat_history": chat_history, "system_prompt": system_prompt}
            given = {name: value for name, value in own.items() if value is not None}
            model, _ = asking_llm(self._llm if llm is None else llm)
            return super().as_chat_engine(ChatMode(chat_mode), llm=model, **given, **kwargs)
        known = (*options.ANSWER_FIELDS, *options.parameters(self.as_chat_engine), "verbose")
        options.warn_unknown(kwargs, known, "as_chat_engine")
        return WholeDocumentChatEngine(
            self._asker(llm, mode=mode or "read_once", system_prompt=system_prompt),
            self.whole_nodes,
            memory=memory,
            chat_history=chat_history,
            options={name: kwargs[name] for name in options.ANSWER_FIELDS if name in kwargs},
            callback_manager=self._callback_manager,
        )

    def close(self) -> None:
        """Free the memories of the documents now."""
        self._shelf.close()


def _same_metadata(known: BaseNode, document: BaseNode) -> bool:
    return bool(lasting_metadata(known.metadata) == lasting_metadata(document.metadata))
