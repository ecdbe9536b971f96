"""Pages in the host's memory: the device keeps the summaries and the blocks that were looked up last."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from typing_extensions import override

from qllm_kernels.dispatch import admit_pages
from qllm_kernels.residency import Residency
from qllm_runtime.memory.slabs import QuantisedSlab, Slab, copying
from qllm_runtime.memory.store import BlockStore, PagedKeys, Pages, summary_space, take


class OffloadedStore(BlockStore):
    """Blocks whose keys and values are kept by the host, pinned where the device is a GPU.

    Compact summaries stay on the device. Where every key represents its block, kernels that compare a question's tokens with
    all of them read the host's memory; what else looks up blocks reads their means and bounds, which others keep.

    Chosen blocks are fetched to slots on the device by a list that the device makes; those used longest ago give way. The host
    does not wait for what was chosen. Where pieces choose more than there are slots, half of these are filled for the next
    pieces while the device attends to the other half. A fork shares what lies on the host and has slots of its own.

    Args:
        device_blocks: Slots, at least twice the blocks of a lookup and as many as it compares by every key.
        reserve: Blocks expected; sizes the first slab of host memory.
        quantised: Keep them as fp8.
    """

    def __init__(self, device_blocks: int, reserve: int = 0, *, quantised: bool = False) -> None:
        super().__init__(reserve)
        self._device_blocks = device_blocks
        self._quantised = quantised
        self._slabs: tuple[Slab, ...] = ()  # one per run
        self._slots: torch.Tensor | None = None  # [device_blocks, kv_heads, 1, width]
        self._state: Residency | None = None
        self._reader: torch.device | None = None  # of keys on the host, which are summaries
        self._awaits = False  # copies to the host that the device was not told to wait for

    @override
    def append(self, key: torch.Tensor, value: torch.Tensor, summaries: torch.Tensor | None) -> None:
        m = key.shape[1]
        if self._own is None or self._n + m > self._own.key.shape[1]:
            self._add_slab(key, value, summaries, max(self._reserve, 2 * self._n, m, 8))
        assert self._own is not None
        new = slice(self._n, self._n + m)
        self._slabs[-1].write(self._n, key, value)
        self._awaits = True
        if summaries is None:
            self._reader = key.device
        else:
            self._own.summaries[:, :, new] = summaries
        self._n += m
        self._runs = (*self._inherited, self._own.first(self._n))

    def _add_slab(self, key: torch.Tensor, value: torch.Tensor, summaries: torch.Tensor | None, capacity: int) -> None:
        """What is on the host stays where it is: there may be more of it than can be held twice."""
        slab = (QuantisedSlab if self._quantised else Slab)(key, value, capacity)
        self._slabs = (*self._slabs, slab)
        self._inherited, self._n, self._reserve = self._runs, 0, 0
        space = None if summaries is None else summary_space(summaries, capacity)
        self._own = Pages.of(*slab.split(slab.data), space)

    @override
    def summaries(self, n_blocks: int, first: int = 0) -> list[torch.Tensor]:
        if self._reader is None:
            return super().summaries(n_blocks, first)
        self.synchronize(self._reader)
        spans = self._among(first, n_blocks)
        return [self._slabs[index].keys(rows.start, rows.stop).transpose(1, 2) for index, rows in spans]

    @override
    def synchronize(self, device: torch.device) -> None:
        """Let what follows on the device see everything that was copied to the host."""
        if self._awaits and device.type == "cuda":
            torch.cuda.current_stream(device).wait_stream(copying(device))
        self._awaits = False

    @override
    def in_place(self, ids: torch.Tensor, valid: torch.Tensor | None) -> PagedKeys | None:
        if ids.shape[0] * ids.shape[2] > self._device_blocks:
            return None
        table, copy = self._admit(ids, valid)
        self.synchronize(ids.device)
        copy()
        return self._paged(table)

    @override
    def in_turn(self, ids: torch.Tensor, valid: torch.Tensor | None) -> Iterator[tuple[slice, PagedKeys | None]]:
        pieces, _, k = ids.shape
        if pieces * k <= self._device_blocks:
            yield slice(0, pieces), self.in_place(ids, valid)
            return
        # half of the slots: what is fetched for the next pieces then never replaces what these ones read
        together = self._device_blocks // (2 * k)
        turns = [slice(at, min(at + together, pieces)) for at in range(0, pieces, together)]
        admitted = [self._admit(ids[rows], None if valid is None else valid[rows]) for rows in turns]
        fetches = _Fetches(ids.device)
        self._awaits = False
        for rows, (table, copy) in zip(turns, admitted, strict=True):
            fetches.run(copy)
            yield rows, self._paged(table)

    def _admit(self, ids: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, Callable[[], None]]:
        """Slots of chosen blocks as `in_place` takes them, [pieces, scopes, k], and what fetches those that are not there."""
        slots, state = self._tables(ids)
        table, moves, counts = admit_pages(state, ids, valid)
        ends = [0]
        for pages in self.pages:
            ends.append(ends[-1] + pages.key.shape[1])
        theirs = (
            [(moves, counts)] if len(ends) == 2 else [_moves_of(*e, moves, counts) for e in itertools.pairwise(ends)]
        )

        def copy() -> None:
            for slab, listed in zip(self._slabs, theirs, strict=True):
                slab.fetch(slots, *listed)

        return table, copy

    def _paged(self, table: torch.Tensor) -> PagedKeys:
        assert self._slots is not None
        return PagedKeys(*self._slabs[0].split(self._slots), table)

    @override
    def gather(self, ids: torch.Tensor, valid: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        pieces, scopes, k = ids.shape
        parts = []
        for _, paged in self.in_turn(ids, valid):
            assert paged is not None
            table = paged.table.transpose(0, 1).reshape(scopes, -1)
            parts.append((take(paged.key, table), take(paged.value, table)))
        key, value = (torch.cat(x, 1) for x in zip(*parts, strict=True))
        kv_heads = key.shape[0]
        return key.view(kv_heads, pieces, k, *key.shape[2:]), value.view(kv_heads, pieces, k, *value.shape[2:])

    @override
    def keys(self, ids: torch.Tensor) -> torch.Tensor:
        return self.gather(ids)[0]

    def _tables(self, ids: torch.Tensor) -> tuple[torch.Tensor, Residency]:
        """Slots, and tables of what they hold that know every block."""
        known = sum(map(len, self._slabs))
        if self._slots is None or self._state is None:
            # what is not chosen reads slot 0, which is the first to be filled
            self._slots = self._slabs[0].slots(self._device_blocks)
            self._state = Residency.empty(ids.shape[1], known, self._device_blocks, ids.device)
        more = known - self._state.slot_of.shape[1]
        if more:
            slot_of = torch.nn.functional.pad(self._state.slot_of, (0, more), value=-1)
            self._state = dataclasses.replace(self._state, slot_of=slot_of)
        return self._slots, self._state

    @override
    def _run(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._slabs[index].contents(self._runs[index].key.shape[1])

    @override
    def fork(self) -> OffloadedStore:
        child = OffloadedStore(self._device_blocks, quantised=self._quantised)
        child._inherited = child._runs = self._runs
        child._slabs, child._awaits, child._reader = self._slabs, self._awaits, self._reader
        return child

    def tally(self) -> tuple[int, int]:
        """Blocks looked up so far and those of them that were fetched (with one choice per head, of each head); waits."""
        if self._state is None:
            return 0, 0
        asked, fetched = self._state.tally.sum(0).tolist()
        return asked, fetched

    @property
    @override
    def like(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._slabs[0].like

    @override
    def nbytes(self) -> int:
        """Bytes on the device: summaries, slots and scales."""
        tables = () if self._state is None else tuple(vars(self._state).values())
        summaries = [pages.summaries for pages in self.pages] if self._reader is None else []
        held: tuple[torch.Tensor, ...] = (*summaries, *tables, *(() if self._slots is None else (self._slots,)))
        scales = sum(slab.device_bytes for slab in self._slabs)
        return scales + sum(x.nbytes for x in held)


def _moves_of(first: int, end: int, moves: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The moves [rows, length, 2] whose pages are among first .. end - 1, counted from `first`, and their numbers [rows]."""
    page, slot = moves.unbind(2)
    listed = torch.arange(moves.shape[1], device=moves.device) < counts[:, None]
    theirs = listed & (page >= first) & (page < end)
    order = theirs.to(torch.uint8).argsort(dim=1, descending=True)
    chosen = torch.stack((page.gather(1, order) - first, slot.gather(1, order)), 2)
    return chosen, theirs.sum(1, dtype=torch.int32)


class _Fetches:
    """Fetches from the host beside what a device computes; on a CPU, one after the other.

    Args:
        device: The device. What it was given to compute so far comes ahead of the first fetch.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _fetching(device)
        self._ahead = torch.cuda.current_stream(device).record_event() if self._stream else None

    def run(self, copy: Callable[[], None]) -> None:
        """Fetch for what is computed next.

        The fetch waits for what was computed up to the call before, not for what was given to the device since then.

        Args:
            copy: Starts the copies; what they read and write was made by the device's current stream.
        """
        if self._stream is None or self._ahead is None:
            copy()
            return
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(copying(self._device))
        self._stream.wait_event(self._ahead)
        with torch.cuda.stream(self._stream):
            copy()
        self._ahead = current.record_event()
        current.wait_stream(self._stream)


@functools.cache
def _fetching(device: torch.device) -> torch.cuda.Stream | None:
    """The stream that fetches from the host beside what a GPU computes."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
