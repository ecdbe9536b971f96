"""Content blocks of messages, in every shape LangChain knows, as documents, text, memories and tool results."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qllm_runtime.documents import document_from_bytes
from qllm_runtime.errors import DocumentError, InvalidRequestError
from qllm_runtime.types import Document

_UNREADABLE = {
    "image": "images",
    "image_url": "images",
    "input_image": "images",
    "audio": "audio",
    "input_audio": "audio",
    "video": "video",
}
# Blocks that say nothing a model reads: reasoning of earlier turns and marks for a provider's prompt cache.
_SILENT = frozenset({"reasoning", "thinking", "redacted_thinking", "cachePoint", "cache_point"})


@dataclass(frozen=True)
class Text:
    """Ordinary text; `is_query` when the block is marked as the question."""

    text: str
    is_query: bool = False


@dataclass(frozen=True)
class DocumentPart:
    """A document; `cache` when it is to be kept for the next requests."""

    document: Document
    cache: bool = False


@dataclass(frozen=True)
class MemoryPart:
    """A document memory named by its id."""

    id: str


@dataclass(frozen=True)
class ToolResultPart:
    """The result of a tool call inside a human message, as Anthropic writes it."""

    call_id: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class ToolCallPart:
    """A tool call inside the content of an AI message."""

    id: str | None
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class CutOffCallPart:
    """A tool call inside the content of an AI message that never became whole."""


Part = Text | DocumentPart | MemoryPart | ToolResultPart | ToolCallPart | CutOffCallPart


def parse_content(content: str | list[Any], where: str) -> list[Part]:
    """The parts of a message's content.

    Args:
        content: `BaseMessage.content`.
        where: What to call the message in errors, e.g. "message 2 (human)".

    Raises:
        InvalidRequestError: A block that cannot be read (an image, a URL, ...).
        DocumentError: A document that is empty, binary or badly encoded.
    """
    if isinstance(content, str):
        return [Text(content)] if content else []
    if not isinstance(content, list):
        raise InvalidRequestError(f"{where}: content is {_kind(content)}; it takes text or a list of blocks.")
    parts: list[Part] = []
    for number, block in enumerate(content, start=1):
        place = f"{where}, block {number}"
        try:
            parts += [Text(block)] if isinstance(block, str) else _parse_block(block, place)
        except DocumentError as error:
            raise DocumentError(f"{place}: {error}") from None
    return parts


def _parse_block(block: Any, where: str) -> list[Part]:
    if not isinstance(block, Mapping):
        raise InvalidRequestError(f"{where}: a block is a dictionary or text, not {_kind(block)}.")
    kind = _string(block, "type", where)
    if kind is None and "document" in block:
        return [_bedrock(_mapping(block, "document", where), where)]
    if kind == "non_standard" and isinstance(block.get("value"), Mapping):
        return _parse_block(block["value"], where)
    if kind in _SILENT or (kind is None and set(block) <= _SILENT):
        return []
    if kind in ("text", "input_text", "output_text"):
        role = _mapping(block, "extras", where).get("qllm_role")
        if role not in (None, "query"):
            raise InvalidRequestError(f"{where}: extras['qllm_role'] is {role!r}; the only role is 'query'.")
        return [Text(_text(block, "text", where), is_query=role == "query")]
    if kind in ("text-plain", "file"):
        optional = _mapping(block, "extras", where).get("qllm_optional") and block.get("text") is not None
        return [] if optional and not str(block["text"]).strip() else [_file(block, where)]
    if kind == "document":
        return [_anthropic(block, where)]
    if kind == "search_result":
        return [_search_result(block, where)]
    if kind == "tool_result":
        result = parse_content(block.get("content") or "", where)
        return [ToolResultPart(str(block.get("tool_use_id", "")), tuple(result))]
    if kind in ("tool_use", "tool_call", "function_call"):
        return [ToolCallPart(_string(block, "id", where), str(block.get("name", "")), _call_arguments(block, where))]
    if kind in ("tool_call_chunk", "invalid_tool_call"):
        return [_unfinished_call(block, where)]
    if kind == "refusal":
        return [Text(_text(block, "refusal", where))]
    if kind in _UNREADABLE:
        raise InvalidRequestError(
            f"{where}: {_UNREADABLE[kind]} cannot be read (block type {kind!r}); this model takes text and documents."
        )
    raise InvalidRequestError(
        f"{where}: unknown block type {kind!r}; text comes as 'text', documents as 'text-plain', 'file', 'document' or "
        "'search_result'."
    )


def _call_arguments(block: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    arguments = block.get("input", block.get("args", block.get("arguments"))) or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise InvalidRequestError(
                f"{where}: the arguments of the tool call {block.get('name')!r} are not valid JSON ({error}); leave a "
                "call out that was cut off."
            ) from None
    if not isinstance(arguments, Mapping):
        raise InvalidRequestError(
            f"{where}: the arguments of the tool call {block.get('name')!r} are {_kind(arguments)}; they take a "
            "dictionary, or one written as JSON."
        )
    return arguments


def _unfinished_call(block: Mapping[str, Any], where: str) -> Part:
    """A `tool_call_chunk`, a call if it holds all of one, or an `invalid_tool_call`."""
    name = _string(block, "name", where)
    if block["type"] == "tool_call_chunk" and name:
        try:
            arguments = json.loads(_string(block, "args", where) or "")
        except ValueError:
            arguments = None
        if isinstance(arguments, dict):
            return ToolCallPart(_string(block, "id", where), name, arguments)
    return CutOffCallPart()


def _file(block: Mapping[str, Any], where: str) -> Part:
    """A `text-plain` or `file` block of LangChain, or a `file` block of OpenAI, with everything under `file`."""
    if nested := _mapping(block, "file", where):
        known = {"base64": nested.get("file_data"), **{key: nested.get(key) for key in ("file_id", "filename")}}
        block = {**block, **{key: value for key, value in known.items() if value is not None}}
    extras = _mapping(block, "extras", where)
    title = block.get("title") or extras.get("title") or extras.get("filename") or block.get("filename")
    if block.get("text") is not None:
        document = _document(block["text"], title, block, where)
    elif block.get("base64") is not None or block.get("data") is not None:
        data, kind = block.get("base64") or block.get("data") or "", _string(block, "mime_type", where)
        document = _encoded(data, kind, title, block, where)
    elif block.get("file_id"):
        return MemoryPart(str(block["file_id"]))
    elif block.get("url"):
        raise InvalidRequestError(
            f"{where}: documents are not fetched from URLs; download it and pass its text or base64 data."
        )
    else:
        raise InvalidRequestError(f"{where}: a {block['type']!r} block needs one of 'text', 'base64' or 'file_id'.")
    return DocumentPart(document, _wants_cache(block, where))


def _anthropic(block: Mapping[str, Any], where: str) -> Part:
    """A `document` block: source of type text, base64, content, file or url."""
    source = block.get("source")
    if not isinstance(source, Mapping):
        raise InvalidRequestError(f"{where}: a 'document' block needs a 'source'.")
    kind, title = source.get("type"), block.get("title")
    if kind == "text":
        document = _document(source.get("data", ""), title, block, where)
    elif kind == "base64":
        document = _encoded(source.get("data", ""), _string(source, "media_type", where), title, block, where)
    elif kind == "content":
        document = _document(_texts(source.get("content") or "", where), title, block, where)
    elif kind == "file":
        return MemoryPart(str(source.get("file_id", "")))
    else:
        raise InvalidRequestError(
            f"{where}: a document source of type {kind!r} cannot be read; use 'text', 'base64', 'content' or 'file'."
        )
    return DocumentPart(document, _wants_cache(block, where))


def _search_result(block: Mapping[str, Any], where: str) -> Part:
    text = _texts(block.get("content") or "", where)
    title = block.get("title") or block.get("source")
    document = _document(text, title, block, where, {"source": block.get("source")})
    return DocumentPart(document, _wants_cache(block, where))


def _bedrock(body: Mapping[str, Any], where: str) -> Part:
    """`{"document": {"name", "format", "source": {"text" | "bytes"}}}` of Bedrock Converse."""
    source, title = _mapping(body, "source", where), body.get("name")
    if "text" in source:
        return DocumentPart(_document(source["text"], title, body, where))
    if "bytes" in source:
        kinds = {"pdf": "application/pdf", "html": "text/html"}
        kind = kinds.get(_string(body, "format", where) or "")
        return DocumentPart(_encoded(source["bytes"], kind, title, body, where))
    raise InvalidRequestError(f"{where}: a document block needs 'text' or 'bytes' in its source.")


def _encoded(data: Any, kind: str | None, title: Any, block: Mapping[str, Any], where: str) -> Document:
    """A document from bytes or base64 of this MIME type; one that a data URL names is nearer to the data."""
    content, named = _decode(data, where)
    read = document_from_bytes(content, named or kind, _title(title))
    return _document(read.text, title, block, where, read.metadata)


def _document(
    text: Any, title: Any, block: Mapping[str, Any], where: str, metadata: Mapping[str, Any] | None = None
) -> Document:
    if not isinstance(text, str) or not text.strip():
        raise DocumentError(f"The document {title!r} has no text." if title else "The document has no text.")
    known = {**(metadata or {}), **_mapping(_mapping(block, "extras", where), "metadata", where)}
    context = block.get("context")
    if context:  # shown to the model with the title, as Anthropic does; citations carry the bare title
        known["title"] = title
        title = f"{title} ({context})" if title else str(context)
    return Document(text, _title(title), known)


def _title(title: Any) -> str | None:
    return str(title) if title else None


def _texts(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for part in parse_content(content, where):
        if isinstance(part, Text):
            texts.append(part.text)
        elif isinstance(part, DocumentPart):
            texts.append(part.document.text)
        else:
            raise InvalidRequestError(f"{where}: only text and documents can be the content of a document.")
    return "\n\n".join(texts)


def _wants_cache(block: Mapping[str, Any], where: str) -> bool:
    return bool(block.get("cache_control") or _mapping(block, "extras", where).get("cache_control"))


def _mapping(block: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = block.get(key) or {}
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"{where}: {key!r} is {_kind(value)}; it takes a dictionary.")
    return value


def _string(block: Mapping[str, Any], key: str, where: str) -> str | None:
    value = block.get(key)
    if value is not None and not isinstance(value, str):
        raise InvalidRequestError(f"{where}: {key!r} is {_kind(value)}; it takes text.")
    return value


def _text(block: Mapping[str, Any], key: str, where: str) -> str:
    value = block.get(key, "")
    if not isinstance(value, str):
        raise InvalidRequestError(f"{where}: {key!r} is {_kind(value)}; it takes text, leave an empty block out.")
    return value


def _kind(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def _decode(data: Any, where: str) -> tuple[bytes, str]:
    """Bytes, and the MIME type that a data URL gives them."""
    if isinstance(data, bytes):
        return data, ""
    if not isinstance(data, str):
        raise InvalidRequestError(f"{where}: the base64 data is {_kind(data)}; it takes text.")
    kind = ""
    if data.startswith("data:"):
        kind, _, data = data.removeprefix("data:").partition(",")
    try:
        return base64.b64decode(data, validate=True), kind.removesuffix(";base64")
    except (binascii.Error, ValueError) as error:
        raise InvalidRequestError(f"{where}: the base64 data cannot be decoded ({error}).") from None
