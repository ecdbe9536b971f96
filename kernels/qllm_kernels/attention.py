"""Attention over key segments whose partial results are merged into one softmax through their log-sum-exp."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

_TILE = 128  # queries that share one span of window keys


@dataclass(frozen=True)
class FarSegment:
    """Keys outside the window, all seen by queries at one distance: blocks read from their pages, then loose keys.

    Attributes:
        query: [heads, pieces * length, head_dim] queries rotated to the far distance.
        key, value: [kv_heads, pieces, m, head_dim or value_dim] loose keys, or None.
        hidden: True where a loose key is not seen, [pieces, scopes, m]; None when all are.
        page_key, page_value: [kv_heads, n_pages, block_size, head_dim or value_dim], or None.
        table: Pages each piece sees, [pieces, scopes, k], or None.
        n_chosen: [pieces] int32, how many of the first entries of its table rows a piece sees; None: k.
    """

    query: torch.Tensor
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    page_key: torch.Tensor | None = None
    page_value: torch.Tensor | None = None
    table: torch.Tensor | None = None
    n_chosen: torch.Tensor | None = None

    @property
    def pieces(self) -> int:
        """Pieces that see keys of their own."""
        if self.table is not None:
            return self.table.shape[0]
        assert self.key is not None
        return self.key.shape[1]


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over one key segment.

    Args:
        query: [batch, heads, n, head_dim].
        key: [batch, heads, m, head_dim].
        value: [batch, heads, m, value_dim].
        scale: Factor on the logits.
        bias: Added to the scaled logits, broadcastable to [batch, heads, n, m]; -inf hides a key. Every query must see a key.
        softcap: Cap c of c * tanh(logit / c), applied before the bias.

    Returns:
        Output [batch, heads, n, value_dim] in the dtype of `query` and natural log-sum-exp [batch, heads, n] in fp32.
    """
    if query.device.type == "cpu" and softcap is None and query.shape[-1] == value.shape[-1]:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=bias, scale=scale
        )
        return out, lse
    logits = segment_logits(query, key, scale=scale, softcap=softcap)
    if bias is not None:
        logits = logits + bias
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - lse[..., None]).to(value.dtype)
    return weights @ value, lse


def segment_logits(query: torch.Tensor, key: torch.Tensor, *, scale: float, softcap: float | None) -> torch.Tensor:
    """Scaled and capped dot products [..., n, m] in fp32 of `query` [..., n, head_dim] and `key` [..., m, head_dim]."""
    logits = torch.matmul(query * scale, key.transpose(-1, -2)).float()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def merge(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join two partial results over disjoint keys into the softmax over all of them.

    Args:
        first, second: (output [..., n, value_dim], log-sum-exp [..., n]).

    Returns:
        The same pair for the union of the keys.
    """
    (out_a, lse_a), (out_b, lse_b) = first, second
    share = torch.sigmoid(lse_b - lse_a)[..., None].to(out_a.dtype)
    return torch.lerp(out_a, out_b, share), torch.logaddexp(lse_a, lse_b)


def attend_pieces(
    near: torch.Tensor,
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    far: FarSegment | None,
    *,
    slot: int,
    back: int,
    length: int,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over window and far keys for equally long pieces of consecutive tokens.

    Piece p sees window keys from slot `slot + p * length` on, up to each query's own token.

    Args:
        near: [heads, pieces * length, head_dim] queries rotated to their slots.
        window_key, window_value: [kv_heads, slots, head_dim or value_dim], rows contiguous.
        far: What lies outside the window, or None. It may cut the same queries into more, shorter pieces.
        slot: First window key of the first piece.
        back: Window keys of a piece before its first token.
        length: Tokens of a piece.
        scale: Factor on the logits.
        softcap: Cap on the scaled logits.

    Returns:
        Output [heads, pieces * length, value_dim] and natural log-sum-exp [heads, pieces * length] in fp32.
    """
    local = _attend_window(
        near, window_key, window_value, slot=slot, back=back, length=length, scale=scale, softcap=softcap
    )
    return local if far is None else merge(attend_far(far, scale=scale, softcap=softcap), local)


def _attend_window(
    near: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    slot: int,
    back: int,
    length: int,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    heads, rows, dim = near.shape
    kv_heads, pieces = key.shape[0], rows // length
    group = heads // kv_heads
    queries = near.reshape(kv_heads, group, pieces, length, dim).permute(2, 0, 1, 3, 4)
    outs, lses = [], []
    for row in range(0, length, _TILE):
        size = min(_TILE, length - row)
        span = back + row + size

        def tiles(x: torch.Tensor, span: int = span) -> torch.Tensor:
            width = x.shape[-1]
            # overlapping views, one per piece; nothing is copied
            return x.as_strided((pieces, kv_heads, span, width), (length * width, x.stride(0), width, 1), slot * width)

        out, lse = attend(
            queries[:, :, :, row : row + size].reshape(pieces, kv_heads, group * size, dim),
            tiles(key),
            tiles(value),
            scale=scale,
            bias=_causal_bias(group, size, span, near.dtype, near.device),
            softcap=softcap,
        )
        outs.append(out.reshape(pieces, kv_heads, group, size, -1))
        lses.append(lse.reshape(pieces, kv_heads, group, size))
    out = (outs[0] if len(outs) == 1 else torch.cat(outs, 3)).permute(1, 2, 0, 3, 4)
    lse = (lses[0] if len(lses) == 1 else torch.cat(lses, 3)).permute(1, 2, 0, 3)
    return out.reshape(heads, rows, -1), lse.reshape(heads, rows)


@functools.lru_cache(maxsize=16)
def _causal_bias(group: int, size: int, span: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[group * size, span]: the last `size` keys are the queries' own tokens."""
    later = torch.ones(size, span, dtype=torch.bool, device=device).triu(span - size + 1)
    return torch.zeros(size, span, dtype=dtype, device=device).masked_fill_(later, float("-inf")).repeat(group, 1)


def attend_far(far: FarSegment, *, scale: float, softcap: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The far part of `attend_pieces`: output [heads, rows, value_dim] and log-sum-exp [heads, rows]."""
    heads, rows, dim = far.query.shape
    key, value, hidden = _far_keys(far, far.pieces)
    length = rows // far.pieces
    bias = None
    if hidden is not None:
        mask = hidden[:, :, None]
        bias = key.new_zeros(mask.shape).masked_fill_(mask, float("-inf"))
    kv_heads, pieces = key.shape[:2]
    group = heads // kv_heads
    if bias is not None and bias.shape[1] not in (1, kv_heads):
        bias = bias.repeat_interleave(kv_heads // bias.shape[1], dim=1)
    queries = far.query.reshape(kv_heads, group, pieces, length, dim).permute(2, 0, 1, 3, 4)
    out, lse = attend(
        queries.reshape(pieces, kv_heads, group * length, dim),
        key.transpose(0, 1),
        value.transpose(0, 1),
        scale=scale,
        bias=bias,
        softcap=softcap,
    )
    out = out.reshape(pieces, kv_heads, group, length, -1).permute(1, 2, 0, 3, 4)
    lse = lse.reshape(pieces, kv_heads, group, length).permute(1, 2, 0, 3)
    return out.reshape(heads, rows, -1), lse.reshape(heads, rows)


def _far_keys(far: FarSegment, pieces: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys, values [kv_heads, pieces, m, ...] and hidden [pieces, scopes, m] of pages and loose keys together."""
    if far.table is None:
        assert far.key is not None and far.value is not None
        return far.key, far.value, far.hidden
    assert far.page_key is not None and far.page_value is not None
    kv_heads, _, size, _ = far.page_key.shape
    scopes, k = far.table.shape[1:]
    pages = far.table.repeat_interleave(kv_heads // scopes, dim=1).transpose(0, 1)  # [kv_heads, pieces, k]
    heads = torch.arange(kv_heads, device=pages.device)[:, None, None]
    joined = []
    for paged, loose in ((far.page_key, far.key), (far.page_value, far.value)):
        taken = paged[heads, pages].flatten(2, 3)
        joined.append(taken if loose is None else torch.cat((taken, loose), 2))
    hidden = torch.zeros(pieces, scopes, joined[0].shape[2], dtype=torch.bool, device=pages.device)
    if far.n_chosen is not None:
        chosen = torch.arange(k * size, device=pages.device) // size < far.n_chosen[:, None]
        hidden[:, :, : k * size] = ~chosen[:, None]
    if far.hidden is not None:
        hidden[:, :, k * size :] = far.hidden
    return joined[0], joined[1], hidden


def apply_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Let value-less sink logits take part in the softmax.

    Args:
        out: [heads, n, value_dim].
        lse: [heads, n] log-sum-exp over the real keys.
        sinks: [heads] one logit per head.

    Returns:
        The pair (output, log-sum-exp) with the sinks included.
    """
    sink = sinks.float()[:, None]
    return out * torch.sigmoid(lse - sink)[..., None].to(out.dtype), torch.logaddexp(lse, sink)
