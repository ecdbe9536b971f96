"""Rotary position embedding of new tokens, and their way into the window and the page being filled."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Destination:
    """Rows of a buffer that new keys and values are written to.

    Attributes:
        key, value: [kv_heads, rows, head_dim or value_dim], head vectors contiguous; pages [kv_heads, n_pages, block_size, ...]
            that lie one behind the other are such a buffer, too. Without a value only keys are written.
        rows: [n] integers on the device, the row of each new token; negative: not written.
    """

    key: torch.Tensor
    value: torch.Tensor | None
    rows: torch.Tensor


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False) -> torch.Tensor:
    """Rotate pairs of dimensions, in fp32.

    Args:
        x: [..., n, head_dim]; dimensions behind rotary_dim stay as they are.
        cos, sin: [n, rotary_dim].
        interleaved: Pairs are neighbours (0, 1), (2, 3), ...; otherwise dimension i and i + rotary_dim / 2.

    Returns:
        As `x`.
    """
    dim = cos.shape[-1]
    turned = x[..., :dim].float()
    if interleaved:
        partner = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        partner = torch.cat((-turned[..., dim // 2 :], turned[..., : dim // 2]), -1)
    return torch.cat(((turned * cos + partner * sin).to(x.dtype), x[..., dim:]), -1)


def rotate_append(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    window: Destination,
    raw: Destination,
    *,
    interleaved: bool = False,
) -> torch.Tensor:
    """Rotate the queries of new tokens; write keys rotated to the window and un-rotated to their page, with their values.

    Args:
        query: [heads, n, head_dim], un-rotated.
        key, value: [kv_heads, n, head_dim or value_dim], un-rotated.
        cos, sin: [n_positions, rotary_dim] fp32 tables.
        positions: [n] integers on the device, rows of the tables for the new tokens.
        window: Takes rotated keys.
        raw: Takes un-rotated keys; its value may be missing, where the window's is the only copy.
        interleaved: As in `rotate`.

    Returns:
        The rotated queries [heads, n, head_dim].
    """
    cos, sin = cos[positions], sin[positions]
    for place, keys in ((window, rotate(key, cos, sin, interleaved=interleaved)), (raw, key)):
        kept = place.rows >= 0
        place.key[:, place.rows[kept]] = keys[:, kept]
        if place.value is not None:
            place.value[:, place.rows[kept]] = value[:, kept]
    return rotate(query, cos, sin, interleaved=interleaved)
