"""Answers of the engine as LlamaIndex responses: text, citations, tool calls, usage."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CitationBlock,
    CompletionResponse,
    ContentBlock,
    LogProb,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from qllm_integrations.llama_index.handle import Reading
from qllm_runtime.errors import InvalidRequestError
from qllm_runtime.toolcalls import CallSplitter, ToolCall
from qllm_runtime.types import Answer, Document, Piece, Timings, TokenLogprob, Usage


@dataclass(frozen=True)
class ResponseContext:
    """What a response says beside the answer itself.

    Attributes:
        model: Name of the model.
        documents: Documents of the request in the order sources count them.
        tool_names: Tools the answer may call (None: no tools were given, nothing is parsed).
        reading: The memory it is asked of, and what of it was read for this very request.
        call_forced: The answer has to be a tool call.
    """

    model: str
    documents: Sequence[Document] = ()
    tool_names: Sequence[str] | None = None
    reading: Reading | None = None
    call_forced: bool = False


def chat_response(answer: Answer, context: ResponseContext) -> ChatResponse:
    """The response to a whole answer."""
    assembler = StreamAssembler(context)
    assembler.take(answer.text)
    return assembler.finish(answer)


def completion_response(response: ChatResponse) -> CompletionResponse:
    """The same response for the completion methods."""
    return CompletionResponse(
        text=response.message.content or "",
        delta=response.delta,
        raw=response.raw,
        logprobs=response.logprobs,
        additional_kwargs=dict(response.additional_kwargs),
    )


class StreamAssembler:
    """Turns the pieces of one answer into responses with the text so far, its newest part, and at last everything else.

    Text that may become a tool call is held back until that is decided, so that a call never shows up as text.
    """

    def __init__(self, context: ResponseContext) -> None:
        self._context = context
        self._splitter = None if context.tool_names is None else CallSplitter(context.tool_names)
        self._text = self._thought = ""
        self._calls: list[ToolCallBlock] = []

    def add(self, piece: Piece) -> ChatResponse | None:
        """The response to the next piece, None when there is nothing to tell yet."""
        delta = self.take(piece.text)
        if piece.answer is not None:
            return self.finish(piece.answer, delta)
        self._thought += piece.reasoning
        if not delta and not piece.reasoning:
            return None
        return ChatResponse(
            message=self._message([*self._thoughts(self._thought), TextBlock(text=self._text)]),
            delta=delta,
            logprobs=_logprobs(piece.logprobs) or None,
            additional_kwargs={"thinking_delta": piece.reasoning} if piece.reasoning else {},
        )

    def take(self, text: str) -> str:
        """Take in text; the part of it that is an answer in words, as far as that is decided."""
        if self._splitter is None:
            self._text += text
            return text
        return self._collect(self._splitter.feed(text))

    def finish(self, answer: Answer, delta: str = "") -> ChatResponse:
        """The last response: whole text, tool calls, citations, usage."""
        if self._splitter is not None:
            delta += self._collect(self._splitter.finish())
        missing = self._context.call_forced and not self._calls
        if answer.finish_reason == "length" and (missing or any(not call.tool_name for call in self._calls)):
            raise cut_off(answer.usage.completion_tokens, "tool call")
        context = self._context
        blocks = self._thoughts(answer.reasoning)
        blocks += [TextBlock(text=self._text)] if self._text or not self._calls else []
        blocks += self._calls
        blocks += _citations(answer, context.documents)
        usage = _usage(answer.usage, context.reading)
        raw = {
            "model": context.model,
            "usage": usage,
            "finish_reason": "tool_calls" if self._calls else answer.finish_reason,
            "query": answer.query,
            "query_source": answer.query_source,
            "mode": answer.mode,
            "reread": answer.reread,
            "timings": asdict(_timings(answer.timings, context.reading)),
            "sources": [asdict(source) for source in answer.sources],
        }
        counts = {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
        message = self._message(blocks)
        if self._calls:  # LlamaIndex's programs look for them here before they ask the model's class
            message.additional_kwargs["tool_calls"] = [_openai_call(call) for call in self._calls]
        return ChatResponse(
            message=message,
            delta=delta,
            raw=raw,
            logprobs=_logprobs(answer.logprobs or ()) or None,
            additional_kwargs=counts,
        )

    def _collect(self, parts: Any) -> str:
        delta = ""
        for part in parts:
            if isinstance(part, ToolCall):
                # a call that could not be read keeps its raw text: the tool's own validation then answers the model
                arguments = part.arguments if part.arguments is not None else part.raw
                self._calls.append(
                    ToolCallBlock(
                        tool_call_id=f"call_{uuid.uuid4().hex[:24]}", tool_name=part.name, tool_kwargs=arguments
                    )
                )
            else:
                delta += part
        self._text += delta
        return delta

    @staticmethod
    def _thoughts(reasoning: str) -> list[ContentBlock]:
        return [ThinkingBlock(content=reasoning)] if reasoning else []

    def _message(self, blocks: list[ContentBlock]) -> ChatMessage:
        return ChatMessage(role=MessageRole.ASSISTANT, blocks=blocks)


def cut_off(max_tokens: int, what: str) -> InvalidRequestError:
    """The error for an answer that is of no use because it is incomplete."""
    return InvalidRequestError(
        f"The answer reached max_tokens={max_tokens} before the {what} was complete; raise max_tokens."
    )


def _openai_call(call: ToolCallBlock) -> dict[str, Any]:
    arguments = call.tool_kwargs
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {"id": call.tool_call_id, "type": "function", "function": {"name": call.tool_name, "arguments": arguments}}


def _citations(answer: Answer, documents: Sequence[Document]) -> list[CitationBlock]:
    citations = []
    for source in answer.sources:
        origin = documents[source.document].metadata.get("source") if source.document < len(documents) else None
        citations.append(
            CitationBlock(
                cited_content=TextBlock(text=source.text),
                source=str(origin or source.title or ""),
                title=source.title or "",
                additional_location_info={
                    "document_index": source.document,
                    "start_char_index": source.start,
                    "end_char_index": source.end,
                },
            )
        )
    return citations


def _usage(usage: Usage, reading: Reading | None) -> dict[str, int]:
    # the engine sees a memory that was read earlier, whichever request it was read for
    new = reading.tokens if reading is not None else 0
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "cache_read_tokens": max(0, usage.cache_read_tokens - new),
        "cache_creation_tokens": usage.cache_creation_tokens + new,
        "reasoning_tokens": usage.reasoning_tokens,
    }


def _timings(timings: Timings, reading: Reading | None) -> Timings:
    if reading is None or not reading.tokens:
        return timings
    read_s = timings.read_s + reading.seconds
    n_read = timings.read_s * timings.read_tokens_per_s + reading.tokens
    return replace(
        timings,
        read_s=read_s,
        total_s=timings.total_s + reading.seconds,
        read_tokens_per_s=n_read / max(read_s, 1e-9),
    )


def _logprobs(tokens: Sequence[TokenLogprob]) -> list[list[LogProb]]:
    result = []
    for token in tokens:
        alternatives = [(text, value) for text, token_id, value in token.top if token_id != token.token_id]
        result.append([_logprob(text, value) for text, value in [(token.token, token.logprob), *alternatives]])
    return result


def _logprob(token: str, value: float) -> LogProb:
    return LogProb(token=token, logprob=value, bytes=list(token.encode("utf-8", "replace")))
