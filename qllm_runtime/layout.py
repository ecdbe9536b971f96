"""Where documents, question and other texts stand: turns as messages made of typed segments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from qllm_runtime.errors import DocumentError, InvalidRequestError
from qllm_runtime.types import Document, Mode, Turn, is_blank

SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Segment:
    """A stretch of the prompt that is tokenised by itself.

    Attributes:
        kind: "template" is the chat template's own text, the only kind in which special tokens are parsed; "text" is any
            other text; "query" the question; "document" a document.
        text: Its characters.
        document: Index of the document in order of appearance, for kind "document".
    """

    kind: Literal["template", "text", "query", "document"]
    text: str
    document: int | None = None


@dataclass(frozen=True)
class Message:
    """A turn laid out: its role, what it holds in order, and further keys for the template."""

    role: str
    segments: tuple[Segment, ...] = ()
    extras: Mapping[str, Any] = field(default_factory=dict)


def join(*parts: Iterable[Segment]) -> tuple[Segment, ...]:
    """The parts that hold something, an empty line between them."""
    joined: list[Segment] = []
    for part in parts:
        segments = list(part)
        if segments and joined:
            joined.append(Segment("text", SEPARATOR))
        joined += segments
    return tuple(joined)


def lay_out(turns: Sequence[Turn], query: str | None, mode: Mode) -> list[Message]:
    """Turns as messages: within a turn all documents come first, then the turn's own text.

    The question is marked where it is the text (or a part of the text) of a user turn, the latest such turn counting.
    With mode "query_aware" it is also put ahead of the first document unless it stands ahead of it already. A question
    that stands nowhere in the text (the caller asked for another one) and has no place ahead is put ahead of the last
    user turn's own text, so that it is always part of the prompt.

    Raises:
        InvalidRequestError: No turns, an unknown role, or a document in a system or assistant turn.
        DocumentError: A document is empty.
    """
    _check(turns)
    found = _find(turns, query) if query else None
    first = next((i for i, turn in enumerate(turns) if turn.documents), None)
    ahead: int | None = None
    if query and mode == "query_aware" and first is not None and (found is None or found[0] >= first):
        ahead = first
    elif query and found is None:
        ahead = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=len(turns) - 1)
    messages: list[Message] = []
    number = 0
    for index, turn in enumerate(turns):
        documents: list[tuple[Segment, ...]] = []
        for document in turn.documents:
            title = (Segment("text", f"[{document.title}]\n"),) if document.title else ()
            documents.append((*title, Segment("document", document.text, number)))
            number += 1
        span = found[1] if found and found[0] == index else None
        own = _own_text(turn.text, span)
        question = (Segment("query", query),) if query and ahead == index else ()
        order = (question, *documents, own) if mode == "query_aware" else (*documents, question, own)
        messages.append(Message(turn.role, join(*order), turn.extras))
    return messages


def insert(message: Message, text: str, *, after_documents: bool = False) -> Message:
    """The message with a text after its other content, or straight after its last document."""
    segments = message.segments
    cut = len(segments)
    if after_documents:
        cut = 1 + max(i for i, segment in enumerate(segments) if segment.kind == "document")
    rest = segments[cut + 1 :]  # the separator goes
    return replace(message, segments=join(segments[:cut], (Segment("text", text),), rest))


def _own_text(text: str, query: tuple[int, int] | None) -> tuple[Segment, ...]:
    if query is None:
        return (Segment("text", text),) if text else ()
    start, end = query
    pieces = (Segment("text", text[:start]), Segment("query", text[start:end]), Segment("text", text[end:]))
    return tuple(piece for piece in pieces if piece.text)


def _find(turns: Sequence[Turn], query: str) -> tuple[int, tuple[int, int]] | None:
    """Index of the latest user turn that asks `query`, and where in its own text."""
    users = [(i, turn) for i, turn in enumerate(turns) if turn.role == "user"]
    for index, turn in reversed(users):
        text, start = turn.text, 0
        if text == query:
            return index, (0, len(text))
        spans = []
        for part in turn.content:
            if isinstance(part, str) and part:
                if part == query:
                    spans.append((start, start + len(part)))
                start += len(part) + len(SEPARATOR)
        if spans:
            return index, spans[-1]
    for index, turn in reversed(users):
        start = turn.text.rfind(query)
        if start >= 0:
            return index, (start, start + len(query))
    return None


def _check(turns: Sequence[Turn]) -> None:
    if not turns:
        raise InvalidRequestError("The conversation is empty; give at least one turn.")
    number = 0
    for turn in turns:
        if turn.role not in ("system", "user", "assistant", "tool"):
            raise InvalidRequestError(f"Unknown role {turn.role!r}; use system, user, assistant or tool.")
        for part in turn.content:
            if isinstance(part, Document):
                number += 1
                name = f"Document {number}" + (f" ({part.title})" if part.title else "")
                if turn.role not in ("user", "tool"):
                    raise InvalidRequestError(f"{name} stands in a {turn.role} turn; put it in a user turn.")
                if is_blank(part.text):
                    raise DocumentError(f"{name} is empty.")
                _check_unicode(name, part.text, DocumentError)
                _check_unicode(f"The title of {name}", part.title or "", DocumentError)
            else:
                _check_unicode(f"The {turn.role} turn", part, InvalidRequestError)


def _check_unicode(name: str, text: str, error_type: type[InvalidRequestError] | type[DocumentError]) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise error_type(
            f"{name} holds half of a surrogate pair (character {error.start}); decode its source with errors='replace'."
        ) from None
