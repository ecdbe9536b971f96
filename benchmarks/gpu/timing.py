"""Seconds of a device, and what the device reaches at its best: copies and matrix products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch


def synchronize(device: torch.device) -> None:
    """Wait for everything queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Mean seconds of a call among `repeats` queued one after the other; median of three such runs, after a warm-up."""
    call()
    runs = []
    for _ in range(3):
        synchronize(device)
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(device)
        runs.append((time.perf_counter() - began) / repeats)
    return statistics.median(runs)


def in_turn(calls: Iterable[Callable[[], object]]) -> Callable[[], object]:
    """A call that takes the next of `calls` each time, so that no cache keeps what it reads."""
    kept = list(calls)
    state = {"next": 0}

    def call() -> object:
        state["next"] = (state["next"] + 1) % len(kept)
        return kept[state["next"]]()

    return call


def _copy_rate(device: torch.device, dtype: torch.dtype, n: int) -> float:
    source = torch.zeros(n, dtype=dtype, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device) / 1e9


def _product_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, device) / 1e12


def ceilings(device: torch.device, dtype: torch.dtype, *, tiny: bool) -> dict[str, float]:
    """Measured GB/s of a device copy (reads and writes counted) and TFLOP/s of a square matrix product."""
    return {
        "copy_gb_s": _copy_rate(device, dtype, 2**20 if tiny else 2**30),
        "matmul_tflop_s": _product_rate(device, dtype, 128 if tiny else 8192),
    }
