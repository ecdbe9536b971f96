"""Arguments whose places lie more than 2^31 elements apart: every kernel finds them as it finds those side by side."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from making import random

from qllm_kernels.attention import FarSegment
from qllm_kernels.gpu import append, attention, mass, pages, prefix, published, refine, rotary, select, summary
from qllm_kernels.rotary import Arrival, Destination

_UNRESERVED = 0x4000  # MAP_NORESERVE, which Python does not name
Tensors = Sequence[Any]


def far_apart(x: torch.Tensor, axis: int, index: int) -> torch.Tensor:
    """`x` where entry `index` of an axis, and not the one before it, is 2^31 elements from the first; no stride is as long.

    An offset that wraps around in 32 bits is in the same memory, which takes what is touched of it.
    """
    step = -(-(2**31) // index // 16) * 16
    strides, size = [step] * x.ndim, 1
    for i in sorted(set(range(x.ndim)) - {axis}, key=lambda i: (x.stride(i), -i)):
        strides[i], size = size, size * x.shape[i]
    n = 2**31 + step * x.shape[axis]
    try:
        room = mmap.mmap(-1, n * x.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _UNRESERVED)
    except OSError as error:
        pytest.skip(f"no room for addresses: {error}")
    wide = torch.frombuffer(room, dtype=x.dtype).as_strided(x.shape, strides, 2**31)
    return wide.copy_(x)


def half(*shape: int, seed: int = 0) -> torch.Tensor:
    return random(*shape, seed=seed).half()


def attended(length: int) -> tuple[dict[str, torch.Tensor], Callable[..., Tensors]]:
    """Three sequences of one token each, or three pieces of a window, that see pages and loose keys."""
    given = {
        "near": half(6, 3 * length, 16), "query": half(6, 3 * length, 16, seed=1),
        "window_key": half(3, 14, 16, seed=2), "window_value": half(3, 14, 16, seed=3),
        "key": half(3, 3, 5, 16, seed=4), "value": half(3, 3, 5, 16, seed=5),
        "page_key": half(3, 6, 4, 16, seed=6), "page_value": half(3, 6, 4, 16, seed=7),
    }  # fmt: skip
    table = torch.tensor([[[0, 2, 5]], [[1, 3, 5]], [[2, 3, 4]]])

    def call(near: Any, window_key: Any, window_value: Any, **others: Any) -> Tensors:
        far = FarSegment(**others, table=table)
        if length == 1:
            where = {"slot": torch.tensor([9, 10, 8]), "back": torch.tensor([3, 1, 5])}
            out, lse = attention.attend_step(near, window_key, window_value, far, **where, scale=0.2)
            return (
                out,
                lse,
                mass.step_mass(near[:, :1], window_key, _one(far), lse[:, :1], **_first(where), scale=0.2).pages,
            )
        sizes = {"slot": 6, "back": 2, "length": length, "scale": 0.2}
        out, lse = attention.attend_pieces(near, window_key, window_value, far, **sizes)
        found = mass.attention_mass(near, window_key, far, lse, **sizes)
        return out, lse, found.window, found.pages, found.loose

    return given, call


def _first(where: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x[:1] for name, x in where.items()}


def _one(far: FarSegment) -> FarSegment:
    assert far.key is not None and far.value is not None and far.table is not None
    paged = {"page_key": far.page_key, "page_value": far.page_value, "table": far.table[:1]}
    return FarSegment(far.query[:, :1], far.key[:, :1], far.value[:, :1], **paged)


def chosen(pieces: int) -> tuple[dict[str, torch.Tensor], Callable[..., Tensors]]:
    given = {"lookup": half(pieces, 6, 16), "summaries": half(3, 4, 40, 16, seed=1), "question": random(3, 40)}

    def call(lookup: Any, summaries: Any, question: Any) -> Tensors:
        kind = {"scopes": 3, "question": question, "weight": 0.7}
        return select.choose_blocks(lookup, [summaries], [40] * pieces, 4, **kind)

    return given, call


def compared() -> tuple[dict[str, torch.Tensor], Callable[..., Tensors]]:
    given = {"lookup": half(3, 6, 16), "page_key": half(3, 9, 5, 16, seed=1), "question": random(3, 40)}
    table = torch.tensor([8, 0, 4, 2, 7]).expand(3, 3, 5)

    def call(lookup: Any, page_key: Any, question: Any) -> Tensors:
        kind = {"scopes": 3, "question": question, "weight": 0.7}
        return refine.refine_pages(lookup, page_key, table, table + 9, [40] * 3, 2, **kind)

    return given, call


def taken_in(n: int) -> tuple[dict[str, torch.Tensor], Callable[..., Tensors]]:
    """Tokens rotated and appended, with a choice of blocks if there is one."""
    given = {"query": half(6, n, 16), "key": half(3, n, 16, seed=1), "value": half(3, n, 16, seed=2)}
    given |= {name: torch.zeros(3, 12, 16).half() for name in ("window_key", "window_value", "raw_key", "raw_value")}
    angles = torch.rand(12, 16, generator=torch.Generator().manual_seed(1))
    rows, parts = torch.arange(12 - n, 12), [half(3, 2, 9, 16)]

    def call(
        query: Any, key: Any, value: Any, window_key: Any, window_value: Any, raw_key: Any, raw_value: Any
    ) -> Tensors:
        places = Destination(window_key, window_value, rows), Destination(raw_key, raw_value, rows)
        new, far = Arrival(query, key, value, angles.cos(), angles.sin(), rows, *places), angles[:2]
        found: Tensors = rotary.rotate_append(new, far)
        if n == 1:
            found = append.append_and_choose(new, far, parts, torch.tensor([9]), 3, scopes=3)
        return *found, window_key, window_value, raw_key, raw_value

    return given, call


def summarised(kind: str) -> tuple[dict[str, torch.Tensor], Callable[..., Tensors]]:
    given = {"key": half(3, 4, 5, 16)}
    if kind == "mean":
        return given, lambda key: [summary.mean_keys(key)]
    given["rotated"] = half(3, 20, 16, seed=1)
    if kind == "published":
        given |= {"query": half(6, 24, 16, seed=2), "lse": random(6, 24) + 3}
        sizes = {"n_local": 6, "repr_topk": 2, "scale": 0.2}
        return given, lambda key, rotated, query, lse: [published.published_means(key, rotated, query, lse, **sizes)]
    given["sums"] = random(3, 46, 16)
    return given, lambda key, rotated, sums: [summary.linear_top_keys(key, rotated, sums, 25, 2)]


def moved(kind: str) -> tuple[dict[str, torch.Tensor], Callable[..., Tensors]]:
    moves, counts = torch.tensor([[[4, 3], [1, 4]]]), torch.tensor([2])
    given = {"source": half(3, 5, 4, 16), "target": torch.zeros(3, 5, 4, 16).half()}
    if kind != "copy":
        name = "target" if kind == "to fp8" else "source"
        given[name] = given[name].to(torch.float8_e4m3fn).view(torch.uint8)

    def call(source: Any, target: Any) -> Tensors:
        scales, fp8 = torch.ones(3, 5), torch.float8_e4m3fn
        if kind == "copy":
            pages.copy_pages(source, target, moves, counts)
        elif kind == "to fp8":
            pages.quantise_pages(source, target.view(fp8), scales, moves, counts)
        else:
            pages.dequantise_pages(source.view(fp8), scales, target, moves, counts)
        return target, scales

    return given, call


WINDOWS = ("window_key", "window_value", "raw_key", "raw_value")
#: what is called, and of its arguments the axes along which places may lie apart, with the place that is
OPERATIONS: dict[str, tuple[tuple[dict[str, torch.Tensor], Callable[..., Tensors]], dict[str, dict[int, int]]]] = {
    "attention, step": (attended(1), {
        "near": {0: 4, 1: 2}, "query": {0: 4, 1: 2}, "window_key": {0: 2, 1: 8}, "window_value": {0: 2, 1: 8},
        "key": {0: 2, 1: 2, 2: 4}, "value": {0: 2, 1: 2, 2: 4}, "page_key": {0: 2, 1: 4}, "page_value": {0: 2, 1: 4},
    }),
    "attention, prefill": (attended(2), {
        "near": {0: 4, 1: 4}, "query": {0: 4, 1: 4}, "window_key": {0: 2, 1: 6}, "window_value": {0: 2, 1: 6},
        "key": {0: 2, 1: 2, 2: 4}, "value": {0: 2, 1: 2, 2: 4}, "page_key": {0: 2, 1: 4}, "page_value": {0: 2, 1: 4},
    }),
    "choice, decode": (chosen(1), {"lookup": {1: 4}, "summaries": {0: 2, 1: 3, 2: 30}, "question": {0: 2}}),
    "choice, prefill": (chosen(3), {"summaries": {0: 2, 1: 3, 2: 30}, "question": {0: 2}}),
    "choice by every key": (chosen(1), {"summaries": {0: 2, 2: 30}}),
    "choice among candidates": (compared(), {
        "lookup": {0: 2, 1: 4}, "page_key": {0: 2, 1: 7}, "question": {0: 2},
    }),
    "append": (taken_in(5), {
        **{name: {0: 2, 1: 4} for name in ("query", "key", "value")}, **{name: {0: 2, 1: 9} for name in WINDOWS},
    }),
    "append and choice": (taken_in(1), {
        **{name: {0: 2} for name in ("query", "key", "value")}, **{name: {0: 2, 1: 10} for name in WINDOWS},
    }),
    "means": (summarised("mean"), {"key": {0: 2, 1: 3}}),
    "best keys": (summarised("linear"), {"key": {0: 2, 1: 3}, "rotated": {0: 2, 1: 15}, "sums": {0: 2, 1: 25}}),
    "published": (summarised("published"), {
        "key": {0: 2, 1: 3}, "rotated": {0: 2, 1: 15}, "query": {0: 4, 1: 20}, "lse": {0: 4},
    }),
    "prefix sums": (({"query": half(3, 90, 16)}, lambda query: [prefix.query_prefix(query)]), {"query": {0: 2, 1: 80}}),
    "copies": (moved("copy"), {"source": {0: 2, 1: 4}, "target": {0: 2, 1: 3}}),
    "copies to fp8": (moved("to fp8"), {"source": {0: 2, 1: 4}, "target": {0: 2, 1: 3}}),
    "copies from fp8": (moved("from fp8"), {"source": {0: 2, 1: 4}, "target": {0: 2, 1: 3}}),
}  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
def test_places_far_apart(operation: str) -> None:
    (given, call), axes = OPERATIONS[operation]
    if operation == "choice by every key":  # a block's lie side by side
        given = given | {"summaries": given["summaries"].transpose(1, 2).contiguous().transpose(1, 2)}
    expected = call(**{name: x.clone() for name, x in given.items()})
    for turn in range(max(map(len, axes.values()))):
        placed = {name: x.clone() for name, x in given.items()}
        for name, indices in axes.items():
            if turn < len(indices):
                placed[name] = far_apart(given[name], *list(indices.items())[turn])
        for found, wanted in zip(call(**placed), expected, strict=True):
            torch.testing.assert_close(found, wanted, msg=lambda text, turn=turn: f"axes of turn {turn}: {text}")
