"""Counters by which the programs of a launch find out which of them ends last; that one sets its counter back to zero."""

from __future__ import annotations

import functools

import torch

N_COUNTERS = 1 << 16


def completion_counters(device: torch.device) -> torch.Tensor:
    """[N_COUNTERS] int32 zeros for launches that run one after the other.

    Launches of one stream share them; those in CUDA graphs have others, as a graph may run beside that stream. Graphs that
    hold such launches must therefore not run beside each other.
    """
    if device.type != "cuda":
        return _zeros(device, None)
    if not torch.cuda.is_current_stream_capturing():
        _zeros(device, None)  # for graphs: made before any of them is captured
        return _zeros(device, torch.cuda.current_stream(device).cuda_stream)
    return _zeros(device, None)


@functools.cache
def _zeros(device: torch.device, stream: int | None) -> torch.Tensor:
    return torch.zeros(N_COUNTERS, dtype=torch.int32, device=device)
