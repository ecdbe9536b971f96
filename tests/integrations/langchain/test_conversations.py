"""What becomes of single turns: empty ones, names, instructions, documents taken out; which memory and question win."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from fake_engine_lc import FakeEngine
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage

from qllm_integrations.langchain import QLLMChat
from qllm_integrations.langchain.messages import translate
from qllm_runtime.config import MemoryConfig
from qllm_runtime.types import Turn

ASK = "Who wrote the letter?"
WRITER = {"title": "Writer", "type": "object", "properties": {"name": {"type": "string"}}}
CALL = {"name": "look", "args": {"at": "sea"}, "id": "c1", "type": "tool_call"}
KEPT = {"type": "text-plain", "text": "Call me Ishmael.", "cache_control": {"type": "ephemeral"}}


def asked(messages: list[BaseMessage], *, schema: bool = False) -> tuple[Turn, ...]:
    """The turns that reach the engine."""
    engine = FakeEngine()
    llm: Any = QLLMChat.from_engine(engine)
    (llm.with_structured_output(WRITER) if schema else llm).invoke(messages)
    turns: tuple[Turn, ...] = engine.requests[0]["turns"]
    return turns


def test_a_format_instruction_stands_in_the_last_question() -> None:
    first, answer, last = asked([HumanMessage(ASK), AIMessage("Ann."), HumanMessage("And who read it?")], schema=True)
    assert (first.content, answer.content) == ((ASK,), ("Ann.",))
    assert last.content[0] == "And who read it?"
    assert "JSON schema" in last.content[1]


def test_a_format_instruction_leaves_the_name_of_who_asks() -> None:
    (turn,) = asked([HumanMessage(ASK, name="ann")], schema=True)
    assert turn.extras == {"name": "ann"}


@pytest.mark.parametrize(
    "result",
    [
        ToolMessage([KEPT], tool_call_id="c1"),
        ToolMessage([KEPT], tool_call_id=""),
        HumanMessage([{"type": "tool_result", "content": [KEPT]}]),
    ],
)
def test_a_tool_result_stays_though_its_document_is_kept(result: BaseMessage) -> None:
    *_, turn, last = asked([HumanMessage(ASK), AIMessage("", tool_calls=[CALL]), result, HumanMessage("Well?")])
    assert (turn.role, turn.content) == ("tool", ())
    assert last.text == "Well?"


def test_an_empty_message_is_a_turn_and_a_tool_result_alone_no_second_one() -> None:
    empty = [HumanMessage("Hi."), AIMessage("Hm."), HumanMessage(""), AIMessage("?"), HumanMessage(ASK)]
    assert [(turn.role, turn.text) for turn in asked(empty)] == [
        ("user", "Hi."),
        ("assistant", "Hm."),
        ("user", ""),
        ("assistant", "?"),
        ("user", ASK),
    ]
    result = HumanMessage([{"type": "tool_result", "tool_use_id": "c1", "content": "waves"}])
    turns = translate([HumanMessage(ASK), AIMessage("", tool_calls=[CALL]), result]).turns
    assert [turn.role for turn in turns] == ["user", "assistant", "tool"]


def test_a_memory_in_the_messages_goes_ahead_of_the_models_own() -> None:
    engine = FakeEngine()
    llm = QLLMChat.from_engine(engine)
    with llm.add_documents("Call me Ishmael.") as own, llm.add_documents("The harbour was empty.") as other:
        qa = llm.with_memory(own)
        qa.invoke([HumanMessage([other.block(), {"type": "text", "text": ASK}])])
        qa.invoke(ASK)
        assert [call["memory"] for call in engine.requests] == [other.memory, own.memory]


@pytest.mark.parametrize(("policy", "query_source"), [("qllm", "none"), ("full", "fallback")])
def test_a_long_message_is_a_question_only_where_nothing_is_looked_up(policy: Any, query_source: str) -> None:
    engine = FakeEngine(memory=MemoryConfig(policy=policy, n_local=256))
    long = "The sea was calm. " * 30
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is read that could be guided
        ai = QLLMChat.from_engine(engine).invoke(long)
    assert ai.response_metadata["qllm"]["query_source"] == query_source
    assert bool(engine.requests[0]["query"]) == (query_source != "none")
