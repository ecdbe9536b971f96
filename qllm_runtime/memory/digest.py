"""What stands for a whole block in lookups where every key represents it but cannot be scored for every token of a text."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Self

import torch


class BlockDigest:
    """One vector per key/value head of every block, in order of eviction. Append-only; forks share what there was.

    Args:
        make: Makes the vectors, [kv_heads, 1, m, width], of keys [kv_heads, m, block_size, head_dim].
    """

    def __init__(self, make: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._make = make
        self._inherited: tuple[torch.Tensor, ...] = ()
        self._own: torch.Tensor | None = None  # [kv_heads, 1, capacity, width]
        self._n = 0

    def append(self, key: torch.Tensor) -> None:
        """Add blocks [kv_heads, m, block_size, head_dim]."""
        new = self._make(key)
        n = self._n + new.shape[2]
        if self._own is None or n > self._own.shape[2]:
            # a block's vectors in a row: heads that choose together need one product
            shape = (max(2 * self._n, n, 64), new.shape[0], 1, new.shape[3])
            grown = new.new_empty(shape).permute(1, 2, 0, 3)
            if self._own is not None:
                grown[:, :, : self._n] = self._own[:, :, : self._n]
            self._own = grown
        self._own[:, :, self._n : n] = new
        self._n = n

    def first(self, n_blocks: int) -> list[torch.Tensor]:
        """Vectors of the first blocks, a tensor [kv_heads, 1, n, width] per generation."""
        parts = []
        for run in self._runs():
            parts.append(run[:, :, :n_blocks])
            n_blocks -= parts[-1].shape[2]
            if not n_blocks:
                break
        return parts

    def _runs(self) -> tuple[torch.Tensor, ...]:
        return self._inherited if self._own is None else (*self._inherited, self._own[:, :, : self._n])

    def runs(self) -> list[torch.Tensor]:
        """Vectors of all blocks as in `first`, the last tensor with the room it has for more: the same until that ends."""
        return [*self._inherited] if self._own is None else [*self._inherited, self._own]

    def fork(self) -> Self:
        """An independent continuation."""
        child = copy.copy(self)
        child._inherited, child._own, child._n = self._runs(), None, 0
        return child

    def nbytes(self) -> int:
        """Bytes of all vectors, inherited ones included."""
        own = 0 if self._own is None else self._own.nbytes
        return own + sum(run.nbytes for run in self._inherited)
