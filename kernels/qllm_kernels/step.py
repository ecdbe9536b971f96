"""Attention of single tokens, and its mass, where only the device knows the tokens' places: a CUDA graph can hold the step."""

from __future__ import annotations

import torch

from qllm_kernels.attention import FarSegment, attend, attend_far, merge
from qllm_kernels.mass import Mass, attention_mass


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
    """`attend_pieces` for one new token of each of several sequences, whose windows lie in one buffer.

    Nothing is read by the host, and no shape depends on values.

    Args:
        near: [heads, sequences, head_dim] queries rotated to their slots.
        window_key, window_value: [kv_heads, slots, head_dim or value_dim], rows contiguous; all of them finite.
        far: What lies outside the windows, a piece per sequence, or None.
        slot, back: [sequences] integers on the device: first window key, and window keys before the token.
        scale, softcap: As in `attend_pieces`.

    Returns:
        Output [heads, sequences, value_dim] and natural log-sum-exp [heads, sequences] in fp32.
    """
    kv_heads, slots = window_key.shape[:2]
    heads, sequences, dim = near.shape
    group = heads // kv_heads
    place = torch.arange(slots, device=near.device)
    hidden = (place < slot[:, None]) | (place > (slot + back)[:, None])
    bias = torch.zeros(hidden.shape, dtype=near.dtype, device=near.device).masked_fill_(hidden, float("-inf"))
    out, lse = attend(
        near.view(kv_heads, group, sequences, dim).permute(2, 0, 1, 3),
        window_key.expand(sequences, -1, -1, -1),
        window_value.expand(sequences, -1, -1, -1),
        scale=scale,
        bias=bias[:, None, None],
        softcap=softcap,
    )
    local = (out.permute(1, 2, 0, 3).reshape(heads, sequences, -1), lse.permute(1, 2, 0).reshape(heads, sequences))
    return local if far is None else merge(attend_far(far, scale=scale, softcap=softcap), local)


def step_mass(
    near: torch.Tensor,
    window_key: torch.Tensor,
    far: FarSegment | None,
    lse: torch.Tensor,
    *,
    slot: torch.Tensor,
    back: torch.Tensor,
    scale: float,
    softcap: float | None = None,
) -> Mass:
    """The mass each key received in `attend_step`; nothing is read by the host, and no shape depends on values.

    Args:
        near, window_key, far, slot, back, scale, softcap: As in `attend_step`, for one sequence.
        lse: [heads, 1] log-sum-exp over everything the query saw, sinks included.

    Returns:
        The mass of all slots of the window, zeros for those that the token does not see, and of the keys outside it.
    """
    slots = window_key.shape[1]
    mass = attention_mass(near, window_key, far, lse, slot=0, back=slots - 1, length=1, scale=scale, softcap=softcap)
    assert mass.window is not None
    place = torch.arange(slots, device=near.device)
    hidden = (place < slot[:, None]) | (place > (slot + back)[:, None])
    return Mass(mass.window.masked_fill(hidden[:, None], 0.0), mass.pages, mass.loose)
