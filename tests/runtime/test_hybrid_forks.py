"""Forks, rows of a batch and questions of what was read, where layers carry states, share keys or make them from latents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import SUPPORTED, WIDE, assert_same, build, model_of, stock, text
from tiny import MEMORY, tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText

from qllm_runtime.engine import QLLM
from qllm_runtime.inference import Inference
from qllm_runtime.support import check_support

RECURRENT = (
    "qwen3_next",
    "qwen3_5",
    "lfm2",
    "falcon_h1",
    "granitemoehybrid",
    "nemotron_h",
    "olmo_hybrid",
    "kimi_linear",
)


@pytest.mark.parametrize("name", [*RECURRENT, "llama", "deepseek_v3", "gemma4"])
def test_forks_go_on_by_themselves(name: str) -> None:
    """Each as though nothing else had been read: tokens in several, single tokens, and again several."""
    model = model_of(name)
    inference, ids = Inference.of(model), text(model)
    start, *ends = ids[0, :50], ids[0, 50:80], ids[0, 70:100]
    outs: list[tuple[torch.Tensor, torch.Tensor]] = []  # what was read, and the logits behind it
    with inference.request():
        cache = inference.cache(WIDE)
        inference.read(cache, [start], WIDE)
        children = [cache.fork(), cache.fork()]
        for begin in (0, 15):  # in turns
            for child, end in zip(children, ends, strict=True):
                inference.read(child, [end[begin : begin + 10]], WIDE)
                for token in end[begin + 10 : begin + 14]:
                    inference.step(child, [int(token)])
                outs.append((torch.cat((start, end[: begin + 15])), inference.step(child, [int(end[begin + 14])])))
        inference.read(cache, [ids[0, 50:60]], WIDE)
        outs.append((ids[0, :61], inference.step(cache, [int(ids[0, 60])])))
    for read, logits in outs:
        assert_same(logits, stock(model, read[None])[:, -1])


@pytest.mark.parametrize("name", [*RECURRENT, "deepseek_v3", "gemma3n"])
def test_rows_of_several_lengths(name: str) -> None:
    """No row sees the padding of another one, nor that another one is finished, also in a fork."""
    model = model_of(name)
    inference, ids = Inference.of(model), text(model)
    rows = [ids[0, :10], ids[0, 10:90], ids[0, 40:77]]
    with inference.request():
        cache = inference.cache(WIDE, rows=3)
        inference.read(cache, [row[:-4] for row in rows], WIDE)
        inference.step(cache, [int(row[-4]) for row in rows])
        cache = cache.fork()
        inference.step(cache, [int(row[-3]) for row in rows])
        inference.step(cache, [None if i == 1 else int(row[-2]) for i, row in enumerate(rows)])
        logits = inference.step(cache, [None if i == 1 else int(row[-1]) for i, row in enumerate(rows)])
    for i in (0, 2):
        assert_same(logits[i], stock(model, rows[i][None])[0, -1])


def test_a_model_that_also_sees_images_reads_texts(tmp_path: Path) -> None:
    """Loaded as what it is, with positions of several axes."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab_size": 264,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    config = AutoConfig.for_model(
        "qwen2_5_vl",
        text_config={**sizes, "num_key_value_heads": 2, "rope_parameters": rope, "eos_token_id": 1, "bos_token_id": 0},
        vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64},
    )
    support = check_support(config)
    assert support.ok, support.reason
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    llm = QLLM.from_pretrained(tmp_path, memory=WIDE, device="cpu")
    model, ids = llm.model, 6 + torch.randperm(250, generator=torch.Generator().manual_seed(1))[None, :100]
    rows = [ids[0, :30], ids[0, 20:]]
    inference = Inference.of(model)
    with inference.request():
        cache = inference.cache(WIDE, rows=2)
        inference.read(cache, [row[:-1] for row in rows], WIDE)
        both = inference.step(cache, [int(row[-1]) for row in rows])
    for row, logits in zip(rows, both, strict=True):
        assert_same(logits, stock(model, row[None])[0, -1])
    answer = llm.ask("Where is the key?", documents="The key is in the drawer. " * 20, max_tokens=4)
    assert answer.usage.completion_tokens


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2", "deepseek_v3", "gemma4"])
def test_documents_are_read_once_and_asked_often(name: str) -> None:
    kind, settings = SUPPORTED[name]
    llm = QLLM(
        build(kind, {**settings, "vocab_size": 264, "vocab_size_per_layer_input": 264}), tokenizer(), memory=MEMORY
    )
    book = "The river is wide. The key of the chapel is in the drawer. Boats pass at dawn. " * 8
    memory = llm.read(book)
    for question in ("Where is the key?", "What passes at dawn?"):
        answer, at_once = (
            llm.ask(question, documents=documents, max_tokens=6, reread=False) for documents in (memory, book)
        )
        assert answer.text == at_once.text
        assert answer.usage.cache_read_tokens
        assert [(s.start, s.end) for s in answer.sources] == [(s.start, s.end) for s in at_once.sources]
        assert all(source.text == book[source.start : source.end] for source in answer.sources)
        assert answer.sources
        assert (
            llm.ask(question, documents=memory, max_tokens=6).text
            == llm.ask(question, documents=book, max_tokens=6).text
        )
