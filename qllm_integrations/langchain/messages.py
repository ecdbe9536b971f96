"""LangChain messages as a reading request: which text is a document, which the question, which everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)

from qllm_integrations.langchain.blocks import (
    CutOffCallPart,
    DocumentPart,
    MemoryPart,
    Part,
    Text,
    ToolCallPart,
    ToolResultPart,
    parse_content,
)
from qllm_runtime.constraints import ask_for_json
from qllm_runtime.errors import InvalidRequestError
from qllm_runtime.types import Document, QuerySource, Turn

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "ai": "assistant",
}


@dataclass(frozen=True)
class Request:
    """What a list of messages asks for.

    Attributes:
        turns: The conversation; documents stand in user and tool turns.
        query: The question that guides the lookups ("" when there is none).
        query_source: Which rule found it.
        memory_id: Id of the document memory that the messages name.
        cache: Whether a document asks to be kept for the next requests (`cache_control`).
    """

    turns: tuple[Turn, ...]
    query: str
    query_source: QuerySource
    memory_id: str | None = None
    cache: bool = False

    @property
    def documents(self) -> tuple[Document, ...]:
        """The documents in the turns, in order."""
        return tuple(document for turn in self.turns for document in turn.documents)

    def without_documents(self) -> Request:
        """The same request with the documents taken out, for asking it of a memory that holds them."""
        turns = (
            replace(turn, content=tuple(part for part in turn.content if isinstance(part, str))) for turn in self.turns
        )
        return replace(self, turns=tuple(turn for turn in turns if turn.content or turn.extras or turn.role == "tool"))

    def opened_by_user(self) -> Request:
        """The same request with an empty user turn where another one comes first: documents open a user turn."""
        first = next((i for i, turn in enumerate(self.turns) if turn.role != "system"), len(self.turns))
        if first < len(self.turns) and self.turns[first].role == "user":
            return self
        return replace(self, turns=(*self.turns[:first], Turn("user", ()), *self.turns[first:]))

    @property
    def system(self) -> str | None:
        """Text of the leading system turns, an empty line between them."""
        leading = takewhile(lambda turn: turn.role == "system", self.turns)
        return "\n\n".join(turn.text for turn in leading if turn.text) or None


@dataclass
class _Reader:
    """Walks over the messages once and collects turns and candidates for the question."""

    turns: list[Turn] = field(default_factory=list)
    memory_ids: list[str] = field(default_factory=list)
    cache: bool = False
    marked: str = ""  # text of the last block with qllm_role "query"
    asked: str = ""  # text of the last human message that has any
    asked_of_document: bool = False  # whether a document stands in or ahead of it
    has_document: bool = False

    def read(self, message: BaseMessage, where: str) -> None:
        role = _role(message, where)
        parts = parse_content(message.content, where)
        if role == "user":
            self._read_user(parts, {"name": message.name} if message.name else {}, where)
        elif role == "assistant":
            self._read_assistant(message, parts, where)
        elif role == "tool":
            extras = {"tool_call_id": getattr(message, "tool_call_id", None), "name": message.name}
            self._add("tool", self._content(parts, where), {key: value for key, value in extras.items() if value})
        else:
            self._add("system", _only_text(parts, where, "a system message", "\n\n"), {})

    def _read_user(self, parts: list[Part], extras: dict[str, Any], where: str) -> None:
        for part in parts:
            if isinstance(part, ToolResultPart):
                result = self._content(list(part.parts), where)
                self._add("tool", result, {"tool_call_id": part.call_id} if part.call_id else {})
        own = [part for part in parts if not isinstance(part, ToolResultPart)]
        texts = [part for part in own if isinstance(part, Text) and part.text.strip()]
        content = self._content(own, where)
        if content or not parts:
            self._add("user", content, extras)
        for text in texts:
            if text.is_query:
                self.marked = text.text
        if texts:
            self.asked = _join(texts)
            self.asked_of_document = self.has_document

    def _read_assistant(self, message: BaseMessage, parts: list[Part], where: str) -> None:
        calls = [part for part in parts if isinstance(part, ToolCallPart)]
        spoken = [part for part in parts if not isinstance(part, ToolCallPart | CutOffCallPart)]
        text = _only_text(spoken, where, "an AI message", "")  # as `BaseMessage.text` has it
        known = [(call["id"], call["name"], call["args"]) for call in getattr(message, "tool_calls", [])]
        known += [(call.id, call.name, call.arguments) for call in calls if not _is_among(call, known)]
        extras = {"tool_calls": [_openai_call(*call) for call in known]} if known else {}
        self._add("assistant", text, extras)

    def _content(self, parts: Sequence[Part], where: str) -> tuple[str | Document, ...]:
        """Documents first, then the text; unmarked text blocks of one message are one text."""
        documents: list[Document] = []
        texts: list[Text] = []
        for part in parts:
            if isinstance(part, DocumentPart):
                documents.append(part.document)
                self.cache |= part.cache
                self.has_document = True
            elif isinstance(part, MemoryPart):
                self.memory_ids.append(part.id)
                self.has_document = True
            elif isinstance(part, Text):
                if part.text.strip():
                    texts.append(part)
            else:
                raise InvalidRequestError(
                    f"{where}: a {type(part).__name__.removesuffix('Part')} block has no place here."
                )
        if any(text.is_query for text in texts):
            return (*documents, *(text.text for text in texts))
        return (*documents, *([_join(texts)] if texts else []))

    def _add(self, role: Any, content: tuple[str | Document, ...], extras: Mapping[str, Any]) -> None:
        self.turns.append(Turn(role, content, dict(extras)))


def translate(
    messages: Sequence[BaseMessage],
    *,
    query: str | None = None,
    memory_id: str | None = None,
    schema: Mapping[str, Any] | None = None,
    to_answer: bool = True,
) -> Request:
    """Turn messages into a request.

    The question is, in this order: `query`; the text block with `extras={"qllm_role": "query"}`; the text of the last
    human message that holds or follows a document ("message"); the text of the last human message ("fallback"). System
    prompts, tool results and format instructions are read by the model but never routed, so in a tool loop the human's
    question stays the query.

    Args:
        messages: The conversation.
        query: Explicit question.
        memory_id: Document memory that the request is asked of, unless the messages name one.
        schema: JSON schema to show the model after the last user turn's text; no part of the question.
        to_answer: Whether messages without any content are an error; they are none where tokens are counted.

    Raises:
        InvalidRequestError: Nothing to answer, an unsupported block, or more than one memory.
        DocumentError: A document without readable text.
    """
    if not messages:
        raise InvalidRequestError("There are no messages to answer; pass at least one human message.")
    reader = _Reader(has_document=memory_id is not None)
    for number, message in enumerate(messages, start=1):
        reader.read(message, f"message {number} ({message.type})")
    if to_answer and not any(turn.content or turn.extras for turn in reader.turns):
        raise InvalidRequestError("The messages are empty; ask a question.")
    memory_ids = list(dict.fromkeys(reader.memory_ids or ([memory_id] if memory_id else [])))
    if len(memory_ids) > 1:
        raise InvalidRequestError(
            f"The messages name {len(memory_ids)} document memories, a request can use one; "
            "read the documents together: add_documents([first, second])."
        )
    if query is not None and not query.strip():
        raise InvalidRequestError("query= is empty; leave it out to use the text of the last human message.")
    found: tuple[str, QuerySource] = ("", "none")
    if query is not None:
        found = (query, "explicit")
    elif reader.marked:
        found = (reader.marked, "block")
    elif reader.asked:
        found = (reader.asked, "message" if reader.asked_of_document else "fallback")
    turns = ask_for_json(reader.turns, schema) if schema is not None else tuple(reader.turns)
    return Request(turns, *found, memory_ids[0] if memory_ids else None, reader.cache)


def _role(message: BaseMessage, where: str) -> str:
    if isinstance(message, HumanMessage):
        return "user"
    if isinstance(message, AIMessage):
        return "assistant"
    if isinstance(message, SystemMessage):
        return "system"
    if isinstance(message, ToolMessage | FunctionMessage):
        return "tool"
    if isinstance(message, ChatMessage) and message.role.lower() in _ROLES:
        return _ROLES[message.role.lower()]
    role = getattr(message, "role", message.type)
    raise InvalidRequestError(
        f"{where}: a message of role {role!r} has no place in a request; use system, human, AI or tool messages."
    )


def _join(texts: Sequence[Text]) -> str:
    return "\n\n".join(text.text for text in texts)


def _only_text(parts: Sequence[Part], where: str, what: str, between: str) -> tuple[str, ...]:
    if not all(isinstance(part, Text) for part in parts):
        raise InvalidRequestError(f"{where}: {what} holds text only; documents belong in a human or tool message.")
    text = between.join(part.text for part in parts if isinstance(part, Text) and part.text)
    return (text,) if text else ()


def _is_among(call: ToolCallPart, known: Sequence[tuple[str | None, str, Any]]) -> bool:
    """Whether a call is one of those known by (id, name, arguments); calls without an id are told by the rest."""
    return any(
        call.id == other if call.id and other else (call.name, dict(call.arguments)) == (name, arguments)
        for other, name, arguments in known
    )


def _openai_call(call_id: str | None, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    call: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
    return {"id": call_id, **call} if call_id else call
