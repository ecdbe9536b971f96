"""Every architecture: stock attention within the window, the definition beyond it, nothing left behind."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import REFUSED, SUPPORTED, WIDE, N, assert_same, build, model_of, stock, text
from definition import Naive, Rotate
from transformers import AutoConfig, PreTrainedModel

from qllm_kernels import rotary
from qllm_runtime.config import MemoryConfig
from qllm_runtime.engine import QLLM
from qllm_runtime.errors import InvalidConfigError, InvalidRequestError, UnsupportedModelError
from qllm_runtime.hooks import decoder_of
from qllm_runtime.inference import Inference
from qllm_runtime.inventory import BUILTIN, MODELS
from qllm_runtime.memory.base import LayerMemory, Scoring
from qllm_runtime.memory.block import BlockMemory
from qllm_runtime.memory.far_context import FarContext
from qllm_runtime.rotary import short_length
from qllm_runtime.seam import examine, installed
from qllm_runtime.support import check_support

NARROW = MemoryConfig(
    n_local=16, exec_block_size=8, chunk_size=24, n_init=4, block_size=4, topk=2, repr_topk=2, query_weight=2.0
)


_LONGROPE: dict[str, object] = {
    "rope_parameters": {
        "rope_theta": 10000.0, "rope_type": "longrope", "original_max_position_embeddings": 64,
        "short_factor": [1.0 + i for i in range(8)], "long_factor": [3.0 + 2 * i for i in range(8)],
    },
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("name", SUPPORTED)
def test_stock_attention_within_the_window(name: str) -> None:
    model = model_of(name)
    inference = Inference(model)
    ids = text(model)
    expected = stock(model, ids)
    cache = inference.cache(WIDE)
    for memory in cache.memories():
        memory.set_query(20, 30)
    with inference.request():
        actual = [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids.split(48, 1)]
    assert_same(torch.cat(actual, 1), expected)
    # chunks without logits, then token by token
    cache = inference.cache(WIDE)
    with inference.request():
        inference.read(cache, [ids[0, :90]], WIDE)
        steps = [inference.step(cache, [int(token)]) for token in ids[0, 90:]]
    assert_same(torch.stack(steps, 1), expected[:, 90:])
    # and greedy decoding of the same prompt
    tokens = QLLM(model, memory=WIDE).generate(ids, (20, 30), max_tokens=8)
    with torch.inference_mode():
        whole = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, N:].tolist()
    end = model.generation_config.eos_token_id
    assert tokens == [whole[: whole.index(end)] if end in whole else whole]


class Recorder(LayerMemory):
    """Notes what goes in and out of a layer's memory."""

    def __init__(self, memory: LayerMemory) -> None:
        self.memory = memory
        self.calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, Scoring, torch.Tensor]] = []

    def append(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        out = self.memory.append(query, key, value, scoring)
        self.n_seen = self.memory.n_seen
        self.calls.append((query.clone(), key.clone(), value.clone(), scoring, out.clone()))
        return out

    def set_query(self, start: int, end: int) -> None:
        self.memory.set_query(start, end)

    def fork(self) -> Recorder:
        raise NotImplementedError

    def nbytes(self) -> int:
        return self.memory.nbytes()


def own_rotation(model: PreTrainedModel, layer: int) -> Rotate:
    """The layer's rotation by way of the stock modules alone, one position at a time."""
    facts = examine(model).layers[layer]
    if not facts.rotary:
        return lambda x, position: x
    apply = sys.modules[type(facts.module).__module__].apply_rotary_pos_emb
    (rotary,) = (part for part in decoder_of(model).children() if type(part).__name__.endswith("RotaryEmbedding"))
    types = getattr(model.config, "layer_types", None)
    several = hasattr(rotary, "layer_types")  # one rotary module for layers of two kinds
    single = "k" not in inspect.signature(apply).parameters
    part_only = model.config.model_type in ("stablelm", "phi", "persimmon") or hasattr(model.config, "qk_rope_head_dim")

    def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
        arguments = (types[layer],) if several else ()
        cos, sin = rotary(x[None], torch.tensor([[position]]), *arguments)
        width = cos.shape[-1] if part_only else x.shape[-1]
        head = x[None, :, None, :width]
        turned = apply(head, cos, sin) if single else apply(head, head, cos, sin)[0]
        return torch.cat((turned[0, :, 0], x[:, width:]), -1)

    return rotate


@pytest.mark.parametrize(
    "name",
    [
        "llama", "llama-yarn", "phi3-longrope", "gemma2", "gemma3", "smollm3", "stablelm", "gpt_oss", "glm4", "qwen3_moe",
        "cohere", "deepseek_v3", "deepseek_v3-yarn", "minicpm3", "gemma4", "qwen3_next", "lfm2", "falcon_h1",
        "granitemoehybrid", "kimi_linear", "zamba2",
    ],
)  # fmt: skip
@pytest.mark.parametrize("selection", ["shared", "per_kv_head"])
def test_definition_beyond_the_window(name: str, selection: str) -> None:
    model = model_of(name)
    inference = Inference(model)
    config = NARROW.replace(selection=selection)
    ids = text(model, 84)
    cache = inference.cache(config)
    for layer in cache.attention:
        layer.rows = [Recorder(layer.rows[0])]
    for memory in cache.memories():
        memory.set_query(27, 31)
    with inference.request():
        inference.read(cache, [ids[0, :76]], config)
        for token in ids[0, 76:]:
            inference.step(cache, [int(token)])
    compared = 0
    for index, recorder in zip(inference.facts.layers, cache.memories(), strict=True):
        if not isinstance(recorder.memory, BlockMemory) or (compared == 2 and index < 3):
            continue
        naive = Naive(config, own_rotation(model, index), recorder.calls[0][3], [(27, 31)])
        # chunks are whole pieces, so reading is one feed
        reading = [torch.cat([call[i] for call in recorder.calls[:-8]], 1) for i in range(3)]
        out = torch.cat([call[4] for call in recorder.calls[:-8]])
        expected = naive.feed(*reading)
        scale = expected.abs().max().item()
        torch.testing.assert_close(out, expected, atol=3e-5 * scale, rtol=0)
        for q, k, v, _, out in recorder.calls[-8:]:
            torch.testing.assert_close(out, naive.feed(q, k, v), atol=3e-5 * scale, rtol=0)
        assert naive.chosen
        compared += 1
    assert compared >= 2


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_frequencies_that_depend_on_the_length(kind: str) -> None:
    """Short texts keep theirs, whatever was read before; long ones have one kind throughout."""
    factors: dict[str, Any] = {"factor": 4.0}
    if kind == "longrope":
        factors = {"short_factor": [1.0 + i for i in range(8)], "long_factor": [3.0 + 2 * i for i in range(8)]}
    rope = {"rope_theta": 10000.0, "rope_type": kind, "original_max_position_embeddings": 64, **factors}
    extra = {"original_max_position_embeddings": 64} if kind == "longrope" else {"max_position_embeddings": 64}
    model = build("phi3" if kind == "longrope" else "llama", {"rope_parameters": rope, **extra})
    assert QLLM(model).memory.n_local <= 64
    ids = text(model)
    short, long = ids[:, :60], ids[:, :100]
    dense = MemoryConfig(policy="full", chunk_size=16)
    small = MemoryConfig(n_init=2, n_local=40, block_size=4, exec_block_size=8, chunk_size=512)

    def ours(part: torch.Tensor, config: MemoryConfig) -> torch.Tensor:
        inference = Inference.of(model)
        with inference.request():
            cache = inference.cache(config, reserve=part.shape[1])
            pieces = part.split(config.chunk_size if config is dense else 20, 1)
            return torch.cat([model(input_ids=x, past_key_values=cache, use_cache=True).logits for x in pieces], 1)

    for _ in range(2):
        assert_same(ours(short, dense), stock(model, short))
        assert_same(ours(short[:, :40], small), stock(model, short[:, :40]))
        if kind == "longrope":
            assert_same(ours(long, dense), stock(model, long))
        else:  # stock attention rotates every token by the length at its time
            with pytest.raises(InvalidConfigError, match="rope_type 'dynamic'"):
                ours(long, dense)


def test_everything_in_view_decides_on_the_frequencies() -> None:
    model = build("phi3", _LONGROPE)
    for n_init, length in ((4, 64), (5, None)):  # with 40 + 4 + 16 more: as long as short texts are, and one longer
        config = MemoryConfig(n_init=n_init, n_local=40, block_size=4, exec_block_size=16)
        (memory, *_) = Inference.of(model).cache(config).memories()
        assert isinstance(memory, BlockMemory)
        assert memory._window._rotation.original_max_position_embeddings == length


def test_the_shortest_length_of_several_kinds_of_layers_counts() -> None:
    kinds = {str(n): {"rope_type": "longrope", "original_max_position_embeddings": n} for n in (64, 32)}
    assert short_length(SimpleNamespace(rope_parameters=kinds)) == 32


def last_logits(model: PreTrainedModel, ids: torch.Tensor, config: MemoryConfig) -> torch.Tensor:
    inference = Inference.of(model)
    with inference.request():
        cache = inference.cache(config, reserve=ids.shape[1])
        inference.read(cache, [ids[0, :-1]], config)
        return inference.step(cache, [int(ids[0, -1])])


def test_a_window_as_long_as_the_training_is_none() -> None:
    """As in Phi-3-mini-128k: its layers get blocks, not a buffer of a quarter of a million tokens."""
    model = build("phi3", {**_LONGROPE, "sliding_window": 262_144})
    ids = text(model)
    cache = Inference.of(model).cache(NARROW)
    assert all(isinstance(memory, BlockMemory) for memory in cache.memories())
    assert_same(last_logits(model, ids[:, :30], NARROW.replace(n_local=40)), stock(model, ids[:, :30])[:, -1])


def test_a_sliding_window_keeps_one_kind_of_frequencies() -> None:
    model = build("phi3", {**_LONGROPE, "sliding_window": 40})
    ids = text(model)
    dense = [last_logits(model, ids, NARROW.replace(policy="full", chunk_size=size)) for size in (8, 24, 512)]
    assert_same(dense[0], dense[1])
    assert_same(dense[0], dense[2])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("phimoe", {}), ("qwen2_moe", {"layer_types": ["sliding_attention", "full_attention"] * 2})],
)
def test_a_window_that_a_model_applies_through_its_mask_only(kind: str, settings: dict[str, object]) -> None:
    sizes = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    model = build(kind, {**sizes, **settings, "sliding_window": 24, "use_sliding_window": True})
    ids = text(model, 90)
    assert_same(last_logits(model, ids, NARROW.replace(policy="full")), stock(model, ids)[:, -1])


def test_a_rotary_embedding_that_was_exchanged_is_noticed() -> None:
    model = build(*SUPPORTED["llama"], seed=5)
    ids = text(model, 40)
    last_logits(model, ids, WIDE)
    model.config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    assert_same(last_logits(model, ids, WIDE), stock(model, ids)[:, -1])


# ---------------------------------------------------------------------- life


def test_what_a_request_finds_it_leaves() -> None:
    rope = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0}
    model = build("llama", {"rope_parameters": rope, "max_position_embeddings": 64})
    ids = text(model)
    before = stock(model, ids)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    config = MemoryConfig(n_init=2, n_local=32, block_size=4, exec_block_size=8, chunk_size=16, topk=2)
    QLLM(model, memory=config).generate(ids, max_tokens=2)
    assert [module.training for module in model.modules()] == modes
    model.eval()
    assert torch.equal(stock(model, ids), before)


def test_faithful_layers_have_no_window_of_their_own() -> None:
    config = NARROW.replace(faithful=True)
    plain, windowed = (build("mistral", {"sliding_window": width}) for width in (None, 40))
    windowed.load_state_dict(plain.state_dict())
    ids = text(plain, 150)
    answers = [QLLM(model, memory=config).generate(ids, (4, 12), max_tokens=6) for model in (plain, windowed)]
    assert answers[0] == answers[1]
    assert answers[0] != QLLM(windowed, memory=NARROW).generate(ids, (4, 12), max_tokens=6)


def test_a_configuration_for_another_rotary_base_is_refused() -> None:
    model = build(*SUPPORTED["llama"])
    ids = text(model, 40)
    own = model.config.rope_parameters["rope_theta"]
    assert QLLM(model, memory=NARROW.replace(rope_theta=own)).generate(ids, max_tokens=1)
    with pytest.raises(InvalidConfigError, match=r"rotary base .* of 300, the model has"):
        QLLM(model, memory=NARROW.replace(rope_theta=300)).generate(ids, max_tokens=1)


def test_a_request_within_a_request_is_refused() -> None:
    model = build(*SUPPORTED["llama"])
    llm, ids = QLLM(model, memory=NARROW), text(model, 40)
    with pytest.raises(InvalidRequestError, match="inside another one"):
        llm.generate(ids, max_tokens=1, progress=lambda done, total: llm.generate(ids, max_tokens=1) and None)
    assert llm.generate(ids, max_tokens=1)


def test_rows_keep_their_own_positions() -> None:
    rope = {
        "rope_theta": 10000.0,
        "rope_type": "default",
        "llama_4_scaling_beta": 1.0,
        "original_max_position_embeddings": 16,
    }
    model = build("ministral3", {"rope_parameters": rope})
    ids, config = text(model), WIDE.replace(policy="full")
    rows = [ids[0, :10], ids[0]]
    inference = Inference.of(model)
    with inference.request():
        cache = inference.cache(config, rows=2, reserve=N)
        inference.read(cache, [row[:-1] for row in rows], config)
        both = inference.step(cache, [int(row[-1]) for row in rows])
    for row, logits in zip(rows, both, strict=True):
        assert_same(logits, stock(model, row[None])[0, -1])


def hooks(model: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def raise_while_installed(model: PreTrainedModel) -> None:
    attention = model.config._attn_implementation
    with installed(model):
        assert model.config._attn_implementation != attention
        raise ZeroDivisionError


@pytest.mark.parametrize("name", SUPPORTED)
def test_nothing_is_left_behind(name: str) -> None:
    model = build(*SUPPORTED[name], seed=3)
    ids = text(model)
    before, attention, n_hooks = stock(model, ids), model.config._attn_implementation, hooks(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    QLLM(model, memory=NARROW).generate(ids, (5, 9), max_tokens=2)
    assert torch.equal(stock(model, ids), before)
    assert (model.config._attn_implementation, hooks(model)) == (attention, n_hooks)
    with pytest.raises(ZeroDivisionError):
        raise_while_installed(model)
    assert (model.config._attn_implementation, hooks(model)) == (attention, n_hooks)
    assert torch.equal(stock(model, ids), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_an_error_inside_the_model_leaves_nothing_behind() -> None:
    model = build(*SUPPORTED["llama"], seed=4)
    ids = text(model)
    before = stock(model, ids)
    llm = QLLM(model, memory=NARROW)
    expected = llm.generate(ids, max_tokens=3)
    forward = model.model.layers[2].mlp.forward

    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("a fuse has blown")

    model.model.layers[2].mlp.forward = broken
    with pytest.raises(RuntimeError, match="fuse"):
        llm.generate(ids, max_tokens=3)
    model.model.layers[2].mlp.forward = forward
    assert torch.equal(stock(model, ids), before)
    assert llm.generate(ids, max_tokens=3) == expected


# ---------------------------------------------------------------------- refusals

REASONS = {
    "gpt2": "positions are part of what they compute with",
    "opt": "positions are part of what they compute with",
    "bloom": "does not route its attention",
    "mamba": "no attention layers",
    "hunyuan": "a weighted norm after the rotation",
    "t5": "encoder-decoder",
    "falcon": "does not route its attention",
    "diffllama": "attends several times in a layer",
    "doge": "gives other logits",
    "jamba": "cannot be read in chunks",
    "recurrent_gemma": "a rotation that each layer makes for itself",
    "llama4": "within fixed chunks",
    "deepseek_v32": "choose or compress the tokens",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_model_and_the_reason(name: str) -> None:
    model = build(*REFUSED[name])
    attention, n_hooks = getattr(model.config, "_attn_implementation", None), hooks(model)
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(UnsupportedModelError, match=REASONS[name]) as refusal:
            QLLM(model, memory=NARROW).generate([[5, 6, 7]], max_tokens=1)
        assert type(model).__name__ in str(refusal.value)
    assert (getattr(model.config, "_attn_implementation", None), hooks(model)) == (attention, n_hooks)


@pytest.mark.parametrize(
    "name",
    [
        "llama-llama3",
        "gemma3",
        "smollm3",
        "gpt_oss",
        "deepseek_v3",
        "gemma4",
        "qwen3_5",
        "lfm2",
        "granitemoehybrid",
        "bamba",
        "zamba2",
        "modernbert-decoder",
    ],
)
def test_support_is_told_from_the_configuration(name: str) -> None:
    support = check_support(model_of(name).config)
    assert support.ok, support.reason


@pytest.mark.parametrize("name", ["gpt2", "bloom", "opt", "hunyuan", "mamba", "t5"])
def test_lack_of_support_is_told_from_the_configuration(name: str) -> None:
    support = check_support(build(*REFUSED[name]).config)
    assert not support.ok
    assert REASONS[name] in support.reason


@pytest.mark.parametrize("name", ["zamba2", "gpt2", "modernbert-decoder"])
def test_support_of_configurations_as_they_come(name: str) -> None:
    """Sizes and special tokens as published, which do not go with those of the small model."""
    support = check_support(AutoConfig.for_model(name))
    assert support.ok == (name != "gpt2")
    assert "cannot be built" not in support.reason


@pytest.mark.parametrize("name", BUILTIN)
def test_support_of_built_in_models(name: str) -> None:
    if not (MODELS / name / "config.json").exists():
        pytest.skip("the trained readers are not here")
    assert check_support(name).ok


@pytest.mark.parametrize("name", SUPPORTED)
def test_tables_rotate_as_the_models_function(name: str) -> None:
    """What kernels rotate by; only frequencies that depend on the length of a text have no table."""
    facts = examine(model_of(name))
    for layer, info in facts.layers.items():
        rotation = facts.rotation(layer, torch.device("cpu"), 64)
        tables = rotation.tables(40, torch.device("cpu"))
        assert (tables is None) == (name == "phi3-longrope")
        if tables is not None:
            x = torch.randn(3, 17, info.head_dim, generator=torch.Generator().manual_seed(0))
            cos, sin, interleaved = tables
            turned = rotary.rotate(x, cos[10:27], sin[10:27], interleaved=interleaved)
            torch.testing.assert_close(turned, rotation.rotate(x, 10), atol=1e-5, rtol=1e-5)
            for policy in ("qllm", "streaming"):
                far_context = FarContext(NARROW.model_copy(update={"policy": policy}), rotation, 0)
                far = far_context.far_angles(x, cos.shape[1], interleaved=interleaved)
                turned = rotary.rotate(x, far[:1], far[1:], interleaved=interleaved)
                torch.testing.assert_close(turned, far_context.far(x), atol=1e-5, rtol=1e-5)
