"""Decode steps recorded once and run again on numbers of the device alone give what the engine gives step by step."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from emulated_graph import EmulatedGraph, NotRecordableError
from torch.utils._python_dispatch import _get_current_dispatch_mode
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from qllm_kernels import dispatch
from qllm_kernels.rotary import Arrival
from qllm_runtime import captured
from qllm_runtime.cache import MemoryCache
from qllm_runtime.config import MemoryConfig
from qllm_runtime.inference import Inference
from qllm_runtime.memory import dense
from qllm_runtime.memory.block import BlockMemory
from qllm_runtime.memory.dense import DenseMemory
from qllm_runtime.memory.offload import OffloadedStore
from qllm_runtime.memory.window import Window

STEPS = 11  # of blocks of 4: two boundaries at least
SIZES = {"n_init": 2, "n_local": 8, "block_size": 4, "topk": 2, "exec_block_size": 8, "chunk_size": 24}
FEW = {"repr_topk": 2}


MODEL: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


def spread(model: PreTrainedModel) -> PreTrainedModel:
    """With weights that make tokens differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim == 2 else 1.0)
    return model.eval()


@pytest.fixture(scope="module")
def inference() -> Inference:
    torch.manual_seed(0)
    return Inference(spread(LlamaForCausalLM(LlamaConfig(**MODEL))))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[EmulatedGraph]]:
    """The engine on Triton, its steps recorded by the emulator."""

    class Graph(EmulatedGraph):
        launched: ClassVar[list[str]] = []

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            everything_on_the_host()

        def replay(self) -> None:
            everything_on_the_host()
            super().replay()

    stores: weakref.WeakSet[OffloadedStore] = weakref.WeakSet()
    append, synchronize = OffloadedStore.append, OffloadedStore.synchronize

    def everything_on_the_host() -> None:
        """No graph can wait for copies that were started outside of it."""
        assert not any(store._awaits for store in stores)

    def noted(store: OffloadedStore, *args: Any) -> None:
        stores.add(store)
        append(store, *args)

    def synchronized(store: OffloadedStore, device: torch.device) -> None:
        assert not (store._awaits and _get_current_dispatch_mode() is not None)
        synchronize(store, device)

    monkeypatch.setattr(OffloadedStore, "append", noted)
    monkeypatch.setattr(OffloadedStore, "synchronize", synchronized)
    monkeypatch.setattr(captured, "recorder", lambda model: Graph)
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    dispatch.backend.cache_clear()
    yield Graph
    monkeypatch.undo()
    dispatch.backend.cache_clear()


Result = tuple[list[torch.Tensor], torch.Tensor, MemoryCache]


def run(
    inference: Inference, config: MemoryConfig, *, question: tuple[int, int] | None = None, fork: int | None = None,
    steps: int = STEPS, weigh: bool = True,
) -> Result:  # fmt: skip
    """Logits of the last steps of a text, their attention mass, and the cache, forked ahead of step `fork`."""
    ids = torch.randint(0, 32, (30 + steps,), generator=torch.Generator().manual_seed(1))
    mass = torch.zeros(len(ids))

    def add(weights: torch.Tensor, positions: torch.Tensor) -> None:
        mass.index_add_(0, positions.reshape(-1), weights.reshape(-1))

    with inference.request():
        cache = inference.cache(config)
        if question is not None:
            for memory in cache.memories():
                memory.set_query(*question)
        inference.read(cache, [ids[:-steps]], config)
        logits = []
        for index, token in enumerate(ids[-steps:]):
            if index == fork:
                cache = cache.fork()
            if weigh and index in (0, fork):
                for memory in cache.memories():
                    memory.on_weights = add
            logits.append(inference.step(cache, [int(token)])[0])
    return logits, mass, cache


def on_torch(inference: Inference, config: MemoryConfig, **options: Any) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(dispatch.VARIABLE, "torch")
        patch.setattr(inference, "captures", False)
        dispatch.backend.cache_clear()
        expected = run(inference, config, **options)
    dispatch.backend.cache_clear()
    return expected


def compare(actual: Result, expected: Result) -> None:
    for x, y in zip(actual[0], expected[0], strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(actual[1], expected[1], atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(actual[2].memories(), expected[2].memories(), strict=True):
        assert mine.n_seen == theirs.n_seen
        if isinstance(mine, DenseMemory):
            kept = [x[:, : mine.n_seen - mine._base] for x in (mine._key, theirs._key, mine._value, theirs._value)]
            torch.testing.assert_close(kept[::2], kept[1::2], atol=1e-4, rtol=1e-4)
            continue
        assert mine._n_blocks == theirs._n_blocks
        (window, other) = (mine._window, theirs._window)
        assert window.base == other.base and window.used == other.used
        for name in ("key", "key_raw", "value", "_query", "_lse"):
            kept = [getattr(x, name)[:, other.used - 8 : other.used] for x in (window, other)]
            torch.testing.assert_close(*kept, atol=1e-4, rtol=1e-4)
        pages = [x._far_context.store for x in (mine, theirs)]
        assert len(pages[0]) == len(pages[1])
        for run_of_pages in zip(pages[0]._runs, pages[1]._runs, strict=True):
            kept = [[x.float() for x in pages] for pages in run_of_pages]
            step = 0.13 if run_of_pages[0].key.dtype == torch.float8_e4m3fn else 1e-4  # to the next number
            torch.testing.assert_close(*kept, atol=1e-4, rtol=step)


@pytest.mark.parametrize(
    ("settings", "question"),
    [
        ({}, None),
        ({"topk": 1}, (5, 9)),
        ({**FEW, "selection": "per_kv_head"}, (5, 9)),
        ({**FEW, "policy": "infllm", "device_blocks": 4}, None),
        ({"device_blocks": 8}, None),
        ({"device_blocks": 8}, (5, 9)),
        ({"device_blocks": 8, "offload_dtype": "fp8"}, (5, 9)),
        ({"summary": "published"}, (20, 24)),
        ({"summary": "mean", "policy": "infllm"}, None),
        ({"policy": "streaming"}, None),
        ({"policy": "lm-infinite"}, None),
    ],
    ids=[
        "every key", "candidates", "per kv head", "offloaded", "offloaded, no question",
        "offloaded, every key", "offloaded, fp8", "published", "mean",
        "streaming", "lm-infinite",
    ],
)  # fmt: skip
def test_replayed_steps(inference, graphs, settings, question):
    config = MemoryConfig(**{**SIZES, **settings})
    expected = on_torch(inference, config, question=question)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*launch by launch")
        actual = run(inference, config, question=question)
    compare(actual, expected)
    assert graphs.recorded <= 3  # pages that had no room left; nothing else is a reason
    assert graphs.replayed >= STEPS - 4
    assert inference.records(actual[2])


@pytest.mark.parametrize(
    ("settings", "question", "expected"),
    [
        ({}, (5, 9), ["append_and_score", "refine", "segment_attention"]),
        ({}, None, ["append_and_score", "refine", "segment_attention"]),
        ({"selection": "per_kv_head"}, (5, 9), ["append_and_score", "refine", "segment_attention"]),
        ({"summary": "mean"}, (5, 9), ["append_and_score", "segment_attention"]),
        ({"policy": "streaming"}, None, ["turn_and_store", "segment_attention"]),
    ],
    ids=["every key, question", "every key", "per kv head", "mean", "streaming"],
)
def test_launches_of_a_layer(inference, graphs, monkeypatch, settings, question, expected):
    """A layer's memory asks the device for these kernels and for nothing else: no operation of torch lies between them."""
    layers: list[list[str]] = []
    step_at = BlockMemory.step_at

    def counted(memory: BlockMemory, *args: Any) -> torch.Tensor:
        before = len(graphs.launched)
        out = step_at(memory, *args)
        layers.append(graphs.launched[before:])
        return out

    monkeypatch.setattr(BlockMemory, "step_at", counted)
    run(inference, MemoryConfig(**{**SIZES, **settings}), question=question, steps=4, weigh=False)
    assert graphs.replayed
    recorded = [launches for launches in layers if launches]
    assert recorded == [expected] * (graphs.recorded * MODEL["num_hidden_layers"])


def test_a_fork_records_steps_of_its_own(inference, graphs):
    config = MemoryConfig(**SIZES, **FEW)
    expected = on_torch(inference, config, fork=5, question=(5, 9))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*launch by launch")
        actual = run(inference, config, fork=5, question=(5, 9))
    compare(actual, expected)
    assert graphs.replayed >= STEPS - 5


@pytest.mark.parametrize("sliding", [True, False])
def test_dense_layers(inference, graphs, monkeypatch, sliding):
    monkeypatch.setattr(dense, "_TILE", 4)  # a buffer that moves within the text
    config = MemoryConfig(**SIZES, policy="qllm" if sliding else "full")
    if sliding:
        torch.manual_seed(0)
        inference = Inference(spread(MistralForCausalLM(MistralConfig(**MODEL, sliding_window=6))))
    expected = on_torch(inference, config)
    compare(run(inference, config), expected)
    # keys move inside their buffer, which is no reason to record again
    assert (graphs.recorded, graphs.replayed) == (1, STEPS - 1)


def test_a_number_of_the_host_shows(inference, graphs, monkeypatch):
    """The emulator finds a step whose launches hold where the token is."""
    config = MemoryConfig(**SIZES, **FEW, policy="infllm")
    expected = on_torch(inference, config)
    arrival = Window.arrival

    def baked(window: Window, query: torch.Tensor, *others: torch.Tensor) -> Arrival:
        slots = others[-1] if query.shape[1] > 1 else torch.arange(window.used, window.used + 1)
        return arrival(window, query, *others[:-1], slots)

    monkeypatch.setattr(Window, "arrival", baked)
    with pytest.raises(AssertionError, match="not close"):
        compare(run(inference, config), expected)
    assert graphs.replayed


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.tolist(),
        lambda x: torch.tensor([1.0]) + x,
        lambda x: torch.repeat_interleave(x, torch.ones(3, dtype=torch.int64)),
    ],
)
def test_what_waits_is_refused(waiting):
    with pytest.raises(NotRecordableError):
        EmulatedGraph(lambda: waiting(torch.arange(3.0)))


def test_errors_while_recording_leave_steps_as_they_were(inference, graphs, monkeypatch):
    config = MemoryConfig(**SIZES, **FEW)
    expected = on_torch(inference, config, steps=6)

    def refuse(step: Any, before: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(captured, "recorder", lambda model: refuse)
    dispatch.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="launch by launch.*operation not permitted") as caught:
        compare(run(inference, config, steps=6), expected)
    assert len([w for w in caught if "launch by launch" in str(w.message)]) == 1
