"""Tools as the engine takes them, and what `tool_choice` means."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from langchain_core.tools import BaseTool, create_schema_from_function
from langchain_core.utils.function_calling import convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

from qllm_runtime import constraints
from qllm_runtime.errors import InvalidRequestError

AnyTool = Mapping[str, Any] | type | Callable[..., Any] | BaseTool
ToolChoice = str | bool | Mapping[str, Any] | None
_DEFINITIONS = ("$defs", "definitions")


def to_openai(tools: Sequence[AnyTool], strict: bool | None = None) -> list[dict[str, Any]]:
    """Tools of any kind in OpenAI's form.

    Raises:
        InvalidRequestError: Something that is not a tool, or a tool run by a provider's server.
    """
    converted: list[dict[str, Any]] = []
    for tool in tools:
        try:
            openai = convert(tool, strict)
            name: Any = openai["function"]["name"]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise InvalidRequestError(
                f"{_describe(tool)} cannot be used as a tool ({error}); pass a function, a pydantic class, a BaseTool "
                "or a dictionary with name and parameters."
            ) from None
        if not isinstance(name, str):
            raise InvalidRequestError(f"{_describe(tool)} has a name that is not a string: {name!r}.")
        if openai not in converted:
            converted.append(openai)
    return converted


def convert(tool: AnyTool, strict: bool | None = None) -> dict[str, Any]:
    """One tool in OpenAI's form, a schema that refers to itself with its definitions.

    LangChain writes references out, and "anything" in place of those that lead back to where they stand.

    Raises:
        KeyError, TypeError, ValueError, RecursionError: Not a tool; from LangChain's conversion.
    """
    if isinstance(tool, Mapping):
        return convert_to_openai_tool(inlined(tool), strict=strict)
    converted = convert_to_openai_tool(tool, strict=strict)
    own = _own_schema(tool)
    if own is None or not _is_recursive(own):
        return converted
    function = {key: converted["function"][key] for key in ("name", "description") if key in converted["function"]}
    parameters = {key: value for key, value in inlined(own).items() if key not in ("title", "description")}
    return convert_to_openai_tool({**function, "parameters": parameters}, strict=strict)


def inlined(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON schema whose top is not a mere reference into its own definitions."""
    whole, seen = dict(schema), set[str]()
    while isinstance(reference := whole.get("$ref"), str) and reference not in seen:
        seen.add(reference)
        target: Any = whole
        for part in reference.split("/")[1:]:
            target = target.get(part) if isinstance(target, Mapping) else None
        if not reference.startswith("#/") or not isinstance(target, Mapping):
            break
        whole.pop("$ref")
        whole = {**target, **whole}
    return whole


def _own_schema(tool: Any) -> Mapping[str, Any] | None:
    """The JSON schema of a tool's arguments as pydantic writes it; None for what has none."""
    shape: Any = tool
    if isinstance(tool, BaseTool):
        shape = tool.tool_call_schema
    elif inspect.isroutine(tool):  # as LangChain reads functions
        shape = create_schema_from_function(
            tool.__name__,
            tool,
            filter_args=(),
            parse_docstring=True,
            error_on_invalid_docstring=False,
            include_injected=False,
        )
    if isinstance(shape, Mapping):
        return shape
    if not (inspect.isclass(shape) and is_basemodel_subclass(shape)):
        return None
    model: Any = shape
    written: dict[str, Any] = (getattr(model, "model_json_schema", None) or model.schema)()
    return written


def _is_recursive(schema: Mapping[str, Any]) -> bool:
    uses = {"#": set(_references({key: value for key, value in schema.items() if key not in _DEFINITIONS}))}
    for key in _DEFINITIONS:
        if isinstance(definitions := schema.get(key), Mapping):
            uses |= {f"#/{key}/{name}": set(_references(definition)) for name, definition in definitions.items()}
    try:
        TopologicalSorter(uses).prepare()
    except CycleError:
        return True
    return False


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        node = list(node.values())
    if isinstance(node, list):
        for value in node:
            yield from _references(value)


def check_names(tools: Sequence[Mapping[str, Any]]) -> None:
    """Raise `InvalidRequestError` if two different tools have one name."""
    names = [tool["function"]["name"] for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequestError(f"There are two tools named {name!r}; rename one.")


def chosen(choice: ToolChoice, tools: Sequence[Mapping[str, Any]]) -> str:
    """`tool_choice` of these tools in one of four forms: "auto", "none", "any" or "tool:NAME".

    Raises:
        InvalidRequestError: A tool that is not bound, a choice of an unknown form, or a forced call without tools.
    """
    return constraints.tool_choice(choice, [tool["function"]["name"] for tool in tools])


def needs_whole_call(tool_choice: ToolChoice, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an answer without a whole call is an error: a call is forced, and not marked as `partial`."""
    partial = isinstance(tool_choice, Mapping) and tool_choice.get("partial")
    return not partial and chosen(tool_choice, tools) not in ("auto", "none")


def _describe(tool: Any) -> str:
    if isinstance(tool, Mapping):
        return f"A dictionary with the keys {sorted(map(str, tool))}"
    return getattr(tool, "__name__", type(tool).__name__)
