"""Mean keys of blocks, for lookups by the mean query of many tokens."""

from __future__ import annotations

import torch

from qllm_kernels.dispatch import mean_keys


class BlockMeans:
    """The mean key of every block, in order of eviction. Append-only; forks share what there was.

    Where every key represents its block, scoring all keys for every piece of a long text would cost more than reading it.
    A piece's query is a mean itself and finds no single key; it is compared with means (the product of two means is the
    mean of all products, eq. 6). Single tokens are compared with every key.
    """

    def __init__(self) -> None:
        self._inherited: tuple[torch.Tensor, ...] = ()
        self._own: torch.Tensor | None = None  # [kv_heads, 1, capacity, head_dim]
        self._n = 0

    def append(self, key: torch.Tensor) -> None:
        """Add the means of blocks [kv_heads, m, block_size, head_dim]."""
        new = mean_keys(key)
        n = self._n + new.shape[2]
        if self._own is None or n > self._own.shape[2]:
            grown = new.new_empty(*new.shape[:2], max(2 * self._n, n, 64), new.shape[3])
            if self._own is not None:
                grown[:, :, : self._n] = self._own[:, :, : self._n]
            self._own = grown
        self._own[:, :, self._n : n] = new
        self._n = n

    def first(self, n_blocks: int) -> list[torch.Tensor]:
        """Means of the first blocks, a tensor [kv_heads, 1, n, head_dim] per generation."""
        parts = []
        for run in self._runs():
            parts.append(run[:, :, :n_blocks])
            n_blocks -= parts[-1].shape[2]
            if not n_blocks:
                break
        return parts

    def _runs(self) -> tuple[torch.Tensor, ...]:
        return self._inherited if self._own is None else (*self._inherited, self._own[:, :, : self._n])

    def fork(self) -> BlockMeans:
        """An independent continuation."""
        child = BlockMeans()
        child._inherited = self._runs()
        return child

    def nbytes(self) -> int:
        """Bytes of all means, inherited ones included."""
        own = 0 if self._own is None else self._own.nbytes
        return own + sum(run.nbytes for run in self._inherited)
