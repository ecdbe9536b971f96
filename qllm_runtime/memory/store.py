"""Pages: the evicted blocks of one layer, with their summaries. Append-only, shared between forks."""

from __future__ import annotations

import torch

_ALONG = (1, 1, 2)  # dimension that counts blocks in keys, values, summaries


class BlockStore:
    """Blocks in order of eviction.

    A fork keeps reading its parent's blocks and appends to pages of its own, so that any number of continuations of one
    document share what was read.

    Args:
        reserve: Blocks expected; sizes the first allocation.
        parent: Store whose present blocks come before this one's.
    """

    def __init__(self, reserve: int = 0, parent: BlockStore | None = None) -> None:
        self._parent = parent
        self._offset = 0 if parent is None else len(parent)
        self._reserve = reserve
        self._n = 0
        self._pages: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._joined: torch.Tensor | None = None  # summaries of parent and own blocks in a row, for scoring
        self._n_joined = 0

    def __len__(self) -> int:
        return self._offset + self._n

    @property
    def kv_heads(self) -> int:
        """Key/value heads of the blocks; 0 while there is none."""
        if self._pages is not None:
            return self._pages[0].shape[0]
        return 0 if self._parent is None else self._parent.kv_heads

    def append(self, key: torch.Tensor, value: torch.Tensor, summaries: torch.Tensor) -> None:
        """Add m blocks.

        Args:
            key: [kv_heads, m, block_size, head_dim], un-rotated.
            value: [kv_heads, m, block_size, value_dim].
            summaries: [summary_heads, r, m, head_dim].
        """
        m = key.shape[1]
        new = (key, value, summaries)
        if self._pages is None or self._n + m > self._pages[0].shape[1]:
            capacity = max(self._reserve, 2 * self._n, self._n + m, 8)
            grown = [
                x.new_empty(*x.shape[:along], capacity, *x.shape[along + 1 :])
                for x, along in zip(new, _ALONG, strict=True)
            ]
            if self._pages is not None:
                for target, source, along in zip(grown, self._pages, _ALONG, strict=True):
                    target.narrow(along, 0, self._n).copy_(source.narrow(along, 0, self._n))
            self._pages = (grown[0], grown[1], grown[2])
        for target, source, along in zip(self._pages, new, _ALONG, strict=True):
            target.narrow(along, self._n, m).copy_(source)
        self._n += m

    def summaries(self) -> torch.Tensor:
        """[summary_heads, r, n_blocks, head_dim] of all blocks, the parent's first."""
        own = None if self._pages is None else self._pages[2][:, :, : self._n]
        if self._parent is None or len(self._parent) == 0:
            assert own is not None
            return own
        if own is None:
            return self._parent.summaries()[:, :, : self._offset]
        if self._joined is None or self._joined.shape[2] < len(self):
            base = self._parent.summaries()[:, :, : self._offset]
            self._joined = base.new_empty(*base.shape[:2], self._offset + 2 * self._n + 8, base.shape[3])
            self._joined[:, :, : self._offset] = base
            self._n_joined = 0
        new = slice(self._n_joined, self._n)
        if new.start < new.stop:
            self._joined[:, :, self._offset + new.start : self._offset + new.stop] = own[:, :, new]
            self._n_joined = self._n
        return self._joined[:, :, : len(self)]

    def gather(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of blocks.

        Args:
            ids: [scopes, m]; one row for all kv heads or one per kv head.

        Returns:
            keys [kv_heads, m, block_size, head_dim] and values [kv_heads, m, block_size, value_dim].
        """
        if self._parent is None or len(self._parent) == 0:
            return self._own(ids)
        if self._n == 0:
            return self._parent.gather(ids)
        inherited = ids < self._offset
        base = self._parent.gather(ids.clamp(max=self._offset - 1))
        own = self._own((ids - self._offset).clamp(min=0))
        where = inherited[:, :, None, None]
        return torch.where(where, base[0], own[0]), torch.where(where, base[1], own[1])

    def _own(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._pages is not None
        key, value, _ = self._pages
        if ids.shape[0] == 1:
            return key.index_select(1, ids[0]), value.index_select(1, ids[0])
        heads = torch.arange(key.shape[0], device=ids.device)[:, None]
        return key[heads, ids], value[heads, ids]

    def fork(self) -> BlockStore:
        """A store that continues after this one's blocks."""
        return BlockStore(parent=self)

    def nbytes(self) -> int:
        """Bytes of all pages, the parent's included."""
        own = 0 if self._pages is None else sum(x.nbytes for x in self._pages)
        return own + (0 if self._parent is None else self._parent.nbytes())
