"""A token's rotation and append, and its choice of blocks, in one launch: neither waits for what the other writes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from qllm_kernels.choice import Pinned
from qllm_kernels.gpu import rotary, select
from qllm_kernels.gpu.choose import PINNED_TILE, hide_twice
from qllm_kernels.gpu.rotary import arguments, take_in, turned, with_partners
from qllm_kernels.gpu.select import Choice, score_run
from qllm_kernels.gpu.shapes import power_of_2
from qllm_kernels.rotary import Arrival

OPTIONS = {"maxnreg": 232}  # left alone, ptxas spills a few bytes to fit more programs
_HEADS = 16  # rotated at a time
_CHANGING = ["pieces", "n_blocks", "first", "n_all", "k", "i_partial", "n_partials", "n_pinned"]


@triton.jit(do_not_specialize=_CHANGING)
def append_and_score(
    query, key, value, cos, sin, positions, far, near, far_query,
    window_key, window_value, window_rows, raw_key, raw_value, raw_rows,
    pinned_block, pinned_position, border, hidden, n_pinned,
    lookup, summaries, n_eligible, scores, moments, question, done, ids, valid,
    pieces, n_blocks, first, n_all, k, weight, i_partial, n_partials, stride_question, n_append,
    stride_query_head, stride_query_row, stride_key_head, stride_key_row, stride_value_head, stride_value_row,
    stride_table, stride_window_key_head, stride_window_key_row, stride_window_value_head, stride_window_value_row,
    stride_raw_key_head, stride_raw_key_row, stride_raw_value_head, stride_raw_value_row,
    stride_summary_head, stride_summary_r, stride_summary_block,
    QUERY_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DV: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    RAW_VALUE: tl.constexpr, PINNED: tl.constexpr, BL: tl.constexpr, BI: tl.constexpr,
    BH: tl.constexpr, BW: tl.constexpr, BV: tl.constexpr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BOUNDS: tl.constexpr,
    COUNTED: tl.constexpr, GUIDED: tl.constexpr, CHOOSES: tl.constexpr,
    BG: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The first n_append programs of each scope are those of `take_in`, a head each, the others those of `score_run`.

    The latter don't wait for the far query that the former write: each has its own in `lookup`, [programs, QUERY_HEADS, D].
    """
    i_x = tl.program_id(0).to(tl.int64)
    if i_x < n_append:
        i_h = i_x * tl.num_programs(1) + tl.program_id(1)
        if i_h < QUERY_HEADS + KV_HEADS:
            take_in(
                query, key, value, cos, sin, positions, far, near, far_query,
                window_key, window_value, window_rows, raw_key, raw_value, raw_rows, 0, i_h, 1,
                stride_query_head, stride_query_row, stride_key_head, stride_key_row, stride_value_head, stride_value_row,
                stride_table, stride_window_key_head, stride_window_key_row, stride_window_value_head,
                stride_window_value_row, stride_raw_key_head, stride_raw_key_row, stride_raw_value_head,
                stride_raw_value_row, QUERY_HEADS, D, DV, ROTARY, INTERLEAVED, True, RAW_VALUE, 1, BW, BV,
            )  # fmt: skip
    else:
        i_split = i_x - n_append
        i_first = tl.program_id(1).to(tl.int64) * HEADS * GROUP
        # [BH]
        o_h = tl.arange(0, BH)
        for i in range(0, HEADS * GROUP, BH):
            m_h = i + o_h < HEADS * GROUP
            o_d = tl.arange(0, BW)
            b_x, b_pair = with_partners(
                query + (i_first + i + o_h) * stride_query_head, o_d, m_h, D, ROTARY, INTERLEAVED
            )
            b_far = turned(b_x, b_pair, far + o_h * 0, far + ROTARY + o_h * 0, m_h, o_d, ROTARY)
            o_row = ((i_split * QUERY_HEADS + i_first + i + o_h) * D)[:, None] + o_d[None, :]
            tl.store(lookup + o_row, b_far.to(lookup.dtype.element_ty), mask=m_h[:, None] & (o_d < D)[None, :])
        # what one thread has written, another one reads
        tl.debug_barrier()
        b_last = score_run(
            lookup + i_split * QUERY_HEADS * D, summaries, n_eligible, scores, moments, question, done, ids, valid,
            i_split, tl.num_programs(0) - n_append,
            pieces, n_blocks, first, n_all, k, weight, i_partial, n_partials, stride_question,
            0, D, stride_summary_head, stride_summary_r, stride_summary_block,
            HEADS, GROUP, R, D, BOUNDS, COUNTED, GUIDED, CHOOSES, BG, BP, BD, BN, BR, BS, BC,
        )  # fmt: skip
        if PINNED:  # noqa: SIM102 (one is known when compiling)
            if b_last:
                i_scope = tl.program_id(1).to(tl.int64)
                p_hidden = hidden + i_scope * n_pinned
                hide_twice(ids + i_scope * k, pinned_block, pinned_position, border, p_hidden, k, n_pinned, BL, BI)


def cannot_serve(new: Arrival, parts: Sequence[torch.Tensor]) -> str | None:
    """Why `append_and_choose` does not take these arguments, or None."""
    refused = (rotary.cannot_serve(new), *(select.cannot_serve(new.query.transpose(0, 1), part) for part in parts))
    return next((reason for reason in refused if reason is not None), None)


def append_and_choose(
    new: Arrival,
    far: torch.Tensor,
    parts: Sequence[torch.Tensor],
    counts: torch.Tensor,
    topk: int,
    *,
    scopes: int,
    question: torch.Tensor | None = None,
    weight: float = 0.0,
    bounds: bool = False,
    pinned: Pinned | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """See :func:`qllm_kernels.dispatch.append_and_choose`; of one part."""
    heads, kv_heads = new.query.shape[0], new.key.shape[0]
    near, far_query, tensors, strides, constants = arguments(new, far)
    choice = Choice(
        new.query.device, 1, heads, parts, topk, scopes=scopes, question=question, weight=weight, bounds=bounds
    )
    n_append = triton.cdiv(heads + kv_heads, scopes)
    ((run, given, sizes),) = choice.launches(counts)
    lookup = torch.empty(run.splits, heads, near.shape[2], dtype=near.dtype, device=near.device)
    append_and_score[(n_append + run.splits, scopes)](
        *tensors, *(pinned or (choice.ids, choice.ids, choice.ids, choice.valid)), 0 if pinned is None else len(pinned.block),
        lookup, *given, n_append, *strides, *run.part.stride()[:3],
        **constants, **{**sizes, **OPTIONS}, PINNED=pinned is not None, **PINNED_TILE, KV_HEADS=kv_heads, BH=_HEADS,
        BW=power_of_2(near.shape[2]),
    )  # fmt: skip
    return near, far_query, choice.ids, choice.valid
