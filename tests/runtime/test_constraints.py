"""Choices of tools in all spellings, grammars as wide and as open-ended as the model, questions that can guide."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qllm_runtime.config import MemoryConfig
from qllm_runtime.constraints import ask_for_json, grammar, tool_choice
from qllm_runtime.errors import InvalidRequestError
from qllm_runtime.guidance import guiding
from qllm_runtime.types import Turn
from tests.integrations.byte_llama import byte_tokenizer

DIGIT = {"type": "integer", "minimum": 1, "maximum": 9}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, "auto"),
        ("auto", "auto"),
        ({"type": "auto"}, "auto"),
        (False, "none"),
        ("none", "none"),
        ({"type": "none"}, "none"),
        (True, "any"),
        ("any", "any"),
        ("required", "any"),
        ({"type": "any", "partial": True}, "any"),
        ("f", "tool:f"),
        ({"type": "function", "function": {"name": "f"}}, "tool:f"),
        ({"type": "tool", "name": "f"}, "tool:f"),
        ({"name": "f"}, "tool:f"),
    ],
)
def test_a_choice_of_tools(choice: Any, expected: str) -> None:
    assert tool_choice(choice, ["f", "g"]) == expected


@pytest.mark.parametrize("choice", ["h", 1, {"type": "tool", "name": "h"}, {}, {"type": "function"}, ["f"]])
def test_a_choice_that_is_none(choice: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"names none of the tools; use one of \['f'\]"):
        tool_choice(choice, ["f"])
    with pytest.raises(InvalidRequestError, match="there are no tools"):
        tool_choice("any", [])


@pytest.fixture
def engine() -> Any:
    """Ends its answers at "</s>" (tokenizer), "<a>" (generation config) and "<b>" (model config); scores are padded."""
    tokenizer = byte_tokenizer(("<s>", "</s>", "<a>", "<b>"))
    ids = tokenizer.convert_tokens_to_ids
    text_config = SimpleNamespace(vocab_size=len(tokenizer), eos_token_id=[ids("<b>")])
    model = SimpleNamespace(
        generation_config=SimpleNamespace(eos_token_id=ids("<a>")),
        config=SimpleNamespace(get_text_config=lambda: text_config),
        get_output_embeddings=lambda: SimpleNamespace(weight=torch.zeros(len(tokenizer) + 8, 1)),
    )
    return SimpleNamespace(
        tokenizer=tokenizer,
        model=model,
        memory=MemoryConfig(n_local=8, exec_block_size=8, block_size=8),
        count_tokens=len,
    )


def allowed(engine: Any, processor: Any, text: str) -> set[str]:
    ids = engine.tokenizer.encode(text, add_special_tokens=False)
    scores = processor(torch.tensor([ids], dtype=torch.long), torch.zeros(1, len(engine.tokenizer) + 8))
    return set(engine.tokenizer.convert_ids_to_tokens(scores[0].isfinite().nonzero()[:, 0].tolist()))


@pytest.mark.parametrize("model", [lambda model: model, lambda model: headless(model)])
def test_an_answer_may_end_wherever_the_engine_ends_one(engine: Any, model: Callable[[Any], Any]) -> None:
    engine.model = model(engine.model)
    (processor,) = grammar(engine, (), "auto", schema=DIGIT)
    assert allowed(engine, processor, "4") == {"</s>", "<a>", "<b>"}


def headless(model: Any) -> Any:
    return SimpleNamespace(**{**vars(model), "get_output_embeddings": lambda: None})


def test_what_is_free_and_what_is_held(engine: Any) -> None:
    assert grammar(engine, [TOOL], "auto") == grammar(engine, [TOOL], "none") == grammar(engine, (), "auto") == ()
    (either,) = grammar(engine, [TOOL], "auto", schema=DIGIT)
    assert allowed(engine, either, "") == {"<", *"123456789"}  # a call or an answer
    (call,) = grammar(engine, [TOOL], "tool:f", schema=DIGIT)
    assert allowed(engine, call, "") == {"<"}
    (json,) = grammar(engine, [TOOL], "none", schema=DIGIT)
    assert allowed(engine, json, "") == set("123456789")


def test_a_schema_is_shown_behind_the_last_question() -> None:
    turns = ask_for_json([Turn("user", ("Who?",)), Turn("assistant", ("I.",)), Turn("user", ("How old?",))], DIGIT)
    assert [turn.content[0] for turn in turns] == ["Who?", "I.", "How old?"]
    assert turns[-1].content[1].endswith('{"type": "integer", "minimum": 1, "maximum": 9}')
    assert ask_for_json([], DIGIT)[0].role == "user"


def test_which_question_can_guide(engine: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert guiding(engine, "Who?", "message", warn=True) == ("Who?", "message")
        assert guiding(engine, "Who is it?", "explicit", warn=True) == ("Who is it?", "explicit")
        assert guiding(engine, "Who is it?", "fallback", warn=False) == ("", "none")
    with pytest.warns(UserWarning, match="more than n_local=8 tokens, too many for a question: lookups are unguided"):
        assert guiding(engine, "Who is it?", "message", warn=True) == ("", "none")
    with pytest.warns(UserWarning, match="no question in the messages: lookups are unguided"):
        assert guiding(engine, "", "none", warn=True) == ("", "none")
    engine.memory = MemoryConfig(policy="full")
    assert guiding(engine, "Who is it? " * 10_000, "message", warn=True)[1] == "message"
