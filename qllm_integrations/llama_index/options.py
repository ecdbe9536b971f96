"""Arguments of a single call: which are known, which override the model's own settings, and a warning for the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from llama_index.core.tools.types import ToolMetadata

from qllm_integrations.llama_index.handle import Reading
from qllm_runtime.errors import InvalidRequestError
from qllm_runtime.types import Sampling

SAMPLING_FIELDS = tuple(field.name for field in fields(Sampling))
#: How an answer is written: what engines hand on to each call of the model.
ANSWER_FIELDS = (*SAMPLING_FIELDS, "reread")
#: Arguments of `chat` and its relatives beside the sampling fields.
REQUEST_FIELDS = (
    "query",
    "memory",
    "mode",
    "reread",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "response_schema",
    "template_kwargs",
    "show_progress",
)


def parameters(function: Callable[..., object]) -> tuple[str, ...]:
    """Names of a function's own parameters, to be suggested for typos."""
    own = inspect.signature(function).parameters.values()
    return tuple(parameter.name for parameter in own if parameter.kind is not parameter.VAR_KEYWORD)


def sampling(defaults: Mapping[str, Any], call: Mapping[str, Any]) -> Sampling:
    """The sampling of a call: the model's settings, overridden by the arguments of the call that are not None."""
    values = {name: defaults[name] for name in SAMPLING_FIELDS}
    values.update({name: call[name] for name in SAMPLING_FIELDS if call.get(name) is not None})
    stop = values["stop"] or ()
    values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    return Sampling(**values)


def tool_specs(tools: Any) -> list[Mapping[str, Any]]:
    """Tools in OpenAI's form.

    Raises:
        InvalidRequestError: Not a sequence, or something in it is not a tool.
    """
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Iterable):
        raise InvalidRequestError(f"tools takes a sequence of tools, got {_kind(tools)}; write tools=[tool].")
    return [_specified(tool) for tool in tools]


def _specified(tool: Any) -> Mapping[str, Any]:
    metadata = getattr(tool, "metadata", None)
    if isinstance(metadata, ToolMetadata):
        spec: dict[str, Any] = metadata.to_openai_tool(skip_length_check=True)
        return spec
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequestError(
            f"tools holds {_kind(tool)} that is not a tool; give LlamaIndex tools, or dicts in OpenAI's form: "
            '{"type": "function", "function": {"name": ..., "parameters": ...}}.'
        )
    return dict(tool)


def reading(memory: Any) -> Reading | None:
    """The memory of a call; one that an index keeps says what of it was read for the call.

    Raises:
        InvalidRequestError: It is not a memory of documents.
    """
    if memory is None or isinstance(memory, Reading):
        return memory
    if not hasattr(memory, "documents"):
        raise InvalidRequestError(
            f"memory takes what QLLM.read returns, got {_kind(memory)}; a MemoryConfig goes to QLLM(memory=...)."
        )
    return Reading(memory)


def check_schema(schema: Any) -> None:
    """Refuse what cannot be a JSON schema.

    Raises:
        InvalidRequestError: It is not a dict.
    """
    if schema is not None and not isinstance(schema, Mapping):
        raise InvalidRequestError(
            f"response_schema takes a JSON schema as a dict, got {_kind(schema)}; of a pydantic class that is "
            "Class.model_json_schema()."
        )


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
