"""Block scores and top-k: blocks are split over programs, each keeps its best; the last one or a second launch merges them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from qllm_kernels.eligible import to_device
from qllm_kernels.gpu.shapes import Target, power_of_2, refusal, target

MOST_BLOCKS_CHOSEN = 256
_CANDIDATES = 4096  # of all splits together
_ROWS = 64


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
        b_top = tl.sort(tl.maximum(b_top, tl.flip(tl.topk(b_key, BK))), descending=True)
    b_id = tl.where((o_k < k) & (b_top != -(2**63)), 0x7FFFFFFF - (b_top & 0x7FFFFFFF), n_blocks)
    b_id = tl.sort(b_id)
    tl.store(ids + i_row * k + o_k, tl.minimum(b_id, n_blocks - 1), mask=o_k < k)
    tl.store(valid + i_row * k + o_k, b_id < n_blocks, mask=o_k < k)


@triton.jit(do_not_specialize=["pieces", "n_blocks", "k"])  # they change from call to call
def score_blocks(
    lookup, summaries, n_eligible, scores, candidates, done, ids, valid,
    pieces, n_blocks, k,
    stride_lookup_piece, stride_lookup_head, stride_summary_head, stride_summary_r, stride_summary_block,
    HEADS: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, D: tl.constexpr, MERGE: tl.constexpr,
    BG: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Scores of a run of blocks for BP pieces, BD dimensions at a time, and the BK best of them as (score, -id) in one integer.

    BR summaries of a block are read at once. With MERGE there is one piece, and the program that ends last merges all.
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
    b_eligible = tl.minimum(tl.load(n_eligible + o_p, mask=m_p, other=0).to(tl.int64), n_blocks)
    # [BN * BR] summaries of a tile: blocks, then theirs
    o_c = tl.arange(0, BN * BR)
    o_cn, o_cr = o_c // BR, o_c % BR
    # [BP, BK]
    b_top = tl.full([BP, BK], -(2**63), tl.int64)
    o_place = (o_p * scopes + i_scope)[:, None]
    n_end = tl.max(b_eligible, 0)
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
        m_score = m_p[:, None] & m_n[None, :]
        tl.store(scores + o_place * n_blocks + o_n[None, :], b_score, mask=m_score)
        # floats in an order of integers; + 0.0 makes one zero of two
        b_bits = (b_score + 0.0).to(tl.int32, bitcast=True)
        b_order = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
        b_key = (b_order.to(tl.int64) << 32) | (0x7FFFFFFF - o_n)[None, :]
        b_key = tl.where(m_score & (o_n[None, :] < b_eligible[:, None]), b_key, -(2**63))
        # the best of two descending lists: one against the other reversed
        b_top = tl.sort(tl.maximum(b_top, tl.flip(tl.topk(b_key, BK, 1), 1)), 1, descending=True)
    p_out = candidates + (o_place * splits + i_split) * BK + tl.arange(0, BK)[None, :]
    tl.store(p_out, b_top, mask=m_p[:, None])
    if MERGE:
        # the program's stores come before its count, the others' before what the last one reads
        tl.debug_barrier()
        b_done = tl.atomic_add(done + i_scope, 1, sem="acq_rel")
        if b_done == splits - 1:
            merge_row(candidates, ids, valid, i_scope, splits * BK, n_blocks, k, BC, BK)


@triton.jit(do_not_specialize=["n_candidates", "n_blocks", "k"])
def merge_candidates(candidates, ids, valid, n_candidates, n_blocks, k, BC: tl.constexpr, BK: tl.constexpr):
    """The k best candidates of one piece and scope."""
    merge_row(candidates, ids, valid, tl.program_id(0).to(tl.int64), n_candidates, n_blocks, k, BC, BK)


def cannot_serve(lookup: torch.Tensor, summaries: torch.Tensor, topk: int) -> str | None:
    """Why `top_blocks` does not take these arguments, or None."""
    group, dim = lookup.shape[1] // summaries.shape[0], lookup.shape[2]
    if topk > MOST_BLOCKS_CHOSEN:
        return f"topk {topk} is above {MOST_BLOCKS_CHOSEN}"
    if group > 16:
        return f"{group} heads share a summary, more than 16"
    refused = refusal(summaries)
    if refused is None and constants(1, group, dim, topk, summaries.element_size(), target(summaries.device)) is None:
        return f"tiles for topk {topk} of head size {dim} in {summaries.dtype} need more shared memory than there is"
    return refused


def constants(
    pieces: int, group: int, dim: int, topk: int, size: int, on: Target, *, side_by_side: bool = False
) -> dict[str, Any] | None:
    """Sizes of the tiles of `score_blocks` for elements of `size` bytes, and its launch options; None: nothing fits.

    With `side_by_side`, the summaries of a block are neighbours in memory and read in pairs.
    """
    b_group, b_k = power_of_2(group), power_of_2(topk, 2)
    b_d = power_of_2(dim, 16) if size < 4 else min(power_of_2(dim, 16), 32)
    # a product takes 16 rows at least; what pieces don't fill goes to heads, so that top-k has no rows in vain
    b_p = max(1, min(power_of_2(pieces), (_ROWS if size < 4 else 16) // b_group))
    b_group = max(b_group, 16 // b_p)
    rows = b_group * b_p
    together = 2 if side_by_side else 1
    b_n = max((64 if dim <= 128 else 32) // together, b_k)
    tile = (rows + b_n * together) * b_d * size
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
        "num_warps": 4 if b_p == 1 else 8,
        "num_stages": stages,
    }
    if b_p == 1 and dim <= 128 and not on.warp_groups:
        # left alone, ptxas spills a few bytes to fit more programs than the shared memory allows
        sizes["maxnreg"] = 208
    return sizes


def top_blocks(
    lookup: torch.Tensor, summaries: torch.Tensor, counts: Sequence[int] | torch.Tensor, topk: int, *, scopes: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """See :func:`qllm_kernels.select.top_blocks` and :func:`qllm_kernels.eligible.top_blocks`.

    Among equal scores the lower id wins. Scores of blocks that a piece may not choose are undefined.
    """
    pieces, heads, dim = lookup.shape
    summary_heads, r, n_blocks = summaries.shape[:3]
    k = min(topk, n_blocks)
    if pieces > 1 or lookup.stride(-1) != 1:
        lookup = lookup.to(summaries.dtype).contiguous()
    together = r > 1 and summaries.stride(1) < summaries.stride(2)
    group, size, on = heads // summary_heads, summaries.element_size(), target(summaries.device)
    sizes = constants(pieces, group, dim, k, size, on, side_by_side=together)
    assert sizes is not None
    splits = max(1, min(triton.cdiv(n_blocks, sizes["BN"]), _CANDIDATES // sizes["BK"]))
    if isinstance(counts, torch.Tensor):
        n_eligible, all_valid = counts, False
    else:
        n_eligible = to_device(counts, lookup.device)
        all_valid = min(counts) >= k
    n_candidates = splits * sizes["BK"]
    b_c = max(sizes["BK"], min(512, power_of_2(n_candidates)))
    scores = torch.empty(pieces, scopes, n_blocks, device=lookup.device)
    candidates = torch.empty(pieces, scopes, splits, sizes["BK"], dtype=torch.int64, device=lookup.device)
    ids = torch.empty(pieces, scopes, k, dtype=torch.int64, device=lookup.device)
    valid = torch.empty(pieces, scopes, k, dtype=torch.bool, device=lookup.device)
    done = torch.zeros(scopes, dtype=torch.int32, device=lookup.device) if pieces == 1 else ids
    score_blocks[(splits, scopes, triton.cdiv(pieces, sizes["BP"]))](
        lookup, summaries, n_eligible, scores, candidates, done, ids, valid, pieces, n_blocks, k,
        *lookup.stride()[:2], *summaries.stride()[:3],
        HEADS=summary_heads // scopes, GROUP=group, R=r, D=dim, MERGE=pieces == 1, BC=b_c, **sizes,
    )  # fmt: skip
    if pieces > 1:
        merge_candidates[(pieces * scopes,)](
            candidates, ids, valid, n_candidates, n_blocks, k, BC=b_c, BK=sizes["BK"], num_warps=4
        )
    return ids, None if all_valid else valid, scores
