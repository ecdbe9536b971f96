"""Asking a question of whole nodes: what query engine, retriever, chat engine and synthesizer have in common."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.prompts import BasePromptTemplate, PromptTemplate
from llama_index.core.schema import BaseNode, NodeWithScore
from llama_index.core.settings import Settings

from qllm_integrations.aio import run_in_thread
from qllm_integrations.llama_index.calls import reading_progress, report_reading
from qllm_integrations.llama_index.documents import citable_block, engine_document, passage
from qllm_integrations.llama_index.handle import MemoryShelf, Reading
from qllm_integrations.llama_index.llm import QLLM
from qllm_integrations.llama_index.prompts import routed_messages
from qllm_runtime.errors import InvalidRequestError
from qllm_runtime.types import Mode, check_mode

#: The documents and the question, and nothing else.
DEFAULT_TEMPLATE = PromptTemplate("{context_str}\n\n{query_str}")
#: Tokens of an answer that is written only to see where the model looks.
LOOKUP_TOKENS = 32


@dataclass
class Sources:
    """Filled when the answer is complete: passages behind it and what a `Response` tells about them.

    Attributes:
        nodes: The passages, best first.
        metadata: Metadata by node id, and under "qllm" how the answer came about.
    """

    nodes: list[NodeWithScore] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)

    def fill(self, response: ChatResponse, nodes: Sequence[BaseNode], top: int | None = None) -> None:
        """Take the sources of a finished response to a question about `nodes`."""
        for source in response.raw["sources"][:top] if response.raw else ():
            if source["document"] < len(nodes):  # the others stand in messages
                self.nodes.append(passage(nodes[source["document"]], source["start"], source["end"], source["score"]))
        self.describe(response)

    def describe(self, response: ChatResponse) -> None:
        """Fill the metadata for the nodes there are."""
        self.metadata.update({found.node.node_id: found.node.metadata for found in self.nodes})
        if response.raw:
            told = ("query", "query_source", "mode", "reread", "finish_reason", "usage", "timings")
            self.metadata["qllm"] = {name: response.raw[name] for name in told}


@dataclass
class Asker:
    """Puts questions to whole nodes.

    Attributes:
        llm: The model.
        mode: "query_aware" reads the nodes under each question, "read_once" keeps their memory on `shelf`.
        shelf: Where memories are kept.
        template: Prompt template with `{context_str}` and `{query_str}`.
        system_prompt: Ahead of the documents.
        show_progress: Show a bar while reading.
    """

    llm: QLLM
    mode: Mode = "read_once"
    shelf: MemoryShelf = field(default_factory=lambda: MemoryShelf(2))
    template: BasePromptTemplate = field(default_factory=lambda: DEFAULT_TEMPLATE)
    system_prompt: str | None = None
    show_progress: bool = False

    def __post_init__(self) -> None:
        check_mode(self.mode)

    def ask(self, query: str, nodes: Sequence[BaseNode], **options: Any) -> ChatResponse:
        """The whole answer."""
        messages = self.messages(query, nodes)
        memory = self.memory(nodes, system_text(messages))
        return self.llm.chat(messages, **self.arguments(query, memory, options))

    async def aask(self, query: str, nodes: Sequence[BaseNode], **options: Any) -> ChatResponse:
        """The whole answer, without blocking the event loop."""
        messages = self.messages(query, nodes)
        memory = await self.amemory(nodes, system_text(messages))
        return await self.llm.achat(messages, **self.arguments(query, memory, options))

    def stream(
        self, query: str, nodes: Sequence[BaseNode], sources: Sources, *, top: int | None = None, **options: Any
    ) -> Generator[str, None, None]:
        """The answer piece by piece; `sources` are filled with the last one."""
        messages = self.messages(query, nodes)
        memory = self.memory(nodes, system_text(messages))
        responses = self.llm.stream_chat(messages, **self.arguments(query, memory, options))
        return _texts(responses, lambda last: sources.fill(last, nodes, top))

    async def astream(
        self, query: str, nodes: Sequence[BaseNode], sources: Sources, *, top: int | None = None, **options: Any
    ) -> AsyncGenerator[str, None]:
        """The answer piece by piece, without blocking the event loop."""
        messages = self.messages(query, nodes)
        memory = await self.amemory(nodes, system_text(messages))
        responses = await self.llm.astream_chat(messages, **self.arguments(query, memory, options))
        return _atexts(responses, lambda last: sources.fill(last, nodes, top))

    def messages(self, query: str, nodes: Sequence[BaseNode]) -> list[ChatMessage]:
        """The question as messages, with the nodes as document blocks unless they are kept in a memory.

        Raises:
            InvalidRequestError: The question is empty.
        """
        check_question(query)
        blocks = [citable_block(node) for node in nodes] if self.mode == "query_aware" else []
        return self.opened(routed_messages(self.template, {"query_str": query}, self.llm, blocks))

    def opened(self, messages: Sequence[ChatMessage]) -> list[ChatMessage]:
        """The messages with the system prompts of model and engine ahead, all leading system text in one message."""
        leading, rest = split_system(messages)
        texts = [self.llm.system_prompt, self.system_prompt, *(message.content for message in leading)]
        return [*_system("\n\n".join(text for text in texts if text)), *rest]

    def chatted(
        self, messages: Sequence[ChatMessage], nodes: Sequence[BaseNode]
    ) -> tuple[list[ChatMessage], str | None]:
        """A conversation about nodes with the system prompts ahead, and the system text to read the nodes under.

        What the history's own system messages say (a summary, what a memory recalls) may change with every turn: a kept
        memory is not read under it, and it follows the nodes.
        """
        if self.mode == "query_aware" or not nodes:
            return self.opened(messages), None
        opening = self.opened(())
        return [*opening, *messages], system_text(opening)

    def memory(
        self, nodes: Sequence[BaseNode], system: str | None, cancel: threading.Event | None = None
    ) -> Reading | None:
        """The kept memory of the nodes under this system text, read now if need be; None when each question reads them."""
        if self.mode == "query_aware" or not nodes:
            return None
        documents = [engine_document(node) for node in nodes]
        progress = reading_progress(len(documents), self.show_progress or self.llm.show_progress)
        reading = self.shelf.get(
            self.llm.engine,
            documents,
            system,
            template_kwargs=self.llm.template_kwargs,
            progress=progress,
            cancel=cancel,
        )
        report_reading(reading)
        return reading

    async def amemory(self, nodes: Sequence[BaseNode], system: str | None) -> Reading | None:
        """As `memory`, without blocking the event loop."""
        if self.mode == "query_aware" or not nodes:
            return None
        return await run_in_thread(lambda cancel: self.memory(nodes, system, cancel))

    def arguments(self, query: str, memory: Reading | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the call."""
        given: dict[str, Any] = {"query": query, "mode": self.mode}
        if memory is not None:
            given["memory"] = memory
        if self.show_progress:
            given["show_progress"] = True
        return {**given, **options}


def split_system(messages: Sequence[ChatMessage]) -> tuple[list[ChatMessage], list[ChatMessage]]:
    """The leading system messages, and the others."""
    n = next((i for i, message in enumerate(messages) if message.role is not MessageRole.SYSTEM), len(messages))
    return list(messages[:n]), list(messages[n:])


def system_text(messages: Sequence[ChatMessage]) -> str | None:
    """What the first message says if it is the system's."""
    return messages[0].content if messages and messages[0].role is MessageRole.SYSTEM else None


def check_question(question: str) -> None:
    """Raise InvalidRequestError if there is nothing to ask."""
    if not question.strip():
        raise InvalidRequestError("The question is empty.")


def asking_llm(llm: Any) -> tuple[QLLM, type[Any] | None]:
    """The `QLLM` behind `llm` (None: `Settings.llm`) and the class of its structured answers, if it has one.

    Raises:
        InvalidRequestError: It is another model.
    """
    if llm is None:
        try:
            llm = Settings.llm
        except (ImportError, ValueError) as error:  # LlamaIndex falls back to a hosted model that is not installed
            raise InvalidRequestError("There is no model; pass llm=QLLM(model=...) or set Settings.llm.") from error
    output_cls = None
    if isinstance(llm, StructuredLLM):
        llm, output_cls = llm.llm, llm.output_cls
    if not isinstance(llm, QLLM):
        raise InvalidRequestError(
            f"Reading whole documents needs a QLLM, got {type(llm).__name__}; pass llm=QLLM(model=...) or set "
            f"Settings.llm."
        )
    return llm, output_cls


def _system(text: str) -> list[ChatMessage]:
    return [ChatMessage(text, role=MessageRole.SYSTEM)] if text else []


def _texts(
    responses: Generator[ChatResponse, None, None], done: Callable[[ChatResponse], None]
) -> Generator[str, None, None]:
    for response in responses:
        if response.raw is not None:
            done(response)
        if response.delta:
            yield response.delta


async def _atexts(
    responses: AsyncGenerator[ChatResponse, None], done: Callable[[ChatResponse], None]
) -> AsyncGenerator[str, None]:
    try:
        async for response in responses:
            if response.raw is not None:
                done(response)
            if response.delta:
                yield response.delta
    finally:
        await responses.aclose()
