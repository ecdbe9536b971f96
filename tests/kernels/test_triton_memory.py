"""The block memory on Triton kernels against its definition and against the torch path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qllm_kernels import dispatch
from qllm_runtime.config import MemoryConfig
from qllm_runtime.memory import dense, offload
from qllm_runtime.memory.base import Scoring
from qllm_runtime.memory.block import BlockMemory
from qllm_runtime.memory.dense import DenseMemory

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

from definition import Naive
from rope import Rope

Spans = list[tuple[int, int]]

DIM, HEADS, KV_HEADS = 16, 4, 2
BASE = {
    "n_init": 3, "n_local": 12, "block_size": 4, "topk": 2, "repr_topk": 2, "exec_block_size": 6, "chunk_size": 12,
}  # fmt: skip
PLAIN = Scoring(DIM**-0.5)
CAPPED = Scoring(0.3, 1.5, torch.linspace(-1, 1, HEADS))


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    dispatch.backend.cache_clear()
    yield
    monkeypatch.undo()
    dispatch.backend.cache_clear()


def tokens(n: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of the first n of 80 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(heads, 80, DIM, generator=generator)[:, :n] for heads in (HEADS, KV_HEADS, KV_HEADS))


def feed(memory: BlockMemory, qkv: tuple[torch.Tensor, ...], scoring: Scoring, chunk: int) -> torch.Tensor:
    parts = zip(*(x.split(chunk, 1) for x in qkv), strict=True)
    return torch.cat([memory.append(*part, scoring) for part in parts])


def cut(qkv: tuple[torch.Tensor, ...], lengths: list[int]) -> list[tuple[torch.Tensor, ...]]:
    return list(zip(*(x.split(lengths, 1) for x in qkv), strict=True))


def check(lengths: list[int], spans: Spans, scoring: Scoring = PLAIN, **settings: Any) -> BlockMemory:
    """Feed segments of these lengths, 80 tokens at most, to memory and definition."""
    config, rope = MemoryConfig(**{**BASE, **settings}), Rope(DIM)
    memory, naive = BlockMemory(config, rope), Naive(config, rope.at, scoring, list(spans))
    for span in spans:
        memory.set_query(*span)
    for part in cut(tokens(sum(lengths)), lengths):
        torch.testing.assert_close(feed(memory, part, scoring, 12), naive.feed(*part), atol=4e-5, rtol=2e-4)
    return memory


def served(monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> list[Any]:
    """The arguments of every call of a kernel from here on."""
    gpu = __import__(f"qllm_kernels.gpu.{module}", fromlist=[name])
    real, calls = getattr(gpu, name), []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return real(*args, **options)

    monkeypatch.setattr(gpu, name, counted)
    return calls


@pytest.mark.parametrize(
    ("policy", "selection", "scoring"),
    [("qllm", "per_kv_head", PLAIN), ("qllm", "shared", CAPPED), ("streaming", "shared", CAPPED)],
)
def test_recorded_steps(monkeypatch: pytest.MonkeyPatch, policy: str, selection: str, scoring: Scoring) -> None:
    """Weights belong to distinct keys and give, with their values, the output; they are those of the torch path."""
    memory = check([32], [(20, 24)] if policy == "qllm" else [], scoring, policy=policy, selection=selection)
    q, k, v = tokens(36)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    calls = served(monkeypatch, "mass", "attention_mass")
    for t in range(32, 36):
        step = [x[:, t : t + 1] for x in (q, k, v)]
        twin = memory.fork()
        memory.on_weights = twin.on_weights = lambda weights, positions: found.append((weights, positions))
        out = memory.append(*step, scoring)
        with monkeypatch.context() as torch_only:
            for module in ("qllm_kernels.dispatch", "qllm_runtime.memory.block", "qllm_runtime.memory.far_context"):
                torch_only.setattr(f"{module}.backend", lambda device: "torch")
            torch.testing.assert_close(twin.append(*step, scoring), out, atol=4e-5, rtol=2e-4)
        (weights, positions), theirs = found[-2:]
        for g in range(KV_HEADS):
            seen = {int(at): float(w) for at, w in zip(positions[g], weights[g], strict=True) if w > 0}
            assert len(seen) == int((weights[g] > 0).sum())
            same = {int(at): float(w) for at, w in zip(theirs[1][g], theirs[0][g], strict=True) if w > 0}
            assert seen == pytest.approx(same, abs=1e-5)
            expected = out[0, 2 * g : 2 * g + 2].sum(0)
            torch.testing.assert_close(weights[g] @ v[g, positions[g]], expected, atol=1e-5, rtol=1e-4)
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("settings", "spans"),
    [
        ({"selection": "per_kv_head"}, [(5, 9)]),
        ({"repr_topk": 4, "n_init": 0}, []),  # nothing but pages
        ({"topk": 9, "exec_block_size": 4}, []),  # pieces with different numbers of blocks
    ],
    ids=str,
)
def test_pages_are_read_in_place(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], spans: Spans) -> None:
    calls = served(monkeypatch, "attention", "attend_pieces")
    memory = check([33, 1], spans, **settings)
    far = [segment for *_, segment in calls if segment is not None]
    assert far
    assert all(segment.table is not None for segment in far)
    assert not any(segment.key.shape[2] >= BASE["block_size"] + BASE["n_init"] for segment in far if not spans)
    if "topk" in settings:
        assert any(segment.n_chosen is not None and len(set(segment.n_chosen.tolist())) > 1 for segment in far)
    assert len(memory._far_context.store) >= 4


def test_forks_gather() -> None:
    """A fork whose blocks lie in two places continues as if it had read all by itself."""
    config, rope = MemoryConfig(**{**BASE, "n_local": 8, "topk": 4}), Rope(DIM)
    trunk, rest = cut(tokens(46), [30, 16])
    parent, naive = BlockMemory(config, rope), Naive(config, rope.at, PLAIN)
    feed(parent, trunk, PLAIN, 12)
    naive.feed(*trunk)
    torch.testing.assert_close(feed(parent.fork(), rest, PLAIN, 12), naive.feed(*rest), atol=4e-5, rtol=2e-4)


@pytest.mark.parametrize(
    ("summary", "module", "kernel"),
    [
        ("published", "published", "published_means"),
        ("max", "prefix", "query_prefix"),
        ("mean", "summary", "mean_keys"),
    ],
)
def test_summaries(monkeypatch: pytest.MonkeyPatch, summary: str, module: str, kernel: str) -> None:
    calls = served(monkeypatch, module, kernel)
    check([33], [], CAPPED, summary=summary, n_local=8)
    assert calls


@pytest.mark.parametrize(
    "settings",
    [
        {"device_blocks": 4, "selection": "shared"},
        {"device_blocks": 4, "selection": "per_kv_head"},
        {"device_blocks": 8, "repr_topk": 4},  # candidates are fetched and compared by every key
        {"device_blocks": 4, "summary": "mean", "exec_block_size": 4},  # pieces choose more than there are slots
    ],
    ids=str,
)
def test_offloaded_blocks(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    """Blocks are fetched from the host by what the device chose, also those of a fork, whose pages lie in two slabs."""
    config = MemoryConfig(**{**BASE, "n_local": 8, "topk": 2, **settings})
    rope = Rope(DIM)
    trunk, *rest = cut(tokens(54), [36, 15, 1, 1, 1])
    memory, naive = BlockMemory(config, rope), Naive(config, rope.at, PLAIN)
    admitted, copied = served(monkeypatch, "residency", "admit_pages"), served(monkeypatch, "pages", "copy_pages")
    turns: list[torch.device] = []
    monkeypatch.setattr(offload, "_fetching", turns.append)
    torch.testing.assert_close(feed(memory, trunk, PLAIN, 12), naive.feed(*trunk), atol=4e-5, rtol=2e-4)
    memory = memory.fork()
    calls = served(monkeypatch, "attention", "attend_pieces")
    for part in rest:
        torch.testing.assert_close(feed(memory, part, PLAIN, 12), naive.feed(*part), atol=4e-5, rtol=2e-4)
    assert all(segment.table.max() < settings["device_blocks"] for *_, segment in calls)
    assert len(memory._far_context.store) > 8
    assert len(copied) > len(admitted) > 0
    assert bool(turns) == (config.exec_block_size == 4)


@pytest.mark.parametrize(
    "settings",
    [
        {"device_blocks": 4, "summary": "mean"},
        {"device_blocks": 8, "repr_topk": 4},  # the question is compared with keys that come back from fp8
    ],
    ids=str,
)
def test_blocks_offloaded_as_fp8(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    """The kernels keep and fetch what the torch functions do, also where pages lie in two slabs."""
    config = MemoryConfig(**{**BASE, "n_local": 8, "topk": 2, "offload_dtype": "fp8", **settings})
    trunk, *rest = cut(tokens(54), [36, 15, 1, 1, 1])

    def run() -> list[torch.Tensor]:
        memory = BlockMemory(config, Rope(DIM))
        memory.set_query(33, 36)
        outs = [feed(memory, trunk, PLAIN, 12)]
        memory = memory.fork()
        return [*outs, *(feed(memory, part, PLAIN, 12) for part in rest)]

    kept, fetched = (served(monkeypatch, "pages", f"{name}_pages") for name in ("quantise", "dequantise"))
    outs = run()
    assert len(kept) > 4 and len(fetched) > len(kept)
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    dispatch.backend.cache_clear()
    torch.testing.assert_close(outs, run(), atol=4e-5, rtol=2e-4)


@pytest.mark.parametrize("scoring", [PLAIN, CAPPED], ids=["plain", "capped"])
def test_a_layer_that_sees_everything_stores_no_logits(monkeypatch: pytest.MonkeyPatch, scoring: Scoring) -> None:
    """It is given to the kernel as a window from the first token on."""
    generator = torch.Generator().manual_seed(3)
    given = [torch.randn(heads, 70, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]

    def outputs() -> torch.Tensor:
        memory = DenseMemory(Rope(DIM))
        parts = zip(*(x.split([40, 1, 29], 1) for x in given), strict=True)
        return torch.cat([memory.append(*part, scoring) for part in parts])

    with monkeypatch.context() as patch:
        patch.setattr(dense, "backend", lambda device: "torch")
        expected = outputs()
    monkeypatch.setattr(DenseMemory, "_tile", None)
    torch.testing.assert_close(outputs(), expected, atol=2e-5, rtol=1e-4)
