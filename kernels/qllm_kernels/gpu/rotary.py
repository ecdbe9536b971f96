"""Rotary position embedding and append in one pass: one program per run of tokens and head, query or key/value."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qllm_kernels.gpu.shapes import power_of_2, refusal
from qllm_kernels.rotary import Arrival

_TOKENS = 16


@triton.jit
def with_partners(p_x, o_d, m_t, D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Dimensions o_d [BD] of the rows that begin at p_x [BT], and the ones they are rotated with, as their sines take them."""
    if INTERLEAVED:
        o_pair, m_first = o_d ^ 1, o_d % 2 == 0
    else:
        m_first = o_d < ROTARY // 2
        o_pair = tl.where(m_first, o_d + ROTARY // 2, o_d - ROTARY // 2)
    b_x = tl.load(p_x[:, None] + o_d[None, :], mask=m_t[:, None] & (o_d < D)[None, :], other=0.0)
    b_pair = tl.load(p_x[:, None] + o_pair[None, :], mask=m_t[:, None] & (o_d < ROTARY)[None, :], other=0.0)
    return b_x, tl.where(m_first[None, :], -b_pair, b_pair)


@triton.jit
def turned(b_x, b_pair, p_cos, p_sin, m_t, o_d, ROTARY: tl.constexpr):
    """Rows and their partners, rotated by tables whose rows begin at p_cos, p_sin [BT]; fp32."""
    m_d = m_t[:, None] & (o_d < ROTARY)[None, :]
    b_cos = tl.load(p_cos[:, None] + o_d[None, :], mask=m_d, other=1.0)
    b_sin = tl.load(p_sin[:, None] + o_d[None, :], mask=m_d, other=0.0)
    return b_x.to(tl.float32) * b_cos + b_pair.to(tl.float32) * b_sin


@triton.jit
def take_in(
    query, key, value, cos, sin, positions, far, near, far_query,
    window_key, window_value, window_rows, raw_key, raw_value, raw_rows, i_t, i_h, n,
    stride_query_head, stride_query_row, stride_key_head, stride_key_row, stride_value_head, stride_value_row,
    stride_table, stride_window_key_head, stride_window_key_row, stride_window_value_head, stride_window_value_row,
    stride_raw_key_head, stride_raw_key_row, stride_raw_value_head, stride_raw_value_row,
    QUERY_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    FAR: tl.constexpr, RAW_VALUE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Run i_t of BT tokens of one head: of the queries first, then of the keys and values."""
    # [BT]
    o_t = i_t * BT + tl.arange(0, BT).to(tl.int64)
    m_t = o_t < n
    o_d = tl.arange(0, BD)
    m_d = m_t[:, None] & (o_d < D)[None, :]
    b_position = tl.load(positions + o_t, mask=m_t, other=0).to(tl.int64)
    p_cos, p_sin = cos + b_position * stride_table, sin + b_position * stride_table
    if i_h < QUERY_HEADS:
        p_x = query + i_h * stride_query_head + o_t * stride_query_row
        b_x, b_pair = with_partners(p_x, o_d, m_t, D, ROTARY, INTERLEAVED)
        o_out = ((i_h * n + o_t) * D)[:, None] + o_d[None, :]
        b_near = turned(b_x, b_pair, p_cos, p_sin, m_t, o_d, ROTARY)
        tl.store(near + o_out, b_near.to(near.dtype.element_ty), mask=m_d)
        if FAR:
            b_far = turned(b_x, b_pair, far + o_t * 0, far + ROTARY + o_t * 0, m_t, o_d, ROTARY)
            tl.store(far_query + o_out, b_far.to(near.dtype.element_ty), mask=m_d)
    else:
        i_kv = i_h - QUERY_HEADS
        # [BT, BD]
        p_x = key + i_kv * stride_key_head + o_t * stride_key_row
        b_key, b_pair = with_partners(p_x, o_d, m_t, D, ROTARY, INTERLEAVED)
        b_turned = turned(b_key, b_pair, p_cos, p_sin, m_t, o_d, ROTARY).to(window_key.dtype.element_ty)
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


@triton.jit(do_not_specialize=["n"])
def turn_and_store(
    query, key, value, cos, sin, positions, far, near, far_query,
    window_key, window_value, window_rows, raw_key, raw_value, raw_rows, n,
    stride_query_head, stride_query_row, stride_key_head, stride_key_row, stride_value_head, stride_value_row,
    stride_table, stride_window_key_head, stride_window_key_row, stride_window_value_head, stride_window_value_row,
    stride_raw_key_head, stride_raw_key_row, stride_raw_value_head, stride_raw_value_row,
    QUERY_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    FAR: tl.constexpr, RAW_VALUE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """See `take_in`."""
    take_in(
        query, key, value, cos, sin, positions, far, near, far_query,
        window_key, window_value, window_rows, raw_key, raw_value, raw_rows,
        tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), n,
        stride_query_head, stride_query_row, stride_key_head, stride_key_row, stride_value_head, stride_value_row,
        stride_table, stride_window_key_head, stride_window_key_row, stride_window_value_head, stride_window_value_row,
        stride_raw_key_head, stride_raw_key_row, stride_raw_value_head, stride_raw_value_row,
        QUERY_HEADS, D, DV, ROTARY, INTERLEAVED, FAR, RAW_VALUE, BT, BD, BV,
    )  # fmt: skip


def cannot_serve(new: Arrival) -> str | None:
    """Why `rotate_append` does not take these tokens, or None."""
    places = (x for place in (new.window, new.raw) for x in (place.key, place.value))
    return refusal(new.query, new.key, new.value, *places)


def arguments(
    new: Arrival, far: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, list[Any], list[int], dict[str, Any]]:
    """Rotated queries near and far, still to be written, and what `take_in` takes: tensors, strides and constants."""
    query, key, value, window, raw = new.query, new.key, new.value, new.window, new.raw
    heads, n, dim = query.shape
    near = torch.empty(heads, n, dim, dtype=query.dtype, device=query.device)
    far_query = near if far is None else torch.empty_like(near)
    assert window.value is not None
    raw_value = window.value if raw.value is None else raw.value
    cos, sin = new.cos.contiguous(), new.sin.contiguous()
    tensors = [
        query, key, value, cos, sin, new.positions, cos if far is None else far, near, far_query,
        window.key, window.value, window.rows, raw.key, raw_value, raw.rows,
    ]  # fmt: skip
    rows = (query, key, value), (window.key, window.value, raw.key, raw_value)
    strides = (
        [s for x in rows[0] for s in x.stride()[:2]] + [cos.shape[-1]] + [s for x in rows[1] for s in x.stride()[:2]]
    )
    constants = {
        "QUERY_HEADS": heads, "DV": value.shape[-1], "ROTARY": cos.shape[-1], "INTERLEAVED": new.interleaved,
        "RAW_VALUE": raw.value is not None, "BV": power_of_2(value.shape[-1]),
    }  # fmt: skip
    return near, far_query, tensors, strides, constants


def rotate_append(new: Arrival, far: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See :func:`qllm_kernels.rotary.rotate_append`."""
    near, far_query, tensors, strides, constants = arguments(new, far)
    heads, n, dim = near.shape
    tokens = min(_TOKENS, power_of_2(n))
    turn_and_store[(triton.cdiv(n, tokens), heads + new.key.shape[0])](
        *tensors, n, *strides, **constants, D=dim, FAR=far is not None, BT=tokens, BD=power_of_2(dim), num_warps=4
    )
    return near, None if far is None else far_query
