"""`DocumentQA`, questions of documents in one line, and a prompt for LangChain's document chains."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, Self

from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, convert_to_messages
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.utils import AddableDict

from qllm_integrations.langchain.chat import QLLMChat
from qllm_integrations.langchain.memory import DocumentHandle, Documents
from qllm_integrations.langchain.outputs import PAGE_KEYS
from qllm_runtime import types
from qllm_runtime.errors import InvalidRequestError

#: For `create_stuff_documents_chain(llm, QLLM_STUFF_PROMPT)`: `{context}` is read as a document,
#: `{input}` is the question. Where `{context}` is empty, because a retriever found nothing, the question is asked alone.
QLLM_STUFF_PROMPT = ChatPromptTemplate.from_messages(
    [
        (
            "human",
            [
                {
                    "type": "text-plain",
                    "mime_type": "text/plain",
                    "text": "{context}",
                    "extras": {"qllm_optional": True},
                },
                {"type": "text", "text": "{input}"},
            ],
        )
    ]
)

Question = str | Mapping[str, Any]
_QUESTION_KEYS = ("input", "query", "question")


class DocumentQA(Runnable[Question, dict[str, Any]]):
    """Answers questions of documents that were read once, with the passages behind each answer.

    ```python
    with DocumentQA.from_documents(docs, llm=QLLMChat(model="reader")) as qa:
        qa.invoke("Who wrote the letter?")
        # {"input": "Who wrote the letter?", "context": [Document(...), ...], "answer": "..."}
    ```

    Input and output have the keys of LangChain's `create_retrieval_chain`. Input is a question, or a mapping with "input"
    (or "query", "question") and, in a conversation, the messages so far under "chat_history"; whatever the mapping holds
    comes back with the answer. `context` holds the passages that were looked up, best first, with the metadata of their
    documents and `start_char_index`, `end_char_index`, `score` and, for PDFs, `page` and, if they run on to others,
    `page_end`. Streaming gives the same dictionary piece by piece; the pieces add up.

    Args:
        llm: The chat model that read the documents.
        handle: What `llm.add_documents` returned.
    """

    def __init__(self, llm: QLLMChat, handle: DocumentHandle) -> None:
        self.handle = handle
        self.llm = llm.with_memory(handle)
        self._own: QLLMChat | None = None

    @classmethod
    def from_documents(
        cls,
        documents: Documents | Iterable[Documents],
        *,
        llm: QLLMChat | None = None,
        show_progress: bool | None = None,
        progress: types.Progress | None = None,
    ) -> Self:
        """Read `documents` (see `QLLMChat.add_documents`) with `llm` (None: the reader, closed with the rest)."""
        with _lent(llm) as chat:
            handle = chat.add_documents(documents, show_progress=show_progress, progress=progress)
            return cls._over(chat, handle, owns=llm is None)

    @classmethod
    async def afrom_documents(
        cls,
        documents: Documents | Iterable[Documents],
        *,
        llm: QLLMChat | None = None,
        show_progress: bool | None = None,
        progress: types.Progress | None = None,
    ) -> Self:
        """Like `from_documents`, in a worker thread; cancelling the task stops the reading within one chunk."""
        with _lent(llm) as chat:
            handle = await chat.aadd_documents(documents, show_progress=show_progress, progress=progress)
            return cls._over(chat, handle, owns=llm is None)

    @classmethod
    def _over(cls, llm: QLLMChat, handle: DocumentHandle, *, owns: bool) -> Self:
        qa = cls(llm, handle)
        qa._own = llm if owns else None
        return qa

    def invoke(self, input: Question, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:
        """Answer one question."""
        return self._call_with_config(self._answer, input, config, run_type="chain", **kwargs)  # type: ignore[arg-type]

    async def ainvoke(self, input: Question, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:
        """Answer one question without blocking the event loop."""
        return await self._acall_with_config(self._aanswer, input, config, run_type="chain", **kwargs)  # type: ignore[arg-type]

    def stream(self, input: Question, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[dict[str, Any]]:
        """Answer piece by piece."""
        given, run = iter((input,)), self._transform_stream_with_config
        yield from run(given, self._pieces, config, run_type="chain", **kwargs)  # type: ignore[arg-type]

    async def astream(
        self, input: Question, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[dict[str, Any]]:
        """Answer piece by piece without blocking the event loop."""

        async def inputs() -> AsyncIterator[Question]:
            yield input

        run = self._atransform_stream_with_config
        pieces = run(inputs(), self._apieces, config, run_type="chain", **kwargs)  # type: ignore[arg-type]
        async with aclosing(pieces):  # type: ignore[type-var]
            async for piece in pieces:
                yield piece

    def close(self) -> None:
        """Give the memory of the documents back, and the chat model if `from_documents` made it."""
        self.handle.close()
        if self._own is not None:
            self._own.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"DocumentQA({self.handle!r})"

    # the work of a run; `config` makes the model's run a child of it

    def _answer(self, given: Question, config: RunnableConfig, **kwargs: Any) -> dict[str, Any]:
        asked, messages = _asked(given)
        return {**asked, **self._output(self.llm.invoke(messages, config, **kwargs))}

    async def _aanswer(self, given: Question, config: RunnableConfig, **kwargs: Any) -> dict[str, Any]:
        asked, messages = _asked(given)
        return {**asked, **self._output(await self.llm.ainvoke(messages, config, **kwargs))}

    def _pieces(self, given: Iterator[Question], config: RunnableConfig, **kwargs: Any) -> Iterator[dict[str, Any]]:
        for question in given:
            asked, messages = _asked(question)
            yield AddableDict(asked)
            for chunk in self.llm.stream(messages, config, **kwargs):
                yield from self._parts(chunk)

    async def _apieces(
        self, given: AsyncIterator[Question], config: RunnableConfig, **kwargs: Any
    ) -> AsyncIterator[dict[str, Any]]:
        async for question in given:
            asked, messages = _asked(question)
            yield AddableDict(asked)
            async with aclosing(self.llm.astream(messages, config, **kwargs)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    for part in self._parts(chunk):
                        yield part

    def _parts(self, chunk: AIMessage) -> Iterator[dict[str, Any]]:
        if text := str(chunk.text):
            yield AddableDict(answer=text)
        if getattr(chunk, "chunk_position", None) == "last":
            yield AddableDict(context=self._context(chunk))

    def _output(self, message: AIMessage) -> dict[str, Any]:
        return {"context": self._context(message), "answer": str(message.text)}

    def _context(self, message: AIMessage) -> list[Document]:
        return source_documents(message, self.handle.documents)


@contextmanager
def _lent(llm: QLLMChat | None) -> Iterator[QLLMChat]:
    """`llm`, or a new chat model, closed again if nothing comes of it."""
    chat = llm or QLLMChat()
    try:
        yield chat
    except BaseException:
        if llm is None:
            chat.close()
        raise


def source_documents(message: AIMessage, documents: Sequence[types.Document]) -> list[Document]:
    """The passages cited by a message as LangChain documents with the metadata of the documents they come from."""
    sources = []
    for citation in message.additional_kwargs.get("citations", []):
        extras = citation["extras"]
        origin = documents[extras["document_index"]]
        known = {key: value for key, value in origin.metadata.items() if key not in PAGE_KEYS}
        title = {"title": citation["title"]} if "title" in citation else {}
        sources.append(Document(page_content=citation["cited_text"], metadata={**title, **known, **extras}))
    return sources


def _asked(given: Question) -> tuple[dict[str, Any], list[BaseMessage]]:
    """What was given, with the question under "input"; and the messages to answer."""
    known: dict[str, Any] = {"input": given} if isinstance(given, str) else {}
    if isinstance(given, Mapping):
        question = next((given[key] for key in _QUESTION_KEYS if isinstance(given.get(key), str)), None)
        known = {} if question is None else {**given, "input": question}
        known = {key: value for key, value in known.items() if key not in ("context", "answer")}
    if not known:
        raise InvalidRequestError(
            "DocumentQA takes a question, or a mapping with the question under 'input', 'query' or 'question'."
        )
    return known, [*_history(known.get("chat_history")), HumanMessage(known["input"])]


def _history(messages: Any) -> list[BaseMessage]:
    if messages is None:
        return []
    if not isinstance(messages, list | tuple):
        raise InvalidRequestError(
            f"chat_history takes a list of messages, not a {type(messages).__name__}; pass what was said so far as messages."
        )
    try:
        return convert_to_messages(messages)
    except (ValueError, NotImplementedError) as error:
        raise InvalidRequestError(f"chat_history holds something that is not a message: {error}") from None
