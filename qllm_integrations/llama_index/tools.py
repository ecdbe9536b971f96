"""Tool calling of `QLLM`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.base.base_selector import MultiSelection, SingleSelection
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, ToolCallBlock
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools.types import BaseTool

from qllm_integrations.llama_index import options
from qllm_runtime import constraints
from qllm_runtime.errors import InvalidRequestError


class ToolsMixin:
    """The tool methods that `FunctionCallingLLM` leaves to its subclasses."""

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        messages = list(chat_history or ())  # a copy: the caller's history stays as it is
        if user_msg is not None:
            messages.append(ChatMessage(user_msg) if isinstance(user_msg, str) else user_msg)
        specs = [_counted_from_one(tool, spec) for tool, spec in zip(tools, options.tool_specs(tools), strict=True)]
        choice = constraints.tool_choice(tool_choice, [spec["function"]["name"] for spec in specs])
        return {
            "messages": messages,
            "tools": specs,
            "tool_choice": "any" if choice == "auto" and tool_required else choice.removeprefix("tool:"),
            "parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def _validate_chat_with_tools_response(
        self, response: ChatResponse, tools: Sequence[BaseTool], allow_parallel_tool_calls: bool = False, **kwargs: Any
    ) -> ChatResponse:
        if not allow_parallel_tool_calls:
            calls = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
            response.message.blocks = [block for block in response.message.blocks if block not in calls[1:]]
            del response.message.additional_kwargs.get("tool_calls", [])[1:]
        return response

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The tool calls of a response.

        Raises:
            InvalidRequestError: There are none and `error_on_no_tool_call` is set.
        """
        calls = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        if not calls and error_on_no_tool_call:
            raise InvalidRequestError("The answer calls no tool; pass tool_required=True to force a call.")
        return [
            ToolSelection(tool_id=call.tool_call_id or "", tool_name=call.tool_name, tool_kwargs=call.tool_kwargs)
            for call in calls
        ]


def _counted_from_one(tool: BaseTool, spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tool in OpenAI's form. Selections count from 1: a 0 would silently choose the last of the choices."""
    if isinstance(tool, Mapping):
        return spec
    parameters = spec["function"]["parameters"]
    if tool.metadata.fn_schema is SingleSelection:
        parameters["properties"]["index"]["minimum"] = 1
    elif tool.metadata.fn_schema is MultiSelection:
        parameters["properties"]["selections"]["minItems"] = 1
        parameters["$defs"]["SingleSelection"]["properties"]["index"]["minimum"] = 1
    return spec
