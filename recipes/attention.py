"""Causal grouped-query attention for training, on a CPU one sequence at a time.

Scores of one sequence fit into a core's cache; those of a whole batch do not, and torch's fused attention for CPUs has a
backward pass in fp32. In bf16 this takes a third of the time. On a GPU fused attention serves scores of one pair of queries
and keys.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

FAR_AWAY = -1e30


class _Attend(torch.autograd.Function):
    """Softmax attention whose scores come from one or, by a mask, from two pairs of queries and keys."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, far_q: Tensor | None, far_k: Tensor | None, bias: Tensor, near: Tensor | None
    ) -> Tensor:  # fmt: skip
        b, g, m, _ = q.shape
        t = k.shape[2]
        out, probs = torch.empty_like(q), torch.empty(b, g, m, t, dtype=q.dtype, device=q.device)
        for i in range(b):
            scores = (q[i] @ k[i].transpose(-1, -2)).view(g, m // t, t, t)
            if near is not None:
                assert far_q is not None
                assert far_k is not None
                far = (far_q[i] @ far_k[i].transpose(-1, -2)).view(scores.shape)
                scores = torch.where(near[i], scores, far)
            scores = scores + bias[min(i, len(bias) - 1)]
            torch.softmax(scores, -1, out=probs[i].view(scores.shape))
            torch.matmul(probs[i], v[i], out=out[i])
        ctx.save_for_backward(q, k, v, far_q, far_k, near, probs)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, far_q, far_k, near, probs = ctx.saved_tensors
        grad = grad.contiguous()
        grads: list[Tensor | None] = [None if x is None else torch.empty_like(x) for x in (q, k, v, far_q, far_k)]
        dq, dk, dv = cast(list[Tensor], grads[:3])
        t = k.shape[2]
        for i in range(len(q)):
            p = probs[i]
            dv[i] = p.transpose(-1, -2) @ grad[i]
            ds = torch.ops.aten._softmax_backward_data(grad[i] @ v[i].transpose(-1, -2), p, -1, p.dtype)
            if near is not None:
                far_dq, far_dk = cast(list[Tensor], grads[3:])
                split = ds.view(ds.shape[0], -1, t, t)
                far = split.masked_fill(near[i], 0.0).view(ds.shape)
                ds = split.masked_fill(~near[i], 0.0).view(ds.shape)
                far_dq[i] = far @ far_k[i]
                far_dk[i] = far.transpose(-1, -2) @ far_q[i]
            dq[i] = ds @ k[i]
            dk[i] = ds.transpose(-1, -2) @ q[i]
        return (*grads, None, None)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    near: Tensor | None = None,
    far: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attend.

    Args:
        q: Rotated queries [B, heads, T, D].
        k: Rotated keys [B, kv_heads, T, D].
        v: Values [B, kv_heads, T, D].
        bias: Added to the scores, [B or 1, 1, T, T]; None: a query sees itself and what is before it, by
            torch's fused attention.
        near: Where `q` and `k` give the scores, [B, 1, T, T]; elsewhere `far` does. All of them when omitted.
        far: Queries and keys shaped like `q` and `k`.

    Returns:
        [B, heads, T, D].
    """
    b, h, t, d = q.shape
    g = k.shape[1]
    dtype = v.dtype
    if bias is None:
        return F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v, is_causal=True, enable_gqa=True)
    packed = [(x.to(dtype) * d**-0.5).reshape(b, g, h // g * t, d) for x in ((q,) if far is None else (q, far[0]))]
    keys = [x.to(dtype).contiguous() for x in ((k,) if far is None else (k, far[1]))]
    far_q, far_k = (None, None) if far is None else (packed[1], keys[1])
    out = _Attend.apply(packed[0], keys[0], v.contiguous(), far_q, far_k, bias.to(dtype), near)  # type: ignore[no-untyped-call]
    return cast(Tensor, out.view(b, h, t, d))


def causal_bias(t: int, device: torch.device) -> Tensor:
    """[1, 1, t, t]: zero where a key stands at or before its query, else far below any score."""
    return torch.full((1, 1, t, t), FAR_AWAY, device=device).triu(1)
