"""Block summaries: which keys represent a block once it has left the local window."""

from __future__ import annotations

import torch

from qllm_kernels.attention import segment_logits


def mean_keys(key: torch.Tensor) -> torch.Tensor:
    """One summary per block, the mean of its keys.

    Args:
        key: [kv_heads, n_blocks, block_size, head_dim], un-rotated.

    Returns:
        [kv_heads, 1, n_blocks, head_dim].
    """
    return key.float().mean(dim=2).to(key.dtype)[:, None]


def key_bounds(key: torch.Tensor) -> torch.Tensor:
    """One summary per block, the bounds of its keys: for every dimension the largest value, then the smallest.

    Args:
        key: [kv_heads, n_blocks, block_size, head_dim], un-rotated.

    Returns:
        [kv_heads, 1, n_blocks, 2 * head_dim], to be scored with `select.bound_lookup`.
    """
    return torch.cat((key.amax(dim=2), key.amin(dim=2)), -1)[:, None]


def linear_token_scores(key_rotated: torch.Tensor, query_prefix: torch.Tensor, n_local: int) -> torch.Tensor:
    """Representative score of every token (paper eq. 4) in one dot product per key.

    Eq. 4 averages q_j . k_i over the n_local queries that follow token i. The average is linear in the queries, so with
    prefix sums of the rotated queries it is one dot product instead of n_local.

    Args:
        key_rotated: [kv_heads, n, head_dim], keys of tokens i = 0..n-1 in a common rotary frame.
        query_prefix: [kv_heads, n + n_local + 1, head_dim] fp32; entry t is the sum of the group's rotated queries before
            token t in the same frame, so n_local queries after the last key are covered.
        n_local: Length of the window that follows each token.

    Returns:
        [kv_heads, n] fp32, summed over the query heads of the group.
    """
    n = key_rotated.shape[1]
    after = query_prefix[:, n_local + 1 : n_local + 1 + n] - query_prefix[:, 1 : n + 1]
    return (key_rotated.float() * after).sum(-1) / n_local


def top_keys(key: torch.Tensor, token_scores: torch.Tensor, repr_topk: int) -> torch.Tensor:
    """The `repr_topk` keys of each block with the highest token scores, in order of position.

    Args:
        key: [kv_heads, n_blocks, block_size, head_dim], un-rotated.
        token_scores: [heads, n_blocks, block_size]; heads is a multiple of kv_heads.
        repr_topk: Representatives per block.

    Returns:
        [heads, repr_topk, n_blocks, head_dim].
    """
    index = token_scores.topk(repr_topk, dim=-1).indices.sort(dim=-1).values
    group = token_scores.shape[0] // key.shape[0]
    if group > 1:
        key = key.repeat_interleave(group, dim=0)
    return key.gather(2, index[..., None].expand(*index.shape, key.shape[-1])).transpose(1, 2)


def linear_top_keys(
    key: torch.Tensor, key_rotated: torch.Tensor, query_prefix: torch.Tensor, n_local: int, repr_topk: int
) -> torch.Tensor:
    """The `repr_topk` keys of each block with the highest linear score (paper eq. 4), in order of position.

    Args:
        key: [kv_heads, n_blocks, block_size, head_dim], un-rotated.
        key_rotated, query_prefix, n_local: As in `linear_token_scores`, n = n_blocks * block_size.
        repr_topk: Representatives per block.

    Returns:
        [kv_heads, repr_topk, n_blocks, head_dim].
    """
    scores = linear_token_scores(key_rotated, query_prefix, n_local)
    return top_keys(key, scores.view(key.shape[:3]), repr_topk)


def softmax_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    *,
    n_local: int,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention mass each key received from the n_local queries from its own position on (as published).

    Args:
        query: [heads, n, head_dim] rotated queries; the first stands at the position of the first key.
        key: [kv_heads, m, head_dim] rotated keys in the same frame.
        lse: [heads, n] log-sum-exp of each query over everything it saw.
        n_local: Window length.
        scale: Factor on the logits.
        softcap: Cap on the scaled logits.

    Returns:
        [heads, m] fp32.
    """
    heads, n, _ = query.shape
    group = heads // key.shape[0]
    logits = segment_logits(query, key.repeat_interleave(group, dim=0), scale=scale, softcap=softcap)
    distance = torch.arange(n, device=key.device)[:, None] - torch.arange(key.shape[1], device=key.device)
    seen = (distance >= 0) & (distance < n_local)
    return torch.where(seen, torch.exp(logits - lse.float()[..., None]), 0.0).sum(dim=1)
