"""Tools for models whose chat template knows none: a plain-text description and a call format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qllm_runtime.layout import Message, Segment, join
from qllm_runtime.toolcalls import HERMES, CallFormat


def describe_tools(tools: Sequence[Mapping[str, Any]], call_format: CallFormat = HERMES) -> str:
    """The tools as text: one line of JSON per tool and how to call it.

    Args:
        tools: Tools in the format of OpenAI functions.
        call_format: How the model writes calls.
    """
    call = _between_marks(f'{{"name": ..., "{call_format.arguments_key}": {{...}}}}', call_format)
    lines = ["You can call these tools:"]
    for tool in tools:
        function = tool.get("function", tool)
        entry = {key: function[key] for key in ("name", "description", "parameters") if key in function}
        lines.append(json.dumps(entry, ensure_ascii=False))
    lines.append(f"To call one, write {call} with its arguments as JSON and nothing else.")
    return "\n".join(lines)


def tool_turns_as_text(messages: Sequence[Message], call_format: CallFormat = HERMES) -> list[Message]:
    """Calls made by the assistant and results given to it, as text in assistant and user turns.

    Args:
        messages: The conversation.
        call_format: How the model writes calls: those of the history are spelled as it is told to spell new ones.
    """
    rewritten: list[Message] = []
    for message in messages:
        extras = {key: value for key, value in message.extras.items() if key not in ("tool_calls", "tool_call_id")}
        if message.role == "tool":
            opening, closing = Segment("text", "<tool_response>\n"), Segment("text", "\n</tool_response>")
            extras.pop("name", None)
            rewritten.append(Message("user", (opening, *message.segments, closing), extras))
        elif calls := message.extras.get("tool_calls"):
            text = "\n".join(_call(call, call_format) for call in calls)
            rewritten.append(Message(message.role, join(message.segments, (Segment("text", text),)), extras))
        else:
            rewritten.append(message)
    return rewritten


def with_arguments_as_objects(extras: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of tool calls as objects, as templates expect them; a string that is no JSON object stays one."""
    calls = extras.get("tool_calls")
    if not calls:
        return dict(extras)
    return {**extras, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else dict(call)


def _call(call: Mapping[str, Any], call_format: CallFormat) -> str:
    function = _with_object(call).get("function", call)
    entry = {"name": function.get("name"), call_format.arguments_key: function.get("arguments", {})}
    return _between_marks(json.dumps(entry, ensure_ascii=False), call_format)


def _between_marks(text: str, call_format: CallFormat) -> str:
    return f"{call_format.begin.strip()}{text}{call_format.end.strip()}"
