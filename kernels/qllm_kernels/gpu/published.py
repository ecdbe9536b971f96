"""Block summaries as published in two launches: attention mass of tokens, then the mean of each block's best keys."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qllm_kernels.gpu.segments import logit_factors
from qllm_kernels.gpu.shapes import power_of_2, refusal

LARGEST_BLOCK = 256


@triton.jit(do_not_specialize=["n", "n_keys", "n_local"])
def token_mass(
    query, rotated, lse, mass, n, n_keys, n_local, factor, cap,
    stride_query_head, stride_query_row, stride_rotated_head, stride_rotated_row, stride_lse_head,
    GROUP: tl.constexpr, D: tl.constexpr, SOFTCAP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Attention that BN keys received from one query head."""
    i_n, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BD)
    # [BN]
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < n_keys
    # [BN, BD]
    p_k = rotated + (i_h // GROUP) * stride_rotated_head + o_n.to(tl.int64)[:, None] * stride_rotated_row + o_d[None, :]
    b_k = tl.load(p_k, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)
    b_mass = tl.zeros([BN], tl.float32)
    for i_m in range(i_n * BN // BM, tl.cdiv(tl.minimum(n, i_n * BN + BN + n_local - 1), BM)):
        # [BM]
        o_m = i_m * BM + tl.arange(0, BM)
        m_m = o_m < n
        # [BM, BD]
        p_q = query + i_h * stride_query_head + o_m.to(tl.int64)[:, None] * stride_query_row + o_d[None, :]
        b_q = tl.load(p_q, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)
        b_lse = tl.load(lse + i_h * stride_lse_head + o_m, mask=m_m, other=0.0) * 1.4426950408889634
        # [BM, BN]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3") * factor
        if SOFTCAP:
            b_s = cap * (1.0 - 2.0 / (tl.exp2(b_s) + 1.0))
        o_far = o_m[:, None] - o_n[None, :]
        m_s = m_m[:, None] & (o_far >= 0) & (o_far < n_local)
        b_mass += tl.sum(tl.where(m_s, tl.exp2(b_s - b_lse[:, None]), 0.0), 0)
    tl.store(mass + i_h * n_keys + o_n, b_mass, mask=m_n)


@triton.jit
def mean_of_best(
    key, mass, out, stride_head, stride_block, stride_row,
    GROUP: tl.constexpr, SIZE: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    BB: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The mean of the R keys of one block that have most mass with one query head; earlier tokens win ties."""
    i_b, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_b = tl.arange(0, BB)
    m_b = o_b < SIZE
    # [BB] mass is not negative, so its bits are in its order
    b_mass = tl.load(mass + (i_h * tl.num_programs(0) + i_b) * SIZE + o_b, mask=m_b, other=0.0)
    b_order = (b_mass + 0.0).to(tl.int32, bitcast=True).to(tl.int64)
    b_key = tl.where(m_b, (b_order << 32) | (0x7FFFFFFF - o_b), -(2**63))
    b_least = tl.sum(tl.where(tl.arange(0, BR) == R - 1, tl.topk(b_key, BR), 0))
    m_best = b_key >= b_least
    for i_d in range(0, D, BD):
        o_d = i_d + tl.arange(0, BD)
        # [BB, BD]
        p_k = key + (i_h // GROUP) * stride_head + i_b * stride_block + o_b[:, None] * stride_row + o_d[None, :]
        b_k = tl.load(p_k, mask=m_best[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)
        p_out = out + (i_h * tl.num_programs(0) + i_b) * D + o_d
        tl.store(p_out, (tl.sum(b_k, 0) / R).to(out.dtype.element_ty), mask=o_d < D)


def cannot_serve(key: torch.Tensor, key_rotated: torch.Tensor, query: torch.Tensor) -> str | None:
    """Why `published_means` does not take these arguments, or None."""
    if key.shape[2] > LARGEST_BLOCK:
        return f"blocks of {key.shape[2]} tokens are longer than {LARGEST_BLOCK}"
    return refusal(key, key_rotated, query)


def constants(dim: int, size: int) -> dict[str, Any]:
    """Sizes of the tiles of `token_mass` for elements of `size` bytes, and launch options."""
    narrow = dim <= 128 and size < 4
    return {
        "BM": 64 if narrow else 32 if size < 4 else 16,
        "BN": 64 if narrow else 32,
        "BD": power_of_2(dim, 16),
        "num_warps": 4,
        "num_stages": 2 if size < 4 else 1,
    }


def published_means(
    key: torch.Tensor,
    key_rotated: torch.Tensor,
    query: torch.Tensor,
    lse: torch.Tensor,
    *,
    n_local: int,
    repr_topk: int,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """See :func:`qllm_kernels.published.published_means`; among equal masses the earlier token wins."""
    kv_heads, n_blocks, size, dim = key.shape
    heads, n, _ = query.shape
    n_keys, group = n_blocks * size, heads // kv_heads
    if lse.stride(1) != 1:
        lse = lse.contiguous()
    mass = torch.empty(heads, n_keys, device=key.device)
    sizes = constants(dim, key.element_size())
    token_mass[(triton.cdiv(n_keys, sizes["BN"]), heads)](
        query, key_rotated, lse, mass, n, n_keys, n_local,
        stride_query_head=query.stride(0), stride_query_row=query.stride(1),
        stride_rotated_head=key_rotated.stride(0), stride_rotated_row=key_rotated.stride(1), stride_lse_head=lse.stride(0),
        GROUP=group, D=dim, **logit_factors(scale, softcap), **sizes,
    )  # fmt: skip
    out = torch.empty(heads, 1, n_blocks, dim, dtype=key.dtype, device=key.device)
    mean_of_best[(n_blocks, heads)](
        key, mass, out, *key.stride()[:3],
        GROUP=group, SIZE=size, R=repr_topk, D=dim, BB=power_of_2(size, 2), BR=power_of_2(repr_topk, 2), BD=32, num_warps=4,
    )  # fmt: skip
    return out
