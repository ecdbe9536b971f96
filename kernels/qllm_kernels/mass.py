"""Attention mass: how much of the softmax each key received."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qllm_kernels.attention import FarSegment, segment_logits


@dataclass(frozen=True)
class Mass:
    """Attention weights in fp32, summed over a piece's tokens and the heads that share a kv head.

    Attributes:
        window: [pieces, kv_heads, back + length], or None when not asked for.
        pages: [pieces, kv_heads, k, block_size], zeros where a piece does not see a page; None without pages. Their sum
            over the last dimension is the mass of a block.
        loose: [pieces, kv_heads, m], zeros for hidden keys; None without loose keys.
    """

    window: torch.Tensor | None
    pages: torch.Tensor | None
    loose: torch.Tensor | None


def attention_mass(
    near: torch.Tensor,
    window_key: torch.Tensor,
    far: FarSegment | None,
    lse: torch.Tensor,
    *,
    slot: int,
    back: int,
    length: int,
    scale: float,
    softcap: float | None = None,
    window: bool = True,
) -> Mass:
    """The mass each key received in `attend_pieces`.

    Args:
        near, window_key, far, slot, back, length, scale, softcap: As in `attend_pieces`; values are not read.
        lse: [heads, pieces * length] log-sum-exp over everything the queries saw, sinks included.
        window: Whether the window's keys are asked for; those outside it always are.
    """
    kv_heads, pieces = window_key.shape[0], near.shape[1] // length

    def received(query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        """[pieces, kv_heads, m] of `key` [kv_heads, pieces, m, head_dim]; seen [..., length, m] fits [kv_heads, pieces]."""
        rows = query.reshape(kv_heads, -1, pieces, length, query.shape[-1]).transpose(1, 2)
        base = lse.reshape(kv_heads, -1, pieces, length).transpose(1, 2)[..., None]
        logits = segment_logits(rows, key[:, :, None], scale=scale, softcap=softcap)
        weights = torch.exp(logits - base)
        if seen is not None:
            weights = weights.masked_fill(~seen[:, :, None], 0.0)
        return weights.sum((2, 3)).transpose(0, 1)

    in_window = None
    if window:
        spans = [window_key[:, lo : lo + back + length] for lo in range(slot, slot + pieces * length, length)]
        causal = torch.ones(length, back + length, dtype=torch.bool, device=near.device).tril(back)
        in_window = received(near, torch.stack(spans, 1), causal[None, None])
    in_pages = on_loose = None
    if far is not None and far.table is not None:
        assert far.page_key is not None
        scopes, k = far.table.shape[1:]
        size = far.page_key.shape[2]
        table = far.table.repeat_interleave(kv_heads // scopes, 1).transpose(0, 1)  # [kv_heads, pieces, k]
        heads = torch.arange(kv_heads, device=table.device)[:, None, None]
        seen = None
        if far.n_chosen is not None:
            chosen = torch.arange(k, device=table.device) < far.n_chosen[:, None]
            seen = chosen.repeat_interleave(size, 1)[None, :, None]
        in_pages = received(far.query, far.page_key[heads, table].flatten(2, 3), seen).reshape(
            pieces, kv_heads, k, size
        )
    if far is not None and far.key is not None:
        seen = None
        if far.hidden is not None:
            scopes = far.hidden.shape[1]
            seen = ~far.hidden.repeat_interleave(kv_heads // scopes, 1).transpose(0, 1)[:, :, None]
        on_loose = received(far.query, far.key, seen)
    return Mass(in_window, in_pages, on_loose)
