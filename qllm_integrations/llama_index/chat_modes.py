"""LlamaIndex's own chat engines over an index of whole documents."""
# mypy: disallow-subclassing-any=False, disallow-untyped-decorators=False

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from typing import Any

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole
from llama_index.core.callbacks import trace_method
from llama_index.core.chat_engine import CondensePlusContextChatEngine, CondenseQuestionChatEngine, SimpleChatEngine
from llama_index.core.chat_engine.types import BaseChatEngine, ChatMode, StreamingAgentChatResponse
from llama_index.core.schema import NodeWithScore
from llama_index.core.tools import ToolOutput

from qllm_integrations.common import warn_unknown
from qllm_integrations.llama_index.chat_engine import replying
from qllm_integrations.llama_index.llm import QLLM
from qllm_runtime.errors import InvalidRequestError

# arguments that every chat engine takes, and those of each beside them
_COMMON = ("memory", "chat_history", "verbose")
_OWN = {
    ChatMode.CONDENSE_QUESTION: ("condense_question_prompt",),
    ChatMode.CONDENSE_PLUS_CONTEXT: (
        "context_prompt",
        "context_refine_prompt",
        "condense_prompt",
        "skip_condense",
        "node_postprocessors",
    ),
    ChatMode.SIMPLE: ("prefix_messages",),
}


class StreamingCondenseQuestionChatEngine(CondenseQuestionChatEngine):
    """A `CondenseQuestionChatEngine` that streams as well; `source_nodes` fill when the answer is complete.

    Attributes:
        streaming: Makes the query engine whose answers are streamed.
    """

    streaming: Callable[[], BaseQueryEngine]

    @trace_method("chat")
    def stream_chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> StreamingAgentChatResponse:
        """Answer a message piece by piece."""
        question = self._condense_question(chat_history or self._memory.get(input=message), message)
        response, nodes = self.streaming().query(question), list[NodeWithScore]()

        def told() -> Generator[ChatResponse, None, None]:
            text = ""
            for delta in response.response_gen:
                text += delta
                yield _piece(text, delta)
            nodes.extend(response.source_nodes)
            self._memory.put(ChatMessage(message))  # the reply follows when the stream has ended

        reply = replying(told(), nodes, self._memory)
        reply.sources = [_tool_output(question, response)]  # behind the constructor, which would wait for its nodes
        return reply

    @trace_method("chat")
    async def astream_chat(
        self, message: str, chat_history: list[ChatMessage] | None = None
    ) -> StreamingAgentChatResponse:
        """Answer a message piece by piece without blocking the event loop."""
        question = await self._acondense_question(chat_history or await self._memory.aget(input=message), message)
        response, nodes = await self.streaming().aquery(question), list[NodeWithScore]()

        async def told() -> AsyncGenerator[ChatResponse, None]:
            text = ""
            async for delta in response.async_response_gen():
                text += delta
                yield _piece(text, delta)
            nodes.extend(response.source_nodes)
            await self._memory.aput(ChatMessage(message))

        reply = StreamingAgentChatResponse(achat_stream=told(), source_nodes=nodes)
        reply.sources = [_tool_output(question, response)]
        reply.awrite_response_to_history_task = asyncio.create_task(reply.awrite_response_to_history(self._memory))
        return reply


def stock_chat_engine(
    mode: ChatMode,
    llm: QLLM,
    query_engine: Callable[..., BaseQueryEngine],
    retriever: Callable[..., BaseRetriever],
    *,
    system_prompt: str | None,
    given: Mapping[str, Any],
    options_of: Mapping[ChatMode, Sequence[str]],
) -> BaseChatEngine:
    """One of LlamaIndex's own chat engines, with the arguments that concern it.

    Args:
        mode: "condense_question", "condense_plus_context" or "simple".
        llm: The model.
        query_engine: Makes the query engine behind "condense_question".
        retriever: Makes the retriever behind "condense_plus_context".
        system_prompt: Of a mode whose answers are written by the chat engine itself; the query engine has its own.
        given: What the caller passed on.
        options_of: Arguments in `given` that go to the query engine or the retriever of a mode.

    Raises:
        InvalidRequestError: A mode that LlamaIndex removed.
    """
    if mode not in _OWN:
        raise InvalidRequestError(
            f"LlamaIndex has removed chat_mode={mode.value!r}; give a FunctionAgent or ReActAgent "
            "QueryEngineTool.from_defaults(index.as_query_engine()), or use 'best'."
        )
    parts = options_of.get(mode, ())
    warn_unknown(f"as_chat_engine({mode.value!r})", given, (*_COMMON, *_OWN[mode], *parts, "streaming"))
    part = {name: given[name] for name in parts if name in given and name != "streaming"}
    own = {name: given[name] for name in (*_COMMON, *_OWN[mode]) if given.get(name) is not None}
    if mode is ChatMode.CONDENSE_QUESTION:
        engine = StreamingCondenseQuestionChatEngine.from_defaults(query_engine=query_engine(**part), llm=llm, **own)
        engine.streaming = lambda: query_engine(streaming=True, **part)
        return engine
    if mode is ChatMode.CONDENSE_PLUS_CONTEXT:
        return CondensePlusContextChatEngine.from_defaults(
            retriever=retriever(**part), llm=llm, system_prompt=system_prompt, **own
        )
    return SimpleChatEngine.from_defaults(llm=llm, system_prompt=system_prompt, **own)


def _piece(text: str, delta: str) -> ChatResponse:
    return ChatResponse(message=ChatMessage(text, role=MessageRole.ASSISTANT), delta=delta)


def _tool_output(question: str, response: Any) -> ToolOutput:
    return ToolOutput(content="", tool_name="query_engine", raw_input={"query": question}, raw_output=response)
