"""Tokens of messages: of none, of empty ones, while `trim_messages` looks for what fits, and of files."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from fake_engine_lc import FakeEngine
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, trim_messages
from pdf_by_hand import pdf_bytes

from qllm_integrations.langchain import QLLMChat
from qllm_integrations.langchain.messages import translate
from qllm_runtime.errors import InvalidRequestError

TEXT = {"type": "text", "text": "Who wrote the letter?"}


@pytest.mark.parametrize("strategy", ["first", "last"])
def test_messages_are_trimmed_to_tokens(strategy: Any) -> None:
    llm = QLLMChat.from_engine(FakeEngine())
    messages = [HumanMessage(" ".join(f"word{n}" for n in range(40))), AIMessage("So many.\nAnd more.")]
    whole = llm.get_num_tokens_from_messages(messages)
    for limit in (20, 60, whole // 2, whole):
        trimmed = trim_messages(messages, max_tokens=limit, token_counter=llm, allow_partial=True, strategy=strategy)
        assert llm.get_num_tokens_from_messages(trimmed) <= limit
    assert trimmed == messages


def test_nothing_can_be_counted() -> None:
    llm = QLLMChat.from_engine(FakeEngine())
    assert llm.get_num_tokens_from_messages([]) == 0
    word = llm.get_num_tokens_from_messages([AIMessage("word")])
    for empty in (AIMessage(""), SystemMessage(""), HumanMessage(""), HumanMessage([])):
        assert 0 < llm.get_num_tokens_from_messages([empty]) < word
        with pytest.raises(InvalidRequestError, match="empty"):
            llm.invoke([empty])


def test_files_in_the_form_of_openai() -> None:
    llm = QLLMChat.from_engine(engine := FakeEngine())
    text = base64.b64encode(b"Call me Ishmael.").decode()
    for data in (f"data:text/plain;base64,{text}", text, base64.b64encode(pdf_bytes("Call me Ishmael.")).decode()):
        block = {"type": "file", "file": {"file_data": data, "filename": "novel"}}
        counted = llm.get_num_tokens_from_messages([HumanMessage([block, TEXT])])
        assert llm.invoke([HumanMessage([block, TEXT])]).usage_metadata["input_tokens"] == counted
        for request in (translate([HumanMessage([block, TEXT])]).documents, engine.requests[-1]["turns"][0].documents):
            (document,) = request
            assert (document.text.strip(), document.title) == ("Call me Ishmael.", "novel")
    assert translate([HumanMessage([{"type": "file", "file": {"file_id": "mem-1"}}, TEXT])]).memory_id == "mem-1"
    for bad in ({"filename": "novel"}, "novel"):
        with pytest.raises(InvalidRequestError, match="block 1"):
            translate([HumanMessage([{"type": "file", "file": bad}, TEXT])])
