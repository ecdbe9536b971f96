"""Seconds of a device, and what the device reaches at its best: copies, matrix products and the link to the host."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

_CALLS = 20  # at least, of a recording and of a run launch by launch
_REPLAYS = 10  # of a run; its beginning and its end then weigh little
_MOST_COPIES = 64
_SPARE = 16 * 2**30  # bytes of a device that copies leave free

Calls = Sequence[Callable[[], object]]
T = TypeVar("T")


def synchronize(device: torch.device) -> None:
    """Wait for everything queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copies(make: Callable[[], T], read: int, device: torch.device) -> list[T]:
    """Data for calls in turn, more than the device's cache holds.

    Args:
        make: Makes the data of one call.
        read: Bytes of it that a call reads.
        device: The device; on a CPU one is enough.

    Returns:
        At least four times what the cache holds as far as 64 copies and the memory suffice.
    """
    made = [make()]
    while len(made) < n_copies(read, device) and torch.cuda.mem_get_info(device)[0] > _SPARE:
        made.append(make())
    return made


def n_copies(read: int, device: torch.device) -> int:
    """Copies that `copies` makes where memory suffices."""
    if device.type != "cuda":
        return 1
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return min(math.ceil(4 * cache / read), _MOST_COPIES)


def spent(calls: Calls, device: torch.device, least: int = _CALLS) -> dict[str, Any]:
    """How long a call takes, of `calls` in turn, at least `least` of them one after the other.

    Returns:
        "us": microseconds on the device: of replays of a CUDA graph of them all, so that the host's time is not in it.
        "eager_us": launch by launch, host included. On a CPU, and where the calls cannot be recorded ("not_recorded" says
        why), there is no other time, and "us" is this one.
    """
    turns = list(itertools.islice(itertools.cycle(calls), max(least, len(calls))))
    eager = 1e6 * _seconds(lambda: [call() for call in turns], device, 1) / len(turns)
    if device.type != "cuda":
        return {"us": eager}
    try:
        replay = _recorded(turns)
    except Exception as error:
        return {"us": eager, "eager_us": eager, "not_recorded": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"us": 1e6 * _seconds(replay, device, _REPLAYS) / len(turns), "eager_us": eager}


def _recorded(calls: Calls) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
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


def _copy_rate(source: torch.Tensor, target: torch.Tensor, device: torch.device) -> float:
    """GB/s of a copy, counted once."""
    return source.nbytes / _seconds(lambda: target.copy_(source, non_blocking=True), device, _CALLS) / 1e9


def _product_rate(device: torch.device, dtype: torch.dtype, side: int) -> float:
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / _seconds(lambda: a @ b, device, _CALLS) / 1e12


def ceilings(device: torch.device, dtype: torch.dtype, *, tiny: bool) -> dict[str, float]:
    """Measured GB/s of copies and TFLOP/s of a square matrix product.

    Of a copy on the device reads and writes are counted; copies from and to pinned memory of the host show the link.
    """
    here = torch.zeros(2**20 if tiny else 2**30, dtype=dtype, device=device)
    pinned = torch.zeros(2**20 if tiny else 2**28, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = pinned.to(device)
    return {
        "copy_gb_s": 2 * _copy_rate(here, torch.empty_like(here), device),
        "from_host_gb_s": _copy_rate(pinned, there, device),
        "to_host_gb_s": _copy_rate(there, pinned, device),
        "matmul_tflop_s": _product_rate(device, dtype, 128 if tiny else 8192),
    }
