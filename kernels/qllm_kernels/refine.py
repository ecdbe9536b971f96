"""The second stage of a choice: candidates are compared by every key of theirs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qllm_kernels.choice import Pinned, always_full, to_device
from qllm_kernels.select import best_blocks, select_blocks, standardise


def refine_choice(
    lookup: torch.Tensor,
    key: torch.Tensor,
    candidates: torch.Tensor,
    counts: Sequence[int] | torch.Tensor,
    topk: int,
    *,
    scopes: int,
    question: torch.Tensor | None = None,
    weight: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Choose the best of candidates by every key of theirs.

    A candidate's score is that of the current tokens, standardised over a piece's candidates, plus the question's term as in
    `choose_blocks`. With all blocks as candidates the choice is that of `choose_blocks` with every key as a summary.

    Args:
        lookup, topk, scopes, question, weight: As in `choose_blocks`.
        key: [kv_heads, pieces, m, block_size, head_dim] keys of the candidates, finite where there is none.
        candidates: [pieces, scopes, m] as `choose_blocks` chose them.
        counts: What they were chosen from, as in `choose_blocks`.

    Returns:
        ids and valid as in `choose_blocks`, and the scores [pieces, scopes, m] of the candidates.
    """
    m = candidates.shape[-1]
    # None: all pieces may choose from the first blocks up to one number, of which there are enough
    eligible: torch.Tensor | None = None
    if isinstance(counts, torch.Tensor):
        eligible = counts
    elif min(counts) < max(counts) or min(counts) < m:
        eligible = to_device(counts, candidates.device)
    elif question is not None:
        question = question[:, : counts[0]]
    given = None if eligible is None or always_full(counts, m) else eligible.clamp(max=m)
    scores = key_scores(lookup, key, scopes=scopes)
    if question is not None:
        term = standardise(question[None], eligible).expand(len(candidates), -1, -1)
        scores = standardise(scores, given) + weight * term.gather(-1, candidates)
    if given is None:
        return candidates.gather(-1, best_blocks(scores, topk)), None, scores
    places, valid = select_blocks(scores, given, topk)
    return candidates.gather(-1, places), None if always_full(counts, min(topk, m)) else valid, scores


def key_scores(lookup: torch.Tensor, key: torch.Tensor, *, scopes: int) -> torch.Tensor:
    """`select.block_scores` of blocks of each piece's own, of which every key is a summary.

    Args:
        lookup, scopes: As there.
        key: [kv_heads, pieces, m, block_size, head_dim].

    Returns:
        [pieces, scopes, m] fp32.
    """
    pieces, heads, dim = lookup.shape
    kv_heads, _, m, size, _ = key.shape
    rows = lookup.float().view(pieces, kv_heads, -1, dim).transpose(0, 1).reshape(kv_heads * pieces, -1, dim)
    keys = key.float().reshape(kv_heads * pieces, m * size, dim)
    dots = torch.bmm(rows, keys.transpose(1, 2))  # [kv_heads * pieces, group, m * block_size]
    best = dots.view(scopes, -1, pieces, heads // kv_heads, m, size).amax(-1)
    return best.sum((1, 3)).transpose(0, 1)


def refine_pages(
    lookup: torch.Tensor,
    page_key: torch.Tensor,
    table: torch.Tensor,
    candidates: torch.Tensor,
    counts: Sequence[int] | torch.Tensor,
    topk: int,
    *,
    scopes: int,
    question: torch.Tensor | None = None,
    weight: float = 0.0,
    pinned: Pinned | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """`refine_choice` of candidates whose keys are read where they lie.

    Args:
        lookup, candidates, counts, topk, scopes, question, weight: As there.
        page_key: [kv_heads, n_pages, block_size, head_dim].
        table: [pieces, scopes, m] the page of each candidate; any page that was written where there is no candidate.
        pinned: Keys to be hidden where the choice shows them as well, or None.
    """
    kv_heads = page_key.shape[0]
    heads = torch.arange(kv_heads, device=table.device)[:, None, None]
    pages = table.repeat_interleave(kv_heads // table.shape[1], dim=1).transpose(0, 1)  # [kv_heads, pieces, m]
    key = page_key[heads, pages]
    chosen = refine_choice(lookup, key, candidates, counts, topk, scopes=scopes, question=question, weight=weight)
    if pinned is not None:
        pinned.write(chosen[0])
    return chosen
