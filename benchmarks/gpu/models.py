"""Reading and writing speed of models of random weights, built on the device from their configurations."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, PreTrainedModel, Qwen2Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from benchmarks.gpu.timing import synchronize
from qllm_kernels import dispatch
from qllm_runtime.config import CANDIDATES, MemoryConfig
from qllm_runtime.errors import OutOfMemoryError
from qllm_runtime.inference import Inference
from qllm_runtime.memory.block import BlockMemory
from qllm_runtime.memory.offload import OffloadedStore
from qllm_runtime.seam import MemoryCache

STEPS = 24
QUESTION = 16
#: kinds of single-token steps by the name of their time, and what is done after all of them
Steps = tuple[dict[str, Callable[[], torch.Tensor]], Callable[[], None]]
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


def with_memory(model: PreTrainedModel, length: int, **settings: Any) -> dict[str, Any]:
    """Prefill and decode through our memory, steps as CUDA graphs and launch by launch."""
    config = MemoryConfig.for_model(model.config.max_position_embeddings, **settings)
    inference = Inference(model)
    ids = torch.randint(0, model.config.vocab_size, (length,))
    row: dict[str, Any] = {}

    def prefill() -> Steps:
        cache = inference.cache(config, reserve=length + 2 * STEPS)
        inference.read(cache, [ids[:-1]], config)
        before = _tally(cache)

        def step(graph: bool) -> torch.Tensor:
            inference.captures = graph
            return inference.step(cache, [1])

        def fetches() -> None:
            if config.device_blocks is not None:
                asked, fetched = (now - then for now, then in zip(_tally(cache), before, strict=True))
                row["found"] = 1 - fetched / max(asked, 1)
                row["fetched_per_step"] = fetched / (2 * STEPS)

        return {"decode_ms": lambda: step(True), "decode_launches_ms": lambda: step(False)}, fetches

    with inference.request():
        return _measure(model, length, prefill) | row


def offloaded(model: PreTrainedModel, length: int, **settings: Any) -> dict[str, Any]:
    """`with_memory` with blocks in the host's memory: of those wanted while decoding, the share found on the device."""
    held = 8 * MemoryConfig.for_model(model.config.max_position_embeddings).topk
    return with_memory(model, length, device_blocks=min(held, 1024), **settings)


@torch.inference_mode()
def agreement(model: PreTrainedModel, length: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Logits of steps behind a text and a question, by each way of computing them.

    Yields:
        Each way and the root mean square of the difference over that of the logits, and the share of steps with the same
        best token: of steps launch by launch against the torch functions, whose rounding may choose other blocks; of the
        others against steps launch by launch, whose kernels are the same ("ok": no more than 1 % apart, but for blocks kept
        as fp8; and steps that were to be recorded were). A way that fails says so.
    """
    config = MemoryConfig.for_model(model.config.max_position_embeddings)
    slots = min(1024, (CANDIDATES if config.every_key else 2) * config.topk)
    ids = torch.randint(0, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))

    def attempt(**way: Any) -> torch.Tensor | str:
        try:
            return logits(**way)
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0]

    def logits(*, graph: bool = False, kernels: str | None = None, **settings: Any) -> torch.Tensor:
        with _kernels(kernels):
            inference = Inference(model)
            inference.captures = graph
            held = config.replace(**settings)
            with inference.request():
                cache = inference.cache(held, reserve=length + STEPS)
                for memory in cache.memories():
                    memory.set_query(length - QUESTION, length)
                inference.read(cache, [ids], held)
                steps = [inference.step(cache, [int(token)])[0].float().cpu() for token in ids[:STEPS]]
                if graph and model.device.type == "cuda" and not inference.records(cache):
                    raise RuntimeError("steps ran launch by launch, without a CUDA graph")
        return torch.stack(steps)

    launches = attempt()
    for name, way in (
        ("launches", {"kernels": "torch"}),
        ("offloaded", {"device_blocks": slots}),
        ("offloaded_fp8", {"device_blocks": slots, "offload_dtype": "fp8"}),
        ("graph", {"graph": True}),
        ("offloaded_graph", {"device_blocks": slots, "graph": True}),
    ):
        found = attempt(**way)
        _free(model.device)
        if isinstance(found, str) or isinstance(launches, str):
            reason = found if isinstance(found, str) else f"nothing to compare with: {launches}"
            yield name, {"failed": reason, "ok": False}
            continue
        apart = float((found - launches).square().mean().sqrt() / launches.square().mean().sqrt())
        alike = float((found.argmax(-1) == launches.argmax(-1)).float().mean())
        sound = apart == apart and (name in ("launches", "offloaded_fp8") or apart < 0.01)
        yield name, {"apart": apart, "same_token": alike, "ok": sound}


def _free(device: torch.device) -> None:
    """Give back what nobody uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _kernels(kind: str | None) -> Iterator[None]:
    """`QLLM_KERNELS` for a while; None: as it is."""
    before = os.environ.get(dispatch.VARIABLE)
    if kind is not None:
        os.environ[dispatch.VARIABLE] = kind
    dispatch.backend.cache_clear()
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(dispatch.VARIABLE, None)
        else:
            os.environ[dispatch.VARIABLE] = before
        dispatch.backend.cache_clear()


def _tally(cache: MemoryCache) -> tuple[int, int]:
    """Blocks that all layers looked up and fetched so far."""
    stores = [memory._outside.store for memory in cache.memories() if isinstance(memory, BlockMemory)]
    tallies = [store.tally() for store in stores if isinstance(store, OffloadedStore)]
    return sum(asked for asked, _ in tallies), sum(fetched for _, fetched in tallies)


@torch.inference_mode()
def with_sdpa(model: PreTrainedModel, length: int) -> dict[str, Any]:
    """Prefill and decode with stock full attention."""
    model.set_attn_implementation("sdpa")
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=model.device)

    def forward(part: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits

    def prefill() -> Steps:
        cache = DynamicCache(config=model.config)
        for part in torch.split(ids[:, :-1], 4096, dim=1):
            forward(part, cache)
        return {"decode_ms": lambda: forward(ids[:, -1:], cache)}, lambda: None

    return _measure(model, length, prefill)


def _measure(model: PreTrainedModel, length: int, prefill: Callable[[], Steps]) -> dict[str, Any]:
    device = model.device
    _free(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        synchronize(device)
        began = time.perf_counter()
        steps, after = prefill()
        synchronize(device)
        spent = time.perf_counter() - began
        decoding = {}
        for name, step in steps.items():
            times = []
            for _ in range(STEPS):
                began = time.perf_counter()
                step()
                synchronize(device)
                times.append(time.perf_counter() - began)
            decoding[name] = 1000 * sorted(times)[STEPS // 2]
        after()
    except (OutOfMemoryError, torch.OutOfMemoryError) as error:
        return {"length": length, "failed": str(error).splitlines()[0]}
    return {
        "length": length,
        "prefill_s": spent,
        "prefill_tokens_s": length / spent,
        "linear_tflop_s": multiplications(model) * length / spent / 1e12,
        **decoding,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }
