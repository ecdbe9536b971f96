"""Conversations about whole documents: one memory, and each message looks up its own passages."""
# mypy: disallow-subclassing-any=False, disallow-untyped-decorators=False

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole, TextBlock
from llama_index.core.callbacks import CallbackManager, trace_method
from llama_index.core.chat_engine.types import AgentChatResponse, BaseChatEngine, StreamingAgentChatResponse
from llama_index.core.memory import BaseMemory, ChatMemoryBuffer
from llama_index.core.schema import BaseNode, NodeWithScore
from llama_index.core.types import Thread

from qllm_integrations.aio import run_in_thread
from qllm_integrations.llama_index.asking import Asker, Sources, check_question
from qllm_integrations.llama_index.documents import citable_block


class WholeDocumentChatEngine(BaseChatEngine):
    """A chat engine that looks up passages anew for every message.

    The documents are read once and stay ahead of the conversation; the newest message is the query, no model rewrites
    it. A message that fails leaves no trace in the history.

    Args:
        asker: Puts questions to the model.
        nodes: Gives the whole nodes of the index.
        memory: Chat history (None: everything that fits the window).
        chat_history: Messages to start with.
        options: Further arguments of each call of the model.

    Examples:
        ```python
        from llama_index.core import Document
        from qllm_integrations.llama_index import QLLM, WholeDocumentIndex

        text = "The lamp was lit at dusk. The secret number of the harbour is 4711. " * 20
        index = WholeDocumentIndex.from_documents([Document(text=text)], llm=QLLM(model="reader", max_tokens=32))
        chat = index.as_chat_engine()
        print(chat.chat("What is the secret number?").source_nodes)
        for token in chat.stream_chat("And when was the lamp lit?").response_gen:
            print(token, end="")
        ```
    """

    def __init__(
        self,
        asker: Asker,
        nodes: Callable[[], Sequence[BaseNode]],
        *,
        memory: BaseMemory | None = None,
        chat_history: Sequence[ChatMessage] | None = None,
        options: dict[str, Any] | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        self._asker = asker
        self._nodes = nodes
        llm = asker.llm
        limit = max(1, llm.metadata.context_window - llm.max_tokens)
        self._history = memory or ChatMemoryBuffer.from_defaults(
            chat_history=list(chat_history or ()), token_limit=limit, tokenizer_fn=llm.tokenizer_fn
        )
        self._options = dict(options or {})
        self.callback_manager = callback_manager or CallbackManager([])

    @trace_method("chat")
    def chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AgentChatResponse:
        """Answer a message."""
        if chat_history is not None:
            self._history.set(list(chat_history))
        asked, nodes = ChatMessage(message), list(self._nodes())
        messages, system = self._messages([*self._history.get(input=message), asked], nodes)
        document_memory = self._asker.memory(nodes, system)
        response = self._asker.llm.chat(messages, **self._asker.arguments(message, document_memory, self._options))
        self._history.put(asked)
        self._history.put(_spoken(response))
        return _reply(response, nodes)

    @trace_method("chat")
    async def achat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AgentChatResponse:
        """Answer a message without blocking the event loop."""
        if chat_history is not None:
            await self._history.aset(list(chat_history))
        asked, nodes = ChatMessage(message), await run_in_thread(lambda cancel: list(self._nodes()))
        messages, system = self._messages([*await self._history.aget(input=message), asked], nodes)
        document_memory = await self._asker.amemory(nodes, system)
        response = await self._asker.llm.achat(
            messages, **self._asker.arguments(message, document_memory, self._options)
        )
        await self._history.aput(asked)
        await self._history.aput(_spoken(response))
        return _reply(response, nodes)

    @trace_method("chat")
    def stream_chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> StreamingAgentChatResponse:
        """Answer a message piece by piece; `source_nodes` fill when the answer is complete."""
        if chat_history is not None:
            self._history.set(list(chat_history))
        asked, nodes, sources = ChatMessage(message), list(self._nodes()), Sources()
        messages, system = self._messages([*self._history.get(input=message), asked], nodes)
        document_memory = self._asker.memory(nodes, system)
        responses = self._asker.llm.stream_chat(
            messages, **self._asker.arguments(message, document_memory, self._options)
        )

        def told() -> Generator[ChatResponse, None, None]:
            for response in responses:
                if response.raw is not None:
                    sources.fill(response, nodes)
                    self._history.put(asked)  # the reply follows when the stream has ended
                    response.message = _spoken(response)
                yield response

        return replying(told(), sources.nodes, self._history)

    @trace_method("chat")
    async def astream_chat(
        self, message: str, chat_history: list[ChatMessage] | None = None
    ) -> StreamingAgentChatResponse:
        """Answer a message piece by piece without blocking the event loop."""
        if chat_history is not None:
            await self._history.aset(list(chat_history))
        asked, sources = ChatMessage(message), Sources()
        nodes = await run_in_thread(lambda cancel: list(self._nodes()))
        messages, system = self._messages([*await self._history.aget(input=message), asked], nodes)
        document_memory = await self._asker.amemory(nodes, system)
        responses = await self._asker.llm.astream_chat(
            messages, **self._asker.arguments(message, document_memory, self._options)
        )

        async def told() -> AsyncGenerator[ChatResponse, None]:
            async for response in responses:
                if response.raw is not None:
                    sources.fill(response, nodes)
                    await self._history.aput(asked)
                    response.message = _spoken(response)
                yield response

        reply = StreamingAgentChatResponse(achat_stream=told(), source_nodes=sources.nodes)
        reply.awrite_response_to_history_task = asyncio.create_task(reply.awrite_response_to_history(self._history))
        return reply

    def reset(self) -> None:
        """Forget the conversation; the documents stay read."""
        self._history.reset()

    @property
    def chat_history(self) -> list[ChatMessage]:
        """The conversation so far."""
        return list(self._history.get_all())

    def _messages(
        self, conversation: Sequence[ChatMessage], nodes: Sequence[BaseNode]
    ) -> tuple[list[ChatMessage], str | None]:
        """System prompts, then the conversation with the documents in its first message, which is the user's.

        Returns:
            The messages, and the system text that the documents are read under where they are kept.
        """
        check_question(conversation[-1].content or "")
        messages, system = self._asker.chatted(conversation, nodes)
        first = next(i for i, message in enumerate(messages) if message.role is not MessageRole.SYSTEM)
        if messages[first].role is not MessageRole.USER:  # a greeting, say
            messages.insert(first, ChatMessage(role=MessageRole.USER, blocks=[]))
        if self._asker.mode == "query_aware":
            blocks = [*(citable_block(node) for node in nodes), *messages[first].blocks]
            messages[first] = messages[first].model_copy(update={"blocks": blocks})
        return messages, system


def _spoken(response: ChatResponse) -> ChatMessage:
    """The reply for the history: its words, without the cited passages."""
    return ChatMessage(role=MessageRole.ASSISTANT, blocks=[TextBlock(text=response.message.content or "")])


def _reply(response: ChatResponse, nodes: Sequence[BaseNode]) -> AgentChatResponse:
    sources = Sources()
    sources.fill(response, nodes)
    return AgentChatResponse(
        response=response.message.content or "", source_nodes=sources.nodes, metadata=sources.metadata
    )


def replying(
    told: Generator[ChatResponse, None, None], nodes: list[NodeWithScore], memory: BaseMemory
) -> StreamingAgentChatResponse:
    """A reply that is written, and put into the history, by a thread of its own."""
    reply = StreamingAgentChatResponse(chat_stream=told, source_nodes=nodes)
    reply.write_response_to_history_thread = Thread(target=write_to_history, args=(reply, memory), daemon=True)
    reply.write_response_to_history_thread.start()
    return reply


def write_to_history(reply: StreamingAgentChatResponse, history: BaseMemory) -> None:
    """Drive a streamed reply to its end, in a thread of its own."""
    try:
        reply.write_response_to_history(history)
    except Exception:  # kept in reply.exception, from where response_gen raises it to the consumer
        assert reply.exception is not None
