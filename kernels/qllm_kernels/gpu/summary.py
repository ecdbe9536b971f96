"""Block summaries: the mean of a block's keys, or its best keys by the linear score (paper eq. 4), all blocks in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qllm_kernels.gpu.shapes import power_of_2, refusal

LARGEST_BLOCK = 256


@triton.jit
def average_keys(
    key,
    out,
    stride_head,
    stride_block,
    stride_row,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BB: tl.constexpr,
    BD: tl.constexpr,
):
    """The mean key of one block and kv head."""
    i_b, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_b, o_d = tl.arange(0, BB), tl.program_id(2) * BD + tl.arange(0, BD)
    m_d = o_d < D
    # [BB, BD]
    p_k = key + i_h * stride_head + i_b * stride_block + o_b[:, None] * stride_row + o_d[None, :]
    b_k = tl.load(p_k, mask=(o_b < SIZE)[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    b_mean = tl.sum(b_k, 0) / SIZE
    tl.store(out + (i_h * tl.num_programs(0) + i_b) * D + o_d, b_mean.to(out.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["n_local"])
def best_keys(
    key,
    rotated,
    prefix,
    out,
    n_local,
    stride_head,
    stride_block,
    stride_row,
    stride_rotated_head,
    stride_rotated_row,
    stride_prefix_head,
    stride_prefix_row,
    SIZE: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BB: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    """The R keys of one block and kv head with the highest linear score, in order of position."""
    i_b, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_b = tl.arange(0, BB)
    m_b = o_b < SIZE
    # [BB] tokens of the window
    o_t = i_b * SIZE + o_b
    b_score = tl.zeros([BB], tl.float32)
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_k = m_b[:, None] & (o_d < D)[None, :]
        # [BB, BD]
        p_k = rotated + i_h * stride_rotated_head + o_t[:, None] * stride_rotated_row + o_d[None, :]
        p_q = prefix + i_h * stride_prefix_head + (o_t + 1)[:, None] * stride_prefix_row + o_d[None, :]
        b_k = tl.load(p_k, mask=m_k, other=0.0).to(tl.float32)
        b_before = tl.load(p_q, mask=m_k, other=0.0)
        b_after = tl.load(p_q + n_local.to(tl.int64) * stride_prefix_row, mask=m_k, other=0.0)
        b_score += tl.sum(b_k * (b_after - b_before), 1)
    # floats in an order of integers, the position below them: earlier tokens win ties
    b_bits = (b_score + 0.0).to(tl.int32, bitcast=True)
    b_order = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    b_key = tl.where(m_b, (b_order.to(tl.int64) << 32) | (0x7FFFFFFF - o_b), -(2**63))
    # [BR]
    o_r = tl.arange(0, BR)
    b_place = 0x7FFFFFFF - (tl.topk(b_key, BR) & 0x7FFFFFFF)
    b_place = tl.sort(tl.where(o_r < R, b_place, SIZE))
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        m_r = (o_r < R)[:, None] & (o_d < D)[None, :]
        # [BR, BD]
        p_k = key + i_h * stride_head + i_b * stride_block + b_place[:, None] * stride_row + o_d[None, :]
        p_o = out + ((i_h * R + o_r)[:, None] * tl.num_programs(0) + i_b) * D + o_d[None, :]
        tl.store(p_o, tl.load(p_k, mask=m_r, other=0.0), mask=m_r)


def cannot_serve(key: torch.Tensor) -> str | None:
    """Why no kernel summarises these keys [kv_heads, n_blocks, block_size, head_dim], or None."""
    if key.shape[2] > LARGEST_BLOCK:
        return f"blocks of {key.shape[2]} tokens are longer than {LARGEST_BLOCK}"
    return refusal(key)


def mean_keys(key: torch.Tensor) -> torch.Tensor:
    """See :func:`qllm_kernels.summary.mean_keys`."""
    kv_heads, n_blocks, size, dim = key.shape
    out = key.new_empty(kv_heads, 1, n_blocks, dim)
    average_keys[(n_blocks, kv_heads, triton.cdiv(dim, 32))](
        key, out, *key.stride()[:3], SIZE=size, D=dim, BB=power_of_2(size), BD=32, num_warps=4
    )
    return out


def linear_top_keys(
    key: torch.Tensor, key_rotated: torch.Tensor, query_prefix: torch.Tensor, n_local: int, repr_topk: int
) -> torch.Tensor:
    """See :func:`qllm_kernels.summary.linear_top_keys`; among equal scores the earlier token wins."""
    kv_heads, n_blocks, size, dim = key.shape
    out = key.new_empty(kv_heads, repr_topk, n_blocks, dim)
    best_keys[(n_blocks, kv_heads)](
        key, key_rotated, query_prefix, out, n_local,
        *key.stride()[:3], *key_rotated.stride()[:2], *query_prefix.stride()[:2],
        SIZE=size, R=repr_topk, D=dim, BB=power_of_2(size, 2), BR=power_of_2(repr_topk, 2), BD=32, num_warps=4,
    )  # fmt: skip
    return out
