"""Which pages are in the hot buffer of a GPU and which give way: least recently used, decided where the choice was made."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Residency:
    """Tables of hot buffers, one row each: a layer's, or one per kv head where these choose for themselves.

    Attributes:
        slot_of: [rows, n_pages] int32, the slot that holds a page; -1: not resident.
        page_of: [rows, n_slots] int32, the page in a slot; -1: empty.
        used: [rows, n_slots] int32, the time of a slot's last use; -1: never.
        clock: [rows] int32, pieces served so far.
        tally: [rows, 2] int64, pages asked for and pages fetched so far.
    """

    slot_of: torch.Tensor
    page_of: torch.Tensor
    used: torch.Tensor
    clock: torch.Tensor
    tally: torch.Tensor

    @classmethod
    def empty(cls, rows: int, n_pages: int, n_slots: int, device: torch.device) -> Residency:
        """Tables for `n_pages` pages and `n_slots` slots, with nothing resident."""

        def none(*shape: int) -> torch.Tensor:
            return torch.full(shape, -1, dtype=torch.int32, device=device)

        tally = torch.zeros(rows, 2, dtype=torch.int64, device=device)
        return cls(none(rows, n_pages), none(rows, n_slots), none(rows, n_slots), none(rows) + 1, tally)


def admit_pages(
    state: Residency, ids: torch.Tensor, valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give every chosen page a slot; pages that are not resident take those that were used longest ago.

    Pieces are served one after the other, and no page of this call gives way to another of it. Among slots used at the same
    time the lower gives way, empty ones before all others. Nothing is read by the host.

    Args:
        state: Tables, updated in place.
        ids: [pieces, rows, k] pages, distinct within a piece and row.
        valid: [pieces, rows, k], False where an entry does not count; None: all do.

    Returns:
        slots [pieces, rows, k] int64 (0 for entries that don't count); moves [rows, pieces * k, 2] int64 of page and slot to be
        fetched before slots are read; and counts [rows] int32, how many of a row's moves there are.

    Raises:
        ValueError: The buffer has fewer slots than ids may ask for.
    """
    check_room(state, ids)
    pieces, rows, k = ids.shape
    slots = torch.zeros(pieces, rows, k, dtype=torch.int64, device=ids.device)
    moves = torch.zeros(rows, pieces * k, 2, dtype=torch.int64, device=ids.device)
    counts = torch.zeros(rows, dtype=torch.int32, device=ids.device)
    for row in range(rows):
        slot_of, page_of, used = (x[row] for x in (state.slot_of, state.page_of, state.used))
        start = int(state.clock[row])
        fetched: list[tuple[int, int]] = []
        asked = 0
        for piece in range(pieces):
            counted = torch.ones(k, dtype=torch.bool) if valid is None else valid[piece, row]
            chosen = [(place, int(ids[piece, row, place])) for place in range(k) if counted[place]]
            asked += len(chosen)
            for _, page in chosen:
                if slot_of[page] >= 0:
                    used[slot_of[page]] = start + piece + 1
            free = sorted(range(len(used)), key=lambda slot: (int(used[slot]), slot))
            for place, page in chosen:
                if slot_of[page] < 0:
                    slot = free.pop(0)
                    if page_of[slot] >= 0:
                        slot_of[page_of[slot]] = -1
                    slot_of[page], page_of[slot], used[slot] = slot, page, start + piece + 1
                    fetched.append((page, slot))
                slots[piece, row, place] = slot_of[page]
        state.clock[row] = start + pieces
        counts[row] = len(fetched)
        state.tally[row] += torch.tensor([asked, len(fetched)], device=ids.device)
        if fetched:
            moves[row, : len(fetched)] = torch.tensor(fetched)
    return slots, moves, counts


def check_room(state: Residency, ids: torch.Tensor) -> None:
    """Raise ValueError where the buffer has fewer slots than `ids` [pieces, rows, k] may ask for."""
    pieces, _, k = ids.shape
    n_slots = state.used.shape[1]
    if pieces * k > n_slots:
        raise ValueError(
            f"{pieces} pieces may choose {pieces * k} pages, the buffer has {n_slots} slots: serve fewer at a time."
        )
