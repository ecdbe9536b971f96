"""From tokens to text as they come: whole characters, no trace of a stop string."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm_runtime.decoding import Sampler, TextStream
from qllm_runtime.errors import InvalidConfigError
from qllm_runtime.types import Sampling

TEXTS = st.text(alphabet="abthe é😀👩\u200d\n", max_size=24)
STOPS = st.lists(st.text(alphabet="abthe é😀", min_size=1, max_size=4), max_size=3)


@cache
def tokenizer() -> Any:
    return tiny.tokenizer()


def written(ids: list[int], stops: list[str]) -> tuple[list[str], TextStream]:
    """The pieces of a text as the engine asks for them."""
    stream = TextStream(tokenizer(), stops)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces, stream
    return [*pieces, stream.finish()], stream


def cut(ids: list[int], stops: list[str]) -> str:
    """The text up to the first stop string that is complete."""
    for n in range(1, len(ids) + 1):
        text = tokenizer().decode(ids[:n])
        found = [text.index(stop) for stop in stops if stop in text]
        if found:
            return text[: min(found)]
    return tokenizer().decode(ids)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, stops=STOPS)
def test_what_is_streamed_is_the_text_up_to_a_stop_string(text: str, stops: list[str]) -> None:
    ids = tokenizer()(text, add_special_tokens=False).input_ids
    pieces, stream = written(ids, stops)
    shown = "".join(pieces)
    assert shown == cut(ids, stops)
    assert stream.stopped == any(stop in text for stop in stops)
    assert not any(stop in shown for stop in stops)
    assert not any("\ufffd" in piece for piece in pieces)
    if stream.stopped:
        assert shown.startswith(tokenizer().decode(stream.kept()).rstrip("\ufffd"))
        assert len(stream.kept()) < len(ids)


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=16))
def test_any_bytes_come_out_as_the_tokenizer_decodes_them(data: bytes) -> None:
    """Random models write broken UTF-8."""
    alphabet = sorted(tokenizer().backend_tokenizer.pre_tokenizer.alphabet())
    ids = [len(tiny.SPECIAL) + byte % len(alphabet) for byte in data]
    pieces, _ = written(ids, [])
    assert "".join(pieces) == tokenizer().decode(ids)


def test_characters_are_never_split() -> None:
    ids = tokenizer()("a😀é", add_special_tokens=False).input_ids
    pieces, _ = written(ids, [])
    assert [piece for piece in pieces if piece] == ["a", "😀", "é"]


def test_what_may_become_a_stop_string_is_held_back() -> None:
    stream = TextStream(tokenizer(), ["END."])
    ids = tokenizer()("an ENd, END.", add_special_tokens=False).input_ids
    shown = [stream.push(token) for token in ids]
    assert shown == ["a", "n", " ", "", "", "ENd", ",", " ", "", "", "", ""]
    assert stream.stopped
    assert tokenizer().decode(stream.kept()) == "an ENd, "


def test_special_tokens_are_not_shown() -> None:
    ids = tokenizer()("ab", add_special_tokens=False).input_ids
    assert "".join(written([ids[0], 2, ids[1]], [])[0]) == "ab"


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e-38, 1e-7])
def test_the_smallest_temperatures_take_the_likeliest_token(temperature: float) -> None:
    for scale in (1.0, 1e6):
        logits = scale * torch.tensor([1.0, 3.0, -2.0, float("-inf")])
        sampler = Sampler(Sampling(temperature=temperature, top_p=0.9, top_k=3, min_p=0.1, seed=1))
        assert [sampler.choose(logits) for _ in range(5)] == [1] * 5


def test_settings_of_any_number_type() -> None:
    logits = torch.linspace(-1, 1, 16)
    usual = Sampling(
        temperature=1.5, top_k=3, top_p=0.5, min_p=0.25, repetition_penalty=2.0, seed=3, logprobs=2, max_tokens=4
    )
    other: Any = {
        "temperature": np.float32(1.5),
        "top_k": np.int64(3),
        "top_p": np.float32(0.5),
        "min_p": np.float16(0.25),
        "repetition_penalty": 2,
        "seed": np.uint8(3),
        "logprobs": np.int32(2),
        "max_tokens": np.int64(4),
    }
    expected, sampler = Sampler(usual), Sampler(Sampling(**other))
    for _ in range(8):
        assert sampler.choose(logits) == expected.choose(logits)
        assert sampler.logprob(None) == expected.logprob(None)
    many: Any = np.array([1, 2])
    with pytest.raises(InvalidConfigError, match="top_p"):
        Sampler(Sampling(top_p=many))
