"""The choice of blocks whose number only the device knows, so that a CUDA graph can hold it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qllm_kernels.select import block_scores, select_blocks


def eligible_blocks(starts: torch.Tensor, *, n_init: int, n_local: int, block_size: int) -> torch.Tensor:
    """How many blocks had left the window when pieces began.

    Args:
        starts: [pieces] absolute indices of the pieces' first tokens, on the device.
        n_init, n_local, block_size: The memory's sizes in tokens.

    Returns:
        [pieces] int32.
    """
    outside = starts - (n_local + n_init)
    return torch.div(outside, block_size, rounding_mode="floor").clamp(min=0).to(torch.int32)


def to_device(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """Numbers of the host as an int32 tensor on the device, which the host does not wait for (`torch.tensor` does)."""
    return torch.tensor(counts, dtype=torch.int32).to(device, non_blocking=True)


def top_blocks(
    lookup: torch.Tensor, summaries: torch.Tensor, counts: torch.Tensor, topk: int, *, scopes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`select.top_blocks` with counts that the host does not know; nothing is read back.

    Args:
        lookup, topk, scopes: As there.
        summaries: [summary_heads, r, n_blocks, head_dim]; blocks behind the largest count may hold anything.
        counts: [pieces] integers on the device.

    Returns:
        ids and valid as in `select_blocks`, and scores that are undefined for blocks a piece may not choose.
    """
    scores = block_scores(lookup, summaries, scopes=scopes)
    ids, valid = select_blocks(scores, counts, topk)
    return ids, valid, scores
