"""Prefix sums of queries in two launches: sums of tiles, then the sums inside each tile behind those of the tiles before."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qllm_kernels.gpu.shapes import refusal

_TOKENS = 64


@triton.jit(do_not_specialize=["n"])
def sum_tiles(query, sums, n, stride_head, stride_row, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Sum of BT queries of one head."""
    i_t, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_t, o_d = i_t * BT + tl.arange(0, BT), tl.program_id(2) * BD + tl.arange(0, BD)
    m_d = o_d < D
    # [BT, BD]
    p_q = query + i_h * stride_head + o_t[:, None] * stride_row + o_d[None, :]
    b_q = tl.load(p_q, mask=(o_t < n)[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    tl.store(sums + (i_h * tl.num_programs(0) + i_t) * D + o_d, tl.sum(b_q, 0), mask=m_d)


@triton.jit(do_not_specialize=["n"])
def sum_before(query, sums, prefix, n, stride_head, stride_row, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """Sums up to and including each of BT queries of one head."""
    i_t, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_t, o_d = i_t * BT + tl.arange(0, BT), tl.program_id(2) * BD + tl.arange(0, BD)
    m_d = o_d < D
    # [BD] of the tiles before
    b_before = tl.zeros([BD], tl.float32)
    for i_s in range(0, i_t, BT):
        o_s = i_s + tl.arange(0, BT)
        p_s = sums + (i_h * tl.num_programs(0) + o_s[:, None]) * D + o_d[None, :]
        b_before += tl.sum(tl.load(p_s, mask=(o_s < i_t)[:, None] & m_d[None, :], other=0.0), 0)
    # [BT, BD]
    p_q = query + i_h * stride_head + o_t[:, None] * stride_row + o_d[None, :]
    b_q = tl.load(p_q, mask=(o_t < n)[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    p_out = prefix + (i_h * (n + 1) + o_t[:, None] + 1) * D + o_d[None, :]
    tl.store(p_out, tl.cumsum(b_q, 0) + b_before[None, :], mask=(o_t < n)[:, None] & m_d[None, :])
    if i_t == 0:
        tl.store(prefix + i_h * (n + 1) * D + o_d, tl.zeros([BD], tl.float32), mask=m_d)


def cannot_serve(query: torch.Tensor) -> str | None:
    """Why `query_prefix` does not take these queries, or None."""
    return refusal(query)


def query_prefix(query: torch.Tensor) -> torch.Tensor:
    """See :func:`qllm_kernels.prefix.query_prefix`."""
    heads, n, dim = query.shape
    tiles = triton.cdiv(n, _TOKENS)
    sums = torch.empty(heads, tiles, dim, device=query.device)
    prefix = torch.empty(heads, n + 1, dim, device=query.device)
    grid, sizes = (tiles, heads, triton.cdiv(dim, 64)), {"D": dim, "BT": _TOKENS, "BD": 64, "num_warps": 4}
    sum_tiles[grid](query, sums, n, *query.stride()[:2], **sizes)
    sum_before[grid](query, sums, prefix, n, *query.stride()[:2], **sizes)
    return prefix
