"""LlamaIndex chat messages as turns of the engine: which parts are documents, which text is the query."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    CitableBlock,
    CitationBlock,
    DocumentBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)

from qllm_runtime.documents import document_from_bytes
from qllm_runtime.errors import DocumentError, InvalidRequestError, QLLMError
from qllm_runtime.types import Document, QuerySource, Turn

#: Key of `ChatMessage.additional_kwargs` that names the query of a message whose text says more than the question.
QUERY_KEY = "query_str"
#: Key under which a prompt template's output parser hands down the JSON schema it can parse.
SCHEMA_KEY = "response_schema"

# how LlamaIndex's agents speak in the user's name
_OBSERVATION = "Observation:"
_REACT_REPLIES = (_OBSERVATION, "Error while parsing the output:", "FAILURE: Your previous response was empty.")
_REACT_STEPS = ("Thought:", "Action:")
_TRANSCRIPT = "<current_conversation>"

_Role = Literal["system", "user", "assistant", "tool"]
_ROLES: dict[MessageRole, _Role] = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.TOOL: "tool",
    MessageRole.FUNCTION: "tool",
}


@dataclass(frozen=True)
class Request:
    """Messages as the engine takes them.

    Attributes:
        turns: One per message.
        query: Text that guides the lookup ("" when there is none).
        query_source: Which rule found it.
        documents: The documents of all turns, in order.
        keep: How many of them a `CachePoint` asks to keep: the leading ones of the first user turn.
        ttl: Seconds to keep them, None for as long as there is room.
        schema: JSON schema the answer must follow because the messages ask for it.
    """

    turns: tuple[Turn, ...]
    query: str
    query_source: QuerySource
    documents: tuple[Document, ...] = field(repr=False)
    keep: int = 0
    ttl: float | None = None
    schema: Mapping[str, Any] | None = None


def to_request(messages: Sequence[ChatMessage], query: str | None = None, *, with_memory: bool = False) -> Request:
    """Translate messages and find the query.

    The query is, in this order: `query` or the `query_str` of the last user message's `additional_kwargs`
    ("explicit"); the text of the last user message when it holds or follows a document ("message"); the last text
    any user message has ("fallback"); else nothing ("none"). Tool results (also those an agent reports in the user's
    name), system prompts and format instructions never become the query; of a transcript it is the last question in it.

    Args:
        messages: The conversation.
        query: The text that guides the lookups, when the caller knows it.
        with_memory: Whether documents stand in a memory ahead of the messages.

    Raises:
        InvalidRequestError: No messages, or a block this model cannot take.
        DocumentError: A document block that cannot be read as text.
    """
    if not messages:
        raise InvalidRequestError("There are no messages to answer; pass at least one ChatMessage.")
    turns: list[Turn] = []
    keep, ttl = 0, None
    for position, message in enumerate(messages):
        turn = _to_turn(message, position)
        if turn.role == "user" and all(earlier.role == "system" for earlier in turns):
            keep, ttl = _cache_point(message)  # elsewhere the conversation does not begin with what would be kept
        turns.append(turn)
    if not any(turn.content or turn.extras for turn in turns):
        raise InvalidRequestError("The messages are empty; ask a question.")
    found, source = _find_query(messages, turns, query, with_memory)
    documents = tuple(document for turn in turns for document in turn.documents)
    return Request(tuple(turns), found, source, documents, keep, ttl, messages[-1].additional_kwargs.get(SCHEMA_KEY))


def split_kept(request: Request) -> tuple[Request, str | None, tuple[Document, ...]]:
    """Take the documents ahead of a cache point out of the turns.

    Returns:
        The rest, the system text ahead of the documents, the documents.
    """
    first = next(i for i, turn in enumerate(request.turns) if turn.role == "user")
    kept: list[Document] = []
    content: list[str | Document] = []
    for part in request.turns[first].content:
        if isinstance(part, Document) and len(kept) < request.keep:
            kept.append(part)
        else:
            content.append(part)
    ahead = request.turns[:first]
    system = "\n\n".join(turn.text for turn in ahead if turn.role == "system") or None
    opening = [Turn("system", (system,))] if system else []  # one, as the memory is read with
    user = replace(request.turns[first], content=tuple(content))
    turns = (*opening, *(turn for turn in ahead if turn.role != "system"), user, *request.turns[first + 1 :])
    documents = tuple(document for turn in turns for document in turn.documents)
    return replace(request, turns=turns, documents=documents, keep=0), system, tuple(kept)


def _to_turn(message: ChatMessage, position: int) -> Turn:
    role = _ROLES[message.role]
    content: list[str | Document] = []
    calls: list[dict[str, Any]] = []
    adjacent = False
    for block in message.blocks:
        if isinstance(block, TextBlock):
            if not block.text:
                continue
            if adjacent:  # as ChatMessage.content joins them
                content[-1] = f"{content[-1]}\n{block.text}"
            else:
                content.append(block.text)
            adjacent = True
            continue
        adjacent = False
        if isinstance(block, (CitableBlock, DocumentBlock)):
            if role not in ("user", "tool"):
                raise InvalidRequestError(
                    f"Message {position} ({message.role.value}) holds a {type(block).__name__}; documents "
                    "belong in user or tool messages."
                )
            content.extend(_documents(block, position))
        elif isinstance(block, ToolCallBlock):
            calls.append(_tool_call(block.tool_call_id, block.tool_name, block.tool_kwargs))
        elif not isinstance(block, (CachePoint, CitationBlock, ThinkingBlock)):
            # citations and thoughts of earlier answers are not part of the conversation's text
            raise InvalidRequestError(
                f"Message {position} ({message.role.value}) holds a {type(block).__name__}, which this text model "
                "cannot read; remove it, or describe it in words."
            )
    return Turn(role, tuple(content), _extras(message, calls))


def _documents(block: CitableBlock | DocumentBlock, position: int) -> list[Document]:
    if isinstance(block, DocumentBlock):
        return [_read_block(block)]
    documents = []
    for part in block.content:
        if isinstance(part, TextBlock):
            document = Document(part.text, block.title or None, {"source": block.source})
        elif isinstance(part, DocumentBlock):
            read = _read_block(part)
            document = replace(
                read, title=block.title or read.title, metadata={**read.metadata, "source": block.source}
            )
        else:
            raise InvalidRequestError(
                f"The CitableBlock {block.title!r} in message {position} holds a {type(part).__name__}, which this "
                "text model cannot read; remove it, or describe it in words."
            )
        documents.append(document)
    return documents


def _read_block(block: DocumentBlock) -> Document:
    source = str(block.path or block.url or "")
    title = block.title if block.title != "input_document" else None  # the class's stand-in for "no title"
    title = title or (Path(source).name if source else None)
    try:
        data = block.resolve_document().read()
    except QLLMError:
        raise
    except Exception as error:  # file system, network, base64: whatever the block's own reader meets
        raise DocumentError(f"Cannot read the DocumentBlock {title or '(no title)'!r}: {error}") from error
    document = document_from_bytes(data, block.document_mimetype, title)
    return replace(document, metadata={**document.metadata, "source": source or title or ""})


def _extras(message: ChatMessage, calls: list[dict[str, Any]]) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if not calls:
        calls = [_foreign_call(call) for call in message.additional_kwargs.get("tool_calls") or ()]
    if calls:
        extras["tool_calls"] = calls
    for key in ("tool_call_id", "name"):
        if message.additional_kwargs.get(key) is not None:
            extras[key] = message.additional_kwargs[key]
    return extras


def _tool_call(call_id: str | None, name: str, arguments: Mapping[str, Any] | str) -> dict[str, Any]:
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except json.JSONDecodeError:
            arguments = {"input": arguments}
    return {"type": "function", "id": call_id or "", "function": {"name": name, "arguments": arguments}}


def _foreign_call(call: Any) -> dict[str, Any]:
    """Tool calls that others left in `additional_kwargs`: in OpenAI's shape, or `ToolSelection`s."""
    data: Mapping[str, Any] = call if isinstance(call, Mapping) else call.model_dump()
    function = data.get("function") or {"name": data.get("tool_name"), "arguments": data.get("tool_kwargs")}
    return _tool_call(data.get("id") or data.get("tool_id"), str(function.get("name")), function.get("arguments") or {})


def _cache_point(message: ChatMessage) -> tuple[int, float | None]:
    kept, documents, ttl = 0, 0, None
    for block in message.blocks:
        if isinstance(block, CitableBlock):
            documents += len(block.content)
        elif isinstance(block, DocumentBlock):
            documents += 1
        elif isinstance(block, CachePoint) and documents:
            kept, ttl = documents, _seconds(block.cache_control.ttl)
    return kept, ttl


def _seconds(ttl: str) -> float | None:
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    try:
        return float(ttl[:-1]) * units[ttl[-1]]
    except (KeyError, ValueError, IndexError):
        raise InvalidRequestError(
            f"Cannot read the CachePoint's ttl {ttl!r}; write a number and a unit, e.g. '5m' or '1h'."
        ) from None


def _find_query(
    messages: Sequence[ChatMessage], turns: Sequence[Turn], query: str | None, with_memory: bool
) -> tuple[str, QuerySource]:
    if query is not None:
        return query, "explicit" if query else "none"
    users = [i for i, turn in enumerate(turns) if turn.role == "user"]
    named = messages[users[-1]].additional_kwargs.get(QUERY_KEY) if users else None
    if named:
        return str(named), "explicit"
    spoken = [(turn.role, turn.text) for turn in turns]
    asked = [i for i in users if not _is_agents(spoken, i)]
    for rank, i in enumerate(reversed(asked)):
        text = _asked_inside(messages[i]) if turns[i].text.startswith(_TRANSCRIPT) else turns[i].text
        if text.strip():
            documents = with_memory or any(turn.documents for turn in turns[: i + 1])
            return text, "message" if documents and rank == 0 else "fallback"
    return "", "none"


def _is_agents(spoken: Sequence[tuple[str, str]], position: int) -> bool:
    """Whether a user message is what `ReActAgent` says to the model: a tool's result, or a complaint about its form."""
    if not spoken[position][1].startswith(_REACT_REPLIES):
        return False
    before = position - 1
    while before >= 0 and spoken[before][0] == "user" and spoken[before][1].startswith(_REACT_REPLIES):
        before -= 1
    if before < 0 or spoken[before][0] != "assistant":
        return False
    step = spoken[before][1].lstrip()
    # a complaint answers a step that has not the form of one
    return step.startswith(_REACT_STEPS) or not spoken[position][1].startswith(_OBSERVATION)


def _asked_inside(message: ChatMessage) -> str:
    """The last question in the transcript that agents with an `output_cls` show to the model as one user message."""
    role, spoken = "", list[tuple[str, str]]()
    for text in (block.text.strip() for block in message.blocks if isinstance(block, TextBlock)):
        if text.startswith("<message>"):
            spoken.append((role, text.removeprefix("<message>").removesuffix("</message>")))
        elif text.startswith("<") and not text.startswith("</"):
            role = text.strip("<>")
    asked = (text for i, (role, text) in enumerate(spoken) if role == "user" and not _is_agents(spoken, i))
    return next((text for text in reversed(list(asked)) if text.strip()), "")
