"""The question as a segment of its own: pinned keys and values, and the queries that guide every lookup."""

from __future__ import annotations

import copy
from typing import Self

import torch


class PinnedQuery:
    """The question's tokens (paper eq. 2, segment Q) and its queries (eq. 5). A new question replaces the old one.

    Attributes:
        tokens: [heads, tokens, head_dim] the question's un-rotated queries, fp32; None before the first is complete.
        key, value: [kv_heads, tokens, head_dim], un-rotated; tokens among the initial ones are left out.
        positions: [tokens] absolute indices of these tokens.
        end: Absolute index after the last of them.
    """

    def __init__(self) -> None:
        self.tokens: torch.Tensor | None = None
        self.key = self.value = self.positions = torch.empty(0)
        self.end = 0
        self._spans: list[tuple[int, int]] = []
        self._parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def announce(self, start: int, end: int) -> None:
        """The tokens [start, end) to come are a question, after those announced before."""
        self._spans = [*self._spans, (start, end)]

    @property
    def awaited(self) -> tuple[int, int] | None:
        """Span of the next question that is not complete."""
        return self._spans[0] if self._spans else None

    def awaits(self, token: int) -> bool:
        """Whether a token belongs to the next question that is not complete."""
        return bool(self._spans) and self._spans[0][0] <= token < self._spans[0][1]

    def capture(self, first: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, n_init: int) -> None:
        """Keep what belongs to an announced span; with its last token the question takes effect.

        Args:
            first: Absolute index of the first of the n tokens.
            query: [heads, n, head_dim], un-rotated.
            key, value: [kv_heads, n, head_dim], un-rotated.
            n_init: Tokens before this index are initial tokens and pinned already.
        """
        while self._spans and self._spans[0][0] < first + query.shape[1]:
            start, end = self._spans[0]
            rows = slice(max(start - first, 0), min(end - first, query.shape[1]))
            self._parts.append((query[:, rows].float(), key[:, rows].clone(), value[:, rows].clone()))
            if first + rows.stop < end:
                return
            self.tokens = torch.cat([part[0] for part in self._parts], dim=1)
            skip = max(0, n_init - start)
            self.key = torch.cat([part[1] for part in self._parts], dim=1)[:, skip:]
            self.value = torch.cat([part[2] for part in self._parts], dim=1)[:, skip:]
            self.positions = torch.arange(start, end, device=key.device)[skip:]
            self.end = end
            self._spans, self._parts = self._spans[1:], []

    def fork(self) -> Self:
        """An independent copy."""
        child = copy.copy(self)
        child._parts = list(self._parts)
        return child
