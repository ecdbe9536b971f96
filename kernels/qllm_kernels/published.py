"""Block summaries as the published code makes them: the mean of the keys that received most attention, per query head."""

from __future__ import annotations

import torch

from qllm_kernels.summary import mean_keys, softmax_mass, top_keys


def published_means(
    key: torch.Tensor,
    key_rotated: torch.Tensor,
    query: torch.Tensor,
    lse: torch.Tensor,
    *,
    n_local: int,
    repr_topk: int,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """One summary per block and query head.

    Args:
        key: [kv_heads, n_blocks, block_size, head_dim], un-rotated.
        key_rotated: [kv_heads, n_blocks * block_size, head_dim], the same keys rotated.
        query: [heads, n, head_dim] queries rotated in the same frame; the first stands at the first key.
        lse: [heads, n] log-sum-exp of each query over everything it saw.
        n_local: Window length; queries up to n_local - 1 after a key count for it.
        repr_topk: Keys that are averaged.
        scale: Factor on the logits.
        softcap: Cap on the scaled logits.

    Returns:
        [heads, 1, n_blocks, head_dim].
    """
    mass = softmax_mass(query, key_rotated, lse, n_local=n_local, scale=scale, softcap=softcap)
    best = top_keys(key, mass.view(-1, *key.shape[1:3]), repr_topk)
    return mean_keys(best.transpose(1, 2))
