"""Reading and writing speed of models of random weights, built on the device from their configurations."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, PreTrainedModel, Qwen2Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from benchmarks.gpu.operations import Rows
from benchmarks.gpu.timing import synchronize
from qllm_kernels import dispatch
from qllm_runtime.cache import MemoryCache
from qllm_runtime.config import CANDIDATES, MemoryConfig
from qllm_runtime.errors import OutOfMemoryError
from qllm_runtime.inference import Inference
from qllm_runtime.memory.block import BlockMemory
from qllm_runtime.memory.offload import OffloadedStore

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


def warm_up_length(model: PreTrainedModel, length: int) -> int:
    """Tokens whose reading compiles what reading `length` of them runs: two chunks, and a last one as long as there."""
    config = MemoryConfig.for_model(model.config.max_position_embeddings)
    chunk = config.chunk_size // config.exec_block_size * config.exec_block_size
    return min(length, length % chunk + 2 * chunk)


def warmed(
    measure: Callable[[PreTrainedModel, int], dict[str, Any]], model: PreTrainedModel, length: int
) -> dict[str, Any]:
    """A row of `measure` after a reading that compiles what it runs."""
    measure(model, warm_up_length(model, length))
    return measure(model, length)


def with_memory(model: PreTrainedModel, length: int, *, question: int = 0, **settings: Any) -> dict[str, Any]:
    """Prefill and decode through our memory, steps as CUDA graphs and launch by launch; the first tokens may be a question."""
    config = MemoryConfig.for_model(model.config.max_position_embeddings, **settings)
    inference = Inference(model)
    ids = torch.randint(0, model.config.vocab_size, (length,))
    row: dict[str, Any] = {}

    def prefill() -> Steps:
        cache = inference.cache(config, reserve=length + 2 * STEPS)
        for memory in cache.memories() if question else ():
            memory.set_query(0, question)
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
    """`with_memory` beside a question, blocks in the host's memory: of those wanted in steps, the share found on the device.

    A first reading of the same length compiles, and pins that memory, which torch then keeps: "first_prefill_s".
    """
    held = 8 * MemoryConfig.for_model(model.config.max_position_embeddings).topk
    first, row = (
        with_memory(model, length, question=QUESTION, device_blocks=min(held, 1024), **settings) for _ in range(2)
    )
    return {**row, "question": QUESTION, "first_prefill_s": first.get("prefill_s")}


class Agreement:
    """Logits of steps after a text and a question, by each way of computing them.

    Args:
        model: The model.
        length: Tokens of the text.
    """

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        self._model, self._length = model, length
        self._config = MemoryConfig.for_model(model.config.max_position_embeddings)
        self._ids = torch.randint(0, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))

    def rows(self) -> Rows:
        """What compares each way: root mean square of the difference over that of the logits, share of the same best tokens.

        Steps launch by launch are compared with the torch functions, whose rounding may choose other blocks; the others with
        steps launch by launch, whose kernels are the same ("ok": no more than 1 % apart, but for blocks kept as fp8; and steps
        that were to be recorded were).
        """
        slots = min(1024, (CANDIDATES if self._config.every_key else 2) * self._config.topk)
        ways: dict[str, dict[str, Any]] = {
            "launches": {"kernels": "torch"},
            "offloaded": {"device_blocks": slots},
            "offloaded_fp8": {"device_blocks": slots, "offload_dtype": "fp8"},
            "graph": {"graph": True},
            "offloaded_graph": {"device_blocks": slots, "graph": True},
        }
        return {name: functools.partial(self._compare, name, way) for name, way in ways.items()}

    @functools.cached_property
    def _launches(self) -> torch.Tensor:
        return self._logits()

    def _compare(self, name: str, way: dict[str, Any]) -> dict[str, Any]:
        launches, found = self._launches, self._logits(**way)
        _free(self._model.device)
        apart = float((found - launches).square().mean().sqrt() / launches.square().mean().sqrt())
        alike = float((found.argmax(-1) == launches.argmax(-1)).float().mean())
        sound = apart == apart and (name in ("launches", "offloaded_fp8") or apart < 0.01)
        return {"apart": apart, "same_token": alike, "ok": sound}

    def _logits(self, *, graph: bool = False, kernels: str | None = None, **settings: Any) -> torch.Tensor:
        length, config = self._length, self._config.replace(**settings)
        with _kernels(kernels):
            inference = Inference(self._model)
            inference.captures = graph
            with inference.request():
                cache = inference.cache(config, reserve=length + STEPS)
                for memory in cache.memories():
                    memory.set_query(length - QUESTION, length)
                inference.read(cache, [self._ids], config)
                steps = [inference.step(cache, [int(token)])[0].float().cpu() for token in self._ids[:STEPS]]
                if graph and self._model.device.type == "cuda" and not inference.records(cache):
                    raise RuntimeError("steps ran launch by launch, without a CUDA graph")
        return torch.stack(steps)


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
    stores = [memory._far_context.store for memory in cache.memories() if isinstance(memory, BlockMemory)]
    tallies = [store.tally() for store in stores if isinstance(store, OffloadedStore)]
    return sum(asked for asked, _ in tallies), sum(fetched for _, fetched in tallies)


@torch.inference_mode()
def with_sdpa(model: PreTrainedModel, length: int) -> dict[str, Any]:
    """Prefill and decode with stock full attention, the prompt in one call where that fits.

    Later parts of a prompt in several calls have a mask, which keeps sdpa from its fastest kernels.
    """
    model.set_attn_implementation("sdpa")
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=model.device)

    def forward(part: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits

    def prefill(size: int) -> Steps:
        cache = DynamicCache(config=model.config)
        for part in torch.split(ids[:, :-1], size, dim=1):
            forward(part, cache)
        return {"decode_ms": lambda: forward(ids[:, -1:], cache)}, lambda: None

    for size in (length, 4096):
        row = _measure(model, length, functools.partial(prefill, size)) | {"tokens_per_call": min(size, length)}
        if "failed" not in row:
            break
    return row


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
