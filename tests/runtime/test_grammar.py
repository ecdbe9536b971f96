"""Constrained decoding: what the grammar lets through, when an answer may end, what cannot be compiled."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qllm_runtime.errors import InvalidRequestError, MissingExtraError, UnsupportedModelError
from qllm_runtime.grammar import GrammarProcessor, json_schema_processor, tool_call_processor
from qllm_runtime.toolcalls import HERMES, LLAMA3, CallSplitter, ToolCall

END, OTHER_END = 0, 1
WIDTH = 300  # wider than the tokenizer, as embeddings padded for speed are


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["</s>", "<|eot|>", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", additional_special_tokens=["<|eot|>"])


def write(
    processor: GrammarProcessor, scores: Any, limit: int = 2000, ends: Sequence[int] = (END, OTHER_END)
) -> list[int]:
    """Greedy decoding of scores(step) [1, WIDTH] under the processor; end token excluded."""
    ids: list[int] = []
    for step in range(limit):
        token = int(processor(torch.tensor([ids], dtype=torch.long), scores(step)).argmax())
        if token in ends:
            return ids
        ids.append(token)
    raise AssertionError("the answer does not end")


def noise(seed: int, end: float = 0.0) -> Any:
    """Random scores; `end` is added to the end token's."""
    generator = torch.Generator().manual_seed(seed)

    def scores(_: int) -> torch.Tensor:
        drawn = torch.randn(1, WIDTH, generator=generator)
        drawn[0, END] += end
        return drawn

    return scores


SCHEMA = {
    "title": "Ship",
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "guns": {"type": "integer", "minimum": 0, "maximum": 120},
        "rig": {"enum": ["brig", "sloop"]},
        "crew": {"type": "array", "items": {"$ref": "#/$defs/Sailor"}, "minItems": 1},
        "at_sea": {"type": "boolean"},
        "speed": {"type": "number"},
        "port": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
    "required": ["name", "guns", "rig", "crew", "at_sea", "speed", "port"],
    "$defs": {"Sailor": {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}},
}


@pytest.mark.parametrize("seed", range(8))
def test_random_scores_give_valid_json_in_one_form(tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    text = tokenizer.decode(write(json_schema_processor(tokenizer, SCHEMA, n_vocab=WIDTH), noise(seed, end=3.0)))
    ship = json.loads(text)
    assert set(ship) == set(SCHEMA["required"])
    assert 0 <= ship["guns"] <= 120
    assert ship["rig"] in ("brig", "sloop")
    assert all(set(sailor) == {"age"} for sailor in ship["crew"])
    assert text.startswith('{"name": "')


def test_a_wish_to_end_closes_the_json(tokenizer: PreTrainedTokenizerFast) -> None:
    def at_once(_: int) -> torch.Tensor:
        scores = torch.zeros(1, WIDTH)
        scores[0, END] = 20.0
        return scores

    ship = json.loads(
        tokenizer.decode(write(json_schema_processor(tokenizer, SCHEMA, n_vocab=WIDTH), at_once, limit=200))
    )
    assert (ship["name"], len(ship["crew"])) == ("", 1)


def test_an_answer_may_end_exactly_when_the_grammar_accepts(tokenizer: PreTrainedTokenizerFast) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    processor = json_schema_processor(tokenizer, schema, n_vocab=WIDTH, eos_token_ids=[END, OTHER_END])
    ids = tokenizer.encode('{"n": 12}', add_special_tokens=False)
    for n in range(len(ids) + 1):
        masked = processor(torch.tensor([ids[:n]], dtype=torch.long), torch.zeros(1, WIDTH))[0]
        allowed = masked.isfinite()
        assert bool(allowed[END]) == bool(allowed[OTHER_END]) == (n == len(ids))
        assert n == len(ids) or bool(allowed[ids[n]])
        assert not allowed[len(tokenizer) :].any()
    assert set(allowed.nonzero().flatten().tolist()) == {END, OTHER_END}


def test_an_earlier_filter_that_ruled_everything_out_does_no_harm(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = json_schema_processor(tokenizer, {"type": "boolean"}, n_vocab=WIDTH)
    masked = processor(torch.empty(1, 0, dtype=torch.long), torch.full((1, WIDTH), -torch.inf))
    allowed = masked[0].isfinite().nonzero().flatten().tolist()
    assert sorted(tokenizer.decode([token]) for token in allowed) == ["f", "t"]


def test_a_token_against_the_grammar_is_noticed(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = json_schema_processor(tokenizer, {"type": "boolean"}, n_vocab=WIDTH)
    with pytest.raises(RuntimeError, match="against the grammar"):
        processor(torch.tensor([[5]]), torch.zeros(1, WIDTH))


def test_objects_are_closed_unless_asked_otherwise(tokenizer: PreTrainedTokenizerFast) -> None:
    schema = {"type": "object", "properties": {"properties": {"type": "integer"}}}
    ids = tokenizer.encode('{"', add_special_tokens=False)
    for open_objects, letters in ((False, {"p"}), (True, {"p", "x", "é"[:1]})):
        processor = json_schema_processor(tokenizer, schema, n_vocab=WIDTH, open_objects=open_objects)
        allowed = processor(torch.tensor([ids]), torch.zeros(1, WIDTH))[0].isfinite()
        able = {letter for letter in "px" if allowed[tokenizer.encode(letter, add_special_tokens=False)[0]]}
        assert able == letters & {"p", "x"}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "strin"}, "strin"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"title": "Odd", "type": "string", "pattern": r"(a)\1"}, "'Odd'.*backreferences"),
        ({"type": "string", "pattern": "(?=a"}, "grammar"),
    ],
)
def test_schemas_that_cannot_be_compiled(
    tokenizer: PreTrainedTokenizerFast, schema: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidRequestError, match=words) as raised:
        json_schema_processor(tokenizer, schema, n_vocab=WIDTH)
    assert not any(word in str(raised.value) for word in ("%json", "start:", "x-guidance", "at 1("))
    tool = {"type": "function", "function": {"name": "odd", "parameters": schema}}
    with pytest.raises(InvalidRequestError, match=words.removeprefix("'Odd'")) as raised:
        tool_call_processor(tokenizer, [tool], n_vocab=WIDTH)
    assert "%json" not in str(raised.value)


def accepts(processor: GrammarProcessor, tokenizer: PreTrainedTokenizerFast, value: Any) -> bool:
    """Whether an answer may be this value and end there."""
    ids = tokenizer.encode(json.dumps(value), add_special_tokens=False)
    for n in range(len(ids) + 1):
        masked = processor(torch.tensor([ids[:n]], dtype=torch.long), torch.zeros(1, WIDTH))[0]
        if not masked[ids[n] if n < len(ids) else END].isfinite():
            return False
    return True


@pytest.mark.parametrize(
    ("schema", "taken", "refused"),
    [
        ({"type": "string", "format": "password"}, ["secret"], [1]),
        ({"type": "string", "format": "path"}, ["/a/b"], [1]),
        ({"type": "string", "format": "date"}, ["1851-10-18"], ["soon"]),
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, [[1, 2]], [["a"]]),
        ({"type": "array", "items": {"type": "integer"}, "contains": {"const": 3}}, [[3]], [["a"]]),
        ({"type": "string", "not": {"const": "a"}}, ["b"], [1]),
        ({"type": "integer", "if": {"minimum": 3}, "then": {"multipleOf": 2}}, [1, 4], ["a"]),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, [1, 1.5], ["a"]),
        ({"type": "string", "pattern": r"^\bfoo\b$"}, ["foo"], ["food"]),
        ({"type": "string", "pattern": r"^(?=.*(a|\))b)(?<![)(])[\])(]x$"}, ["(x"], ["x", "ax"]),
        ({"type": "object", "patternProperties": {r"^a\b": {"type": "integer"}}}, [{"a": 1}], [{"a": "b"}]),
        (
            {
                "$defs": {"Rig": {"enum": ["brig", "sloop"]}},
                "type": "object",
                "propertyNames": {"$ref": "#/$defs/Rig"},
                "additionalProperties": {"type": "integer"},
            },
            [{"brig": 1, "sloop": 2}, {"sloop": 3}, {}],
            [{"ship": 1}, {"brig": "a"}],
        ),
        ({"type": "object", "propertyNames": {"const": "a"}}, [{"a": "b"}], [{"b": "b"}]),
        ({"type": "object", "propertyNames": {"minLength": 3}}, [{"abc": 1}], [[]]),
        (
            {"type": "object", "properties": {"pattern": {"type": "integer"}, "propertyNames": {"type": "integer"}}},
            [{"pattern": 1, "propertyNames": 2}],
            [{"additionalProperties": 1}],
        ),
    ],
)
def test_what_a_grammar_cannot_say_is_left_to_validation(
    tokenizer: PreTrainedTokenizerFast, schema: dict[str, Any], taken: list[Any], refused: list[Any]
) -> None:
    for value in (*taken, *refused):
        processor = json_schema_processor(tokenizer, schema, n_vocab=WIDTH)
        assert accepts(processor, tokenizer, value) == (value in taken), value


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        eos_token_id = 0

    with pytest.raises(UnsupportedModelError, match="fast tokenizer"):
        json_schema_processor(Slow(), {"type": "boolean"}, n_vocab=WIDTH)


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("look", at={"type": "string"}), tool('Ünï"k', n={"type": "integer"}), tool("rest")]


@pytest.mark.parametrize("call_format", [HERMES, LLAMA3], ids=["hermes", "llama3"])
@pytest.mark.parametrize("seed", range(4))
def test_forced_calls_are_read_back(tokenizer: PreTrainedTokenizerFast, call_format: Any, seed: int) -> None:
    processor = tool_call_processor(tokenizer, TOOLS, n_vocab=WIDTH, call_format=call_format)
    text = tokenizer.decode(write(processor, noise(seed, end=3.0)))
    splitter = CallSplitter([entry["function"]["name"] for entry in TOOLS])
    (call,) = [*splitter.feed(text), *splitter.finish()]
    assert isinstance(call, ToolCall)
    assert call.arguments is not None
    assert set(call.arguments) == {"look": {"at"}, 'Ünï"k': {"n"}, "rest": set()}[call.name]


def test_one_tool_by_name_and_several_calls(tokenizer: PreTrainedTokenizerFast) -> None:
    for seed in range(3):
        processor = tool_call_processor(tokenizer, TOOLS, n_vocab=WIDTH, names=["rest"])
        assert '"rest"' in tokenizer.decode(write(processor, noise(seed)))
    call = '<tool_call>\n{"name": "rest", "arguments": {}}\n</tool_call>'
    ids = tokenizer.encode(f"{call}\n{call}", add_special_tokens=False)
    processor = tool_call_processor(tokenizer, TOOLS, n_vocab=WIDTH, parallel=True)
    assert processor(torch.tensor([ids]), torch.zeros(1, WIDTH))[0].isfinite()[END]


def test_calls_or_an_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ('{"n": 1}', '<tool_call>\n{"name": "rest", "arguments": {}}\n</tool_call>'):
        schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
        processor = tool_call_processor(tokenizer, TOOLS, n_vocab=WIDTH, answer_schema=schema)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert processor(torch.tensor([ids]), torch.zeros(1, WIDTH))[0].isfinite()[END]


def test_tools_that_do_not_exist(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InvalidRequestError, match="no tool 'sleep'"):
        tool_call_processor(tokenizer, TOOLS, n_vocab=WIDTH, names=["sleep"])


def test_processors_share_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    first, second = (json_schema_processor(tokenizer, SCHEMA, n_vocab=WIDTH) for _ in range(2))
    expected = write(first, noise(1, end=3.0))
    assert write(second, noise(1, end=3.0)) == expected


@pytest.mark.parametrize("opening", ["[Note] Look.\n", "{thinking} ", "[1] ", '{"a": 1} '])
def test_calls_behind_brackets_are_found(opening: str) -> None:
    splitter = CallSplitter(["rest"])
    parts = [*splitter.feed(opening + '<tool_call>{"name": "rest"}</tool_call>'), *splitter.finish()]
    assert parts == [opening.rstrip(), ToolCall("rest", {}, "{}")]


def test_bare_calls_one_after_the_other() -> None:
    splitter = CallSplitter(["rest", "look"])
    text = '{"name": "rest"}\n{"name": "look", "parameters": {"at": "x"}}; {"name": "rest"}'
    assert [call.name for call in [*splitter.feed(text), *splitter.finish()]] == ["rest", "look", "rest"]


@pytest.mark.parametrize("text", ["[1] It says so.", "{Ann} it was", "[[x]] and"])
def test_text_that_begins_with_a_bracket_streams(text: str) -> None:
    splitter = CallSplitter(["rest"])
    pieces = [piece for letter in text for piece in splitter.feed(letter)]
    assert len(pieces) > len(text) // 2


def test_random_pieces_never_change_what_is_found() -> None:
    rng = random.Random(0)
    texts = [
        'Well.\n<tool_call>{"name": "look", "arguments": {"at": "</tool_"}}</tool_call> then '
        '<tool_call>\n{"name": "rest"}\n</tool_call>\n',
        '{"name": "rest", "parameters": {}}',
        '[{"name": "rest"}, {"name": "look", "arguments": "{\\"at\\": \\"x\\"}"}]',
        "a <tool_cal",
        '[Note] Look.\n<tool_call>{"name": "rest"}</tool_call>',
        '{thinking} <tool_call>{"name": "rest"}</tool_call>',
        '{"name": "rest"}\n{"name": "look", "parameters": {"at": "x"}}; {"name": "rest"}',
        "<tool_call>{oops</tool_call> after",
        "  plain  ",
        "",
    ]
    for text in texts:
        whole = CallSplitter(["look", "rest"])
        expected = merge([*whole.feed(text), *whole.finish()])
        for _ in range(50):
            splitter, parts, rest = CallSplitter(["look", "rest"]), [], text
            while rest:
                n = rng.randint(1, 9)
                parts += splitter.feed(rest[:n])
                rest = rest[n:]
            assert merge([*parts, *splitter.finish()]) == expected


def merge(parts: list[str | ToolCall]) -> list[str | ToolCall]:
    merged: list[str | ToolCall] = []
    for part in parts:
        if merged and isinstance(part, str) and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    return merged


def test_what_is_not_installed_is_named(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'qllm-integrations\[grammar\]'"):
        json_schema_processor(tokenizer, {"type": "object"}, n_vocab=WIDTH)
