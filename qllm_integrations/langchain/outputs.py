"""Answers of the engine as LangChain messages: citations, usage, metadata, log-probabilities, tool calls."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from langchain_core.messages import AIMessage, AIMessageChunk, InvalidToolCall, ToolCall, ToolCallChunk, UsageMetadata
from langchain_core.messages import content as types
from langchain_core.messages.block_translators import register_translator

from qllm_runtime import toolcalls
from qllm_runtime.documents import page_span
from qllm_runtime.types import Answer, Document, Source, TokenLogprob

PROVIDER = "qllm"
# Indices of streamed tool calls begin after those that LangChain counts itself: thought, text, citations.
CALLS = 100
#: Metadata of a document in pages: where each starts, which number and label it has in its file. Citations say which it is.
PAGE_KEYS = ("page_starts", "page_numbers", "page_labels")


def citations(sources: Iterable[Source], documents: Sequence[Document]) -> list[types.Citation]:
    """The passages behind an answer as standard citation annotations, best first.

    `extras` holds `document_index`, `start_char_index`, `end_char_index` (into the document's text) and `score`; for
    documents with pages also `page` (in the whole file, from 1), if the passage runs on to others `page_end`, and
    `page_label` ("iv", "iv-v") where a loader gave labels; and `source` where the document's metadata names one.
    """
    return [
        _citation(source, documents[source.document] if source.document < len(documents) else None)
        for source in sources
    ]


def _citation(source: Source, document: Document | None) -> types.Citation:
    metadata = document.metadata if document else {}
    extras: dict[str, Any] = {
        "document_index": source.document,
        "start_char_index": source.start,
        "end_char_index": source.end,
        "score": source.score,
    }
    extras |= _pages(metadata, source)
    citation = types.Citation(type="citation", cited_text=source.text, extras=extras)
    origin = metadata.get("source")
    if isinstance(origin, str) and origin.startswith(("http://", "https://")):
        citation["url"] = origin
    elif origin:
        extras["source"] = str(origin)
    if title := metadata.get("title") or source.title:
        citation["title"] = title
    return citation


def _pages(metadata: Mapping[str, Any], source: Source) -> dict[str, Any]:
    if not (starts := metadata.get("page_starts")):
        return {}
    span = page_span(starts, source.start, source.end)
    numbers, labels = metadata.get("page_numbers"), metadata.get("page_labels")
    first, last = (numbers[page - 1] for page in span) if numbers else span
    pages: dict[str, Any] = {"page": first} if first == last else {"page": first, "page_end": last}
    if labels:
        pages["page_label"] = "-".join(dict.fromkeys(labels[page - 1] for page in span))
    return pages


def usage(answer: Answer, *, creates_memory: bool = False) -> UsageMetadata:
    """Token counts; `creates_memory` when the memory the answer was read from was made for this very request."""
    counts = answer.usage
    read, created = counts.cache_read_tokens, counts.cache_creation_tokens
    if creates_memory:
        read, created = 0, created + read
    told = UsageMetadata(
        input_tokens=counts.prompt_tokens,
        output_tokens=counts.completion_tokens,
        total_tokens=counts.total_tokens,
        input_token_details={"cache_read": read, "cache_creation": created},
    )
    if counts.reasoning_tokens:
        told["output_token_details"] = {"reasoning": counts.reasoning_tokens}
    return told


def metadata(answer: Answer, model: str, *, query_tokens: int, documents: int) -> dict[str, Any]:
    """`response_metadata` of a finished answer, without the log-probabilities."""
    details = {
        "query_source": answer.query_source,
        "query": answer.query,
        "query_tokens": query_tokens,
        "mode": answer.mode,
        "reread": answer.reread,
        "documents": documents,
        "timings": asdict(answer.timings),
    }
    return {"model_provider": PROVIDER, "model_name": model, "finish_reason": answer.finish_reason, "qllm": details}


def logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Log-probabilities in the form chat models of LangChain share."""

    def entry(token: str, value: float) -> dict[str, Any]:
        return {"token": token, "bytes": list(token.encode()), "logprob": value}

    return {
        "content": [
            {**entry(token.token, token.logprob), "top_logprobs": [entry(text, value) for text, _, value in token.top]}
            for token in tokens
        ]
    }


def to_message(answer: Answer, names: Collection[str] | None, **fields: Any) -> AIMessage:
    """The answer as a message; tool calls are looked for when `names` of tools are given."""
    text, calls = answer.text, []
    if names is not None:
        splitter = toolcalls.CallSplitter(names)
        parts = [*splitter.feed(answer.text), *splitter.finish()]
        text = "".join(part for part in parts if isinstance(part, str))
        calls = [part for part in parts if isinstance(part, toolcalls.ToolCall)]
    good = [
        ToolCall(type="tool_call", id=_call_id(), name=call.name, args=call.arguments)
        for call in calls
        if call.arguments is not None
    ]
    bad = [
        InvalidToolCall(
            type="invalid_tool_call", id=_call_id(), name=call.name or None, args=call.raw, error=call.error
        )
        for call in calls
        if call.arguments is None
    ]
    message = AIMessage(content=text, tool_calls=good, invalid_tool_calls=bad, **fields)
    if answer.reasoning:
        message.additional_kwargs["reasoning_content"] = answer.reasoning
    return message


def to_chunk(part: str | toolcalls.ToolCall, number: int) -> AIMessageChunk:
    """A streamed piece: text, or a whole tool call, the `number`-th (from 1)."""
    marks = {"model_provider": PROVIDER}
    if isinstance(part, str):
        return AIMessageChunk(content=part, response_metadata=marks)
    call = ToolCallChunk(
        type="tool_call_chunk", id=_call_id(), name=part.name or None, args=part.raw, index=CALLS + number
    )
    return AIMessageChunk(content="", tool_call_chunks=[call], response_metadata=marks)


def to_thought(reasoning: str) -> AIMessageChunk:
    """A streamed piece of the thought ahead of an answer."""
    marks = {"model_provider": PROVIDER}
    return AIMessageChunk(content="", additional_kwargs={"reasoning_content": reasoning}, response_metadata=marks)


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def content_blocks(message: AIMessage) -> list[types.ContentBlock]:
    """Standard content blocks of a message: a thought, its text with the citations, the tool calls, the invalid ones."""
    if not isinstance(message.content, str):
        raise NotImplementedError  # LangChain's own reading of block lists applies
    blocks: list[types.ContentBlock] = []
    if reasoning := message.additional_kwargs.get("reasoning_content"):
        blocks.append(types.ReasoningContentBlock(type="reasoning", reasoning=reasoning))
    cited = message.additional_kwargs.get("citations")
    if message.content or cited:
        text = types.TextContentBlock(type="text", text=message.content)
        if cited:
            text["annotations"] = list(cited)
        blocks.append(text)
    if isinstance(message, AIMessageChunk) and message.chunk_position != "last":
        blocks += [cast(types.ContentBlock, {"type": "tool_call_chunk", **call}) for call in message.tool_call_chunks]
    else:
        calls = [
            types.ToolCall(type="tool_call", id=call["id"], name=call["name"], args=call["args"])
            for call in message.tool_calls
        ]
        blocks += cast("list[types.ContentBlock]", calls)
        blocks += [
            cast(types.ContentBlock, {**call, "type": "invalid_tool_call"}) for call in message.invalid_tool_calls
        ]
    return blocks


register_translator(PROVIDER, content_blocks, content_blocks)
