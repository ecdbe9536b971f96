"""`WholeDocumentIndex`: an index that keeps documents whole."""
# mypy: disallow-subclassing-any=False

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.chat_engine.types import BaseChatEngine, ChatMode
from llama_index.core.indices.registry import INDEX_STRUCT_TYPE_TO_INDEX_CLASS
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.schema import BaseNode, Document, TransformComponent
from llama_index.core.storage.storage_context import StorageContext

from qllm_integrations.bar import reading_bar
from qllm_integrations.common import warn_unknown
from qllm_integrations.llama_index import options
from qllm_integrations.llama_index.asking import Asker, asking_llm, system_text
from qllm_integrations.llama_index.chat_engine import WholeDocumentChatEngine
from qllm_integrations.llama_index.chat_modes import stock_chat_engine
from qllm_integrations.llama_index.contents import STRUCT_TYPE, IndexContents, WholeDocumentList, stored_struct
from qllm_integrations.llama_index.documents import WholeDocument, check_ids, rejoin, whole_node
from qllm_integrations.llama_index.handle import MemoryShelf
from qllm_integrations.llama_index.query_engine import WholeDocumentQueryEngine
from qllm_integrations.llama_index.retriever import LookupRetriever
from qllm_runtime.errors import InvalidRequestError
from qllm_runtime.reading_folder import is_reading
from qllm_runtime.types import Mode, check_mode

# memories kept while several documents are read one after the other
_READING_STEPS = 8
# engines and system prompts whose memories are kept
_FAMILIES = 4


class WholeDocumentIndex(IndexContents):
    """An index of whole documents: no splitter, no embeddings, no vector store.

    Pages and sections of one file are put together again. Metadata stays beside the text, so `start_char_idx` and
    `end_char_idx` of every source slice the document's text exactly; page labels of a PDF come back in the sources'
    metadata.

    The documents are read with the first question and kept as a memory; later questions read nothing again. Mode
    "read_once" reads them when the index is built already. In mode "query_aware" each question reads them anew, with the
    question in mind. A memory holds the documents of one question, all of them or (response mode "accumulate") one; it
    stays as long as their texts do, unless four other models or system prompts were asked with since.

    Args:
        nodes: Whole nodes; most users call `from_documents`.
        llm: A `QLLM` (None: `Settings.llm` when it is needed).
        mode: "read_once" or "query_aware" (None: read once, when it is needed; "query_aware" for a model with
            `MemoryConfig(faithful=True)`).
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

        Read once, then chat; keep the documents on disk, and what was read of them:

        ```python
        index = WholeDocumentIndex.from_documents([Document(text=text)], llm=llm, mode="read_once", show_progress=True)
        chat = index.as_chat_engine()
        print(chat.chat("What is the secret number?"))
        index.persist("store")
        index = WholeDocumentIndex.load("store", llm=llm)
        ```
    """

    def __init__(
        self,
        nodes: Sequence[BaseNode] | None = None,
        *,
        llm: Any = None,
        mode: Mode | None = None,
        system_prompt: str | None = None,
        index_struct: WholeDocumentList | None = None,
        storage_context: StorageContext | None = None,
        show_progress: bool = False,
        **kwargs: Any,
    ) -> None:
        check_mode(mode)
        self._llm = llm
        self._mode = mode
        self._system_prompt = system_prompt
        self._shelf = MemoryShelf(steps=_READING_STEPS, families=_FAMILIES)
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
        warn_unknown(cls.__name__, kwargs, ("llm", "mode", "system_prompt"))
        known = {name: kwargs[name] for name in ("llm", "mode", "system_prompt") if name in kwargs}
        storage_context = storage_context or StorageContext.from_defaults()
        wholes = rejoin(documents)
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
            asker = index._asker(None)
            asker.memory(index.whole_nodes(), system_text(asker.opened(())))
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
        """Load an index that `persist` or `index.storage_context.persist(persist_dir)` wrote.

        What `persist` kept of the reading is taken up by the first question; without it the texts are read anew then.

        Raises:
            InvalidRequestError: No index of whole documents there, or several and no `index_id`.
        """
        warn_unknown("load", kwargs, ("system_prompt", "show_progress", "callback_manager"))
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
        struct = stored_struct(storage_context, str(persist_dir), index_id)
        index = cls(index_struct=struct, storage_context=storage_context, llm=llm, mode=mode, **kwargs)
        reading = _reading_in(persist_dir, struct.index_id)
        if is_reading(reading):
            index._shelf.saved = reading
        return index

    def persist(self, persist_dir: str | Path) -> None:
        """Write the index and the reading of its documents to a directory, so that `load` has nothing to read again.

        The documents are read now if they were not; in mode "query_aware", where each question reads them, only the index is
        written. Keys and values of every token take as much on disk as in memory.

        Raises:
            SavedReadingError: The reading does not fit on the disk, or cannot be written.
        """
        self.storage_context.persist(persist_dir=str(persist_dir))
        asker = self._asker(None)
        reading = asker.memory(self.whole_nodes(), system_text(asker.opened(())))
        if reading is not None:
            reading.memory.save(
                _reading_in(persist_dir, self.index_id),
                progress=reading_bar("Saving", "layers") if self._show_progress else None,
            )

    # Asking

    def _default_mode(self, llm: Any) -> Mode:
        model, _ = asking_llm(self._llm if llm is None else llm)
        return "query_aware" if model.reads_for_the_question else "read_once"

    def _asker(self, llm: Any, **changes: Any) -> Asker:
        model, _ = asking_llm(self._llm if llm is None else llm)
        settings: dict[str, Any] = {
            "mode": self._mode or self._default_mode(llm),
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
        warn_unknown("as_retriever", kwargs, (*options.parameters(self.as_retriever), "verbose"))
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
        warn_unknown("as_query_engine", kwargs, known)
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
        `mode` or `MemoryConfig(faithful=True)` says otherwise), and each message looks up its own passages. The other
        modes are LlamaIndex's own over this index: "condense_question" takes the arguments of `as_query_engine`,
        "condense_plus_context" those of `as_retriever`.

        Raises:
            InvalidRequestError: There is no such mode.
        """
        try:
            chosen = ChatMode(chat_mode)
        except ValueError:
            names = ", ".join(repr(known.value) for known in ChatMode)
            raise InvalidRequestError(f"There is no chat_mode {chat_mode!r}; known are {names}.") from None
        if chosen not in (ChatMode.BEST, ChatMode.CONTEXT):
            return self._stock_chat_engine(
                chosen, llm, mode, system_prompt, {"memory": memory, "chat_history": chat_history, **kwargs}
            )
        known = (*options.ANSWER_FIELDS, *options.parameters(self.as_chat_engine), "verbose")
        warn_unknown("as_chat_engine", kwargs, known)
        return WholeDocumentChatEngine(
            self._asker(llm, mode=mode or self._default_mode(llm), system_prompt=system_prompt),
            self.whole_nodes,
            memory=memory,
            chat_history=chat_history,
            options={name: kwargs[name] for name in options.ANSWER_FIELDS if name in kwargs},
            callback_manager=self._callback_manager,
        )

    def _stock_chat_engine(
        self, chosen: ChatMode, llm: Any, mode: Mode | None, system_prompt: str | None, given: dict[str, Any]
    ) -> BaseChatEngine:
        model, _ = asking_llm(self._llm if llm is None else llm)
        known = {
            ChatMode.CONDENSE_QUESTION: (*options.ANSWER_FIELDS, *options.parameters(self.as_query_engine)),
            ChatMode.CONDENSE_PLUS_CONTEXT: options.parameters(self.as_retriever),
        }
        if system_prompt is None and "prefix_messages" not in given:  # which stand where it would
            system_prompt = self._system_prompt
        return stock_chat_engine(
            chosen,
            model,
            functools.partial(self.as_query_engine, llm, mode=mode, system_prompt=system_prompt),
            functools.partial(self.as_retriever, llm, mode=mode),
            system_prompt=system_prompt,
            given=given,
            options_of=known,
        )

    def close(self) -> None:
        """Free the memories of the documents now."""
        self._shelf.close()


def _reading_in(persist_dir: str | Path, index_id: str) -> Path:
    return Path(persist_dir) / f"reading-{quote(index_id, safe='')}"


# for load_index_from_storage
INDEX_STRUCT_TYPE_TO_INDEX_CLASS[STRUCT_TYPE] = WholeDocumentIndex
