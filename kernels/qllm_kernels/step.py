"""Attention of a single token whose place in the window only the device knows, so that a CUDA graph can hold the step."""

from __future__ import annotations

import torch

from qllm_kernels.attention import FarSegment, attend, attend_far, merge


def attend_step(
    near: torch.Tensor,
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    far: FarSegment | None,
    *,
    slot: torch.Tensor,
    back: torch.Tensor,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_pieces` for one piece of one token. Nothing is read by the host, and no shape depends on values.

    Args:
        near, window_key, window_value, far, scale, softcap: As in `attend_pieces`. Keys of slots outside the window must be
            finite.
        slot, back: [1] integers on the device: first window key, and window keys before the token.

    Returns:
        As `attend_pieces`.
    """
    kv_heads, slots = window_key.shape[:2]
    heads, _, dim = near.shape
    place = torch.arange(slots, device=near.device)
    bias = torch.zeros(1, slots, dtype=near.dtype, device=near.device)
    bias.masked_fill_((place < slot) | (place > slot + back), float("-inf"))
    out, lse = attend(
        near.view(1, kv_heads, heads // kv_heads, dim),
        window_key[None],
        window_value[None],
        scale=scale,
        bias=bias,
        softcap=softcap,
    )
    local = (out.reshape(heads, 1, -1), lse.reshape(heads, 1))
    return local if far is None else merge(attend_far(far, scale=scale, softcap=softcap), local)
