"""The question's term of the block score (paper eq. 5): computed once per question and block, then only read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qllm_kernels.dispatch import block_scores


class QuestionScores:
    """Scores of all blocks for one question.

    Every token of the question looks for its own best match in a block; matches are summed over tokens and heads. For
    blocks with one summary this is eq. 5 itself; the mean query of all tokens, equal to it there, drowns single words as
    soon as several summaries compete.

    Args:
        tokens: [heads, tokens, head_dim] the question's queries in far form, fp32.
        scopes: Groups of heads that choose together.

    Attributes:
        known: Blocks whose scores are known, the first ones.
    """

    def __init__(self, tokens: torch.Tensor, scopes: int) -> None:
        self._tokens = tokens.transpose(0, 1)
        self._scopes = scopes
        self._scores = tokens.new_empty(scopes, 0)
        self.known = 0

    def scores(self, fresh: Sequence[torch.Tensor], room: int) -> torch.Tensor:
        """Scores, [scopes, `room` or more]: those of the known blocks first, then anything.

        Args:
            fresh: Summaries of the blocks that follow the `known` ones, in order, tensors [summary_heads, r, n, head_dim].
            room: Blocks for which there is to be a place; until more are asked for, it is the same tensor that is filled.
        """
        self._make_room(max(self.known + sum(part.shape[2] for part in fresh), room))
        for part in fresh:
            end = self.known + part.shape[2]
            self._scores[:, self.known : end] = block_scores(self._tokens, part, scopes=self._scopes).sum(0)
            self.known = end
        return self._scores

    def _make_room(self, n: int) -> None:
        if n > self._scores.shape[1]:
            # kernels are compiled anew for rows of another alignment
            room = (max(n, 2 * self.known) + 15) // 16 * 16
            grown = self._scores.new_empty(self._scopes, room)
            grown[:, : self.known] = self._scores[:, : self.known]
            self._scores = grown
