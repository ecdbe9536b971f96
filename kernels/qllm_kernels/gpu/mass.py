"""Attention mass per key, from the log-sum-exp of attention that has already run: one program per tile of keys."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qllm_kernels.attention import FarSegment
from qllm_kernels.gpu.segments import cannot_serve as cannot_serve
from qllm_kernels.gpu.segments import far_arguments, logit_factors
from qllm_kernels.gpu.shapes import power_of_2
from qllm_kernels.mass import Mass


@triton.jit(do_not_specialize=["slot", "back", "length", "n_window", "n_loose", "k"])  # they change from call to call
def segment_mass(
    near, far, lse, mass,
    window_key, loose_key, hidden, page_key, table, n_chosen,
    stride_near_head, stride_near_row, stride_far_head, stride_far_row, stride_window_key_head, stride_window_key_row,
    stride_loose_key_head, stride_loose_key_piece, stride_loose_key_row, stride_page_key_head, stride_page_key_page,
    slot, back, length, n_window, n_loose, k, factor, cap,
    GROUP: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, SCOPES: tl.constexpr,
    LOOSE: tl.constexpr, HIDDEN: tl.constexpr, PAGES: tl.constexpr, COUNTED: tl.constexpr, SOFTCAP: tl.constexpr,
    ON_DEVICE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The mass of BN keys of one segment (window, which may be left out, pages or loose keys), for one piece and kv head.

    With ON_DEVICE, `slot` and `back` point to those of each piece, a single token, and all n_window slots are looked at.
    """
    i_t, i_h, i_p = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    kv_heads, pieces = tl.num_programs(1), tl.num_programs(2)
    i_scope = i_h * SCOPES // kv_heads
    o_d = tl.arange(0, BD)
    t_window, t_pages = tl.cdiv(n_window, BN), tl.cdiv(k * PAGE, BN)
    in_window, in_pages = i_t < t_window, i_t < t_window + t_pages
    # [BN] place among the keys of the segment, which it has, and whether rows of any token see it
    o_k = tl.where(in_window, i_t, tl.where(in_pages, i_t - t_window, i_t - t_window - t_pages)) * BN + tl.arange(0, BN)
    n_keys = tl.where(in_window, n_window, tl.where(in_pages, k * PAGE, n_loose))
    o_out = tl.where(in_window, 0, tl.where(in_pages, n_window, n_window + k * PAGE)) + o_k
    m_n = o_k < n_keys
    m_seen = m_n
    if ON_DEVICE:
        b_start, b_back, b_least = 0, tl.load(back + i_p).to(tl.int32), tl.load(slot + i_p).to(tl.int32)
        b_back += b_least
    else:
        b_start, b_back, b_least = slot + i_p * length, back, 0
    p_k = window_key + i_h * stride_window_key_head + (b_start + o_k.to(tl.int64)) * stride_window_key_row
    if PAGES:  # noqa: SIM102 - decided when compiling
        if in_pages & (i_t >= t_window):
            b_page = tl.load(table + (i_p * SCOPES + i_scope) * k + o_k // PAGE, mask=m_n, other=0).to(tl.int64)
            p_k = page_key + i_h * stride_page_key_head + b_page * stride_page_key_page + (o_k % PAGE).to(tl.int64) * D
            if COUNTED:
                m_seen = m_n & (o_k < tl.load(n_chosen + i_p).to(tl.int32) * PAGE)
    if LOOSE:  # noqa: SIM102
        if i_t >= t_window + t_pages:
            p_k = loose_key + i_h * stride_loose_key_head + i_p * stride_loose_key_piece
            p_k += o_k.to(tl.int64) * stride_loose_key_row
            if HIDDEN:
                m_seen = m_n & (tl.load(hidden + (i_p * SCOPES + i_scope) * n_loose + o_k, mask=m_n, other=1) == 0)
    # [BN, BD]
    b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)
    p_q, stride_head, stride_row, reach, first = near, stride_near_head, stride_near_row, b_back, 0
    if in_window:
        m_seen = m_n & (o_k >= b_least)
        # rows before the first key's own token do not see this tile
        first = tl.maximum(i_t * BN - b_back, 0) * GROUP // BM
    else:
        p_q, stride_head, stride_row, reach = far, stride_far_head, stride_far_row, n_keys
    b_mass = tl.zeros([BN], tl.float32)
    for i_m in range(first, tl.cdiv(GROUP * length, BM)):
        # [BM]
        o_m = i_m * BM + tl.arange(0, BM)
        o_t = o_m // GROUP
        m_m = o_t < length
        o_head, o_row = i_h * GROUP + o_m % GROUP, i_p * length + o_t
        # [BM, BD]
        b_q = tl.load(
            p_q + o_head[:, None] * stride_head + o_row[:, None] * stride_row + o_d[None, :],
            mask=m_m[:, None] & (o_d < D)[None, :],
            other=0.0,
        )
        b_lse = tl.load(lse + o_head * (pieces * length) + o_row, mask=m_m, other=0.0) * 1.4426950408889634
        # [BM, BN]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3") * factor
        if SOFTCAP:
            b_s = cap * (1.0 - 2.0 / (tl.exp2(b_s) + 1.0))
        m_s = m_m[:, None] & m_seen[None, :] & (o_k[None, :] <= reach + o_t[:, None])
        b_mass += tl.sum(tl.where(m_s, tl.exp2(b_s - b_lse[:, None]), 0.0), 0)
    tl.store(mass + (i_p * kv_heads + i_h) * (n_window + k * PAGE + n_loose) + o_out, b_mass, mask=m_n)


def constants(rows: int, dim: int, size: int) -> dict[str, Any]:
    """Sizes of the tiles for `rows` packed query rows and elements of `size` bytes, and launch options."""
    narrow = dim <= 128 and size < 4
    return {
        "BM": min(64 if narrow else 32 if size < 4 else 16, power_of_2(rows, 16)),
        "BN": 64 if narrow else 32,
        "BD": power_of_2(dim, 16),
        "num_warps": 4,
        "num_stages": 2 if size < 4 else 1,
    }


def attention_mass(
    near: torch.Tensor,
    window_key: torch.Tensor,
    far: FarSegment | None,
    lse: torch.Tensor,
    *,
    slot: int,
    back: int,
    length: int,
    scale: float,
    softcap: float | None = None,
    window: bool = True,
) -> Mass:
    """See :func:`qllm_kernels.mass.attention_mass`."""
    n_window = back + length if window else 0
    return _launch(near, window_key, far, lse, slot, back, length, n_window, scale, softcap)


def step_mass(
    near: torch.Tensor,
    window_key: torch.Tensor,
    far: FarSegment | None,
    lse: torch.Tensor,
    *,
    slot: torch.Tensor,
    back: torch.Tensor,
    scale: float,
    softcap: float | None = None,
) -> Mass:
    """See :func:`qllm_kernels.step.step_mass`."""
    return _launch(near, window_key, far, lse, slot, back, 1, window_key.shape[1], scale, softcap)


def _launch(
    near: torch.Tensor,
    window_key: torch.Tensor,
    far: FarSegment | None,
    lse: torch.Tensor,
    slot: int | torch.Tensor,
    back: int | torch.Tensor,
    length: int,
    n_window: int,
    scale: float,
    softcap: float | None,
) -> Mass:
    """The mass of `n_window` keys of each piece's window and of all outside it."""
    heads, rows, dim = near.shape
    kv_heads, pieces = window_key.shape[0], rows // length
    sizes = constants(heads // kv_heads * length, dim, near.element_size())
    distant = far_arguments(far, window_key, values=False)
    far_query = near if far is None else far.query
    n_paged, n_loose = distant["k"] * distant["PAGE"], distant["n_loose"]
    mass = torch.empty(pieces, kv_heads, n_window + n_paged + n_loose, device=near.device)
    tiles = sum(triton.cdiv(n, sizes["BN"]) for n in (n_window, n_paged, n_loose))
    if tiles:
        segment_mass[(tiles, kv_heads, pieces)](
            near, far_query, lse.contiguous(), mass, window_key,
            stride_near_head=near.stride(0), stride_near_row=near.stride(1),
            stride_far_head=far_query.stride(0), stride_far_row=far_query.stride(1),
            stride_window_key_head=window_key.stride(0), stride_window_key_row=window_key.stride(1),
            slot=slot, back=back, length=length, n_window=n_window, GROUP=heads // kv_heads, D=dim,
            ON_DEVICE=isinstance(slot, torch.Tensor), **distant, **logit_factors(scale, softcap), **sizes,
        )  # fmt: skip
    in_window, in_pages, loose = torch.split(mass, [n_window, n_paged, n_loose], 2)
    return Mass(
        in_window if n_window else None,
        in_pages.reshape(pieces, kv_heads, distant["k"], distant["PAGE"]) if n_paged else None,
        loose if n_loose else None,
    )
