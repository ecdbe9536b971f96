"""Block scores and top-k: blocks are split over programs, each keeps its best, a second launch merges them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from qllm_kernels.gpu.shapes import power_of_2, refusal

MOST_BLOCKS_CHOSEN = 256
_CANDIDATES = 4096  # of all splits together, in one tile of the merge
_ROWS = 64


@triton.jit(do_not_specialize=["pieces", "n_blocks", "tiles_per_split"])  # they change from call to call
def score_blocks(
    lookup,
    summaries,
    n_eligible,
    scores,
    candidates,
    pieces,
    n_blocks,
    tiles_per_split,
    stride_lookup_piece,
    stride_lookup_head,
    stride_summary_head,
    stride_summary_r,
    stride_summary_block,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BG: tl.constexpr,
    BP: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Scores of a run of blocks for BP pieces, and the BK best of them as (score, -id) in one integer."""
    i_split, i_scope, i_p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    scopes = tl.num_programs(1)
    o_d = tl.arange(0, BD)
    # [BG * BP] query rows: heads of the group, then pieces
    o_row = tl.arange(0, BG * BP)
    o_g, o_rp = o_row // BP, i_p * BP + o_row % BP
    m_q = ((o_g < GROUP) & (o_rp < pieces))[:, None] & (o_d < D)[None, :]
    # [BP]
    o_p = i_p * BP + tl.arange(0, BP)
    m_p = o_p < pieces
    b_eligible = tl.load(n_eligible + o_p, mask=m_p, other=0)
    # [BP, BK]
    b_top = tl.full([BP, BK], -(2**63), tl.int64)
    o_place = (o_p * scopes + i_scope)[:, None]
    for i_tile in range(i_split * tiles_per_split, tl.minimum((i_split + 1) * tiles_per_split, tl.cdiv(n_blocks, BN))):
        # [BN]
        o_n = i_tile * BN + tl.arange(0, BN).to(tl.int64)
        m_n = o_n < n_blocks
        b_score = tl.zeros([BP, BN], tl.float32)
        b_best = tl.zeros([BG * BP, BN], tl.float32)
        for i in range(HEADS * R):
            i_head, i_r = i_scope * HEADS + i // R, i % R
            # [BG * BP, BD]
            p_q = lookup + o_rp[:, None] * stride_lookup_piece + (i_head * GROUP + o_g)[:, None] * stride_lookup_head
            b_q = tl.load(p_q + o_d[None, :], mask=m_q, other=0.0)
            # [BN, BD]
            p_k = summaries + i_head * stride_summary_head + i_r * stride_summary_r
            p_k += o_n[:, None] * stride_summary_block + o_d[None, :]
            b_k = tl.load(p_k, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)
            # [BG * BP, BN]
            b_dot = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
            b_best = tl.where(i_r == 0, b_dot, tl.maximum(b_best, b_dot))
            if i_r == R - 1:
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
    p_out = candidates + (o_place * tl.num_programs(0) + i_split) * BK + tl.arange(0, BK)[None, :]
    tl.store(p_out, b_top, mask=m_p[:, None])


@triton.jit(do_not_specialize=["n_candidates", "n_blocks", "k"])
def merge_candidates(candidates, ids, valid, n_candidates, n_blocks, k, BC: tl.constexpr, BK: tl.constexpr):
    """The k best candidates of one piece and scope, by ascending id."""
    i_row = tl.program_id(0).to(tl.int64)
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


def cannot_serve(lookup: torch.Tensor, summaries: torch.Tensor, topk: int) -> str | None:
    """Why `top_blocks` does not take these arguments, or None."""
    if topk > MOST_BLOCKS_CHOSEN:
        return f"topk {topk} is above {MOST_BLOCKS_CHOSEN}"
    if lookup.shape[1] // summaries.shape[0] > 16:
        return f"{lookup.shape[1] // summaries.shape[0]} heads share a summary, more than 16"
    return refusal(summaries)


def constants(pieces: int, group: int, dim: int, topk: int, size: int) -> dict[str, Any]:
    """Sizes of the tiles of `score_blocks` for elements of `size` bytes, and its launch options."""
    b_group = power_of_2(group)
    b_k = power_of_2(topk, 2)
    rows = min(_ROWS, b_group * power_of_2(pieces))
    return {
        "BG": b_group,
        "BP": max(16, rows) // b_group,
        "BD": power_of_2(dim, 16),
        "BN": max(64 if dim <= 128 else 32, b_k),
        "BK": b_k,
        "num_warps": 4,
        "num_stages": 1 if size == 4 else 3 if dim <= 128 else 2,
    }


def top_blocks(
    lookup: torch.Tensor, summaries: torch.Tensor, counts: Sequence[int], topk: int, *, scopes: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """See :func:`qllm_kernels.select.top_blocks`; among equal scores the lower id wins."""
    pieces, heads, dim = lookup.shape
    summary_heads, r, n_blocks = summaries.shape[:3]
    k = min(topk, n_blocks)
    lookup = lookup.to(summaries.dtype).contiguous()
    sizes = constants(pieces, heads // summary_heads, dim, k, summaries.element_size())
    tiles = triton.cdiv(n_blocks, sizes["BN"])
    per_split = triton.cdiv(tiles, max(1, min(tiles, _CANDIDATES // sizes["BK"])))
    splits = triton.cdiv(tiles, per_split)
    n_eligible = torch.tensor(counts, dtype=torch.int32, device=lookup.device)
    scores = torch.empty(pieces, scopes, n_blocks, device=lookup.device)
    candidates = torch.empty(pieces, scopes, splits, sizes["BK"], dtype=torch.int64, device=lookup.device)
    score_blocks[(splits, scopes, triton.cdiv(pieces, sizes["BP"]))](
        lookup, summaries, n_eligible, scores, candidates, pieces, n_blocks, per_split,
        *lookup.stride()[:2], *summaries.stride()[:3],
        HEADS=summary_heads // scopes, GROUP=heads // summary_heads, R=r, D=dim, **sizes,
    )  # fmt: skip
    ids = torch.empty(pieces, scopes, k, dtype=torch.int64, device=lookup.device)
    valid = torch.empty(pieces, scopes, k, dtype=torch.bool, device=lookup.device)
    n_candidates = splits * sizes["BK"]
    merge_candidates[(pieces * scopes,)](
        candidates, ids, valid, n_candidates, n_blocks, k, BC=max(512, sizes["BK"]), BK=sizes["BK"], num_warps=4
    )
    return ids, None if min(counts) >= k else valid, scores
