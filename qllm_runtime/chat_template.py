"""A model's own chat template, rendered with place-holders so that every content's place is known."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qllm_runtime.errors import TemplateError
from qllm_runtime.layout import Message, Segment, join
from qllm_runtime.tool_text import tool_turns_as_text, with_arguments_as_objects
from qllm_runtime.toolcalls import CallFormat, call_format

#: Layout for tokenizers without a chat template: a line with the role, the content, an empty line.
PLAIN_TEMPLATE = (
    "{% for m in messages %}"
    "{{ {'system': 'System', 'user': 'User', 'assistant': 'Assistant', 'tool': 'Tool'}[m.role] }}:\n"
    "{{ m.content }}\n\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)

_PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "qllm_probe_tool",
        "description": "d",
        "parameters": {
            "type": "object",
            "properties": {"x": {"type": "string", "description": "d"}},
            "required": ["x"],
        },
    },
}
_PROBE_CALL = {
    "type": "function",
    "id": "call12345",
    "function": {"name": "qllm_probe_tool", "arguments": {"x": "y"}},
}


@dataclass(frozen=True)
class Abilities:
    """What a chat template renders by itself.

    Attributes:
        system: A leading system turn stays where it is; otherwise its text goes ahead of the first user turn's.
        more_systems: Further system turns; otherwise they are merged into the leading one.
        repeats: Two turns of one role in a row; otherwise they are merged, and an empty user turn opens what an
            assistant turn would.
        tools: The list of tools; otherwise it is described in the system turn.
        tool_turns: Calls and results; otherwise they become text.
        as_parts: Contents have to be lists of typed parts, not strings.
    """

    system: bool
    more_systems: bool
    repeats: bool
    tools: bool
    tool_turns: bool
    as_parts: bool


def template_of(tokenizer: Any, tools: Sequence[Mapping[str, Any]] | None = None) -> str:
    """The template that would be used: the tokenizer's own (its tool variant if there is one) or the plain layout."""
    if not getattr(tokenizer, "chat_template", None):
        return PLAIN_TEMPLATE
    return str(tokenizer.get_chat_template(None, [dict(tool) for tool in tools] if tools else None))


def abilities(tokenizer: Any, template: str) -> Abilities:
    """Find out what `template` renders by rendering small conversations with it."""
    user, reply = Message("user", _probe_text()), Message("assistant", _probe_text())
    system = Message("system", _probe_text())
    as_parts = not _renders(tokenizer, template, [user], False) and _renders(tokenizer, template, [user], True)

    def renders(*messages: Message) -> bool:
        return _renders(tokenizer, template, list(messages), as_parts)

    call = Message("assistant", (), {"tool_calls": [_PROBE_CALL]})
    result = Message("tool", _probe_text(), {"name": "qllm_probe_tool", "tool_call_id": "call12345"})
    with_call = _try(lambda: _render(tokenizer, template, [user, call, result, reply], as_parts))
    with_tool = _try(lambda: _render(tokenizer, template, [user], as_parts, tools=[_PROBE_TOOL]))
    return Abilities(
        system=renders(system, user, reply, user),
        more_systems=renders(system, system, user, reply, system, user),
        repeats=renders(user, user, reply, reply, user),
        tools=with_tool is not None and _names_tool(with_tool),
        tool_turns=with_call is not None and _names_tool(with_call),
        as_parts=as_parts,
    )


def render(
    tokenizer: Any,
    template: str,
    able: Abilities,
    messages: Sequence[Message],
    *,
    control: re.Pattern[str] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
) -> list[Segment]:
    """The conversation as the template writes it: "template" segments around the segments of the messages.

    Matches of `control` inside tool definitions, tool calls and template arguments become "text" segments.

    Raises:
        InvalidRequestError: The template refuses the conversation or loses a part of it; the message names the part.
    """

    def attempt(able: Abilities) -> list[Segment]:
        return _render(
            tokenizer,
            template,
            _fit(messages, able, call_format(template)),
            able.as_parts,
            control=control,
            tools=tools if able.tools else None,
            template_kwargs=template_kwargs,
            add_generation_prompt=add_generation_prompt,
        )

    try:
        return attempt(able)
    except TemplateError:
        if not able.tool_turns or not any(m.role == "tool" or "tool_calls" in m.extras for m in messages):
            raise
        # some templates know tools but not several calls at once, or only call ids of their own form
        return attempt(replace(able, tool_turns=False))


def _fit(messages: Sequence[Message], able: Abilities, calls: CallFormat) -> list[Message]:
    """The conversation in a form that the template can take, without losing any of its text."""
    fitted = list(messages) if able.tool_turns else tool_turns_as_text(messages, calls)
    systems = [message for message in fitted if message.role == "system"]
    misplaced = len(systems) > 1 or (bool(systems) and fitted[0].role != "system")
    if systems and (not able.system or (misplaced and not able.more_systems)):
        merged = join(*(message.segments for message in systems))
        fitted = [message for message in fitted if message.role != "system"]
        if able.system:
            fitted.insert(0, replace(systems[0], segments=merged))
        else:
            first = next((i for i, message in enumerate(fitted) if message.role == "user"), None)
            if first is None:
                fitted.insert(0, Message("user", merged))
            else:
                fitted[first] = replace(fitted[first], segments=join(merged, fitted[first].segments))
    if able.repeats:
        return fitted
    alternating: list[Message] = []
    for message in fitted:
        last = alternating[-1] if alternating else None
        if last and last.role == message.role != "tool" and {*message.extras, *last.extras} <= {"name"}:
            alternating[-1] = Message(last.role, join(_named(last), _named(message)))
        else:
            alternating.append(message)
    first = next((i for i, message in enumerate(alternating) if message.role != "system"), 0)
    if alternating[first].role == "assistant":
        alternating.insert(first, Message("user", ()))
    return alternating


def _named(message: Message) -> tuple[Segment, ...]:
    """What a message says, with the name of who says it where there is one."""
    name = message.extras.get("name")
    return (Segment("text", f"{name}: "), *message.segments) if name else message.segments


def _render(
    tokenizer: Any,
    template: str,
    messages: Sequence[Message],
    as_parts: bool,
    *,
    control: re.Pattern[str] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = False,
) -> list[Segment]:
    marks = _Marks(control)
    conversation = []
    for message in messages:
        content: Any = marks.place(message) if message.segments else ""
        if as_parts:
            content = [{"type": "text", "text": content}]
        extras = marks.defuse(with_arguments_as_objects(message.extras))
        conversation.append({"role": message.role, "content": content, **extras})
    try:
        text = tokenizer.apply_chat_template(
            conversation,
            tools=marks.defuse([dict(tool) for tool in tools]) if tools else None,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **marks.defuse(dict(template_kwargs or {})),
        )
    except Exception as error:  # a template can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TemplateError(f"The model's chat template refuses this conversation: {reason}") from error
    return marks.resolve(str(text))


class _Marks:
    """Place-holders of one rendering. They are random words: no content can contain one, no filter changes them."""

    def __init__(self, control: re.Pattern[str] | None) -> None:
        self._nonce = secrets.token_hex(8)
        self._placed: list[Message] = []
        self._defused: list[str] = []
        self._control = control

    def place(self, message: Message) -> str:
        self._placed.append(message)
        return f"qllm{self._nonce}c{len(self._placed) - 1}e"

    def defuse(self, value: Any) -> Any:
        """`value` with every control token in its strings replaced by a place-holder."""
        if isinstance(value, str) and self._control:
            return self._control.sub(self._defuse, value)
        if isinstance(value, Mapping):
            return {self.defuse(key): self.defuse(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.defuse(item) for item in value]
        return value

    def _defuse(self, match: re.Match[str]) -> str:
        self._defused.append(match.group())
        return f"qllm{self._nonce}t{len(self._defused) - 1}e"

    def resolve(self, text: str) -> list[Segment]:
        """The rendered text as segments, place-holders replaced by what they stand for."""
        pieces = re.split(f"qllm{self._nonce}([ct])([0-9]+)e", text)
        segments: list[Segment] = []
        seen: list[int] = []
        for literal, kind, number in zip(pieces[0::3], [*pieces[1::3], ""], [*pieces[2::3], ""], strict=True):
            if literal:
                segments.append(Segment("template", literal))
            if kind == "c":
                seen.append(int(number))
                segments += self._placed[int(number)].segments
            elif kind == "t":
                segments.append(Segment("text", self._defused[int(number)]))
        self._verify(seen)
        return segments

    def _verify(self, seen: list[int]) -> None:
        wanted = list(range(len(self._placed)))
        if seen == wanted:
            return
        missing = [i for i in wanted if i not in seen]
        repeated = [i for i in wanted if seen.count(i) > 1]
        moved = [i for i, other in zip(wanted, seen, strict=False) if i != other]
        index, verb = (
            (missing[0], "drops") if missing else (repeated[0], "repeats") if repeated else (moved[0], "moves")
        )
        role = self._placed[index].role
        raise TemplateError(
            f"The model's chat template {verb} the content of a {role} turn (number {index + 1} with content); "
            "leave that turn out or give the tokenizer another chat_template."
        )


def _probe_text() -> tuple[Segment, ...]:
    return (Segment("text", "p"),)


def _renders(tokenizer: Any, template: str, messages: list[Message], as_parts: bool) -> bool:
    return _try(lambda: _render(tokenizer, template, messages, as_parts)) is not None


def _try(action: Callable[[], list[Segment]]) -> list[Segment] | None:
    try:
        return action()
    except TemplateError:
        return None


def _names_tool(segments: Sequence[Segment]) -> bool:
    return any("qllm_probe_tool" in segment.text for segment in segments)
