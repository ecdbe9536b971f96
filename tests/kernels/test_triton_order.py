"""Kernels whose programs run side by side: none reads what another one of its launch writes, unless it has acquired it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import test_triton_append as appending
import test_triton_attention as attending
import test_triton_choice as choosing
import test_triton_pages as moving
import test_triton_refine as refining
import torch
import triton
import triton.language as tl
from interleaved import interleaved
from making import random

from qllm_kernels.gpu import choose, prefix, published


def _append() -> None:
    sizes = {"group": 3, "kv_heads": 2, "dims": (16, 16, 16), "interleaved": False, "half": False, "seed": 3}
    kind = {"per_head": True, "bounds": True, "r": 1, "n_blocks": 140, "topk": 9, "asked": True, "pins": 5}
    appending.test_append_and_choose.hypothesis.inner_test(**sizes, **kind)


def _attend() -> None:
    attending.check(length=1, pieces=2, kv_heads=1, back=90, loose=70, hide=True, pages=3, page=40, seed=1)


def _choose(pieces: int) -> None:
    lookup, summaries, question = random(pieces, 4, 16), random(2, 3, 150, 16, seed=1), random(2, 150, seed=2)
    kind = {"scopes": 2, "question": question, "weight": 0.7}
    choosing.check(lookup, [summaries[:, :, :70], summaries[:, :, 70:]][: 3 - pieces], [60] * pieces, 5, **kind)


def _refine() -> None:
    sizes = {"group": 2, "kv_heads": 2, "per_head": True, "block": 5, "dim": 16, "m": 9, "topk": 4, "pieces": 2}
    refining.test_refine_pages.hypothesis.inner_test(**sizes, asked=True, short=False, pins=3, seed=2)


def _fetch() -> None:
    moving.test_evictions.hypothesis.inner_test(moving.gpu_residency, rows=2, k=3, pieces=2, spare=3, seed=4)
    sizes = {"heads": 2, "per_head": True, "sizes": (5, 64), "n_source": 7, "n_target": 8, "seed": 5}
    moving.test_fp8_and_back.hypothesis.inner_test(half=False, **sizes)


def _summarise() -> None:
    key, rotated, query, lse = (
        random(2, 3, 5, 16),
        random(2, 15, 16, seed=1),
        random(4, 20, 16, seed=2),
        random(4, 20) + 3,
    )
    published.published_means(key, rotated, query, lse, n_local=6, repr_topk=2, scale=0.2)
    torch.testing.assert_close(prefix.query_prefix(query)[:, 1:], query.cumsum(1))


CASES: dict[str, Callable[[], None]] = {
    "append and choose": _append,
    "attend": _attend,
    "choose for one piece": lambda: _choose(1),
    "choose for several": lambda: _choose(2),
    "refine": _refine,
    "fetch": _fetch,
    "summarise": _summarise,
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", CASES)
def test_any_order(case: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "TILE", 64)
    with interleaved(seed) as races:
        CASES[case]()
    assert not races


@triton.jit
def join(x, parts, out, done, MISTAKE: tl.constexpr):
    """The sum of a row per program; the one that ends last adds them up."""
    i, n = tl.program_id(0), tl.num_programs(0)
    if MISTAKE == "counted before it stores":
        i_done = tl.atomic_add(done, 1, sem="acq_rel")
    tl.store(parts + i, tl.sum(tl.load(x + i * 16 + tl.arange(0, 16)), 0))
    if MISTAKE == "the last by number joins":
        i_done = i
    elif MISTAKE == "nothing is acquired":
        i_done = tl.atomic_add(done, 1, sem="relaxed")
    elif MISTAKE != "counted before it stores":
        i_done = tl.atomic_add(done, 1, sem="acq_rel")
    if i_done == n - 1:
        tl.store(done, 0)
        tl.store(out, tl.sum(tl.load(parts + tl.arange(0, 16), mask=tl.arange(0, 16) < n, other=0.0), 0))


@pytest.mark.parametrize("mistake", ["", "counted before it stores", "the last by number joins", "nothing is acquired"])
def test_mistakes_show(mistake: str) -> None:
    x, expected = random(9, 16), random(9, 16).sum()

    def joined() -> torch.Tensor:
        out = torch.full((1,), float("nan"))
        join[(9,)](x, torch.full((9,), float("nan")), out, torch.zeros(1, dtype=torch.int32), mistake)
        return out[0]

    torch.testing.assert_close(joined(), expected)  # one after the other, all are right
    with interleaved(1) as races:
        found = joined()
    assert bool(races) == bool(mistake)
    if not mistake:
        torch.testing.assert_close(found, expected)
