"""Reading and writing speed of models of random weights, built on the device from their configurations."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, PreTrainedModel, Qwen2Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from benchmarks.gpu.timing import synchronize
from qllm_runtime.config import MemoryConfig
from qllm_runtime.errors import OutOfMemoryError
from qllm_runtime.inference import Inference

STEPS = 24
CONFIGS: dict[str, Callable[[], Any]] = {
    "Llama-3-8B": lambda: LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "Qwen2.5-1.5B": lambda: Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, max_position_embeddings=32768, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
}  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 128, "max_position_embeddings": 256}  # fmt: skip


def build(name: str, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> PreTrainedModel:
    """The model of `CONFIGS[name]`, random weights."""
    config = CONFIGS[name]()
    if tiny:
        config = type(config)(**{**SMALL, "rope_parameters": config.rope_parameters})
    with torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def multiplications(model: PreTrainedModel) -> int:
    """Floating-point operations per token of the linear layers, without the output layer."""
    weights: dict[str, torch.Tensor] = dict(model.get_decoder().named_parameters())
    return 2 * sum(weight.numel() for name, weight in weights.items() if "embed" not in name)


def with_memory(model: PreTrainedModel, length: int) -> dict[str, Any]:
    """Prefill and decode through our memory."""
    config = MemoryConfig.for_model(model.config.max_position_embeddings)
    inference = Inference(model)
    ids = torch.randint(0, model.config.vocab_size, (length,))

    def prefill() -> Callable[[], torch.Tensor]:
        cache = inference.cache(config, reserve=length + STEPS)
        inference.read(cache, [ids[:-1]], config)
        return lambda: inference.step(cache, [1])

    with inference.request():
        return _measure(model, length, prefill)


@torch.inference_mode()
def with_sdpa(model: PreTrainedModel, length: int) -> dict[str, Any]:
    """Prefill and decode with stock full attention."""
    model.set_attn_implementation("sdpa")
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=model.device)

    def forward(part: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits

    def prefill() -> Callable[[], torch.Tensor]:
        cache = DynamicCache(config=model.config)
        for part in torch.split(ids[:, :-1], 4096, dim=1):
            forward(part, cache)
        return lambda: forward(ids[:, -1:], cache)

    return _measure(model, length, prefill)


def _measure(model: PreTrainedModel, length: int, prefill: Callable[[], Callable[[], torch.Tensor]]) -> dict[str, Any]:
    device = model.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        synchronize(device)
        began = time.perf_counter()
        step = prefill()
        synchronize(device)
        spent = time.perf_counter() - began
        times = []
        for _ in range(STEPS):
            began = time.perf_counter()
            step()
            synchronize(device)
            times.append(time.perf_counter() - began)
    except (OutOfMemoryError, torch.OutOfMemoryError) as error:
        return {"length": length, "failed": str(error).splitlines()[0]}
    return {
        "length": length,
        "prefill_s": spent,
        "prefill_tokens_s": length / spent,
        "linear_tflop_s": multiplications(model) * length / spent / 1e12,
        "decode_ms": 1000 * sorted(times)[STEPS // 2],
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }
