"""Attention over key segments whose partial results are merged into one softmax through their log-sum-exp."""

from __future__ import annotations

import torch


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
