"""Copies of pages by a list on the device: few programs, as the link to the host is slow, each taking entry after entry."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_PROGRAMS = 16  # keep the link to the host busy and leave the GPU to others (vLLM: within 5 % of the peak with 12)
_ELEMENTS = 4096
_CHANGING = ["most", "stride_scale_head"]  # from call to call, from slab to slab


@triton.jit(do_not_specialize=["most"])
def move_pages(
    source, target, moves, counts, most,
    stride_source_head, stride_source_page, stride_target_head, stride_target_page,
    ROWS: tl.constexpr, SIZE: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Pages of one head, SIZE elements each."""
    i_h = tl.program_id(1).to(tl.int64)
    i_row = i_h * ROWS // tl.num_programs(1)
    n_parts: tl.constexpr = (SIZE + BE - 1) // BE
    n_moves = tl.minimum(tl.load(counts + i_row).to(tl.int32), most)
    for i in range(tl.program_id(0), n_moves * n_parts, tl.num_programs(0)):
        p_move = moves + (i_row * most + i // n_parts) * 2
        # [BE]
        o_e = i % n_parts * BE + tl.arange(0, BE)
        p_from = source + i_h * stride_source_head + tl.load(p_move).to(tl.int64) * stride_source_page
        p_to = target + i_h * stride_target_head + tl.load(p_move + 1).to(tl.int64) * stride_target_page
        tl.store(p_to + o_e, tl.load(p_from + o_e, mask=o_e < SIZE), mask=o_e < SIZE)


@triton.jit
def to_fp8(b_x):
    """Nearest float8_e4m3fn of |x| <= 448, ties to even, as its byte. In integers, as GPUs before sm_89 have no such type."""
    b_abs = tl.abs(b_x)
    # the step between neighbours: 2^-3 of the power of two below, at least that of the subnormal numbers
    b_power = tl.maximum((b_abs.to(tl.int32, bitcast=True) >> 23) - 127, -6) - 3
    b_step = ((b_power + 127) << 23).to(tl.float32, bitcast=True)
    b_inverse = ((127 - b_power) << 23).to(tl.float32, bitcast=True)
    # adding 1.5 * 2^23 rounds to whole steps
    b_whole = (b_abs * b_inverse + 12582912.0) - 12582912.0
    # as fp16 with a smaller bias: exponent and upper mantissa bits are those of the byte
    b_half = (b_whole * b_step * 0.00390625).to(tl.float16).to(tl.int16, bitcast=True)
    b_sign = (b_x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (b_sign | (b_half.to(tl.int32) >> 7)).to(tl.uint8)


@triton.jit
def from_fp8(b_byte):
    """The fp32 number of a float8_e4m3fn byte that is not NaN."""
    b_bits = b_byte.to(tl.int32)
    b_half = (((b_bits & 0x80) << 8) | ((b_bits & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
    return b_half.to(tl.float32) * 256.0


@triton.jit(do_not_specialize=_CHANGING)
def quantise(
    source, target, scales, moves, counts, most,
    stride_source_head, stride_source_page, stride_target_head, stride_target_page, stride_scale_head,
    ROWS: tl.constexpr, SIZE: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Pages of one head to bytes with a scale."""
    i_h = tl.program_id(1).to(tl.int64)
    i_row = i_h * ROWS // tl.num_programs(1)
    n_moves = tl.minimum(tl.load(counts + i_row).to(tl.int32), most)
    for i in range(tl.program_id(0), n_moves, tl.num_programs(0)):
        p_move = moves + (i_row * most + i) * 2
        p_from = source + i_h * stride_source_head + tl.load(p_move).to(tl.int64) * stride_source_page
        i_to = tl.load(p_move + 1).to(tl.int64)
        p_to = target + i_h * stride_target_head + i_to * stride_target_page
        # [BE]
        b_most = tl.full([BE], 0.0, tl.float32)
        for i_e in range(0, SIZE, BE):
            o_e = i_e + tl.arange(0, BE)
            b_most = tl.maximum(b_most, tl.abs(tl.load(p_from + o_e, mask=o_e < SIZE, other=0.0).to(tl.float32)))
        # 448 times the smallest normal number
        b_largest = tl.maximum(tl.max(b_most, 0), 5.2663546e-36)
        # rounded as torch does, or some bytes would differ
        b_factor = tl.div_rn(448.0, b_largest)
        for i_e in range(0, SIZE, BE):
            o_e = i_e + tl.arange(0, BE)
            b_x = tl.load(p_from + o_e, mask=o_e < SIZE, other=0.0).to(tl.float32) * b_factor
            b_x = tl.minimum(tl.maximum(b_x, -448.0), 448.0)
            tl.store(p_to + o_e, to_fp8(b_x), mask=o_e < SIZE)
        tl.store(scales + i_h * stride_scale_head + i_to, tl.div_rn(b_largest, 448.0))


@triton.jit(do_not_specialize=_CHANGING)
def dequantise(
    source, scales, target, moves, counts, most,
    stride_source_head, stride_source_page, stride_target_head, stride_target_page, stride_scale_head,
    ROWS: tl.constexpr, SIZE: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Pages of one head from bytes with a scale."""
    i_h = tl.program_id(1).to(tl.int64)
    i_row = i_h * ROWS // tl.num_programs(1)
    n_parts: tl.constexpr = (SIZE + BE - 1) // BE
    n_moves = tl.minimum(tl.load(counts + i_row).to(tl.int32), most)
    for i in range(tl.program_id(0), n_moves * n_parts, tl.num_programs(0)):
        p_move = moves + (i_row * most + i // n_parts) * 2
        i_from = tl.load(p_move).to(tl.int64)
        # [BE]
        o_e = i % n_parts * BE + tl.arange(0, BE)
        p_from = source + i_h * stride_source_head + i_from * stride_source_page
        p_to = target + i_h * stride_target_head + tl.load(p_move + 1).to(tl.int64) * stride_target_page
        b_x = from_fp8(tl.load(p_from + o_e, mask=o_e < SIZE, other=0))
        b_x = b_x * tl.load(scales + i_h * stride_scale_head + i_from)
        tl.store(p_to + o_e, b_x.to(target.dtype.element_ty), mask=o_e < SIZE)


def cannot_serve(*pages: torch.Tensor) -> str | None:
    """Why no kernel copies these pages [heads, n_pages, block_size, head_dim], or None."""
    for x in pages:
        if x.stride(3) != 1 or x.stride(2) != x.shape[3]:
            return "a page is not contiguous"
        if x.device.type == "cpu" and pages[0].device != pages[-1].device and not x.is_pinned():
            return "memory of the host is not pinned"
    return None


def _grid(heads: int) -> tuple[int, int]:
    return triton.cdiv(_PROGRAMS, heads), heads


def copy_pages(source: torch.Tensor, target: torch.Tensor, moves: torch.Tensor, counts: torch.Tensor) -> None:
    """See :func:`qllm_kernels.pages.copy_pages`."""
    size = source.shape[2] * source.shape[3]
    move_pages[_grid(source.shape[0])](
        source, target, moves.contiguous(), counts, moves.shape[1], *source.stride()[:2], *target.stride()[:2],
        ROWS=moves.shape[0], SIZE=size, BE=_ELEMENTS, num_warps=8,
    )  # fmt: skip


def quantise_pages(
    source: torch.Tensor, target: torch.Tensor, scales: torch.Tensor, moves: torch.Tensor, counts: torch.Tensor
) -> None:
    """See :func:`qllm_kernels.pages.quantise_pages`."""
    size = source.shape[2] * source.shape[3]
    quantise[_grid(source.shape[0])](
        source, target.view(torch.uint8), scales, moves.contiguous(), counts, moves.shape[1],
        *source.stride()[:2], *target.stride()[:2], scales.stride(0),
        ROWS=moves.shape[0], SIZE=size, BE=_ELEMENTS, num_warps=8,
    )  # fmt: skip


def dequantise_pages(
    source: torch.Tensor, scales: torch.Tensor, target: torch.Tensor, moves: torch.Tensor, counts: torch.Tensor
) -> None:
    """See :func:`qllm_kernels.pages.dequantise_pages`."""
    size = source.shape[2] * source.shape[3]
    dequantise[_grid(source.shape[0])](
        source.view(torch.uint8), scales, target, moves.contiguous(), counts, moves.shape[1],
        *source.stride()[:2], *target.stride()[:2], scales.stride(0),
        ROWS=moves.shape[0], SIZE=size, BE=_ELEMENTS, num_warps=8,
    )  # fmt: skip
