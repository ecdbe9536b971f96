"""Faithful mode against numbers of the published research code: tokens, choices of blocks, tensors.

Set QLLM_PARITY_DIR to run the cases of another folder (see data/README.md for its form).
"""

import json
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qllm_runtime.config import MemoryConfig
from qllm_runtime.engine import QLLM
from qllm_runtime.inference import Inference
from qllm_runtime.memory.base import LayerMemory
from qllm_runtime.memory.published import PublishedMemory
from qllm_runtime.memory.record import Lookup

FOLDER = Path(os.environ.get("QLLM_PARITY_DIR") or Path(__file__).parent / "data")
CASES = sorted(path.stem for path in FOLDER.glob("case_*.json"))
TOLERANCE = 2e-4


@cache
def load_model(name: str, theta: float | None) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(FOLDER / name)
    if theta is not None:
        config.rope_parameters["rope_theta"] = theta
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(FOLDER / name, config=config, dtype=torch.float32)
    return model.eval()


@dataclass
class Run:
    """One case driven through the seam, beside what the published code gave."""

    case: dict[str, Any]
    published: dict[str, torch.Tensor]
    config: MemoryConfig
    model: PreTrainedModel
    at_prompt_end: list[dict[str, torch.Tensor | None]] = field(default_factory=list)
    lookups: list[list[Lookup]] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    attention: list[list[torch.Tensor]] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def question(self) -> tuple[int, int] | None:
        span = self.case["question_span"]
        return None if span is None else (span[0], span[1])

    def check(self, name: str, actual: torch.Tensor | None) -> None:
        """`actual` equals the published tensor, which may be absent."""
        expected = self.published.get(name)
        if expected is None or expected.numel() == 0:
            assert actual is None or actual.numel() == 0, f"{name} exists, the published code has none"
            return
        assert actual is not None, f"{name} is missing"
        # scores are sums of products that nothing normalises; in float32 those of a thousand are known to a hundredth
        rtol = 1e-5 if name == "block_scores" else 0
        torch.testing.assert_close(
            actual.reshape(expected.shape), expected, atol=TOLERANCE, rtol=rtol, msg=lambda m: f"{name}: {m}"
        )


def settings(case: dict[str, Any], folder: Path) -> MemoryConfig:
    """The case's configuration, by way of a published configuration file."""
    file = folder / "published.yaml"
    model = {"type": case["attn_type"], **case["attn_kwargs"]}
    file.write_text(yaml.safe_dump({"model": model, "chunk_size": case["chunk_size"]}))
    return MemoryConfig.from_yaml(file, faithful=True)


def drive(run: Run, inference: Inference) -> None:
    """Prompt in calls of chunk_size, its last token alone, then greedy decoding."""
    cache = inference.cache(run.config)
    for memory, lookups in zip(cache.memories(), run.lookups, strict=True):
        memory.on_lookup = lookups.append
        if run.question is not None:
            memory.set_query(*run.question)
    ids = run.case["input_ids"]
    if len(ids) > 1:
        inference.read(cache, [torch.tensor(ids[:-1])], run.config)
    run.logits.append(inference.step(cache, ids[-1:])[0])
    for memory, lookups in zip(cache.memories(), run.lookups, strict=True):
        run.at_prompt_end.append(state_of(memory) | {"block_scores": lookups[-1].scores if lookups else None})
    for _ in run.case["greedy_tokens"]:
        run.tokens.append(int(run.logits[-1].argmax()))
        run.logits.append(inference.step(cache, run.tokens[-1:])[0])


def state_of(memory: LayerMemory) -> dict[str, torch.Tensor | None]:
    if not isinstance(memory, PublishedMemory):
        return {}
    return {"block_k": memory.summaries, "question": memory.query_vector, "rem_score": memory.remainder_scores}


@pytest.fixture(scope="module", params=CASES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    case = json.loads((FOLDER / f"{request.param}.json").read_text())
    model = load_model(case["model"], case["attn_kwargs"].get("base"))
    config = settings(case, tmp_path_factory.mktemp("config"))
    run = Run(case, load_file(FOLDER / f"{request.param}.safetensors"), config, model)
    decoder = model.get_decoder()
    run.lookups, run.attention = [[] for _ in decoder.layers], [[] for _ in decoder.layers]
    inference = Inference(model)
    with inference.request():
        hooks = [decoder.norm.register_forward_hook(lambda _, __, out: run.hidden.append(out[0]))]
        for layer, seen in zip(decoder.layers, run.attention, strict=True):
            hooks.append(
                layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0]))
            )
        try:
            drive(run, inference)
        finally:
            for hook in hooks:
                hook.remove()
    return run


def test_there_are_cases() -> None:
    assert CASES, f"no case_*.json in {FOLDER}"


def test_greedy_tokens(run: Run) -> None:
    assert run.tokens == run.case["greedy_tokens"]


def test_generate(run: Run) -> None:
    tokens = QLLM(run.model, memory=run.config).generate(
        run.case["input_ids"], run.question, max_tokens=len(run.tokens)
    )
    assert tokens == [run.case["greedy_tokens"]]


def test_choice_of_blocks(run: Run) -> None:
    keys = ("q_start", "len_q", "n_blocks", "ids")
    for layer, expected in enumerate(run.case["selections"] or []):
        actual = [(each.start, each.length, each.n_blocks, each.ids.tolist()) for each in run.lookups[layer]]
        assert actual == [tuple(each[key] for key in keys) for each in expected], f"layer {layer}"


def test_logits(run: Run) -> None:
    run.check("logits_prompt", run.logits[0])
    run.check("logits_decode", torch.stack(run.logits[1:]))


def test_activations(run: Run) -> None:
    positions = run.case["sample_positions"]
    run.check("attn_out", torch.stack([torch.cat(each)[positions] for each in run.attention]))
    run.check("hidden", torch.cat(run.hidden)[positions])


def test_memory_at_the_end_of_the_prompt(run: Run) -> None:
    for layer, state in enumerate(run.at_prompt_end):
        for name, tensor in state.items():
            run.check(f"{name}.{layer}", tensor)
