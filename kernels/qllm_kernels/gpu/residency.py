"""The table of resident pages on the device: one program per row serves piece after piece."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qllm_kernels.gpu.shapes import power_of_2
from qllm_kernels.residency import Residency, check_room

MOST_SLOTS = 1024


@triton.jit(do_not_specialize=["pieces", "k", "n_pages", "n_slots"])
def admit(
    ids, valid, slots, moves, counts, slot_of, page_of, used, clock, tally, pieces, k, n_pages, n_slots,
    VALID: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Slots, evictions and fetches of one row."""
    i_row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    o_k, o_s = tl.arange(0, BK), tl.arange(0, BS)
    p_slot_of, p_page_of, p_used = slot_of + i_row * n_pages, page_of + i_row * n_slots, used + i_row * n_slots
    b_start = tl.load(clock + i_row)
    n_moves = 0
    n_asked = 0
    for i_p in range(pieces):
        # [BK]
        o_id = (i_p * rows + i_row) * k + o_k
        m_id = o_k < k
        if VALID:
            m_id = m_id & (tl.load(valid + o_id, mask=m_id, other=0) != 0)
        b_id = tl.load(ids + o_id, mask=m_id, other=0)
        b_slot = tl.load(p_slot_of + b_id, mask=m_id, other=0).to(tl.int32)
        m_miss = m_id & (b_slot < 0)
        tl.store(p_used + b_slot, b_start + i_p + 1, mask=m_id & (b_slot >= 0))
        tl.debug_barrier()
        # [BS] slots in the order in which they give way; there are enough before those of this call
        b_used = tl.load(p_used + o_s, mask=o_s < n_slots, other=0x7FFFFFFE)
        b_order = tl.sort(((b_used.to(tl.int64) + 1) << 32) | o_s).to(tl.int32)
        # [BK]
        b_rank = tl.cumsum(m_miss.to(tl.int32), 0) - 1
        b_given = tl.gather(b_order, tl.maximum(b_rank, 0), 0)
        b_old = tl.load(p_page_of + b_given, mask=m_miss, other=-1)
        # of fewer slots than threads each is read by several
        tl.debug_barrier()
        tl.store(p_slot_of + b_old, tl.full([BK], -1, tl.int32), mask=m_miss & (b_old >= 0))
        tl.store(p_slot_of + b_id, b_given, mask=m_miss)
        tl.store(p_page_of + b_given, b_id.to(tl.int32), mask=m_miss)
        tl.store(p_used + b_given, b_start + i_p + 1, mask=m_miss)
        p_move = moves + (i_row * pieces * k + n_moves + b_rank) * 2
        tl.store(p_move, b_id, mask=m_miss)
        tl.store(p_move + 1, b_given.to(tl.int64), mask=m_miss)
        b_slot = tl.where(m_miss, b_given, tl.where(m_id, b_slot, 0))
        tl.store(slots + o_id, b_slot.to(tl.int64), mask=o_k < k)
        n_asked += tl.sum(m_id.to(tl.int32), 0)
        n_moves += tl.sum(m_miss.to(tl.int32), 0)
        tl.debug_barrier()
    tl.store(counts + i_row, n_moves)
    tl.store(clock + i_row, b_start + pieces)
    tl.store(tally + 2 * i_row, tl.load(tally + 2 * i_row) + n_asked)
    tl.store(tally + 2 * i_row + 1, tl.load(tally + 2 * i_row + 1) + n_moves)


def cannot_serve(state: Residency, ids: torch.Tensor) -> str | None:
    """Why `admit_pages` does not take these arguments, or None."""
    if state.used.shape[1] > MOST_SLOTS:
        return f"{state.used.shape[1]} slots are more than {MOST_SLOTS}"
    return None


def admit_pages(
    state: Residency, ids: torch.Tensor, valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See :func:`qllm_kernels.residency.admit_pages`."""
    check_room(state, ids)
    pieces, rows, k = ids.shape
    n_pages, n_slots = state.slot_of.shape[1], state.used.shape[1]
    slots = torch.empty(pieces, rows, k, dtype=torch.int64, device=ids.device)
    moves = torch.empty(rows, pieces * k, 2, dtype=torch.int64, device=ids.device)
    counts = torch.empty(rows, dtype=torch.int32, device=ids.device)
    admit[(rows,)](
        ids.contiguous(), ids if valid is None else valid.contiguous(), slots, moves, counts,
        state.slot_of, state.page_of, state.used, state.clock, state.tally, pieces, k, n_pages, n_slots,
        VALID=valid is not None, BK=power_of_2(k), BS=power_of_2(n_slots), num_warps=4 if n_slots <= 256 else 8, num_stages=1,
    )  # fmt: skip
    return slots, moves, counts
