"""Pages: the evicted blocks of one layer, with their summaries. Append-only, shared between forks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from qllm_kernels.dispatch import backend


class Pages(NamedTuple):
    """A run of blocks, or the buffers of a growing one.

    Attributes:
        key: [kv_heads, n_blocks, block_size, head_dim], un-rotated.
        value: [kv_heads, n_blocks, block_size, value_dim].
        summaries: [summary_heads, r, n_blocks, head_dim]; a view of `key` where every key represents its block.
    """

    key: torch.Tensor
    value: torch.Tensor
    summaries: torch.Tensor

    @classmethod
    def of(cls, key: torch.Tensor, value: torch.Tensor, summaries: torch.Tensor | None) -> Pages:
        """Pages of these blocks; None: every key represents its block."""
        return cls(key, value, key.transpose(1, 2) if summaries is None else summaries)

    def first(self, n: int) -> Pages:
        """The first `n` blocks."""
        return Pages(self.key[:, :n], self.value[:, :n], self.summaries[:, :, :n])


class PagedKeys(NamedTuple):
    """Chosen blocks that are read where they lie.

    Attributes:
        key, value: [kv_heads, n_pages, block_size, head_dim or value_dim], each page contiguous.
        table: [pieces, scopes, k] the page of each block.
    """

    key: torch.Tensor
    value: torch.Tensor
    table: torch.Tensor


class BlockStore:
    """Blocks in order of eviction.

    A fork keeps reading the blocks there were and appends to pages of its own, so that any number of continuations of one
    document share what was read.

    Args:
        reserve: Blocks expected; sizes the first allocation.
    """

    def __init__(self, reserve: int = 0) -> None:
        self._inherited: tuple[Pages, ...] = ()
        self._runs: tuple[Pages, ...] = ()  # all blocks in order, a run per generation that has any
        self._reserve = reserve
        self._n = 0
        self._own: Pages | None = None

    def __len__(self) -> int:
        return sum(pages.key.shape[1] for pages in self._runs)

    @property
    def kv_heads(self) -> int:
        """Key/value heads of the blocks; 0 while there is none."""
        return self._runs[0].key.shape[0] if self._runs else 0

    @property
    def like(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of no token [kv_heads, 0, head_dim or value_dim]; there is a block."""
        return self._runs[0].key[:, 0, :0], self._runs[0].value[:, 0, :0]

    @property
    def pages(self) -> tuple[Pages, ...]:
        """All blocks in order, a run per generation, the last with its room for more blocks; the same until that ends."""
        return self._runs if self._own is None else (*self._inherited, self._own)

    def append(self, key: torch.Tensor, value: torch.Tensor, summaries: torch.Tensor | None) -> None:
        """Add m blocks.

        Args:
            key: [kv_heads, m, block_size, head_dim], un-rotated.
            value: [kv_heads, m, block_size, value_dim].
            summaries: [summary_heads, r, m, head_dim], or None: every key represents its block.
        """
        m = key.shape[1]
        if self._own is None or self._n + m > self._own.key.shape[1]:
            self._grow(
                Pages.of(key, value, summaries), max(self._reserve, 2 * self._n, self._n + m, 8), summaries is None
            )
        assert self._own is not None
        new = slice(self._n, self._n + m)
        self._own.key[:, new] = key
        self._own.value[:, new] = value
        if summaries is not None:
            self._own.summaries[:, :, new] = summaries
        self._n += m
        self._runs = (*self._inherited, self._own.first(self._n))

    def _grow(self, like: Pages, capacity: int, every_key: bool) -> None:
        heads, _, size, dim = like.key.shape
        if every_key:  # a head's keys in a row are scored by one product
            shape, order = (heads, capacity, size), (0, 1, 2, 3)
        else:  # a block in a row is fetched at once
            shape, order = (capacity, heads, size), (1, 0, 2, 3)
        key = like.key.new_empty(*shape, dim).permute(order)
        value = like.value.new_empty(*shape, like.value.shape[-1]).permute(order)
        grown = Pages.of(key, value, None if every_key else summary_space(like.summaries, capacity))
        if self._own is not None:
            for target, source in zip(grown.first(self._n), self._own.first(self._n), strict=True):
                target.copy_(source)
        self._own = grown

    def synchronize(self, device: torch.device) -> None:
        """Have what was appended in place for what `device` does next; ahead of a step that is recorded or run again."""

    def summaries(self, n_blocks: int, first: int = 0) -> list[torch.Tensor]:
        """Summaries of blocks first .. n_blocks - 1 in order, a tensor [summary_heads, r, n, head_dim] per generation."""
        return [self._runs[index].summaries[:, :, rows] for index, rows in self._among(first, n_blocks)]

    def _among(self, first: int, end: int) -> Iterator[tuple[int, slice]]:
        """Generations that have some of the blocks first .. end - 1, and where in them these are."""
        for index, pages in enumerate(self._runs):
            size = pages.key.shape[1]
            rows = slice(max(first, 0), min(end, size))
            if rows.start < rows.stop:
                yield index, rows
            first, end = first - size, end - size

    def in_place(self, ids: torch.Tensor, valid: torch.Tensor | None) -> PagedKeys | None:
        """Where chosen blocks can be read without a copy, until the next call; None: they must be gathered.

        Args:
            ids: [pieces, scopes, k], one scope for all kv heads or one per kv head; each row ascending.
            valid: [pieces, scopes, k], False for places that hold no choice; None: all do.
        """
        return PagedKeys(self.pages[0].key, self.pages[0].value, ids) if len(self.pages) == 1 else None

    def in_turn(self, ids: torch.Tensor, valid: torch.Tensor | None) -> Iterator[tuple[slice, PagedKeys | None]]:
        """`in_place` for as many pieces at a time as can be read without a copy, with the pieces; read before the next."""
        yield slice(0, ids.shape[0]), self.in_place(ids, valid)

    def gather(self, ids: torch.Tensor, valid: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of chosen blocks.

        Args:
            ids, valid: As in `in_place`.

        Returns:
            keys [kv_heads, pieces, k, block_size, head_dim] and values likewise; any finite numbers where there is no choice.
        """
        return self.keys(ids), _gathered([pages.value for pages in self.pages], ids)

    def keys(self, ids: torch.Tensor) -> torch.Tensor:
        """Copies of the keys alone, as `gather` returns them."""
        return _gathered([pages.key for pages in self.pages], ids)

    def keys_in_pages(self, ids: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Pages of keys [kv_heads, n_pages, block_size, head_dim], and where blocks are in them [pieces, scopes, k].

        Args:
            ids, valid: As in `in_place`.
        """
        paged = self.in_place(ids, valid)
        if paged is not None:
            return paged.key, paged.table
        place = torch.arange(ids.shape[0] * ids.shape[2], device=ids.device).view(ids.shape[0], 1, -1)
        return self.keys(ids).flatten(1, 2), place.expand_as(ids)

    def contents(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Copies of all blocks on the host, as `append` takes them; there is one."""
        runs = [self._run(index) for index in range(len(self._runs))]
        summaries = None
        if not any(_shares_keys(run) for run in self._runs):
            summaries = torch.cat([run.summaries.cpu() for run in self._runs], 2)
        key, value = (torch.cat([part.cpu() for part in parts], 1) for parts in zip(*runs, strict=True))
        return key, value, summaries

    def _run(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a run, in the dtype of the model."""
        return self._runs[index].key, self._runs[index].value

    def fork(self) -> BlockStore:
        """A store that continues after this one's present blocks."""
        child = BlockStore()
        child._inherited = child._runs = self._runs
        return child

    def nbytes(self) -> int:
        """Bytes of all pages, inherited ones included."""
        return sum(_nbytes(pages) for pages in self.pages)


def summary_space(like: torch.Tensor, capacity: int) -> torch.Tensor:
    """Room for summaries of `capacity` blocks, like these [summary_heads, r, any, head_dim]."""
    heads, r, _, dim = like.shape
    if r > 1 and backend(like.device) == "torch":
        # dot products of few queries with many summaries are faster along columns
        return like.new_empty(heads, r, dim, capacity).transpose(2, 3)
    return like.new_empty(heads, r, capacity, dim)


def _gathered(runs: list[torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Blocks `ids` [pieces, scopes, k] of runs [kv_heads, n, block_size, dim], [kv_heads, pieces, k, block_size, dim]."""
    pieces, scopes, k = ids.shape
    ids = ids[0] if pieces == 1 else ids.transpose(0, 1).reshape(scopes, pieces * k)
    if len(runs) == 1:
        found = take(runs[0], ids)
    else:
        # which run a block is in stays on a device: nothing waits for the host
        at_hand = ids.device.type == "cpu" and backend(ids.device) == "torch"
        end = int(ids.max()) + 1 if at_hand else sum(run.shape[1] for run in runs)
        first = 0
        for run in runs:
            if first < end:
                part = take(run, (ids - first).clamp(0, run.shape[1] - 1))
                found = torch.where((ids >= first)[:, :, None, None], part, found) if first else part
                first += run.shape[1]
    return found.view(-1, pieces, k, *found.shape[2:])


def take(pages: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Pages `ids` [scopes, m] of `pages` [kv_heads, n, block_size, dim], as [kv_heads, m, block_size, dim]."""
    kv_heads, n, size, dim = pages.shape
    row = size * dim
    head, page, *within = pages.stride()
    if within == [dim, 1] and head % row == 0 == page % row:
        # rows of the buffer of which `pages` are the first: a view that is not contiguous would be copied as a whole
        if len(ids) == 1 and page == row and head >= n * row:  # with one head, its stride says nothing
            heads_of_rows = pages.as_strided((kv_heads, head // row, row), (head, row, 1))
            return heads_of_rows.index_select(1, ids[0]).view(kv_heads, -1, size, dim)
        rows = pages.as_strided((((kv_heads - 1) * head + (n - 1) * page) // row + 1, row), (row, 1))
        firsts = torch.arange(kv_heads, device=ids.device).mul_(head // row)[:, None]
        index = torch.add(firsts, ids, alpha=page // row)
        return rows.index_select(0, index.flatten()).view(kv_heads, -1, size, dim)
    heads = torch.arange(kv_heads, device=ids.device)[:, None]
    return pages[heads, ids]


def _nbytes(pages: Pages) -> int:
    return pages.key.nbytes + pages.value.nbytes + (0 if _shares_keys(pages) else pages.summaries.nbytes)


def _shares_keys(pages: Pages) -> bool:
    """Whether the keys themselves are the summaries."""
    return pages.summaries.data_ptr() == pages.key.data_ptr()
