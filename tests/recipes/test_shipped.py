"""The checkpoints that ship: they load, speak the layout they were trained on, and answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from qllm_bench.questions.data import make_case
from recipes.evaluate import MODELS, in_window, prompt_ids, story_prose

NAMES = ("reader", "reader-plain")


@pytest.fixture(params=NAMES)
def folder(request: pytest.FixtureRequest) -> Path:
    return MODELS / str(request.param)


def test_is_small_and_complete(folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sum(sizes.values()) < 12e6
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(sizes)
    assert {"tokenizer_config.json", "README.md"} <= set(sizes)


@pytest.mark.parametrize("text", ["Kargath 12", "two  spaces\n\nnew\ttab ", "héllo — “quotes” 🙂", '{"a-b": "0f3e"}'])
def test_tokenizer_round_trip(folder: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_an_answer_may_begin_like_a_word_inside_a_sentence(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(" surgeon").ids
    assert tokenizer.encode("Ann is a surgeon.").ids[-len(ids) - 1 : -1] == ids
    assert tokenizer.decode(ids) == "surgeon"


def test_names_and_numbers_have_the_same_tokens_everywhere(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for word in ("Mirelda", "48213", "QX"):
        alone = tokenizer.encode(word).ids
        assert tokenizer.encode(f"It is {word}.").ids[-len(alone) - 1 : -1] == alone
        assert tokenizer.encode(f'"{word}"').ids[1:-1] == alone


def test_chat_template_is_the_layout_of_training(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": " s "}, {"role": "user", "content": "Q\n"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|><|system|> s <|end|><|user|>Q\n<|end|><|assistant|>"


def test_prompt_holds_the_question_where_the_layout_says(folder: Path) -> None:
    import random

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    case = make_case(random.Random(0), story_prose()[0], 500, "magic")
    once = tokenizer.decode(prompt_ids(tokenizer, case, "read_once"))
    aware = tokenizer.decode(prompt_ids(tokenizer, case, "query_aware"))
    body = f"{case.document}\n\n{case.question}<|end|><|assistant|>"
    assert once == f"<|bos|><|user|>{body}"
    assert aware == f"<|bos|><|user|>{case.question}\n\n{body}"


def test_answers_in_the_window(folder: Path) -> None:
    report = in_window(folder, story_prose(), 384, 5, "canonical", "query_aware", seed=1)
    assert report["scores"]["all"]["share"] >= 0.65, report["misses"]
