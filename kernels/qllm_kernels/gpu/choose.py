"""The best of scores that have been written: moments of all of them, the question's term, the k-th best score by bisection."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qllm_kernels.gpu.shapes import power_of_2

PARTIALS = 256  # programs that score a run of blocks, at most; so many partial moments are read at once
TILE = 1024  # scores of a row that are read at a time
PINNED_TILE = {"BL": 64, "BI": 32}  # of `hide_twice`: keys and ids


@triton.jit
def ordered(b_score):
    """Floats as 32-bit integers of the same order."""
    # + 0.0 makes one zero of two
    b_bits = (b_score + 0.0).to(tl.int32, bitcast=True)
    return b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(b_order):
    """What `ordered` made an integer of."""
    b_bits = b_order.to(tl.int32)
    return (b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


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


@triton.jit
def score_range(
    p_score, p_moments, p_question, n_end, n_partials, weight, GUIDED: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr
):
    """Lowest and highest of the first n_end scores; with GUIDED, joint ones are written in their place first."""
    if GUIDED:
        # [BS]
        o_s = tl.arange(0, BS)
        m_s = o_s < n_partials
        b_n = tl.load(p_moments + o_s * 5, mask=m_s, other=0.0)
        n_all = tl.maximum(tl.sum(b_n, 0), 1.0)
        b_mean, b_scale = mean_and_scale(p_moments + o_s * 5 + 1, m_s, b_n, n_all)
        b_question_mean, b_question_scale = mean_and_scale(p_moments + o_s * 5 + 3, m_s, b_n, n_all)
    # [BN]
    b_low, b_high = tl.full([BN], float("inf"), tl.float32), tl.full([BN], float("-inf"), tl.float32)
    for i_n in range(0, n_end, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < n_end
        b_score = tl.load(p_score + o_n, mask=m_n, other=0.0)
        if GUIDED:
            b_term = (tl.load(p_question + o_n, mask=m_n, other=0.0) - b_question_mean) * b_question_scale
            b_score = (b_score - b_mean) * b_scale + weight * b_term
            tl.store(p_score + o_n, b_score, mask=m_n)
        b_low = tl.minimum(b_low, tl.where(m_n, b_score, float("inf")))
        b_high = tl.maximum(b_high, tl.where(m_n, b_score, float("-inf")))
    # what one thread has written, another one reads
    tl.debug_barrier()
    return tl.min(b_low, 0), tl.max(b_high, 0)


@triton.jit
def kth_best(p_score, b_low, b_high, n_end, k, BN: tl.constexpr):
    """The k-th best of the first n_end scores, which lie from b_low to b_high, and how many of those equal to it are wanted.

    Each round counts the scores above three thresholds, and keeps the quarter in which the k-th lies.
    """
    low, high = ordered(b_low).to(tl.int64), ordered(b_high).to(tl.int64)
    high = tl.where(n_end <= k, low, high)
    n_above = n_end * 0  # scores above `high`
    while low < high:
        step = (high - low + 3) // 4
        b_first, b_second, b_third = unordered(low + step), unordered(low + 2 * step), unordered(low + 3 * step)
        # [BN]
        b_n_first = tl.zeros([BN], tl.int32)
        b_n_second, b_n_third = b_n_first, b_n_first
        for i_n in range(0, n_end, BN):
            o_n = i_n + tl.arange(0, BN)
            m_n = o_n < n_end
            b_score = tl.load(p_score + o_n, mask=m_n, other=float("-inf"))
            b_n_first += (m_n & (b_score >= b_first)).to(tl.int32)
            b_n_second += (m_n & (b_score >= b_second)).to(tl.int32)
            b_n_third += (m_n & (b_score >= b_third)).to(tl.int32)
        n_first, n_second, n_third = tl.sum(b_n_first, 0), tl.sum(b_n_second, 0), tl.sum(b_n_third, 0)
        quarter = (n_first >= k).to(tl.int64) + (n_second >= k).to(tl.int64) + (n_third >= k).to(tl.int64)
        n_from = tl.where(
            quarter == 1, n_first, tl.where(quarter == 2, n_second, tl.where(quarter == 3, n_third, n_end))
        )
        n_beyond = tl.where(quarter == 0, n_first, tl.where(quarter == 1, n_second, n_third))
        low = low + quarter * step
        shrinks = (quarter < 3) & (low + step <= high)
        n_above = tl.where(shrinks, n_beyond, n_above)
        high = tl.where(shrinks, low + step - 1, high)
        # with k scores from here on, all of them are wanted
        n_above = tl.where(n_from == k, 0, n_above)
        high = tl.where(n_from == k, low, high)
    return unordered(low), k - n_above


@triton.jit
def choose_row(
    p_score, p_moments, p_question, p_ids, p_valid, n_end, n_partials, k, weight,
    GUIDED: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write the ids of the k best of the first n_end scores of one piece and scope, ascending."""
    b_low, b_high = score_range(p_score, p_moments, p_question, n_end, n_partials, weight, GUIDED, BS, BN)
    b_least, n_wanted = kth_best(p_score, b_low, b_high, n_end, k, BN)
    n_better, n_equal = n_end * 0, n_end * 0
    for i_n in range(0, n_end, BN):
        # [BN]
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < n_end
        b_score = tl.load(p_score + o_n, mask=m_n, other=float("-inf"))
        m_better, m_equal = m_n & (b_score > b_least), m_n & (b_score == b_least)
        # both counts in one number
        b_both = m_better.to(tl.int32) + (m_equal.to(tl.int32) << 16)
        b_up_to = tl.cumsum(b_both, 0)
        b_equal = n_equal + (b_up_to >> 16)
        o_out = n_better + (b_up_to & 0xFFFF) + tl.minimum(b_equal, n_wanted) - 1
        tl.store(p_ids + o_out, o_n.to(tl.int64), mask=m_better | (m_equal & (b_equal <= n_wanted)))
        n_both = tl.sum(b_both, 0)
        n_better, n_equal = n_better + (n_both & 0xFFFF), n_equal + (n_both >> 16)
    n_out = n_better + tl.minimum(n_equal, n_wanted)
    for i_k in range(0, k, BN):
        # [BN]
        o_k = i_k + tl.arange(0, BN)
        tl.store(p_valid + o_k, o_k < n_out, mask=o_k < k)
        tl.store(p_ids + o_k, tl.maximum(n_end - 1, 0) + tl.zeros([BN], tl.int64), mask=(o_k < k) & (o_k >= n_out))


@triton.jit
def hide_twice(p_ids, block, position, p_border, p_hidden, k, n_pinned, BL: tl.constexpr, BI: tl.constexpr):
    """Write which pinned keys are in the k blocks that were written, or after the border."""
    # what one thread has written, another one reads
    tl.debug_barrier()
    b_border = tl.load(p_border)
    for i_l in range(0, n_pinned, BL):
        # [BL]
        o_l = i_l + tl.arange(0, BL)
        m_l = o_l < n_pinned
        b_block = tl.load(block + o_l, mask=m_l, other=-1)
        b_hidden = (tl.load(position + o_l, mask=m_l, other=-1) >= b_border).to(tl.int32)
        for i_i in range(0, k, BI):
            # [BL, BI]
            o_i = i_i + tl.arange(0, BI)
            b_id = tl.load(p_ids + o_i, mask=o_i < k, other=-2)
            b_same = (b_block[:, None] == b_id[None, :]).to(tl.int32)
            b_hidden = tl.maximum(b_hidden, tl.max(b_same, 1))
        tl.store(p_hidden + o_l, b_hidden > 0, mask=m_l)


@triton.jit(do_not_specialize=["scopes", "n_blocks", "n_partials", "k"])  # they change from call to call
def choose(
    scores, moments, question, n_eligible, ids, valid,
    scopes, n_blocks, n_partials, k, weight, stride_question,
    GUIDED: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The best of the scores of one piece and scope.

    With GUIDED, scores are standardised by their partial moments (count, mean, sum of squared deviations, the latter two also
    of the question's scores), get the question's term and are written back.
    """
    i_row = tl.program_id(0).to(tl.int64)
    n_end = tl.minimum(tl.load(n_eligible + i_row // scopes).to(tl.int32), n_blocks)
    choose_row(
        scores + i_row * n_blocks, moments + i_row * n_partials * 5, question + i_row % scopes * stride_question,
        ids + i_row * k, valid + i_row * k, n_end, n_partials, k, weight, GUIDED, BS, BN,
    )  # fmt: skip


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
    n_partials = 1 if moments is None else moments.shape[2]
    ids = torch.empty(pieces, scopes, k, dtype=torch.int64, device=scores.device)
    valid = torch.empty(pieces, scopes, k, dtype=torch.bool, device=scores.device)
    choose[(pieces * scopes,)](
        scores, scores if moments is None else moments, scores if question is None else question, n_eligible, ids, valid,
        scopes, n_blocks, n_partials, k, float(weight), 0 if question is None else question.stride(0),
        GUIDED=question is not None, BS=1 if question is None else max(PARTIALS, power_of_2(n_partials)), BN=TILE, num_warps=8,
    )  # fmt: skip
    return ids, valid
