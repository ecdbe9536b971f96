"""Causal grouped-query attention for training: on a CPU one sequence at a time, on a GPU the whole batch at once.

Scores of one sequence fit into a core's cache; those of a whole batch do not, and torch's fused attention for CPUs has a
backward pass in fp32. In bf16 `attend` takes a third of the time. A GPU would wait for the launches of so many small steps:
there `attend_whole` hands torch's fused attention everything at once, clamped distances too.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

FAR_AWAY = -1e30


#: So many queries of a sequence are taken at a time, and only the keys up to the last of them.
ROWS = 128


def _parts(t: int) -> list[slice]:
    """Queries of each part, of a sequence of `t` tokens."""
    return [slice(a, min(a + ROWS, t)) for a in range(0, t, ROWS)]


def _rows(x: Tensor, rows: slice) -> Tensor:
    """Some queries of one sequence [g, r, T, D], those of a group below each other: [g, r * rows, D]."""
    return x[:, :, rows].reshape(x.shape[0], -1, x.shape[-1])


class _Attend(torch.autograd.Function):
    """Softmax attention whose scores come from one or, by a mask, from two pairs of queries and keys."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, far_q: Tensor | None, far_k: Tensor | None, bias: Tensor, near: Tensor | None
    ) -> Tensor:  # fmt: skip
        b, g, r, t, d = q.shape
        out = torch.empty_like(q)
        probs: list[Tensor] = []
        for i in range(b):
            for rows in _parts(t):
                seen = slice(0, rows.stop)
                scores = (_rows(q[i], rows) @ k[i, :, seen].transpose(-1, -2)).view(g, r, -1, rows.stop)
                if near is not None:
                    assert far_q is not None
                    assert far_k is not None
                    far = (_rows(far_q[i], rows) @ far_k[i, :, seen].transpose(-1, -2)).view(scores.shape)
                    scores = torch.where(near[i, :, rows, seen], scores, far)
                scores = scores + bias[min(i, len(bias) - 1), :, rows, seen]
                probs.append(torch.softmax(scores, -1).view(g, -1, rows.stop))
                out[i, :, :, rows] = (probs[-1] @ v[i, :, seen]).view(g, r, -1, d)
        ctx.save_for_backward(q, k, v, far_q, far_k, near, *probs)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, far_q, far_k, near, *probs = ctx.saved_tensors
        g, r, t, d = q.shape[1:]
        grads: list[Tensor | None] = [None if x is None else torch.zeros_like(x) for x in (q, k, v, far_q, far_k)]
        dq, dk, dv = cast(list[Tensor], grads[:3])
        parts = _parts(t)
        for i in range(len(q)):
            for n, rows in enumerate(parts):
                seen = slice(0, rows.stop)
                p, dout = probs[i * len(parts) + n], _rows(grad[i], rows)
                dv[i, :, seen] += p.transpose(-1, -2) @ dout
                ds = torch.ops.aten._softmax_backward_data(dout @ v[i, :, seen].transpose(-1, -2), p, -1, p.dtype)
                if near is not None:
                    far_dq, far_dk = cast(list[Tensor], grads[3:])
                    split, close = ds.view(g, r, -1, rows.stop), near[i, :, rows, seen]
                    far = split.masked_fill(close, 0.0).view(ds.shape)
                    ds = split.masked_fill(~close, 0.0).view(ds.shape)
                    far_dq[i, :, :, rows] = (far @ far_k[i, :, seen]).view(g, r, -1, d)
                    far_dk[i, :, seen] += far.transpose(-1, -2) @ _rows(far_q[i], rows)
                dq[i, :, :, rows] = (ds @ k[i, :, seen]).view(g, r, -1, d)
                dk[i, :, seen] += ds.transpose(-1, -2) @ _rows(q[i], rows)
        return (*grads, None, None)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    near: Tensor | None = None,
    far: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attend, one sequence after another.

    Args:
        q: Rotated queries [B, heads, T, D].
        k: Rotated keys [B, kv_heads, T, D].
        v: Values [B, kv_heads, T, D].
        bias: Added to the scores, [B or 1, 1, T, T].
        near: Where `q` and `k` give the scores, [B, 1, T, T]; elsewhere `far` does. All of them when omitted.
        far: Queries and keys shaped like `q` and `k`.

    Returns:
        [B, heads, T, D].
    """
    b, h, t, d = q.shape
    g = k.shape[1]
    dtype = v.dtype
    packed = [(x.to(dtype) * d**-0.5).reshape(b, g, h // g, t, d) for x in ((q,) if far is None else (q, far[0]))]
    keys = [x.to(dtype).contiguous() for x in ((k,) if far is None else (k, far[1]))]
    far_q, far_k = (None, None) if far is None else (packed[1], keys[1])
    out = _Attend.apply(packed[0], keys[0], v.contiguous(), far_q, far_k, bias.to(dtype), near)  # type: ignore[no-untyped-call]
    return cast(Tensor, out.view(b, h, t, d))


def attend_whole(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, far: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """What `attend` computes, for the whole batch by torch's fused attention: no scores are kept.

    A query and its far form, side by side, stand before twice the keys: ``[q, far_q] · [k, 0]`` are the scores of the
    first half, ``[q, far_q] · [0, far_k]`` those of the second, and the bias leaves one of the two.

    Args:
        q: Rotated queries [B, heads, T, D].
        k: Rotated keys [B, kv_heads, T, D].
        v: Values [B, kv_heads, T, D].
        bias: Of `split_bias`, [B, 1, T, 2 * T]; None: a query sees itself and what is before it, by `q` and `k`.
        far: Queries and keys shaped like `q` and `k`, with a bias.

    Returns:
        [B, heads, T, D].
    """
    dtype = v.dtype
    if bias is None or far is None:
        return F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v, is_causal=True, enable_gqa=True)
    far_q, far_k = far
    both = torch.cat((q.to(dtype), far_q.to(dtype)), -1)
    keys = torch.cat((F.pad(k.to(dtype), (0, k.shape[-1])), F.pad(far_k.to(dtype), (k.shape[-1], 0))), 2)
    values = torch.cat((v, v), 2)
    # The kernels that take a bias know no groups of heads.
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
    mask = bias.to(dtype).expand(-1, q.shape[1], -1, -1)
    return F.scaled_dot_product_attention(both, keys, values, attn_mask=mask, scale=q.shape[-1] ** -0.5)


def split_bias(visible: Tensor, near: Tensor, dtype: torch.dtype) -> Tensor:
    """Bias [B, 1, T, 2 * T] of `attend_whole`: keys that are seen and near in its first half, seen and far in its second.

    Args:
        visible: Keys that a query sees, [B, 1, T, T].
        near: Where the scores are those of the rotated keys, [B, 1, T, T].
        dtype: That of the attention.
    """
    hidden = ~torch.cat((visible & near, visible & ~near), -1)
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, FAR_AWAY)


def causal_bias(t: int, device: torch.device) -> Tensor:
    """[1, 1, t, t]: zero where a key stands at or before its query, else far below any score."""
    return torch.full((1, 1, t, t), FAR_AWAY, device=device).triu(1)
