"""Rotary position embedding and append in one pass: one program per run of tokens and head, query or key/value."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qllm_kernels.gpu.shapes import power_of_2, refusal
from qllm_kernels.rotary import Destination

_TOKENS = 16


@triton.jit
def turned(p_x, b_x, p_cos, p_sin, m_t, o_d, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The rows b_x [BT, BD] that begin at p_x [BT], rotated by tables whose rows begin at p_cos, p_sin [BT]; fp32."""
    if INTERLEAVED:
        o_pair, m_first = o_d ^ 1, o_d % 2 == 0
    else:
        m_first = o_d < ROTARY // 2
        o_pair = tl.where(m_first, o_d + ROTARY // 2, o_d - ROTARY // 2)
    m_d = m_t[:, None] & (o_d < ROTARY)[None, :]
    b_pair = tl.load(p_x[:, None] + o_pair[None, :], mask=m_d, other=0.0).to(tl.float32)
    b_cos = tl.load(p_cos[:, None] + o_d[None, :], mask=m_d, other=1.0)
    b_sin = tl.load(p_sin[:, None] + o_d[None, :], mask=m_d, other=0.0)
    return b_x.to(tl.float32) * b_cos + tl.where(m_first[None, :], -b_pair, b_pair) * b_sin


@triton.jit(do_not_specialize=["n"])
def turn_and_store(
    query, key, value, cos, sin, positions, near,
    window_key, window_value, window_rows, raw_key, raw_value, raw_rows, n,
    stride_query_head, stride_query_row, stride_key_head, stride_key_row, stride_value_head, stride_value_row,
    stride_table, stride_window_key_head, stride_window_key_row, stride_window_value_head, stride_window_value_row,
    stride_raw_key_head, stride_raw_key_row, stride_raw_value_head, stride_raw_value_row,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    RAW_VALUE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """BT tokens of one head: of the queries first, then of the keys and values."""
    i_h = tl.program_id(1).to(tl.int64)
    # [BT]
    o_t = tl.program_id(0) * BT + tl.arange(0, BT).to(tl.int64)
    m_t = o_t < n
    o_d = tl.arange(0, BD)
    m_d = m_t[:, None] & (o_d < D)[None, :]
    b_position = tl.load(positions + o_t, mask=m_t, other=0).to(tl.int64)
    p_cos, p_sin = cos + b_position * stride_table, sin + b_position * stride_table
    if i_h < HEADS:
        p_x = query + i_h * stride_query_head + o_t * stride_query_row
        b_x = tl.load(p_x[:, None] + o_d[None, :], mask=m_d, other=0.0)
        b_x = turned(p_x, b_x, p_cos, p_sin, m_t, o_d, ROTARY, INTERLEAVED)
        tl.store(near + ((i_h * n + o_t) * D)[:, None] + o_d[None, :], b_x.to(near.dtype.element_ty), mask=m_d)
    else:
        i_kv = i_h - HEADS
        # [BT, BD]
        p_x = key + i_kv * stride_key_head + o_t * stride_key_row
        b_key = tl.load(p_x[:, None] + o_d[None, :], mask=m_d, other=0.0)
        b_turned = turned(p_x, b_key, p_cos, p_sin, m_t, o_d, ROTARY, INTERLEAVED).to(window_key.dtype.element_ty)
        # [BT, BV]
        o_v = tl.arange(0, BV)
        p_v = value + i_kv * stride_value_head + o_t * stride_value_row
        m_v = m_t[:, None] & (o_v < DV)[None, :]
        b_value = tl.load(p_v[:, None] + o_v[None, :], mask=m_v, other=0.0)
        # [BT]
        b_row = tl.load(window_rows + o_t, mask=m_t, other=-1).to(tl.int64)
        m_row = (b_row >= 0)[:, None]
        p_k = window_key + i_kv * stride_window_key_head + b_row * stride_window_key_row
        p_v = window_value + i_kv * stride_window_value_head + b_row * stride_window_value_row
        tl.store(p_k[:, None] + o_d[None, :], b_turned, mask=m_d & m_row)
        tl.store(p_v[:, None] + o_v[None, :], b_value, mask=m_v & m_row)
        b_row = tl.load(raw_rows + o_t, mask=m_t, other=-1).to(tl.int64)
        m_row = (b_row >= 0)[:, None]
        p_k = raw_key + i_kv * stride_raw_key_head + b_row * stride_raw_key_row
        tl.store(p_k[:, None] + o_d[None, :], b_key, mask=m_d & m_row)
        if RAW_VALUE:
            p_v = raw_value + i_kv * stride_raw_value_head + b_row * stride_raw_value_row
            tl.store(p_v[:, None] + o_v[None, :], b_value, mask=m_v & m_row)


def cannot_serve(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *places: Destination) -> str | None:
    """Why `rotate_append` does not take these arguments, or None."""
    return refusal(query, key, value, *(x for place in places for x in (place.key, place.value)))


def rotate_append(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    window: Destination,
    raw: Destination,
    *,
    interleaved: bool = False,
) -> torch.Tensor:
    """See :func:`qllm_kernels.rotary.rotate_append`."""
    heads, n, dim = query.shape
    value_dim = value.shape[-1]
    near = torch.empty(heads, n, dim, dtype=query.dtype, device=query.device)
    tokens = min(_TOKENS, power_of_2(n))
    assert window.value is not None
    raw_value = window.value if raw.value is None else raw.value
    turn_and_store[(triton.cdiv(n, tokens), heads + key.shape[0])](
        query, key, value, cos.contiguous(), sin.contiguous(), positions, near,
        window.key, window.value, window.rows, raw.key, raw_value, raw.rows, n,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], cos.shape[-1],
        *window.key.stride()[:2], *window.value.stride()[:2], *raw.key.stride()[:2], *raw_value.stride()[:2],
        HEADS=heads, D=dim, DV=value_dim, ROTARY=cos.shape[-1], INTERLEAVED=interleaved,
        RAW_VALUE=raw.value is not None, BT=tokens, BD=power_of_2(dim), BV=power_of_2(value_dim), num_warps=4,
    )  # fmt: skip
    return near
