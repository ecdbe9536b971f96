"""The choice of blocks by current tokens and question together, from summaries that may lie in several places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from qllm_kernels.select import block_scores, bound_lookup, select_blocks, standardise


class Pinned(NamedTuple):
    """Keys outside the window that are seen whatever is chosen, unless that were their second appearance.

    Attributes:
        block: [m] int64, the block a key is in, or will be; -1: none.
        position: [m] int64, its absolute index; -1: no matter.
        border: [pieces] int64, first token of each window.
        hidden: [pieces, scopes, m] bool, to be written: True for keys of chosen blocks and of the window.
    """

    block: torch.Tensor
    position: torch.Tensor
    border: torch.Tensor
    hidden: torch.Tensor

    def write(self, ids: torch.Tensor) -> None:
        """Write `hidden` for blocks [pieces, scopes, k] that are seen."""
        self.hidden.copy_(seen_twice(ids, self.block, self.position, self.border))


def seen_twice(
    ids: torch.Tensor, block: torch.Tensor, position: torch.Tensor, border: torch.Tensor | None
) -> torch.Tensor:
    """Which pinned keys are in a block or window that is seen.

    Args:
        ids: [pieces, scopes, k] blocks that are seen.
        block, position, border: As in `Pinned`; without a border all windows begin after these keys.

    Returns:
        [pieces, scopes, m].
    """
    twice = (ids[..., None] == block).any(dim=2)
    return twice if border is None else twice | (position >= border[:, None])[:, None]


def choose_blocks(
    lookup: torch.Tensor,
    parts: Sequence[torch.Tensor],
    counts: Sequence[int] | torch.Tensor,
    topk: int,
    *,
    scopes: int,
    question: torch.Tensor | None = None,
    weight: float = 0.0,
    bounds: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Score the blocks, add the question's term and choose the best eligible blocks for every piece.

    A block's score is that of the current tokens (paper eq. 6) plus `weight` times that of the question (eq. 5), each
    standardised over the piece's eligible blocks, so that the weight means the same for every model, layer and length (eq. 7).
    Without a question it is the score of the current tokens as it is.

    Args:
        lookup: [pieces, heads, head_dim] lookup vectors, rotated to the far position.
        parts: Summaries of the blocks in order, tensors [summary_heads, r, n, head_dim], any strides.
        counts: How many of the first blocks each piece may choose from: numbers of the host, or [pieces] integers on the
            device, which the host does not read.
        topk: Blocks wanted.
        scopes: As in `select.block_scores`.
        question: [scopes, n_blocks or more] fp32 scores of the blocks for the question, not standardised, rows contiguous;
            or None.
        weight: Factor on the question's term.
        bounds: The summaries are bounds of keys (`summary.key_bounds`), [summary_heads, 1, n, 2 * head_dim].

    Returns:
        ids and valid as in `select.select_blocks`, valid None where the host knows that all are; and the scores
        [pieces, scopes, n_blocks], undefined for blocks that a piece may not choose.
    """
    if bounds:
        lookup = bound_lookup(lookup)
    each = [block_scores(lookup, part, scopes=scopes) for part in parts]
    scores = each[0] if len(each) == 1 else torch.cat(each, -1)
    n_blocks = scores.shape[-1]
    eligible = None
    if not always_full(counts, n_blocks):
        eligible = counts if isinstance(counts, torch.Tensor) else to_device(counts, scores.device)
    if question is not None:
        scores = standardise(scores, eligible) + weight * standardise(question[None, :, :n_blocks], eligible)
    k = min(topk, n_blocks)
    if eligible is None:
        return scores.topk(k, dim=-1).indices.sort(dim=-1).values, None, scores
    ids, valid = select_blocks(scores, eligible, k)
    return ids, None if always_full(counts, k) else valid, scores


def always_full(counts: Sequence[int] | torch.Tensor, k: int) -> bool:
    """Whether the host knows that every piece has `k` blocks to choose."""
    return not isinstance(counts, torch.Tensor) and min(counts) >= k


def to_device(counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """Numbers of the host as an int32 tensor on the device, which the host does not wait for (`torch.tensor` does)."""
    return torch.tensor(counts, dtype=torch.int32).to(device, non_blocking=True)
