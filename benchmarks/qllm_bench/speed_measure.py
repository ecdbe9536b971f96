"""One measurement of speed in a process of its own: ``python -m qllm_bench.speed_measure '<json>'`` prints JSON.

A process per measurement makes peak memory this measurement's own and keeps one policy's caches out of another's way.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from qllm_runtime.config import MemoryConfig
from qllm_runtime.errors import OutOfMemoryError
from qllm_runtime.hooks import is_out_of_memory
from qllm_runtime.inference import Inference
from qllm_runtime.loading import load

QUESTION = 32  # tokens of the second question
_WARM_UP = 3_000  # tokens; compiles kernels and touches every code path
_ROPE = {"rope_type": "default", "rope_theta": 500_000.0}
#: Random weights: speed doesn't depend on what they know.
SHAPES: dict[str, dict[str, Any]] = {
    "random": {
        "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024,
    },
    "random-1b": {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 8192,
        "tie_word_embeddings": True, "rope_parameters": _ROPE,
    },
    "random-8b": {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_parameters": _ROPE,
    },
}  # fmt: skip
#: Memory of the smallest shape, whose trained length means nothing.
SMALL_MEMORY = {"n_init": 64, "n_local": 512, "block_size": 64, "topk": 8, "repr_topk": 64, "exec_block_size": 256}


@dataclass(frozen=True)
class Measurement:
    """What to measure.

    Attributes:
        policy: A policy of the engine, or "sdpa" for stock transformers with its own cache and the same chunks.
        length: Tokens read.
        model: A name of `SHAPES`, or anything that `loading.load` takes.
        device: cpu, cuda or cuda:N.
        dtype: As in `QLLM.from_pretrained`.
        memory: Memory settings, as `MemoryConfig.model_dump` gives them.
        steps: Decode steps; the median counts.
        threads: CPU threads.
    """

    policy: str
    length: int
    model: str
    device: str
    dtype: str
    memory: dict[str, Any]
    steps: int
    threads: int


def build(name: str, device: str, dtype: str) -> PreTrainedModel:
    """A model of random weights, or one by name."""
    if name not in SHAPES:
        return load(name, device=device, dtype=dtype).inference.model
    if dtype == "auto":
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            LlamaConfig(**SHAPES[name]), dtype=getattr(torch, dtype)
        )
    return model.eval()


def trained_length(config: Any) -> int:
    """Tokens a model was trained for, by its configuration; 4,096 where it does not say."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 4096)


def memory_for(name: str, trained_length: int) -> MemoryConfig:
    """Memory settings a model is measured with unless others are given."""
    return MemoryConfig(**SMALL_MEMORY) if name == "random" else MemoryConfig.for_model(trained_length)


def measure(asked: Measurement) -> dict[str, float]:
    """Prefill, decode, second question and memory.

    Returns:
        ``prefill_s``; ``decode_ms`` per token; ``second_ms`` until the first token after a second question of `QUESTION`
        tokens to what was read; ``held_mib`` of keys, values and summaries; ``start_mib`` and ``peak_mib`` of the process
        (CPU) or the device (CUDA) before reading and at most.
    """
    torch.set_num_threads(asked.threads)
    model = build(asked.model, asked.device, asked.dtype)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(0, vocabulary, (asked.length,), generator=torch.Generator().manual_seed(0))
    config = MemoryConfig(**asked.memory)
    run: Callable[[torch.Tensor], dict[str, float]]
    if asked.policy == "sdpa":
        model.set_attn_implementation("sdpa")
        stock = _Stock(model, config.chunk_size)
        run = lambda tokens: stock.run(tokens, asked.steps)  # noqa: E731
    else:
        engine = _Engine(Inference.of(model), config)
        run = lambda tokens: engine.run(tokens, asked.steps)  # noqa: E731
    run(ids[: min(_WARM_UP, asked.length // 2)])
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(model.device)
    start = _peak_mib(model.device)
    return {**run(ids), "start_mib": start, "peak_mib": _peak_mib(model.device)}


class _Engine:
    """Our memory."""

    def __init__(self, inference: Inference, config: MemoryConfig) -> None:
        self._inference, self._config = inference, config
        self._device = inference.model.device

    def run(self, ids: torch.Tensor, steps: int) -> dict[str, float]:
        inference, config = self._inference, self._config
        with inference.request():
            cache = inference.cache(config, reserve=len(ids) + steps)
            prefill = _timed(self._device, lambda: inference.read(cache, [ids[:-1]], config))
            held = cache.nbytes() / 2**20
            decode = _decode(self._device, steps, int(ids[-1]), lambda token: inference.step(cache, [token]))
            fork = cache.fork()

            def ask() -> None:
                inference.read(fork, [ids[: QUESTION - 1]], config)
                inference.step(fork, [int(ids[QUESTION - 1])])

            second = _timed(self._device, ask)
        return {"prefill_s": prefill, "decode_ms": decode, "second_ms": 1000 * second, "held_mib": held}


class _Stock:
    """Transformers as it comes: sdpa and `DynamicCache`."""

    def __init__(self, model: PreTrainedModel, chunk: int) -> None:
        self._model, self._chunk = model, chunk

    @torch.inference_mode()
    def run(self, ids: torch.Tensor, steps: int) -> dict[str, float]:
        model = self._model
        cache = DynamicCache(config=model.config)

        def forward(part: torch.Tensor) -> torch.Tensor:
            part = part[None].to(model.device)
            return model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0]  # type: ignore[no-any-return]

        def read() -> None:
            for part in torch.split(ids[:-1], self._chunk):
                forward(part)

        prefill = _timed(model.device, read)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 2**20
        decode = _decode(model.device, steps, int(ids[-1]), lambda token: forward(torch.tensor([token])))
        second = _timed(model.device, lambda: forward(ids[:QUESTION]))
        return {"prefill_s": prefill, "decode_ms": decode, "second_ms": 1000 * second, "held_mib": held}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of something."""
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _decode(device: torch.device, steps: int, token: int, step: Callable[[int], torch.Tensor]) -> float:
    """Median milliseconds of a decode step; each takes the likeliest token of the one before."""
    times = []
    for _ in range(steps):
        _wait(device)
        began = time.perf_counter()
        token = int(step(token)[0].argmax(-1))
        _wait(device)
        times.append(time.perf_counter() - began)
    return 1000 * sorted(times)[len(times) // 2]


def _peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    if sys.platform == "win32":
        return float("nan")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def main() -> None:
    """Measure what the first argument says."""
    asked = Measurement(**json.loads(sys.argv[1]))
    try:
        result: dict[str, Any] = measure(asked)
    except (OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        result = {"failed": "out of memory"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
