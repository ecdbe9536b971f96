"""The question's term of the block score (paper eq. 5): computed once per question and block, then only read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qllm_kernels.dispatch import block_scores


class Guide:
    """Scores of all blocks for one question.

    Every token of the question looks for its own best match in a block; matches are summed over tokens and heads. For
    blocks with one summary this is eq. 5 itself; the mean query of all tokens, equal to it there, drowns single words as
    soon as several summaries compete.

    Args:
        tokens: [heads, tokens, head_dim] the question's queries in far form, fp32.
        scopes: Groups of heads that choose together.
    """

    def __init__(self, tokens: torch.Tensor, scopes: int) -> None:
        self._tokens = tokens.transpose(0, 1)
        self._scopes = scopes
        self._scores = tokens.new_empty(scopes, 0)
        self._n = 0  # blocks they are known of

    def scores(self, summaries: Sequence[torch.Tensor], room: int) -> torch.Tensor:
        """Scores, [scopes, `room` or more]: those of these blocks first, then anything.

        Args:
            summaries: Summaries of all blocks in order, tensors [summary_heads, r, n, head_dim].
            room: Blocks for which there is to be a place; until more are asked for, it is the same tensor that is filled.
        """
        self._extend(summaries, room)
        return self._scores

    def _extend(self, summaries: Sequence[torch.Tensor], room: int = 0) -> None:
        known, first, n = self._n, 0, sum(part.shape[2] for part in summaries)
        if max(n, room) > self._scores.shape[1]:
            grown = self._scores.new_empty(self._scopes, max(n, room, 2 * known))
            grown[:, :known] = self._scores[:, :known]
            self._scores = grown
        for part in summaries:
            end = first + part.shape[2]
            if end > known:
                fresh = part[:, :, max(known - first, 0) :]
                scores = block_scores(self._tokens, fresh, scopes=self._scopes)
                self._scores[:, end - fresh.shape[2] : end] = scores.sum(0)
            first = end
        self._n = max(n, known)
