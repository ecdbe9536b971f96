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
        x: [..., n, head_dim]; dimensions after rotary_dim stay as they are.
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


@dataclass(frozen=True)
class Arrival:
    """New tokens, and where they go.

    Attributes:
        query: [heads, n, head_dim], un-rotated.
        key, value: [kv_heads, n, head_dim or value_dim], un-rotated.
        cos, sin: [n_positions, rotary_dim] fp32 tables.
        positions: [n] integers on the device, rows of the tables for the new tokens.
        window: Takes rotated keys.
        raw: Takes un-rotated keys; its value may be missing, where the window's is the only copy.
        interleaved: As in `rotate`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor
    window: Destination
    raw: Destination
    interleaved: bool = False


def rotate_append(new: Arrival, far: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotate the queries of new tokens; write keys rotated to the window and un-rotated to their page, with their values.

    Args:
        new: The tokens.
        far: [2, rotary_dim] fp32, cosines and sines of the position that queries have for far keys; or None.

    Returns:
        The queries [heads, n, head_dim] rotated to their positions, and to the far one if it was given.
    """
    cos, sin = new.cos[new.positions], new.sin[new.positions]
    for place, keys in ((new.window, rotate(new.key, cos, sin, interleaved=new.interleaved)), (new.raw, new.key)):
        kept = place.rows >= 0
        place.key[:, place.rows[kept]] = keys[:, kept]
        if place.value is not None:
            place.value[:, place.rows[kept]] = new.value[:, kept]
    near = rotate(new.query, cos, sin, interleaved=new.interleaved)
    return near, None if far is None else rotate(new.query, far[:1], far[1:], interleaved=new.interleaved)
