"""Attention of pieces to window, pages and loose far keys under one softmax, in one launch.

Few queries split the keys over programs; the program that ends last joins their partial results.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qllm_kernels.attention import FarSegment
from qllm_kernels.gpu.counters import completion_counters
from qllm_kernels.gpu.segments import cannot_serve as cannot_serve
from qllm_kernels.gpu.segments import far_arguments, logit_factors
from qllm_kernels.gpu.shapes import Target, power_of_2, target

_PROGRAMS = 256  # wanted at least, where keys can be split
_JOINED = 4096  # elements of partial results at a time


@triton.jit
def fold_tile(
    p_q, m_q, b_q, p_k, p_v, m_n, m_visible, b_m, b_l, b_o, factor, cap, o_d, o_v,
    D: tl.constexpr, DV: tl.constexpr, SOFTCAP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys into the running softmax: rows' maxima and sums in base 2, un-normalised output.

    p_q [BM], p_k [BN] and p_v [BN] point to vectors; b_q [BM, BD] are the queries, which are read anew in parts of BC
    dimensions where BC < BD. m_n [BN] are the keys that exist, m_visible those a row sees, [BM, BN] or broadcastable to it;
    both None: all.
    """
    # [1, BV], with m_n [BN, BV]
    m_v = (o_v < DV)[None, :]
    if m_n is not None:
        m_v = m_n[:, None] & m_v
    if b_q.shape[1] > BC:
        b_s = tl.zeros([p_q.shape[0], p_k.shape[0]], tl.float32)
        for i_d in tl.static_range(0, b_q.shape[1], BC):
            o_c = i_d + tl.arange(0, BC)
            m_c = (o_c < D)[None, :]
            b_part = tl.load(p_q[:, None] + o_c[None, :], mask=m_q[:, None] & m_c, other=0.0)
            if m_n is not None:
                m_c = m_n[:, None] & m_c
            b_k = tl.load(p_k[:, None] + o_c[None, :], mask=m_c, other=0.0)
            b_s = tl.dot(b_part, tl.trans(b_k), b_s, input_precision="tf32x3")
    else:
        m_k = (o_d < D)[None, :]
        if m_n is not None:
            m_k = m_n[:, None] & m_k
        b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_k, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3")
    b_v = tl.load(p_v[:, None] + o_v[None, :], mask=m_v, other=0.0)
    # [BM, BN]
    b_s = b_s * factor
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (e^2x + 1)
        b_s = cap * (1.0 - 2.0 / (tl.exp2(b_s) + 1.0))
    if m_visible is not None:
        b_s = tl.where(m_visible, b_s, float("-inf"))
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
    # rows that have seen nothing yet keep zeros
    b_base = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    b_p = tl.exp2(b_s - b_base[:, None])
    b_keep = tl.exp2(b_m - b_base)
    b_l = b_l * b_keep + tl.sum(b_p, 1)
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_keep[:, None], input_precision="tf32x3")
    return b_m_new, b_l, b_o


@triton.jit
def merge_parts(
    parts, part_lse, out, lse, o_row, m_row, o_v, n_rows,
    SPLITS: tl.constexpr, DV: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Join the partial results of all splits for the rows o_row [BR], BS splits at a time, into the softmax over all keys."""
    # [SPLITS, BR]
    o_s = tl.arange(0, SPLITS).to(tl.int64)
    b_lse = tl.load(part_lse + o_s[:, None] * n_rows + o_row[None, :], mask=m_row[None, :], other=0.0)
    b_m = tl.max(b_lse, 0)
    b_sum = tl.sum(tl.exp(b_lse - b_m[None, :]), 0)
    # [BR, BV]
    b_o = tl.zeros([o_row.shape[0], o_v.shape[0]], tl.float32)
    m_part = (m_row[:, None] & (o_v < DV)[None, :])[None, :, :]
    for i_s in range(0, SPLITS, BS):
        # [BS, BR], [BS, BR, BV]
        o_part = (i_s + tl.arange(0, BS).to(tl.int64))[:, None] * n_rows + o_row[None, :]
        b_w = tl.exp(tl.load(part_lse + o_part, mask=m_row[None, :], other=0.0) - b_m[None, :])
        b_part = tl.load(parts + (o_part * DV)[:, :, None] + o_v[None, None, :], mask=m_part, other=0.0)
        b_o += tl.sum(b_part * b_w[:, :, None], 0)
    m_out = m_row[:, None] & (o_v < DV)[None, :]
    p_out = out + o_row[:, None] * DV + o_v[None, :]
    tl.store(p_out, (b_o / b_sum[:, None]).to(out.dtype.element_ty), mask=m_out)
    tl.store(lse + o_row, b_m + tl.log(b_sum), mask=m_row)


@triton.jit(do_not_specialize=["slot", "back", "length", "n_loose", "k"])  # they change from call to call
def segment_attention(
    near, far, out, lse, parts, part_lse, done,
    window_key, window_value, loose_key, loose_value, hidden, page_key, page_value, table, n_chosen,
    stride_near_head, stride_near_row, stride_far_head, stride_far_row,
    stride_window_key_head, stride_window_key_row, stride_window_value_head, stride_window_value_row,
    stride_loose_key_head, stride_loose_key_piece, stride_loose_key_row,
    stride_loose_value_head, stride_loose_value_piece, stride_loose_value_row,
    stride_page_key_head, stride_page_key_page, stride_page_value_head, stride_page_value_page,
    slot, back, length, n_loose, k, factor, cap,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr, SCOPES: tl.constexpr,
    LOOSE: tl.constexpr, HIDDEN: tl.constexpr, PAGES: tl.constexpr, COUNTED: tl.constexpr, SOFTCAP: tl.constexpr,
    SPLITS: tl.constexpr, ON_DEVICE: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
    BR: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """BM query rows (token after token, the heads of a group side by side) of one piece and kv head, one split of the keys.

    With ON_DEVICE, `slot` and `back` point to those of each piece, which is a sequence of its own. With WIDE, slots may lie
    2^31 elements apart.
    """
    i_m, i_h, i_p = tl.program_id(0) // SPLITS, tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_split = tl.program_id(0) % SPLITS
    kv_heads, pieces = tl.num_programs(1), tl.num_programs(2)
    # [BM]
    o_m = i_m * BM + tl.arange(0, BM)
    o_t = o_m // GROUP
    m_m = o_t < length
    o_head, o_row = i_h * GROUP + o_m % GROUP, i_p * length + o_t
    o_n, o_d, o_v = tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BV)
    i_scope = i_h * SCOPES // kv_heads

    if ON_DEVICE:
        b_slot, b_back = tl.load(slot + i_p).to(tl.int32), tl.load(back + i_p).to(tl.int32)
        if WIDE:
            b_slot = b_slot.to(tl.int64)
    else:
        b_slot, b_back = slot + i_p * length, back
    # tiles: window keys all rows see, window keys at the rows' own tokens, pages, loose keys
    i_first = (i_m * BM) // GROUP
    n_window = b_back + tl.minimum((i_m * BM + BM - 1) // GROUP + 1, length)
    t_full = (b_back + i_first + 1) // BN
    t_window = tl.cdiv(n_window, BN)
    t_pages = t_window
    t_all = t_window
    if PAGES:
        n_pages = k
        if COUNTED:
            n_pages = tl.minimum(tl.load(n_chosen + i_p).to(tl.int32), k)
        n_paged = n_pages * PAGE
        t_pages += tl.cdiv(n_paged, BN)
        t_all = t_pages
    if LOOSE:
        t_all = t_pages + tl.cdiv(n_loose, BN)
    t_begin, t_end = 0, t_all
    if SPLITS > 1:
        t_begin = tl.cdiv(t_all, SPLITS) * i_split
        t_end = tl.minimum(t_begin + tl.cdiv(t_all, SPLITS), t_all)

    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, BV], tl.float32)

    # [BM], [BM, BD]
    p_q = near + o_head * stride_near_head + o_row * stride_near_row
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)
    p_k = window_key + i_h * stride_window_key_head + b_slot * stride_window_key_row
    p_v = window_value + i_h * stride_window_value_head + b_slot * stride_window_value_row
    for i_t in range(t_begin, tl.minimum(t_end, t_full)):
        o_k = (i_t * BN + o_n).to(tl.int64)
        b_m, b_l, b_o = fold_tile(
            p_q, m_m, b_q, p_k + o_k * stride_window_key_row, p_v + o_k * stride_window_value_row,
            None, None, b_m, b_l, b_o, factor, cap, o_d, o_v, D, DV, SOFTCAP, BC,
        )  # fmt: skip
    for i_t in range(tl.maximum(t_begin, t_full), tl.minimum(t_end, t_window)):
        o_k = (i_t * BN + o_n).to(tl.int64)
        b_m, b_l, b_o = fold_tile(
            p_q, m_m, b_q, p_k + o_k * stride_window_key_row, p_v + o_k * stride_window_value_row,
            o_k < n_window, o_k[None, :] <= b_back + o_t[:, None], b_m, b_l, b_o, factor, cap, o_d, o_v, D, DV, SOFTCAP, BC,
        )  # fmt: skip

    if PAGES or LOOSE:
        p_q = far + o_head * stride_far_head + o_row * stride_far_row
        b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)
    if PAGES:
        p_table = table + (i_p * SCOPES + i_scope) * k
        for i_t in range(tl.maximum(t_begin, t_window), tl.minimum(t_end, t_pages)):
            o_k = (i_t - t_window) * BN + o_n
            m_n = o_k < n_paged
            # [BN]
            b_page = tl.load(p_table + o_k // PAGE, mask=m_n, other=0).to(tl.int64)
            o_in = (o_k % PAGE).to(tl.int64)
            p_page_key = page_key + i_h * stride_page_key_head + b_page * stride_page_key_page + o_in * D
            p_page_value = page_value + i_h * stride_page_value_head + b_page * stride_page_value_page + o_in * DV
            b_m, b_l, b_o = fold_tile(
                p_q, m_m, b_q, p_page_key, p_page_value,
                m_n, m_n[None, :], b_m, b_l, b_o, factor, cap, o_d, o_v, D, DV, SOFTCAP, BC,
            )  # fmt: skip
    if LOOSE:
        p_k = loose_key + i_h * stride_loose_key_head + i_p * stride_loose_key_piece
        p_v = loose_value + i_h * stride_loose_value_head + i_p * stride_loose_value_piece
        for i_t in range(tl.maximum(t_begin, t_pages), t_end):
            o_k = ((i_t - t_pages) * BN + o_n).to(tl.int64)
            m_n = o_k < n_loose
            m_seen = m_n
            if HIDDEN:
                m_seen = m_n & (tl.load(hidden + (i_p * SCOPES + i_scope) * n_loose + o_k, mask=m_n, other=1) == 0)
            b_m, b_l, b_o = fold_tile(
                p_q, m_m, b_q, p_k + o_k * stride_loose_key_row, p_v + o_k * stride_loose_value_row,
                m_n, m_seen[None, :], b_m, b_l, b_o, factor, cap, o_d, o_v, D, DV, SOFTCAP, BC,
            )  # fmt: skip

    # a split may have seen nothing: zeros that weigh nothing
    b_o = b_o / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
    b_lse = (b_m + tl.log2(b_l)) * 0.6931471805599453
    m_out = m_m[:, None] & (o_v < DV)[None, :]
    o_out = o_head * (pieces * length) + o_row
    if SPLITS == 1:
        tl.store(out + o_out[:, None] * DV + o_v[None, :], b_o.to(out.dtype.element_ty), mask=m_out)
        tl.store(lse + o_out, b_lse, mask=m_m)
    else:
        n_rows = kv_heads * GROUP * pieces * length
        o_part = i_split * n_rows + o_out
        tl.store(parts + o_part[:, None] * DV + o_v[None, :], b_o, mask=m_out)
        tl.store(part_lse + o_part, tl.where(b_l == 0.0, float("-inf"), b_lse), mask=m_m)
        # the program's stores come before its count, the others' before what the last one reads
        tl.debug_barrier()
        p_done = done + i_p * kv_heads + i_h
        b_done = tl.atomic_add(p_done, 1, sem="acq_rel")
        if b_done == SPLITS - 1:
            tl.store(p_done, 0)
            # [BR] the rows there are
            o_r = tl.arange(0, BR)
            o_join = (i_h * GROUP + o_r % GROUP) * (pieces * length) + i_p * length + o_r // GROUP
            merge_parts(parts, part_lse, out, lse, o_join, o_r // GROUP < length, o_v, n_rows, SPLITS, DV, BS)


def constants(rows: int, dim: int, value_dim: int, size: int, on: Target) -> dict[str, Any]:
    """Sizes of the tiles for `rows` packed query rows and elements of `size` bytes, and launch options."""
    b_d, b_v = power_of_2(dim, 16), power_of_2(value_dim, 16)
    wide = max(b_d, b_v)
    if size == 4:
        tile = (16, 32 if wide <= 128 else 16, 8 if on.warp_groups else 4, 1)
    elif rows <= 16:
        tile = (16, 64 if wide <= 128 else 32, 4, 3 if wide <= 128 else 2)
    elif wide > 128 and not on.warp_groups:
        tile = (32, 64, 8, 2)
    elif (on.warp_groups and rows <= 64) or rows <= 32 or wide > 128:
        tile = (power_of_2(min(rows, 64), 16), 64 if wide <= 128 else 32, 4 if wide <= 128 else 8, 2)
    else:
        tile = (128, 64, 8, 2) if on.warp_groups else (64, 64, 8, 2)
    # left alone, ptxas spills a few bytes to fit more programs than the shared memory allows
    limit = {"maxnreg": 232} if size < 4 and rows <= 16 and not on.warp_groups else {}
    return {
        **dict(zip(("BM", "BN", "num_warps", "num_stages"), tile, strict=True)),
        **limit,
        "BD": b_d,
        "BV": b_v,
        "BC": b_d if size < 4 else min(b_d, 64 if wide <= 128 or on.warp_groups else 32),
    }


def merging(rows: int, value_dim: int, splits: int) -> dict[str, int]:
    """Sizes of the tiles in which partial results of `rows` query rows from `splits` splits are joined."""
    b_r = power_of_2(rows)
    return {"BR": b_r, "BS": max(1, min(splits, _JOINED // (b_r * power_of_2(value_dim, 16))))}


def attend_pieces(
    near: torch.Tensor,
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    far: FarSegment | None,
    *,
    slot: int,
    back: int,
    length: int,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`qllm_kernels.attention.attend_pieces`."""
    if far is not None and far.pieces * length != near.shape[1]:
        # what sees far keys of its own becomes a piece of its own, with the window of the longer piece it is cut from
        size = near.shape[1] // far.pieces
        row = torch.arange(0, near.shape[1], size, device=near.device)
        within = row % length
        places = slot + row - within, back + within
        return _launch(near, window_key, window_value, far, *places, size, back + length, scale, softcap)
    return _launch(near, window_key, window_value, far, slot, back, length, back + length, scale, softcap)


def attend_step(
    near: torch.Tensor,
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    far: FarSegment | None,
    *,
    slot: torch.Tensor,
    back: torch.Tensor,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`qllm_kernels.step.attend_step`."""
    return _launch(near, window_key, window_value, far, slot, back, 1, window_key.shape[1], scale, softcap)


def _launch(
    near: torch.Tensor,
    window_key: torch.Tensor,
    window_value: torch.Tensor,
    far: FarSegment | None,
    slot: int | torch.Tensor,
    back: int | torch.Tensor,
    length: int,
    most_window: int,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of pieces that see at most `most_window` window keys."""
    heads, rows, dim = near.shape
    kv_heads, value_dim = window_key.shape[0], window_value.shape[-1]
    group, pieces = heads // kv_heads, rows // length
    sizes = constants(group * length, dim, value_dim, near.element_size(), target(near.device))
    tiles_m = triton.cdiv(group * length, sizes["BM"])
    distant = far_arguments(far, window_key, values=True)
    far_query = near if far is None else far.query
    splits = 1
    if tiles_m == 1 and length <= 4:
        keys = (most_window, distant["n_loose"], distant["k"] * distant["PAGE"])
        n_tiles = sum(triton.cdiv(n, sizes["BN"]) for n in keys)
        splits = max(1, min(n_tiles, _PROGRAMS // (kv_heads * pieces), 64))
        splits = 1 << (splits.bit_length() - 1)  # few, as each number is compiled for
    extents = [x.shape[1] * x.stride(1) for x in (window_key, window_value)]
    out = near.new_empty(heads, rows, value_dim)
    lse = torch.empty(heads, rows, device=near.device)
    parts, part_lse = out, lse
    if splits > 1:
        parts = torch.empty(splits, heads, rows, value_dim, device=near.device)
        part_lse = torch.empty(splits, heads, rows, device=near.device)
    segment_attention[(tiles_m * splits, kv_heads, pieces)](
        near, far_query, out, lse, parts, part_lse, completion_counters(near.device), window_key, window_value,
        stride_near_head=near.stride(0), stride_near_row=near.stride(1),
        stride_far_head=far_query.stride(0), stride_far_row=far_query.stride(1),
        stride_window_key_head=window_key.stride(0), stride_window_key_row=window_key.stride(1),
        stride_window_value_head=window_value.stride(0), stride_window_value_row=window_value.stride(1),
        slot=slot, back=back, length=length, GROUP=group, D=dim, DV=value_dim, SPLITS=splits,
        ON_DEVICE=isinstance(slot, torch.Tensor), WIDE=max(extents) >= 2**31,
        **distant, **logit_factors(scale, softcap), **sizes, **merging(group * length if splits > 1 else 1, value_dim, splits),
    )  # fmt: skip
    return out, lse
