"""How models write tool calls, and finding them in an answer, whole or streamed. Importing this loads no torch."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CallFormat:
    """The way a model family writes a call: `begin` + JSON with `name` and `arguments_key` + `end`."""

    begin: str
    end: str
    arguments_key: str


#: Hermes, Qwen and most others: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.
HERMES = CallFormat("<tool_call>\n", "\n</tool_call>", "arguments")
#: Llama 3: a bare `{"name": ..., "parameters": {...}}`.
LLAMA3 = CallFormat("", "", "parameters")

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_BARE = re.compile(r'\s*(?:\[\s*)?(?:\{\s*(?:".*)?)?', re.DOTALL)  # how calls without marks begin, or a part of that
_BETWEEN = re.compile(r"[\s;]*")


def call_format(chat_template: str | None) -> CallFormat:
    """The format that a chat template teaches; `HERMES` when it teaches none."""
    template = chat_template or ""
    return LLAMA3 if '"parameters"' in template and _OPEN not in template else HERMES


@dataclass(frozen=True)
class ToolCall:
    """A call found in an answer.

    Attributes:
        name: The tool ("" when even that could not be read).
        arguments: Its arguments, or None when they are not a JSON object.
        raw: The text of the arguments, or of the whole call with its mark when it could not be read.
        error: Why `arguments` is None.
    """

    name: str
    arguments: dict[str, Any] | None
    raw: str
    error: str | None = None


class CallSplitter:
    """Separates the text of an answer from the tool calls in it, piece by piece.

    Text that may still turn out to be a call is held back until that is decided.

    Args:
        names: Names of the tools at hand. A bare JSON object counts as a call only if it names one of them.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._buffer = ""
        self._started = False  # something was given out
        self._after_call = False

    def feed(self, piece: str) -> Iterator[str | ToolCall]:
        """Take in a piece of the answer and give out what is decided."""
        self._buffer += piece
        while self._started or not self._may_be_bare():
            start = self._buffer.find(_OPEN)
            if start < 0:
                yield from self._text(len(self._buffer) - _undecided(self._buffer))
                return
            if self._buffer[:start].strip():
                yield from self._text(len(self._buffer[:start].rstrip()))
            self._buffer = self._buffer.lstrip()
            end = self._buffer.find(_CLOSE)
            if end < 0:
                return
            body, self._buffer = self._buffer[len(_OPEN) : end], self._buffer[end + len(_CLOSE) :]
            self._started = self._after_call = True
            yield _read_call(body)

    def finish(self) -> Iterator[str | ToolCall]:
        """Give out what is left when the answer has ended."""
        if self._buffer.startswith(_OPEN):
            yield _read_call(self._buffer[len(_OPEN) :])
        elif calls := [] if self._started else self._bare():
            yield from calls
        else:
            yield from self._text(len(self._buffer.rstrip() if self._after_call else self._buffer))

    def _text(self, length: int) -> Iterator[str]:
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        if self._after_call:
            text = text.lstrip()
        if text:
            self._started, self._after_call = True, False
            yield text

    def _may_be_bare(self) -> bool:
        """Whether what came so far may begin calls without marks, or is nothing yet."""
        return _OPEN not in self._buffer and _BARE.fullmatch(self._buffer) is not None

    def _bare(self) -> list[ToolCall]:
        text, at, items = self._buffer.strip(), 0, []
        while at < len(text):
            try:
                value, at = json.JSONDecoder().raw_decode(text, at)
            except ValueError:
                return []
            items += value if isinstance(value, list) else [value]
            at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
        if not all(isinstance(item, dict) and item.get("name") in self._names for item in items):
            return []
        return [_read_call(json.dumps(item, ensure_ascii=False)) for item in items]


def _undecided(text: str) -> int:
    """Characters at the end that may belong to a call: a part of its mark and the white space before it."""
    part = next((n for n in range(len(_OPEN) - 1, 0, -1) if text.endswith(_OPEN[:n])), 0)
    return len(text) - len(text[: len(text) - part].rstrip())


def _read_call(body: str) -> ToolCall:
    try:
        value = json.loads(body)
    except ValueError as error:
        return ToolCall("", None, _OPEN + body, f"The call is not valid JSON: {error}")
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return ToolCall("", None, _OPEN + body, "The call names no tool.")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # some models write the arguments as a string of JSON
        with contextlib.suppress(ValueError):
            arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        return ToolCall(
            value["name"], None, json.dumps(arguments, ensure_ascii=False), "The arguments are not a JSON object."
        )
    return ToolCall(value["name"], arguments, json.dumps(arguments, ensure_ascii=False))
