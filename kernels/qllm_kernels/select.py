"""Block scores and the choice of the blocks that a piece of the text attends to."""

from __future__ import annotations

import torch

# dot products, or elements of summaries in fp32, at a time: what a CPU's cache holds; elsewhere launches are to be few
_TILE = {"cpu": 1 << 19}
_TILE_ELSEWHERE = 1 << 24


def block_scores(lookup: torch.Tensor, summaries: torch.Tensor, *, scopes: int) -> torch.Tensor:
    """Score every block for every piece (paper eqs. 5 and 6).

    The score of a block for one head is the dot product with its best summary; heads are summed. Products and sums are
    fp32 for summaries of any dtype.

    Args:
        lookup: [pieces, heads, head_dim] lookup vectors, rotated to the far position.
        summaries: [summary_heads, r, n_blocks, head_dim], any strides; summary_heads divides heads.
        scopes: Groups of consecutive heads that are summed: 1 (all of them) or one per kv head. Divides summary_heads.

    Returns:
        [pieces, scopes, n_blocks] fp32.
    """
    pieces, heads, dim = lookup.shape
    n_heads, r, n_blocks = summaries.shape[:3]
    rows = lookup.float().view(pieces, n_heads, heads // n_heads, dim)
    if r == 1:
        rows = rows.sum(2, keepdim=True)  # the sum over a group's heads folds into the query
        vectors = summaries.permute(2, 0, 1, 3)  # [n_blocks, n_heads, 1, head_dim]
        if scopes == 1 and vectors.is_contiguous():
            return _products(rows.view(pieces, -1), vectors.view(n_blocks, -1))[:, None]
    rows = rows.transpose(0, 1).reshape(n_heads, -1, dim)  # [n_heads, pieces * group, dim]
    tile = max(1, _TILE.get(lookup.device.type, _TILE_ELSEWHERE) // (rows.shape[0] * max(rows.shape[1], dim) * r))
    parts = [_best_products(rows, summaries[:, :, at : at + tile]) for at in range(0, n_blocks, tile)]
    best = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    # [scopes, heads of a scope, pieces, group, n_blocks]
    return best.view(scopes, -1, pieces, rows.shape[1] // pieces, n_blocks).sum((1, 3)).transpose(0, 1)


def _products(rows: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """[m, n] dot products in fp32 of rows [m, dim] with vectors [n, dim] of any dtype."""
    if vectors.dtype == torch.float32:
        return rows @ vectors.t()
    tile = max(1, _TILE.get(rows.device.type, _TILE_ELSEWHERE) // vectors.shape[1])
    parts = [vectors[at : at + tile].float() for at in range(0, len(vectors), tile)]
    return torch.cat([rows @ part.t() for part in parts], -1)


def bound_lookup(lookup: torch.Tensor) -> torch.Tensor:
    """Lookup vectors whose dot product with the bounds of a block's keys is at least that with any key of the block.

    Every dimension meets the largest value of the keys where the vector is positive and the smallest where it is negative
    (`summary.key_bounds`; the score of Quest, Tang et al. 2024, arXiv 2406.10774).

    Args:
        lookup: [pieces, heads, head_dim].

    Returns:
        [pieces, heads, 2 * head_dim].
    """
    return torch.cat((lookup.clamp(min=0), lookup.clamp(max=0)), -1)


def _best_products(rows: torch.Tensor, summaries: torch.Tensor) -> torch.Tensor:
    """[n_heads, m, n] dot product of each row [n_heads, m, dim] with the best summary of each block [n_heads, r, n, dim]."""
    summaries = summaries.float()
    if summaries.stride(1) < summaries.stride(2):  # a block's summaries lie side by side, as keys in their pages do
        dots = rows @ summaries.transpose(1, 2).flatten(1, 2).transpose(1, 2)
        return dots.view(*dots.shape[:2], -1, summaries.shape[1]).amax(3)
    return (rows[:, None] @ summaries.transpose(2, 3)).amax(1)


def best_blocks(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """Ids [pieces, scopes, min(topk, n_blocks)] of the best of all blocks, ascending."""
    return scores.topk(min(topk, scores.shape[-1]), dim=-1).indices.sort(dim=-1).values


def select_blocks(scores: torch.Tensor, n_eligible: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `topk` best eligible blocks, ascending.

    Args:
        scores: [pieces, scopes, n_blocks] fp32.
        n_eligible: [pieces] how many of the first blocks had left the window when the piece began.
        topk: Blocks wanted.

    Returns:
        ids [pieces, scopes, k] with k = min(topk, n_blocks), ascending, and valid [pieces, scopes, k]: False marks the
        places of pieces that have fewer than k eligible blocks; they come last and hold that of the last eligible one, or 0.
    """
    n_blocks = scores.shape[-1]
    k = min(topk, n_blocks)
    blocked = torch.arange(n_blocks, device=scores.device) >= n_eligible[:, None, None]
    ids = scores.masked_fill(blocked, float("-inf")).topk(k, dim=-1).indices
    valid = torch.arange(k, device=scores.device) < n_eligible[:, None, None]
    ids = torch.where(valid, ids, n_blocks).sort(dim=-1).values
    valid = ids < n_blocks
    last = (n_eligible.clamp(max=n_blocks) - 1).clamp(min=0)
    return torch.minimum(ids, last[:, None, None]), valid


def standardise(scores: torch.Tensor, n_eligible: torch.Tensor | None) -> torch.Tensor:
    """Scores with mean 0 and variance 1 over the eligible blocks, so that terms of different scale can be added.

    Args:
        scores: [pieces or 1, scopes, n_blocks] fp32.
        n_eligible: [pieces] how many of the first blocks count; None: all of them.

    Returns:
        [pieces, scopes, n_blocks] ([1, ...] without `n_eligible`); what is not eligible holds numbers without meaning.
    """
    if n_eligible is None:
        variance, mean = torch.var_mean(scores, -1, correction=0, keepdim=True)
        centred = scores - mean
    else:
        count = n_eligible[:, None, None]
        counted = torch.arange(scores.shape[-1], device=scores.device) < count
        centred = scores - torch.where(counted, scores, 0).sum(-1, keepdim=True) / count
        variance = torch.where(counted, centred.square(), 0).sum(-1, keepdim=True) / count
    return centred * variance.clamp(min=torch.finfo(variance.dtype).tiny).rsqrt()
