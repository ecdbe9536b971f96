"""Schemas that refer to themselves, and schemas in the wrappings of OpenAI: enforced like any other."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fake_engine_lc import FakeEngine
from langchain_core.tools import tool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from pydantic import BaseModel, Field
from pydantic.v1 import BaseModel as BaseModelV1
from typing_extensions import TypedDict

from qllm_integrations.langchain import QLLMChat
from qllm_integrations.langchain.structured import to_json_schema
from qllm_integrations.langchain.tools import to_openai
from qllm_runtime.errors import InvalidRequestError


class Node(BaseModel):
    """A node of a tree."""

    name: str = Field(max_length=8)
    children: list[Node] = []


class NodeV1(BaseModelV1):
    """A node of a tree."""

    name: str
    children: list[NodeV1] = []


class Tree(BaseModel):
    """A tree."""

    root: Node
    depth: int


class Leaf(BaseModel):
    """A leaf."""

    name: str


class Twig(BaseModel):
    """A twig: two references to the same, but no way back."""

    left: Leaf
    right: Leaf | None = None


class Ring(TypedDict):
    """A ring."""

    next: Ring


NodeV1.update_forward_refs(NodeV1=NodeV1)


@tool
def plant(root: Node, deep: bool) -> str:
    """Plant a tree."""
    return f"{root.name} {deep}"


@tool(args_schema=Tree.model_json_schema())
def fell(**tree: Any) -> str:
    """Fell a tree."""
    return str(tree)


def climb(root: Node) -> str:
    """Climb a tree.

    Args:
        root: Where it begins.
    """
    return root.name


NODE = {"name": "a", "children": [{"name": "b", "children": [{"name": "c", "children": []}]}]}
NO_NODE = {"name": "a", "children": [{"name": "b", "children": [3]}]}
RECURSIVE: dict[str, tuple[Any, str, Any, Any]] = {
    "pydantic": (Node, "Node", NODE, NO_NODE),
    "pydantic 1": (NodeV1, "NodeV1", NODE, NO_NODE),
    "below the top": (Tree, "Tree", {"root": NODE, "depth": 3}, {"root": NO_NODE, "depth": 3}),
    "json schema": (Node.model_json_schema(), "Node", NODE, NO_NODE),
}
TOOLS: dict[str, tuple[Any, str, Any, Any]] = {
    **RECURSIVE,
    "tool": (plant, "plant", {"root": NODE, "deep": True}, {"root": NO_NODE, "deep": True}),
    "tool of a dictionary": (fell, "fell", {"root": NODE, "depth": 3}, {"root": NO_NODE, "depth": 3}),
    "function": (climb, "climb", {"root": NODE}, {"root": NO_NODE}),
}


def writes(text: str) -> QLLMChat:
    """A model that writes `text` as far as the grammar lets it."""
    return QLLMChat.from_engine(FakeEngine(reply=text))


def calls(name: str, arguments: Any) -> QLLMChat:
    call = json.dumps({"name": name, "arguments": arguments})
    return writes(f"<tool_call>\n{call}\n</tool_call>")


@pytest.mark.parametrize("strict", [None, True])
@pytest.mark.parametrize(("schema", "name", "good", "bad"), RECURSIVE.values(), ids=RECURSIVE)
def test_a_schema_that_refers_to_itself_is_enforced(
    schema: Any, name: str, good: Any, bad: Any, strict: bool | None
) -> None:
    for value in (good, bad):
        for method in ("json_schema", "json_mode", "function_calling"):
            llm = calls(name, value) if method == "function_calling" else writes(json.dumps(value))
            out = llm.with_structured_output(schema, method=method, strict=strict, include_raw=True).invoke("hi")
            written = [call["args"] for call in out["raw"].tool_calls] or out["raw"].text
            assert (written in ([value], json.dumps(value))) == (value is good)
            if value is good:
                assert out["parsed"] == (value if isinstance(schema, dict) else schema(**value))


@pytest.mark.parametrize("strict", [None, True])
@pytest.mark.parametrize(("kind", "name", "good", "bad"), TOOLS.values(), ids=TOOLS)
def test_a_tool_with_such_a_schema_is_enforced(kind: Any, name: str, good: Any, bad: Any, strict: bool | None) -> None:
    (function,) = (converted["function"] for converted in to_openai([kind], strict))
    assert function["name"] == name
    assert function["description"]
    assert function["parameters"]["type"] == "object"
    assert to_openai([{"type": "function", "function": function}])[0]["function"] == function
    for value in (good, bad):
        llm = calls(name, value).bind_tools([kind], tool_choice={"type": "any", "partial": True}, strict=strict)
        found = [call["args"] for call in llm.invoke("hi").tool_calls]
        assert (found == [value]) == (value is good)


def test_other_schemas_stay_as_langchain_writes_them() -> None:
    for kind in (Twig, Leaf):
        for strict in (None, True, False):
            assert to_json_schema(kind, strict) == convert_to_json_schema(kind, strict=strict)
            assert to_openai([kind], strict) == [convert_to_openai_tool(kind, strict=strict)]


def test_what_cannot_be_written_as_a_schema_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="pydantic class"):
        writes("x").with_structured_output(Ring)
    with pytest.raises(InvalidRequestError, match="pydantic class"):
        writes("x").bind_tools([Ring])


INNER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
BODY = {"name": "count", "description": "A count.", "schema": INNER, "strict": True}


WRAPPED = [BODY, {"type": "json_schema", "json_schema": BODY}, {"type": "json_schema", **BODY}]


@pytest.mark.parametrize("schema", WRAPPED, ids=["body", "chat completions", "responses"])
def test_schemas_in_the_wrappings_of_openai(schema: dict[str, Any]) -> None:
    for method in ("json_schema", "json_mode", "function_calling"):
        for value, fits in (({"n": 3}, True), ({"n": "x"}, False)):
            llm = calls("count", value) if method == "function_calling" else writes(json.dumps(value))
            out = llm.with_structured_output(schema, method=method, include_raw=True).invoke("hi")
            assert (out["parsed"] == value) == fits
    shown = writes("{}").with_structured_output(schema).first.kwargs["response_format"]["json_schema"]
    assert shown["schema"] == {**INNER, "title": "count", "description": "A count."}
    assert shown["strict"]
    loose = json.loads(json.dumps(schema).replace("true", "false"))
    for strict in (None, True):
        bound = writes("{}").with_structured_output(loose, strict=strict).first
        assert bound.kwargs["response_format"]["json_schema"]["strict"] is bool(strict)


@pytest.mark.parametrize(
    "schema",
    [
        {"title": "X"},
        {"title": "X", "description": "d"},
        {"name": "x", "description": "d"},
        {"name": "x", "parameters": {}},
        {"name": "x", "input_schema": {}},
        {"name": "x", "schema": {}},
        {"name": "x", "schema": 5},
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
        {"type": "json_schema", "json_schema": {"name": "x"}},
        {"type": "json_schema", "json_schema": 5},
        {"type": "json_schema"},
    ],
)
@pytest.mark.parametrize("method", ["json_schema", "json_mode", "function_calling"])
def test_a_schema_that_says_nothing_is_refused(schema: dict[str, Any], method: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"says nothing|holds no schema"):
        writes("x").with_structured_output(schema, method=method)
