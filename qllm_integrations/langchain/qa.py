"""`DocumentQA`, questions of documents in one line, and a prompt for LangChain's document chains."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from langchain_core.documents import Document
from langchain_core.messages import AIMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.utils import AddableDict

from qllm_integrations.langchain.chat import QLLMChat
from qllm_integrations.langchain.memory import DocumentHandle, Documents
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


class DocumentQA(Runnable[Question, dict[str, Any]]):
    """Answers questions of documents that were read once, with the passages behind each answer.

    ```python
    with DocumentQA.from_documents(docs, llm=QLLMChat(model="reader")) as qa:
        qa.invoke("Who wrote the letter?")
        # {"query": "Who wrote the letter?", "answer": "...", "source_documents": [Document(...), ...]}
    ```

    Input is a question, or a mapping with "query", "input" or "question". `source_documents` hold the passages that
    were looked up, best first, with the metadata of their documents and `start_char_index`, `end_char_index`, `score`
    and, for PDFs, `page` and, if they run on to others, `page_end`. Streaming gives the same dictionary piece by piece;
    the pieces add up.

    Args:
        llm: The chat model that read the documents.
        handle: What `llm.add_documents` returned.
    """

    def __init__(self, llm: QLLMChat, handle: DocumentHandle) -> None:
        self.handle = handle
        self.llm = llm.with_memory(handle)

    @classmethod
    def from_documents(
        cls,
        documents: Documents | Iterable[Documents],
        *,
        llm: QLLMChat | None = None,
        show_progress: bool | None = None,
        progress: types.Progress | None = None,
    ) -> Self:
        """Read `documents` (see `QLLMChat.add_documents`) with `llm` (None: the reader)."""
        chat = llm or QLLMChat()
        return cls(chat, chat.add_documents(documents, show_progress=show_progress, progress=progress))

    def invoke(self, input: Question, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:
        """Answer one question."""
        question = _question(input)
        return self._output(question, self.llm.invoke(question, config, **kwargs))

    async def ainvoke(self, input: Question, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:
        """Answer one question without blocking the event loop."""
        question = _question(input)
        return self._output(question, await self.llm.ainvoke(question, config, **kwargs))

    def stream(self, input: Question, config: RunnableConfig | None = None, **kwargs: Any) -> Iterator[dict[str, Any]]:
        """Answer piece by piece."""
        question = _question(input)
        yield AddableDict(query=question)
        for chunk in self.llm.stream(question, config, **kwargs):
            yield from self._pieces(chunk)

    async def astream(
        self, input: Question, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[dict[str, Any]]:
        """Answer piece by piece without blocking the event loop."""
        question = _question(input)
        yield AddableDict(query=question)
        async for chunk in self.llm.astream(question, config, **kwargs):
            for piece in self._pieces(chunk):
                yield piece

    def close(self) -> None:
        """Give the memory of the documents back."""
        self.handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"DocumentQA({self.handle!r})"

    def _output(self, question: str, message: AIMessage) -> dict[str, Any]:
        return {"query": question, "answer": str(message.text), "source_documents": self._sources(message)}

    def _pieces(self, chunk: AIMessage) -> Iterator[dict[str, Any]]:
        if text := str(chunk.text):
            yield AddableDict(answer=text)
        if getattr(chunk, "chunk_position", None) == "last":
            yield AddableDict(source_documents=self._sources(chunk))

    def _sources(self, message: AIMessage) -> list[Document]:
        return source_documents(message, self.handle.documents)


def source_documents(message: AIMessage, documents: Sequence[types.Document]) -> list[Document]:
    """The passages cited by a message as LangChain documents with the metadata of the documents they come from."""
    sources = []
    for citation in message.additional_kwargs.get("citations", []):
        extras = citation["extras"]
        origin = documents[extras["document_index"]]
        known = {key: value for key, value in origin.metadata.items() if key != "page_starts"}
        title = {"title": citation["title"]} if "title" in citation else {}
        sources.append(Document(page_content=citation["cited_text"], metadata={**title, **known, **extras}))
    return sources


def _question(value: Question) -> str:
    if isinstance(value, str):
        return value
    for key in ("query", "input", "question"):
        if isinstance(value, Mapping) and isinstance(value.get(key), str):
            return str(value[key])
    raise InvalidRequestError(
        "DocumentQA takes a question, or a mapping with the question under 'query', 'input' or 'question'."
    )
