"""The second stage of a choice in one launch: a program per candidate compares all its keys, the last one to end chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from qllm_kernels.choice import Pinned, always_full, to_device
from qllm_kernels.gpu.choose import PINNED_TILE, fold_moments, hide_twice, mean_and_scale, ordered
from qllm_kernels.gpu.counters import N_COUNTERS, completion_counters
from qllm_kernels.gpu.shapes import MOST_PIECES, Target, power_of_2, refusal, target

MOST_CANDIDATES = 1024
_QUESTION = 128  # of the question's scores at a time


@triton.jit
def order_key(b_score, o_id):
    """Scores and ids in one integer each: a higher score is larger, then a lower id."""
    return (ordered(b_score).to(tl.int64) << 32) | (0x7FFFFFFF - o_id)


@triton.jit
def best_products(
    p_q, m_q, p_k, stride_row, SIZE: tl.constexpr, D: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
):
    """[BG] dot product of the query rows that begin at p_q [BG] with the best of the SIZE keys from p_k on; 0 without m_q."""
    b_best = tl.full([BG], float("-inf"), tl.float32)
    for i_n in range(0, SIZE, BN):
        # [BN]
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < SIZE
        # [BG, BN]
        b_dot = tl.zeros([BG, BN], tl.float32)
        for i_d in tl.static_range(0, D, BD):
            o_d = i_d + tl.arange(0, BD)
            m_d = (o_d < D)[None, :]
            b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_q[:, None] & m_d, other=0.0)
            b_k = tl.load(p_k + o_n[:, None] * stride_row + o_d[None, :], mask=m_n[:, None] & m_d, other=0.0)
            b_dot = tl.dot(b_q.to(b_k.dtype), tl.trans(b_k), b_dot, input_precision="tf32x3")
        b_best = tl.maximum(b_best, tl.max(tl.where(m_n[None, :], b_dot, float("-inf")), 1))
    return tl.where(m_q, b_best, 0.0)


@triton.jit
def choose_candidates(
    scores, moments, question, candidates, ids, valid, i_row, i_scope, m, n_given, k, weight, stride_question,
    GUIDED: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Write the k best of the m candidates of one row, by ascending id; with GUIDED, replace scores by the joint ones."""
    # [BM]
    o_m = tl.arange(0, BM)
    m_m = o_m < n_given
    b_score = tl.load(scores + i_row * m + o_m, mask=m_m, other=0.0)
    if GUIDED:
        b_n = m_m.to(tl.float32)
        n_all = tl.maximum(tl.sum(b_n, 0), 1.0)
        b_off = tl.where(m_m, b_score - tl.sum(b_score, 0) / n_all, 0.0)
        b_variance = tl.maximum(tl.sum(b_off * b_off, 0) / n_all, 1.1754943508222875e-38)
        # of the question's scores, a run per candidate
        m_run = o_m < m
        p_moments = moments + (i_row * m + o_m) * 3
        b_count = tl.load(p_moments, mask=m_run, other=0.0)
        b_mean, b_scale = mean_and_scale(p_moments + 1, m_run, b_count, tl.maximum(tl.sum(b_count, 0), 1.0))
        o_id = tl.load(candidates + i_row * m + o_m, mask=m_m, other=0).to(tl.int64)
        b_term = tl.load(question + i_scope * stride_question + o_id, mask=m_m, other=0.0)
        b_score = b_off / tl.sqrt(b_variance) + weight * (b_term - b_mean) * b_scale
        # of fewer scores than threads each is read by several
        tl.debug_barrier()
        tl.store(scores + i_row * m + o_m, b_score, mask=m_m)
    b_key = tl.sort(tl.where(m_m, order_key(b_score, o_m.to(tl.int64)), -(2**63)), descending=True)
    b_place = tl.where((o_m < k) & (b_key != -(2**63)), 0x7FFFFFFF - (b_key & 0x7FFFFFFF), m)
    b_place = tl.sort(b_place)
    o_last = tl.maximum(n_given - 1, 0)
    o_id = tl.load(candidates + i_row * m + tl.minimum(b_place, o_last), mask=o_m < k, other=0).to(tl.int64)
    tl.store(ids + i_row * k + o_m, o_id, mask=o_m < k)
    tl.store(valid + i_row * k + o_m, b_place < m, mask=o_m < k)


@triton.jit(do_not_specialize=["k", "n_blocks", "n_pinned"])  # they change from call to call
def refine(
    lookup, key, table, candidates, counts, scores, moments, question, done, ids, valid,
    pinned_block, pinned_position, border, hidden, n_pinned,
    k, n_blocks, weight, stride_question,
    stride_lookup_piece, stride_lookup_head, stride_key_head, stride_key_page, stride_key_row,
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, GUIDED: tl.constexpr,
    PINNED: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BQ: tl.constexpr,
    BL: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """The score of one candidate of a piece and scope, and the moments of one run of the question's scores."""
    i_m, i_scope, i_p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    m, scopes = tl.num_programs(0), tl.num_programs(1)
    i_row = i_p * scopes + i_scope
    n_eligible = tl.load(counts + i_p).to(tl.int64)
    n_given = tl.minimum(n_eligible, m)
    if i_m < n_given:
        i_page = tl.load(table + i_row * m + i_m).to(tl.int64)
        # [BG] heads of a group
        o_g = tl.arange(0, BG)
        b_score = tl.zeros([BG], tl.float32)
        for i in range(HEADS):
            i_h = i_scope * HEADS + i
            p_q = lookup + i_p * stride_lookup_piece + (i_h * GROUP + o_g) * stride_lookup_head
            p_k = key + i_h * stride_key_head + i_page * stride_key_page
            b_score += best_products(p_q, o_g < GROUP, p_k, stride_key_row, SIZE, D, BG, BN, BD)
        tl.store(scores + i_row * m + i_m, tl.sum(b_score, 0))
    if GUIDED:
        n_asked = tl.minimum(n_eligible, n_blocks)
        n_share = tl.cdiv(n_asked, m)
        # [1], the rows of `fold_moments`
        b_n, b_mean, b_m2 = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32), tl.zeros([1], tl.float32)
        n_end = tl.minimum((i_m + 1) * n_share, n_asked)
        for i_q in range(i_m * n_share, n_end, BQ):
            o_q = i_q + tl.arange(0, BQ)[None, :]
            b_x = tl.load(question + i_scope * stride_question + o_q, mask=o_q < n_end, other=0.0)
            b_n, b_mean, b_m2 = fold_moments(b_n, b_mean, b_m2, b_x, o_q < n_end)
        p_moments = moments + (i_row * m + i_m) * 3 + tl.arange(0, 1)
        tl.store(p_moments, b_n)
        tl.store(p_moments + 1, b_mean)
        tl.store(p_moments + 2, b_m2)
    # the program's stores come before its count, the others' before what the last one reads
    tl.debug_barrier()
    b_done = tl.atomic_add(done + i_row, 1, sem="acq_rel")
    if b_done == m - 1:
        tl.store(done + i_row, 0)
        choose_candidates(
            scores, moments, question, candidates, ids, valid, i_row, i_scope, m, n_given, k, weight, stride_question,
            GUIDED, BM,
        )  # fmt: skip
        if PINNED:
            p_hidden = hidden + i_row * n_pinned
            hide_twice(ids + i_row * k, pinned_block, pinned_position, border + i_p, p_hidden, k, n_pinned, BL, BI)


def cannot_serve(lookup: torch.Tensor, page_key: torch.Tensor, candidates: torch.Tensor) -> str | None:
    """Why `refine_pages` does not take these arguments, or None."""
    if candidates.shape[2] > MOST_CANDIDATES:
        return f"{candidates.shape[2]} candidates are more than {MOST_CANDIDATES}"
    group, rows = lookup.shape[1] // page_key.shape[0], len(lookup) * candidates.shape[1]
    if group > 16:
        return f"{group} heads share a key, more than 16"
    if rows > N_COUNTERS or len(lookup) > MOST_PIECES:
        return f"{rows} choices are more than one launch counts"
    return refusal(page_key)


def constants(group: int, dim: int, block: int, size: int, m: int, on: Target) -> dict[str, Any]:
    """Sizes of the tiles for keys of `size` bytes per element, and launch options."""
    sizes = {
        "BG": power_of_2(group, 16),
        "BN": min(power_of_2(block, 16), 64 if size < 4 else 32),
        "BD": min(power_of_2(dim, 16), 128 if size < 4 else 32),
        "BM": power_of_2(m, 2),
        "BQ": _QUESTION,
        "num_warps": 4,
        "num_stages": 1 if size == 4 else 3 if dim <= 128 else 2,
    }
    if not on.warp_groups:
        # left alone, ptxas spills a few bytes to fit more programs
        sizes["maxnreg"] = 232
    return sizes


def refine_pages(
    lookup: torch.Tensor,
    page_key: torch.Tensor,
    table: torch.Tensor,
    candidates: torch.Tensor,
    counts: Sequence[int] | torch.Tensor,
    topk: int,
    *,
    scopes: int,
    question: torch.Tensor | None = None,
    weight: float = 0.0,
    pinned: Pinned | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """See :func:`qllm_kernels.refine.refine_pages`; among equal scores the lower id wins."""
    pieces, heads, _ = lookup.shape
    kv_heads, _, block, dim = page_key.shape
    m = candidates.shape[2]
    k = min(topk, m)
    device, group = lookup.device, heads // kv_heads
    if lookup.stride(-1) != 1:
        lookup = lookup.contiguous()
    eligible = counts if isinstance(counts, torch.Tensor) else to_device(counts, device)
    scores = torch.empty(pieces, scopes, m, device=device)
    moments = scores if question is None else torch.empty(pieces, scopes, m, 3, device=device)
    ids = torch.empty(pieces, scopes, k, dtype=torch.int64, device=device)
    valid = torch.empty(pieces, scopes, k, dtype=torch.bool, device=device)
    asked, counters = scores if question is None else question, completion_counters(device)
    refine[(m, scopes, pieces)](
        lookup, page_key, table.contiguous(), candidates.contiguous(), eligible, scores, moments, asked, counters, ids,
        valid, *(pinned or (ids, ids, ids, valid)), 0 if pinned is None else len(pinned.block),
        k, asked.shape[-1], float(weight), 0 if question is None else asked.stride(0),
        *lookup.stride()[:2], *page_key.stride()[:3],
        HEADS=kv_heads // scopes, GROUP=group, SIZE=block, D=dim, GUIDED=question is not None, PINNED=pinned is not None,
        **PINNED_TILE, **constants(group, dim, block, page_key.element_size(), m, target(device)),
    )  # fmt: skip
    return ids, None if always_full(counts, k) else valid, scores
