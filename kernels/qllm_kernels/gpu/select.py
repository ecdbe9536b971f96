"""Block scores, split over programs; for one piece without a question the same launch chooses the best blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from qllm_kernels.choice import always_full
from qllm_kernels.eligible import to_device
from qllm_kernels.gpu.choose import CANDIDATES, choose_best, fold_moments, merge_row, order_key
from qllm_kernels.gpu.shapes import Target, power_of_2, refusal, target
from qllm_kernels.gpu.tickets import tickets

MOST_BLOCKS_CHOSEN = 256
_MOST_MERGED = 64  # blocks wanted that are chosen by the launch that scores
_ROWS = 64
_SPLITS = 256  # of the blocks of one launch, at most


@triton.jit(do_not_specialize=["pieces", "n_blocks", "first", "n_all", "k", "i_partial", "n_partials"])  # they change
def score_blocks(
    lookup, summaries, n_eligible, scores, moments, question, candidates, done, ids, valid,
    pieces, n_blocks, first, n_all, k, i_partial, n_partials, stride_question,
    stride_lookup_piece, stride_lookup_head, stride_summary_head, stride_summary_r, stride_summary_block,
    HEADS: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BOUNDS: tl.constexpr,
    MERGE: tl.constexpr, GUIDED: tl.constexpr,
    BG: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Scores for BP pieces of a run of the n_blocks blocks that come behind `first` others, BD dimensions at a time.

    BR summaries of a block are read at once. With BOUNDS they are bounds of keys, D / 2 upper ones and then the lower. With
    MERGE there is one piece, each program keeps its BK best as (score, -id) in one integer, and the one that ends last merges
    all. With GUIDED, each leaves count, mean and sum of squared deviations of its eligible scores, and the latter two of the
    question's scores of the same blocks, behind i_partial others.
    """
    i_split, i_scope, i_p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    splits, scopes = tl.num_programs(0), tl.num_programs(1)
    # [BG * BP] query rows: heads of the group, then pieces
    o_row = tl.arange(0, BG * BP)
    o_g, o_rp = o_row // BP, i_p * BP + o_row % BP
    m_q = (o_g < GROUP) & (o_rp < pieces)
    # [BP]
    o_p = i_p * BP + tl.arange(0, BP)
    m_p = o_p < pieces
    b_eligible = tl.minimum(tl.load(n_eligible + o_p, mask=m_p, other=0).to(tl.int64) - first, n_blocks)
    # [BN * BR] summaries of a tile: blocks, then theirs
    o_c = tl.arange(0, BN * BR)
    o_cn, o_cr = o_c // BR, o_c % BR
    if MERGE:
        # [BP, BK]
        b_top = tl.full([BP, BK], -(2**63), tl.int64)
    if GUIDED:
        # [BP]
        b_n, b_mean, b_m2 = tl.zeros([BP], tl.float32), tl.zeros([BP], tl.float32), tl.zeros([BP], tl.float32)
        b_question_mean, b_question_m2 = tl.zeros([BP], tl.float32), tl.zeros([BP], tl.float32)
    o_place = (o_p * scopes + i_scope)[:, None]
    n_end = tl.maximum(tl.max(b_eligible, 0), 0)
    n_tiles = tl.cdiv(n_end, BN)
    n_share = tl.cdiv(n_tiles, splits)
    for i_tile in range(i_split * n_share, tl.minimum((i_split + 1) * n_share, n_tiles)):
        # [BN]
        o_n = i_tile * BN + tl.arange(0, BN).to(tl.int64)
        m_n = o_n < n_end
        b_score = tl.zeros([BP, BN], tl.float32)
        b_best = tl.zeros([BG * BP, BN], tl.float32)
        for i in range(HEADS * ((R + BR - 1) // BR)):
            i_head, i_r = i_scope * HEADS + i // ((R + BR - 1) // BR), i % ((R + BR - 1) // BR)
            o_r, o_b = i_r * BR + o_cr, i_tile * BN + o_cn.to(tl.int64)
            m_c = (o_b < n_end) & (o_r < R)
            # [BG * BP], [BN * BR]
            p_q = lookup + o_rp * stride_lookup_piece + (i_head * GROUP + o_g) * stride_lookup_head
            p_k = summaries + i_head * stride_summary_head + o_r * stride_summary_r + o_b * stride_summary_block
            # [BG * BP, BN * BR], then its best per block [BG * BP, BN]
            b_dot = tl.zeros([BG * BP, BN * BR], tl.float32)
            for i_d in tl.static_range(0, D, BD):
                o_d = i_d + tl.arange(0, BD)
                m_d = (o_d < D)[None, :]
                if BOUNDS:
                    m_upper = (o_d < D // 2)[None, :]
                    o_q = tl.where(o_d < D // 2, o_d, o_d - D // 2)
                    b_q = tl.load(p_q[:, None] + o_q[None, :], mask=m_q[:, None] & m_d, other=0.0)
                    b_q = tl.where(m_upper, tl.maximum(b_q, 0.0), tl.minimum(b_q, 0.0))
                else:
                    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_q[:, None] & m_d, other=0.0)
                b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_c[:, None] & m_d, other=0.0)
                b_dot = tl.dot(b_q.to(b_k.dtype), tl.trans(b_k), b_dot, input_precision="tf32x3")
            if BR > 1:
                if R % BR != 0:
                    b_dot = tl.where((o_r < R)[None, :], b_dot, float("-inf"))
                b_dot = tl.max(tl.reshape(b_dot, [BG * BP, BN, BR]), 2)
            b_best = tl.where(i_r == 0, b_dot, tl.maximum(b_best, b_dot))
            if i_r == (R + BR - 1) // BR - 1:
                b_score += tl.sum(tl.reshape(b_best, [BG, BP, BN]), 0)
        tl.store(scores + o_place * n_all + first + o_n[None, :], b_score, mask=m_p[:, None] & m_n[None, :])
        m_score = m_p[:, None] & (o_n[None, :] < b_eligible[:, None])
        if MERGE:
            b_key = tl.where(m_score, order_key(b_score, o_n[None, :]), -(2**63))
            # the best of two descending lists: one against the other reversed
            b_top = tl.sort(tl.maximum(b_top, tl.flip(tl.topk(b_key, BK, 1), 1)), 1, descending=True)
        if GUIDED:
            p_question = question + i_scope * stride_question + first + o_n[None, :]
            b_term = tl.broadcast_to(tl.load(p_question, mask=m_n[None, :], other=0.0), [BP, BN])
            _, b_question_mean, b_question_m2 = fold_moments(b_n, b_question_mean, b_question_m2, b_term, m_score)
            b_n, b_mean, b_m2 = fold_moments(b_n, b_mean, b_m2, b_score, m_score)
    if GUIDED:
        # [BP]
        p_moments = moments + ((o_p * scopes + i_scope) * n_partials + i_partial + i_split) * 5
        tl.store(p_moments, b_n, mask=m_p)
        tl.store(p_moments + 1, b_mean, mask=m_p)
        tl.store(p_moments + 2, b_m2, mask=m_p)
        tl.store(p_moments + 3, b_question_mean, mask=m_p)
        tl.store(p_moments + 4, b_question_m2, mask=m_p)
    if MERGE:
        p_out = candidates + (o_place * splits + i_split) * BK + tl.arange(0, BK)[None, :]
        tl.store(p_out, b_top, mask=m_p[:, None])
        # the program's stores come before its count, the others' before what the last one reads
        tl.debug_barrier()
        b_done = tl.atomic_add(done + i_scope, 1, sem="acq_rel")
        if b_done == splits - 1:
            tl.store(done + i_scope, 0)
            merge_row(candidates, ids, valid, i_scope, splits * BK, n_all, k, BC, BK)


def cannot_serve(lookup: torch.Tensor, summaries: torch.Tensor, topk: int) -> str | None:
    """Why `top_blocks` does not take these arguments, or None."""
    group, dim = lookup.shape[1] // summaries.shape[0], summaries.shape[3]
    if topk > MOST_BLOCKS_CHOSEN:
        return f"topk {topk} is above {MOST_BLOCKS_CHOSEN}"
    if group > 16:
        return f"{group} heads share a summary, more than 16"
    refused = refusal(summaries[..., : lookup.shape[2]])
    wanted = min(topk, _MOST_MERGED)
    if refused is None and constants(1, group, dim, wanted, summaries.element_size(), target(lookup.device)) is None:
        return f"tiles of head size {dim} in {summaries.dtype} need more shared memory than there is"
    return refused


def constants(
    pieces: int, group: int, dim: int, topk: int, size: int, on: Target, *, side_by_side: bool = False
) -> dict[str, Any] | None:
    """Sizes of the tiles of `score_blocks`, and its launch options, for summaries of `dim` elements of `size` bytes.

    None: nothing fits. With `side_by_side`, the summaries of a block are neighbours in memory and read in pairs.
    """
    b_group, b_k = power_of_2(group), power_of_2(topk, 2)
    b_d = min(power_of_2(dim, 16), 128 if size < 4 else 32)
    # a product takes 16 rows at least; what pieces don't fill goes to heads, so that top-k has no rows in vain
    b_p = max(1, min(power_of_2(pieces), (_ROWS if size < 4 else 16) // b_group))
    b_group = max(b_group, 16 // b_p)
    rows = b_group * b_p
    together = 2 if side_by_side else 1
    b_n = max((64 if dim <= 128 and size < 4 else 32) // together, b_k)
    tile = (rows + b_n * together) * (power_of_2(dim, 16) if size < 4 else b_d) * size
    stages = min(1 if size == 4 else 3 if dim <= 128 else 2, on.shared // tile)
    if stages == 0:
        return None
    sizes = {
        "BG": b_group,
        "BP": b_p,
        "BD": b_d,
        "BN": b_n,
        "BR": together,
        "BK": b_k,
        "num_warps": 4 if b_p == 1 or dim > 128 else 8,
        "num_stages": stages,
    }
    if b_p == 1 and dim <= 128 and not on.warp_groups:
        # left alone, ptxas spills a few bytes to fit more programs than the shared memory allows
        sizes["maxnreg"] = 232
    return sizes


def top_blocks(
    lookup: torch.Tensor, summaries: torch.Tensor, counts: Sequence[int] | torch.Tensor, topk: int, *, scopes: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """See :func:`qllm_kernels.select.top_blocks` and :func:`qllm_kernels.eligible.top_blocks`.

    Among equal scores the lower id wins. Scores of blocks that a piece may not choose are undefined.
    """
    return choose_blocks(lookup, [summaries], counts, topk, scopes=scopes)


def choose_blocks(
    lookup: torch.Tensor,
    parts: Sequence[torch.Tensor],
    counts: Sequence[int] | torch.Tensor,
    topk: int,
    *,
    scopes: int,
    question: torch.Tensor | None = None,
    weight: float = 0.0,
    bounds: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """See :func:`qllm_kernels.choice.choose_blocks`; one launch per part and one that chooses, or one in all.

    Among equal scores the lower id wins.
    """
    pieces, heads, _ = lookup.shape
    like = parts[0]
    summary_heads, dim = like.shape[0], like.shape[3]
    n_blocks = sum(part.shape[2] for part in parts)
    k = min(topk, n_blocks)
    if pieces > 1 or lookup.stride(-1) != 1:
        lookup = lookup.to(like.dtype).contiguous()
    merge = pieces == 1 and len(parts) == 1 and question is None and k <= _MOST_MERGED
    n_eligible = counts if isinstance(counts, torch.Tensor) else to_device(counts, lookup.device)
    group, size, on = heads // summary_heads, like.element_size(), target(lookup.device)
    launches = []
    for part in parts:
        together = part.shape[1] > 1 and part.stride(1) < part.stride(2)
        sizes = constants(pieces, group, dim, k if merge else 1, size, on, side_by_side=together)
        assert sizes is not None
        most = CANDIDATES // sizes["BK"] if merge else _SPLITS
        launches.append((part, sizes, max(1, min(triton.cdiv(part.shape[2], sizes["BN"]), most))))
    n_partials = sum(splits for *_, splits in launches)
    scores = torch.empty(pieces, scopes, n_blocks, device=lookup.device)
    moments = candidates = ids = valid = scores
    if question is not None:
        moments = torch.empty(pieces, scopes, n_partials, 5, device=lookup.device)
    if merge:
        ids = torch.empty(1, scopes, k, dtype=torch.int64, device=lookup.device)
        valid = torch.empty(1, scopes, k, dtype=torch.bool, device=lookup.device)
        candidates = torch.empty(scopes, n_partials, launches[0][1]["BK"], dtype=torch.int64, device=lookup.device)
    first = i_partial = 0
    for part, sizes, splits in launches:
        score_blocks[(splits, scopes, triton.cdiv(pieces, sizes["BP"]))](
            lookup, part, n_eligible, scores, moments, scores if question is None else question, candidates,
            tickets(lookup.device), ids, valid, pieces, part.shape[2], first, n_blocks, k, i_partial, n_partials,
            0 if question is None else question.stride(0), *lookup.stride()[:2], *part.stride()[:3],
            HEADS=summary_heads // scopes, GROUP=group, R=part.shape[1], D=dim, BOUNDS=bounds,
            MERGE=merge, GUIDED=question is not None,
            BC=max(sizes["BK"], min(512, power_of_2(splits * sizes["BK"]))) if merge else 1, **sizes,
        )  # fmt: skip
        first, i_partial = first + part.shape[2], i_partial + splits
    if not merge:
        ids, valid = choose_best(scores, n_eligible, k, moments=moments, question=question, weight=weight)
    return ids, None if always_full(counts, k) else valid, scores
