"""The best of scores that have been written: moments of all of them, the question's term, top-k split over programs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qllm_kernels.gpu.shapes import Target, power_of_2, target
from qllm_kernels.gpu.tickets import tickets

CANDIDATES = 4096  # of all splits of a row together, at most
_TILE = 1024
_PROGRAMS = 512


@triton.jit
def order_key(b_score, o_id):
    """Scores and ids in one integer each: a higher score is larger, then a lower id."""
    # floats in an order of integers; + 0.0 makes one zero of two
    b_bits = (b_score + 0.0).to(tl.int32, bitcast=True)
    b_order = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    return (b_order.to(tl.int64) << 32) | (0x7FFFFFFF - o_id)


@triton.jit
def merge_row(candidates, ids, valid, i_row, n_candidates, n_blocks, k, BC: tl.constexpr, BK: tl.constexpr):
    """Write the k best candidates of one piece and scope, by ascending id."""
    # [BK]
    o_k = tl.arange(0, BK)
    b_top = tl.full([BK], -(2**63), tl.int64)
    for i_c in range(0, n_candidates, BC):
        # [BC]
        o_c = i_c + tl.arange(0, BC)
        b_key = tl.load(candidates + i_row * n_candidates + o_c, mask=o_c < n_candidates, other=-(2**63))
        b_top = tl.sort(tl.maximum(b_top, tl.flip(tl.topk(b_key, BK), 0)), descending=True)
    b_id = tl.where((o_k < k) & (b_top != -(2**63)), 0x7FFFFFFF - (b_top & 0x7FFFFFFF), n_blocks)
    b_id = tl.sort(b_id)
    tl.store(ids + i_row * k + o_k, tl.minimum(b_id, n_blocks - 1), mask=o_k < k)
    tl.store(valid + i_row * k + o_k, b_id < n_blocks, mask=o_k < k)


@triton.jit
def fold_moments(b_n, b_mean, b_m2, b_x, m_x):
    """Take the masked columns of b_x [rows, n] into each row's count, mean and sum of squared deviations [rows]."""
    b_new = tl.sum(m_x.to(tl.float32), 1)
    b_all = tl.maximum(b_n + b_new, 1.0)
    b_centre = tl.sum(tl.where(m_x, b_x, 0.0), 1) / tl.maximum(b_new, 1.0)
    b_off = tl.where(m_x, b_x - b_centre[:, None], 0.0)
    b_apart = b_centre - b_mean
    b_m2 += tl.sum(b_off * b_off, 1) + b_apart * b_apart * b_n * (b_new / b_all)
    return b_n + b_new, b_mean + b_apart * (b_new / b_all), b_m2


@triton.jit
def mean_and_scale(p_moments, m_s, b_n, n_all):
    """Mean, and one over the standard deviation, of what the partial moments (counts b_n) come from."""
    b_mean = tl.load(p_moments, mask=m_s, other=0.0)
    b_m2 = tl.load(p_moments + 1, mask=m_s, other=0.0)
    b_all = tl.sum(b_n * b_mean, 0) / n_all
    b_apart = b_mean - b_all
    b_variance = tl.sum(b_m2 + b_n * b_apart * b_apart, 0) / n_all
    return b_all, 1.0 / tl.sqrt(tl.maximum(b_variance, 1.1754943508222875e-38))


@triton.jit(do_not_specialize=["scopes", "n_blocks", "n_partials", "k"])  # they change from call to call
def choose(
    scores, moments, question, n_eligible, candidates, done, ids, valid,
    scopes, n_blocks, n_partials, k, weight, stride_question,
    GUIDED: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The BK best of a run of the scores of one piece and scope; the program that ends last merges those of all runs.

    With GUIDED, scores are standardised by their partial moments (count, mean, sum of squared deviations, the latter two also
    of the question's scores), get the question's term and are written back.
    """
    i_split, i_row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    splits = tl.num_programs(0)
    n_end = tl.minimum(tl.load(n_eligible + i_row // scopes).to(tl.int64), n_blocks)
    p_score, p_question = scores + i_row * n_blocks, question + i_row % scopes * stride_question
    b_mean, b_scale, b_question_mean, b_question_scale = 0.0, 1.0, 0.0, 1.0
    if GUIDED:
        # [BS]
        o_s = tl.arange(0, BS)
        m_s = o_s < n_partials
        p_moments = moments + (i_row * n_partials + o_s) * 5
        b_n = tl.load(p_moments, mask=m_s, other=0.0)
        n_all = tl.maximum(tl.sum(b_n, 0), 1.0)
        b_mean, b_scale = mean_and_scale(p_moments + 1, m_s, b_n, n_all)
        b_question_mean, b_question_scale = mean_and_scale(p_moments + 3, m_s, b_n, n_all)
    # [BK]
    b_top = tl.full([BK], -(2**63), tl.int64)
    n_tiles = tl.cdiv(n_end, BN)
    n_share = tl.cdiv(n_tiles, splits)
    for i_tile in range(i_split * n_share, tl.minimum((i_split + 1) * n_share, n_tiles)):
        # [BN]
        o_n = i_tile * BN + tl.arange(0, BN).to(tl.int64)
        m_n = o_n < n_end
        b_score = tl.load(p_score + o_n, mask=m_n, other=0.0)
        if GUIDED:
            b_term = (tl.load(p_question + o_n, mask=m_n, other=0.0) - b_question_mean) * b_question_scale
            b_score = (b_score - b_mean) * b_scale + weight * b_term
            tl.store(p_score + o_n, b_score, mask=m_n)
        b_key = tl.where(m_n, order_key(b_score, o_n), -(2**63))
        # the best of two descending lists: one against the other reversed
        b_top = tl.sort(tl.maximum(b_top, tl.flip(tl.topk(b_key, BK), 0)), descending=True)
    tl.store(candidates + (i_row * splits + i_split) * BK + tl.arange(0, BK), b_top)
    # the program's stores come before its count, the others' before what the last one reads
    tl.debug_barrier()
    b_done = tl.atomic_add(done + i_row, 1, sem="acq_rel")
    if b_done == splits - 1:
        tl.store(done + i_row, 0)
        merge_row(candidates, ids, valid, i_row, splits * BK, n_blocks, k, BC, BK)


def options(on: Target) -> dict[str, int]:
    """Launch options of `choose`; left alone, ptxas before sm_90 spills a few bytes to fit more programs."""
    return {"num_warps": 4} if on.warp_groups else {"num_warps": 4, "maxnreg": 128}


def choose_best(
    scores: torch.Tensor,
    n_eligible: torch.Tensor,
    k: int,
    *,
    moments: torch.Tensor | None = None,
    question: torch.Tensor | None = None,
    weight: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` best eligible blocks as in :func:`qllm_kernels.select.select_blocks`; among equal scores the lower id wins.

    Args:
        scores: [pieces, scopes, n_blocks] fp32; with a question, what is eligible is replaced by the joint score.
        n_eligible: [pieces] integers on the device.
        k: Blocks wanted, at most n_blocks.
        moments: [pieces, scopes, partials, 5] of `fold_moments` over runs of eligible blocks, with a question.
        question: [scopes, n_blocks or more] fp32 or None.
        weight: Factor on the question's standardised term.
    """
    pieces, scopes, n_blocks = scores.shape
    rows, b_k = pieces * scopes, power_of_2(k, 2)
    b_n = max(b_k, min(_TILE, power_of_2(n_blocks)))
    splits = max(1, min(triton.cdiv(n_blocks, b_n), CANDIDATES // b_k, _PROGRAMS // rows))
    n_partials = 1 if moments is None else moments.shape[2]
    candidates = torch.empty(rows, splits, b_k, dtype=torch.int64, device=scores.device)
    ids = torch.empty(pieces, scopes, k, dtype=torch.int64, device=scores.device)
    valid = torch.empty(pieces, scopes, k, dtype=torch.bool, device=scores.device)
    choose[(splits, rows)](
        scores, scores if moments is None else moments, scores if question is None else question, n_eligible, candidates,
        tickets(scores.device), ids, valid, scopes, n_blocks, n_partials, k, float(weight),
        0 if question is None else question.stride(0),
        GUIDED=question is not None, BS=power_of_2(n_partials), BN=b_n, BC=max(b_k, min(512, power_of_2(splits * b_k))),
        BK=b_k, **options(target(scores.device)),
    )  # fmt: skip
    return ids, valid
