"""Tools and structured output: forced by the grammar, found in free text, typed errors for what cannot work."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import reduce
from operator import add
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from fake_engine_lc import FakeEngine
from ishmael import REPLY
from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from pydantic import BaseModel, Field, RootModel, SecretStr, field_validator
from pydantic.v1 import BaseModel as BaseModelV1
from typing_extensions import TypedDict

from qllm_integrations.langchain import QLLMChat
from qllm_runtime.errors import InvalidConfigError, InvalidRequestError


@tool
def weather(city: str, days: int = 1) -> str:
    """Look up the weather."""
    return f"{city}: windy for {days} days"


@tool
def clock() -> str:
    """Tell the time."""
    return "noon"


class Ship(BaseModel):
    """A ship."""

    name: str
    guns: int = Field(ge=0, le=120)
    rig: Literal["brig", "sloop"]
    crew: list[str] = Field(max_length=3)
    port: str | None = None


class ShipV1(BaseModelV1):
    """A ship."""

    name: str
    guns: int


class ShipDict(TypedDict):
    """A ship."""

    name: Annotated[str, ..., "its name"]
    guns: int


def says(reply: str, **settings: Any) -> QLLMChat:
    return QLLMChat.from_engine(FakeEngine(reply=reply), **settings)


def both(runnable: Any, text: Any = "hi") -> list[AIMessage]:
    """The whole answer and the merged stream."""
    return [runnable.invoke(text), reduce(add, runnable.stream(text))]


@pytest.fixture(scope="module")
def tiny(tiny_path: str) -> QLLMChat:
    return QLLMChat(model=tiny_path)


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("any", {"weather", "clock"}),
        ("required", {"weather", "clock"}),
        (True, {"weather", "clock"}),
        ("clock", {"clock"}),
        ("weather", {"weather"}),
        ({"type": "function", "function": {"name": "clock"}}, {"clock"}),
        ({"type": "tool", "name": "clock"}, {"clock"}),
        ({"type": "any"}, {"weather", "clock"}),
    ],
)
def test_forced_calls(tiny: QLLMChat, choice: Any, names: set[str]) -> None:
    for ai in both(tiny.bind_tools([weather, clock], tool_choice=choice)):
        (call,) = ai.tool_calls
        assert call["name"] in names
        assert ai.content == ""
        assert ai.invalid_tool_calls == []
        assert [block["type"] for block in ai.content_blocks] == ["tool_call"]
        {"weather": weather, "clock": clock}[call["name"]].invoke(call)


def test_stop_strings_leave_forced_answers_whole(tiny: QLLMChat) -> None:
    stop = ["\n", '"', "}"]
    for ai in both(tiny.bind_tools([clock], tool_choice="any").bind(stop=stop)):
        assert [call["name"] for call in ai.tool_calls] == ["clock"]
        assert ai.invalid_tool_calls == []
    stopped = tiny.model_copy(update={"stop": stop})
    for method in METHODS:
        assert stopped.with_structured_output(Ship, method=method).invoke("hi").name == REPLY
    assert tiny.invoke("hi", stop=["m"]).text == REPLY[: REPLY.index("m")]


@pytest.mark.parametrize("choice", [None, "auto", "none", False, {"type": "auto"}])
def test_unforced_answers_are_free(tiny: QLLMChat, choice: Any) -> None:
    for ai in both(tiny.bind_tools([weather], tool_choice=choice)):
        assert (ai.content, ai.tool_calls) == (REPLY, [])


def test_tools_are_shown_unless_none() -> None:
    engine = FakeEngine()
    llm = QLLMChat.from_engine(engine)
    llm.bind_tools([weather]).invoke("hi")
    llm.bind_tools([weather], tool_choice="none").invoke("hi")
    assert "weather" in engine.tokenizer.decode(engine.requests[0]["prompt"].ids)
    assert "weather" not in engine.tokenizer.decode(engine.requests[1]["prompt"].ids)


@pytest.mark.parametrize(
    ("reply", "text", "calls"),
    [
        (
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
            "",
            [("weather", {"city": "Oslo"})],
        ),
        (
            'I look.\n\n<tool_call>{"name": "weather", "arguments": {"city": "<Å>"}}</tool_call>\n'
            '<tool_call>{"name": "clock"}</tool_call>',
            "I look.",
            [("weather", {"city": "<Å>"}), ("clock", {})],
        ),
        ('{"name": "weather", "parameters": {"city": "Oslo"}}', "", [("weather", {"city": "Oslo"})]),
        ('{"name": "nobody", "parameters": {}}', '{"name": "nobody", "parameters": {}}', []),
        ('{"answer": 1}', '{"answer": 1}', []),
        ("a < b and <tool", "a < b and <tool", []),
    ],
)
@pytest.mark.parametrize("version", [None, "v1"])
def test_calls_are_found_in_free_text(reply: str, text: str, calls: list[Any], version: str | None) -> None:
    for ai in both(says(reply, output_version=version).bind_tools([weather, clock])):
        assert ai.text == text
        assert [(call["name"], call["args"]) for call in ai.tool_calls] == calls
        assert len({call["id"] for call in ai.tool_calls}) == len(calls)
        assert [block["name"] for block in ai.content_blocks if block["type"] == "tool_call"] == [
            name for name, _ in calls
        ]


def test_without_tools_nothing_is_taken_for_a_call() -> None:
    reply = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
    for ai in both(says(reply)):
        assert (ai.text, ai.tool_calls) == (reply, [])


def test_a_call_that_cannot_be_read_is_invalid_not_lost() -> None:
    for ai in both(says('<tool_call>{"name": "weather", "arguments": {"city": "Os').bind_tools([weather])):
        assert ai.tool_calls == []
        (call,) = ai.invalid_tool_calls
        assert '"Os' in call["args"]


def test_a_tool_loop_runs_to_its_end() -> None:
    llm = says("It is windy.").bind_tools([weather])
    call = {"name": "weather", "args": {"city": "Oslo"}, "id": "c1", "type": "tool_call"}
    messages = [HumanMessage("How is the weather?"), AIMessage("", tool_calls=[call]), weather.invoke(call)]
    assert isinstance(messages[-1], ToolMessage)
    ai = llm.invoke(messages)
    assert ai.text == "It is windy."
    assert ai.response_metadata["qllm"]["query"] == "How is the weather?"


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_a_call_without_words_has_no_text_block(tiny_path: str, version: Any) -> None:
    llm = QLLMChat(model=tiny_path, output_version=version).bind_tools([clock], tool_choice="any")
    document = {"type": "text-plain", "mime_type": "text/plain", "text": "Call me Ishmael. " * 20}
    for ai in both(llm, [HumanMessage([document, {"type": "text", "text": "What time is it?"}])]):
        assert [block["type"] for block in ai.content_blocks] == ["tool_call"]


def test_several_calls_on_demand(tiny: QLLMChat) -> None:
    for ai in both(tiny.bind_tools([clock], tool_choice="any", parallel_tool_calls=True)):  # never ends by itself
        assert len(ai.tool_calls) >= 1


def test_anything_can_be_a_tool(tiny: QLLMChat) -> None:
    def plain(x: int) -> int:
        """Twice x."""
        return 2 * x

    anthropic = {
        "name": "anthropic",
        "description": "d",
        "input_schema": {"type": "object", "properties": {"x": {"type": "integer"}}},
    }
    openai = {"type": "function", "function": {"name": "openai", "parameters": {"type": "object", "properties": {}}}}
    tools = [weather, plain, Ship, anthropic, openai]
    for name in ("weather", "plain", "Ship", "anthropic", "openai"):
        assert tiny.bind_tools(tools, tool_choice=name).invoke("hi").tool_calls[0]["name"] == name


def test_impossible_tools_and_choices_are_refused_by_name(tiny: QLLMChat) -> None:
    for tools, choice, words in (
        ([weather], "clock", "clock.*weather"),
        ([weather], {"type": "tool", "name": "clock"}, "clock"),
        ([], "any", "no tools"),
        ([{"type": "web_search"}], None, "cannot be used as a tool"),
        ([3], None, "cannot be used as a tool"),
    ):
        with pytest.raises(InvalidRequestError, match=words):
            tiny.bind_tools(tools, tool_choice=choice)
    other = {"name": "clock", "description": "another", "parameters": {"type": "object", "properties": {}}}
    with pytest.raises(InvalidRequestError, match="two tools named 'clock'"):
        tiny.bind_tools([clock, other]).invoke("hi")
    odd = {
        "name": "odd",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "pattern": r"(a)\1"}}},
    }
    with pytest.raises(InvalidRequestError, match="cannot be compiled"):
        tiny.bind_tools([odd], tool_choice="any").invoke("hi")


METHODS = ["json_schema", "function_calling", "json_mode"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strict", [None, True, False])
def test_pydantic_instances(tiny: QLLMChat, method: Any, strict: bool | None) -> None:
    llm = tiny.with_structured_output(Ship, method=method, strict=strict)
    for ship in (llm.invoke("hi"), *llm.stream("hi")):
        assert isinstance(ship, Ship)
        assert ship.name == REPLY


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("schema", "check"),
    [
        (ShipV1, lambda ship: isinstance(ship, ShipV1)),
        (ShipDict, lambda ship: set(ship) == {"name", "guns"}),
        (Ship.model_json_schema(), lambda ship: {"name", "guns"} <= set(ship)),
        ({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}, lambda v: set(v) == {"n"}),
        ({"name": "ship", "parameters": ShipV1.schema()}, lambda ship: set(ship) == {"name", "guns"}),
        (
            {"type": "function", "function": {"name": "ship", "parameters": ShipV1.schema()}},
            lambda ship: "guns" in ship,
        ),
    ],
    ids=["pydantic 1", "typed dict", "json schema", "no title", "function", "tool"],
)
def test_every_kind_of_schema(tiny: QLLMChat, method: Any, schema: Any, check: Callable[[Any], bool]) -> None:
    if (
        method == "function_calling"
        and isinstance(schema, dict)
        and "title" not in schema
        and "type" in schema
        and "function" not in schema
    ):
        with pytest.raises(InvalidRequestError, match="cannot be used as a tool"):
            tiny.with_structured_output(schema, method=method)
        return
    llm = tiny.with_structured_output(schema, method=method)
    assert check(llm.invoke("hi"))
    assert check(list(llm.stream("hi"))[-1])


@pytest.mark.parametrize(
    ("schema", "check"),
    [
        ({"enum": ["yes", "no"]}, lambda value: value in ("yes", "no")),
        ({"description": "d", "const": "k"}, lambda value: value == "k"),
        ({"oneOf": [{"type": "boolean"}]}, lambda value: isinstance(value, bool)),
        ({"allOf": [{"type": "boolean"}]}, lambda value: isinstance(value, bool)),
        ({"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, lambda value: isinstance(value, list)),
    ],
)
def test_schemas_of_other_values_than_objects(
    tiny: QLLMChat, schema: dict[str, Any], check: Callable[[Any], bool]
) -> None:
    titled = {"title": "E", **schema}
    for method in ("json_schema", "json_mode"):
        assert check(tiny.with_structured_output(titled, method=method).invoke("hi"))
    with pytest.raises(InvalidRequestError, match="does not describe an object"):
        tiny.with_structured_output(titled, method="function_calling")


def test_only_objects_are_arguments(tiny: QLLMChat) -> None:
    with pytest.raises(InvalidRequestError, match="does not describe an object"):
        tiny.with_structured_output(RootModel[list[int]], method="function_calling")
    flags = {"title": "Flags", "type": "object", "patternProperties": {"^I": {"type": "boolean"}}, "minProperties": 1}
    for method in ("json_schema", "function_calling"):
        value = tiny.with_structured_output(flags, method=method).invoke("hi")
        assert value and all(name[0] == "I" and isinstance(flag, bool) for name, flag in value.items())


async def test_async_and_raw(tiny: QLLMChat) -> None:
    llm = tiny.with_structured_output(Ship, include_raw=True)
    out = await llm.ainvoke("hi")
    assert isinstance(out["raw"], AIMessage)
    assert isinstance(out["parsed"], Ship)
    assert out["parsing_error"] is None
    assert [part async for part in tiny.with_structured_output(Ship).astream("hi")][-1] == out["parsed"]


def test_dictionaries_grow_while_streaming(tiny: QLLMChat) -> None:
    parts = list(tiny.with_structured_output(ShipDict).stream("hi"))
    names = [part["name"] for part in parts if "name" in part]
    assert names == sorted(names, key=len)
    assert len(parts) > 3


def test_json_mode_without_a_schema() -> None:
    assert isinstance(says("x").with_structured_output(method="json_mode").invoke("hi"), dict)


def test_nested_enums_and_references(tiny: QLLMChat) -> None:
    class Rig(Enum):
        brig = "brig"
        sloop = "sloop"

    class Sail(BaseModel):
        rig: Rig
        area: float

    class Fleet(BaseModel):
        flagship: Sail
        others: list[Sail] = Field(max_length=1)
        at_sea: bool

    assert isinstance(tiny.with_structured_output(Fleet, method="json_schema").bind(max_tokens=400).invoke("hi"), Fleet)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_types_that_a_grammar_knows_nothing_of(tiny: QLLMChat, method: Any) -> None:
    class Rig(Enum):
        brig = "brig"
        sloop = "sloop"

    class Log(BaseModel):
        path: Path
        secret: SecretStr
        data: bytes
        ports: set[bool]
        guns: dict[Rig, bool]
        mark: Annotated[str, Field(pattern=r"\bIshmael\b")]

    log = tiny.with_structured_output(Log, method=method).bind(max_tokens=400).invoke("hi")
    assert log.path == Path(REPLY)
    assert log.secret.get_secret_value() == REPLY


@pytest.mark.parametrize("method", METHODS)
def test_an_answer_that_is_cut_off_raises_and_says_why(method: Any) -> None:
    llm = says("x", max_tokens=12).with_structured_output(Ship, method=method)
    for run in (lambda: llm.invoke("hi"), lambda: list(llm.stream("hi"))):
        with pytest.raises(OutputParserException, match="raise max_tokens"):
            run()
    raw = says("x", max_tokens=12).with_structured_output(Ship, method=method, include_raw=True).invoke("hi")
    assert raw["parsed"] is None
    assert isinstance(raw["parsing_error"], OutputParserException)


@pytest.mark.parametrize("choice", ["any", "weather", {"type": "tool", "name": "weather"}])
@pytest.mark.parametrize("limit", [{"max_tokens": 6}, {"max_tokens": 16}, {"max_tokens": 24}, {"stop": ["weather"]}])
async def test_a_forced_call_that_is_cut_off_raises_and_says_why(choice: Any, limit: dict[str, Any]) -> None:
    llm = says("x").bind_tools([weather], tool_choice=choice).bind(**limit)
    why = "raise max_tokens" if "max_tokens" in limit else "no complete tool call"
    for run in (lambda: llm.invoke("hi"), lambda: list(llm.stream("hi"))):
        with pytest.raises(OutputParserException, match=why):
            run()
    with pytest.raises(OutputParserException, match=why):
        await llm.ainvoke("hi")
    with pytest.raises(OutputParserException, match=why):
        [chunk async for chunk in llm.astream("hi")]
    assert says("x", **limit).bind_tools([weather]).invoke("hi").text == "x"


def test_checks_of_the_class_apply(tiny: QLLMChat) -> None:
    class Even(BaseModel):
        n: str

        @field_validator("n")
        @classmethod
        def _never(cls, value: str) -> str:
            raise ValueError("never right")

    with pytest.raises(OutputParserException, match="never right"):
        tiny.with_structured_output(Even).invoke("hi")


def test_schemas_that_cannot_work_are_refused(tiny: QLLMChat) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be compiled"):
        tiny.with_structured_output({"title": "X", "type": "object", "properties": {"x": {"type": "strin"}}}).invoke(
            "hi"
        )
    with pytest.raises(InvalidRequestError, match="cannot be compiled"):
        list(tiny.with_structured_output({"title": "X", "$ref": "#/nowhere"}).stream("hi"))
    with pytest.raises(InvalidRequestError, match="Unknown method"):
        tiny.with_structured_output(Ship, method="magic")
    with pytest.raises(InvalidRequestError, match="needs a schema"):
        tiny.with_structured_output()
    with pytest.raises(InvalidRequestError, match="not a schema"):
        tiny.with_structured_output(3)
    with pytest.raises(InvalidRequestError, match="response_format"):
        tiny.invoke("hi", response_format={"type": "grammar"})


def test_tools_beside_a_response_format(tiny: QLLMChat) -> None:
    body = {"type": "json_schema", "json_schema": {"name": "ship", "schema": ShipV1.schema()}}
    assert ShipV1.parse_raw(tiny.bind_tools([], response_format=body).invoke("hi").text).name == REPLY
    for ai in both(tiny.bind_tools([clock], response_format=body)):
        assert ai.tool_calls or ShipV1.parse_raw(ai.text)
    assert both(tiny.bind_tools([clock], response_format=body, tool_choice="any"))[0].tool_calls
    assert tiny.invoke("hi", response_format={"type": "text"}).text == REPLY


def test_an_agent_loop() -> None:
    from langchain.agents import create_agent

    replies = ['<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>', "Windy."]

    class Script(FakeEngine):
        def chat_stream(self, turns: Any, **options: Any) -> Any:
            self.reply = replies[any(turn.role == "tool" for turn in turns)]
            return super().chat_stream(turns, **options)

    engine = Script()
    agent = create_agent(QLLMChat.from_engine(engine), tools=[weather])
    out = agent.invoke({"messages": [HumanMessage("How is the weather in Oslo?")]})
    assert [message.type for message in out["messages"]] == ["human", "ai", "tool", "ai"]
    assert out["messages"][-1].text == "Windy."
    assert [call["query"] for call in engine.requests] == ["How is the weather in Oslo?"] * 2


def test_an_agent_with_a_response_format(tiny: QLLMChat) -> None:
    from langchain.agents import create_agent

    out = create_agent(tiny, tools=[], response_format=Ship).invoke({"messages": [HumanMessage("Name a ship.")]})
    assert isinstance(out["structured_response"], Ship)


def test_bad_sampling_beside_a_grammar_is_typed(tiny: QLLMChat) -> None:
    with pytest.raises(InvalidConfigError):
        tiny.with_structured_output(Ship).bind(max_tokens=-1).invoke("hi")


def test_truncated_sampling_still_follows_the_grammar(tiny: QLLMChat) -> None:
    llm = tiny.with_structured_output(ShipDict).bind(temperature=1.5, top_k=1, top_p=0.1, seed=1)
    assert set(llm.invoke("hi")) == {"name", "guns"}
