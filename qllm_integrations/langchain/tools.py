"""Tools as the engine takes them, and what `tool_choice` means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool

from qllm_runtime.errors import InvalidRequestError

AnyTool = Mapping[str, Any] | type | Callable[..., Any] | BaseTool
ToolChoice = str | bool | Mapping[str, Any] | None


def to_openai(tools: Sequence[AnyTool], strict: bool | None = None) -> list[dict[str, Any]]:
    """Tools of any kind in OpenAI's form.

    Raises:
        InvalidRequestError: Something that is not a tool, or a tool run by a provider's server.
    """
    converted: list[dict[str, Any]] = []
    for tool in tools:
        try:
            openai = convert_to_openai_tool(tool, strict=strict)
            name: Any = openai["function"]["name"]
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequestError(
                f"{_describe(tool)} cannot be used as a tool ({error}); pass a function, a pydantic class, a BaseTool "
                "or a dictionary with name and parameters."
            ) from None
        if not isinstance(name, str):
            raise InvalidRequestError(f"{_describe(tool)} has a name that is no string: {name!r}.")
        if openai not in converted:
            converted.append(openai)
    return converted


def check_names(tools: Sequence[Mapping[str, Any]]) -> None:
    """Raise `InvalidRequestError` if two different tools have one name."""
    names = [tool["function"]["name"] for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequestError(f"There are two tools named {name!r}; rename one.")


def forced(tool_choice: ToolChoice, tools: Sequence[Mapping[str, Any]]) -> str:
    """`tool_choice` in one of four forms: "auto", "none", "any" or "tool:NAME".

    Takes None, booleans, "auto", "none", "any", "required", the name of a tool, and the dictionaries of OpenAI and
    Anthropic.

    Raises:
        InvalidRequestError: A tool that is not bound, a choice of an unknown form, or a forced call without tools.
    """
    names = [tool["function"]["name"] for tool in tools]
    choice: Any = tool_choice
    if isinstance(choice, Mapping):
        kind = choice.get("type")
        named = choice.get("name") or (choice.get("function") or {}).get("name")
        choice = named if kind in ("function", "tool") and named else kind
    if choice is None or choice == "auto":
        return "auto"
    if choice is False or choice == "none":
        return "none"
    if choice is True or choice in ("any", "required"):
        if not names:
            raise InvalidRequestError(f"tool_choice={tool_choice!r} asks for a tool call, but no tools are bound.")
        return "any"
    if choice in names:
        return f"tool:{choice}"
    raise InvalidRequestError(
        f"tool_choice={tool_choice!r} names no bound tool; use one of {names}, 'auto', 'any', 'required' or 'none'."
    )


def needs_whole_call(tool_choice: ToolChoice, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an answer without a whole call is an error: a call is forced, and not marked as `partial`."""
    partial = isinstance(tool_choice, Mapping) and tool_choice.get("partial")
    return not partial and forced(tool_choice, tools) not in ("auto", "none")


def _describe(tool: Any) -> str:
    if isinstance(tool, Mapping):
        return f"A dictionary with the keys {sorted(map(str, tool))}"
    return getattr(tool, "__name__", type(tool).__name__)
