"""Block scores, split over programs; for one piece the same launch chooses the best blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from qllm_kernels.choice import always_full, to_device
from qllm_kernels.gpu import choose
from qllm_kernels.gpu.choose import choose_best, choose_row, fold_moments
from qllm_kernels.gpu.counters import completion_counters
from qllm_kernels.gpu.shapes import MOST_PIECES, Target, power_of_2, refusal, target

_ROWS = 64


@triton.jit
def add_products(
    b_dot, p_q, p_k, m_q, m_c, i_d, i_half: tl.constexpr, D: tl.constexpr, BOUNDS: tl.constexpr, BD: tl.constexpr
):
    """b_dot and the products of dimensions i_d to i_d + BD of rows and summaries; of positive elements with upper bounds."""
    o_d = i_d + tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_q[:, None] & m_d, other=0.0)
    if BOUNDS:
        b_q = tl.maximum(b_q, 0.0) if i_half == 0 else tl.minimum(b_q, 0.0)
    b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_c[:, None] & m_d, other=0.0)
    return tl.dot(b_q.to(b_k.dtype), tl.trans(b_k), b_dot, input_precision="tf32x3")


@triton.jit
def score_run(
    lookup, summaries, n_eligible, scores, moments, question, done, ids, valid, i_split, splits,
    pieces, n_blocks, first, n_all, k, weight, i_partial, n_partials, stride_question,
    stride_lookup_piece, stride_lookup_head, stride_summary_head, stride_summary_r, stride_summary_block,
    HEADS: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BOUNDS: tl.constexpr,
    COUNTED: tl.constexpr, GUIDED: tl.constexpr, CHOOSES: tl.constexpr,
    BG: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Scores for BP pieces of a run of the n_blocks blocks that come after `first` others, BD dimensions at a time.

    BR summaries of a block are read at once. With BOUNDS they are bounds of keys, D upper ones and then the lower. With
    COUNTED only the first n_eligible blocks count. With GUIDED, each program leaves count, mean and sum of squared deviations
    of its eligible scores, and the latter two of the question's scores of the same blocks, after i_partial others. With
    CHOOSES there is one piece, and the program that ends last chooses the k best; returns whether this one did.
    """
    i_scope, i_p = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    scopes = tl.num_programs(1)
    # [BG * BP] query rows: heads of the group, then pieces
    o_row = tl.arange(0, BG * BP)
    o_g, o_rp = o_row // BP, i_p * BP + o_row % BP
    m_q = (o_g < GROUP) & (o_rp < pieces)
    # [BP]
    o_p = i_p * BP + tl.arange(0, BP)
    m_p = o_p < pieces
    if COUNTED:
        b_eligible = tl.minimum(tl.load(n_eligible + o_p, mask=m_p, other=0).to(tl.int64) - first, n_blocks)
    else:
        b_eligible = tl.where(m_p, n_blocks, 0).to(tl.int64)
    # [BN * BR] summaries of a tile: blocks, then theirs
    o_c = tl.arange(0, BN * BR)
    o_cn, o_cr = o_c // BR, o_c % BR
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
            p_k = summaries + i_head * stride_summary_head + o_b * stride_summary_block
            # side by side they are no further apart than a block is long
            p_k += o_r * stride_summary_r if BR > 1 else i_r * tl.cast(stride_summary_r, tl.int64)
            # [BG * BP, BN * BR], then its best per block [BG * BP, BN]
            b_dot = tl.zeros([BG * BP, BN * BR], tl.float32)
            for i_half in tl.static_range(2 if BOUNDS else 1):
                # many products that are unrolled need more registers than there are
                if D <= 2 * BD:
                    for i_d in tl.static_range(0, D, BD):
                        b_dot = add_products(b_dot, p_q, p_k + i_half * D, m_q, m_c, i_d, i_half, D, BOUNDS, BD)
                else:
                    for i_d in range(0, D, BD):
                        b_dot = add_products(b_dot, p_q, p_k + i_half * D, m_q, m_c, i_d, i_half, D, BOUNDS, BD)
            if BR > 1:
                if R % BR != 0:
                    b_dot = tl.where((o_r < R)[None, :], b_dot, float("-inf"))
                b_dot = tl.max(tl.reshape(b_dot, [BG * BP, BN, BR]), 2)
            b_best = tl.where(i_r == 0, b_dot, tl.maximum(b_best, b_dot))
            if i_r == (R + BR - 1) // BR - 1:
                b_score += tl.sum(tl.reshape(b_best, [BG, BP, BN]), 0)
        tl.store(scores + o_place * n_all + first + o_n[None, :], b_score, mask=m_p[:, None] & m_n[None, :])
        if GUIDED:
            m_score = m_p[:, None] & (o_n[None, :] < b_eligible[:, None])
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
    if CHOOSES:
        # the program's stores come before its count, the others' before what the last one reads
        tl.debug_barrier()
        b_last = tl.atomic_add(done + i_scope, 1, sem="acq_rel") == splits - 1
        if b_last:
            tl.store(done + i_scope, 0)
            choose_row(
                scores + i_scope * n_all, moments + i_scope * n_partials * 5, question + i_scope * stride_question,
                ids + i_scope * k, valid + i_scope * k, n_end.to(tl.int32), n_partials, k, weight, GUIDED, BS, BC,
            )  # fmt: skip
    else:
        b_last = False
    return b_last


@triton.jit(do_not_specialize=["pieces", "n_blocks", "first", "n_all", "k", "i_partial", "n_partials"])  # they change
def score_blocks(
    lookup, summaries, n_eligible, scores, moments, question, done, ids, valid,
    pieces, n_blocks, first, n_all, k, weight, i_partial, n_partials, stride_question,
    stride_lookup_piece, stride_lookup_head, stride_summary_head, stride_summary_r, stride_summary_block,
    HEADS: tl.constexpr, GROUP: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BOUNDS: tl.constexpr,
    COUNTED: tl.constexpr, GUIDED: tl.constexpr, CHOOSES: tl.constexpr,
    BG: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """See `score_run`."""
    score_run(
        lookup, summaries, n_eligible, scores, moments, question, done, ids, valid,
        tl.program_id(0).to(tl.int64), tl.num_programs(0),
        pieces, n_blocks, first, n_all, k, weight, i_partial, n_partials, stride_question,
        stride_lookup_piece, stride_lookup_head, stride_summary_head, stride_summary_r, stride_summary_block,
        HEADS, GROUP, R, D, BOUNDS, COUNTED, GUIDED, CHOOSES, BG, BP, BD, BN, BR, BS, BC,
    )  # fmt: skip


def cannot_serve(lookup: torch.Tensor, summaries: torch.Tensor) -> str | None:
    """Why these summaries are not scored by `score_blocks`, or None."""
    group, dim = lookup.shape[1] // summaries.shape[0], lookup.shape[2]
    if len(lookup) > MOST_PIECES:
        return f"{len(lookup)} pieces are more than {MOST_PIECES}"
    if summaries.device.type == "cpu" and lookup.is_cuda and not summaries.is_pinned():
        return "memory of the host is not pinned"
    if group > 16:
        return f"{group} heads share a summary, more than 16"
    refused, on = refusal(summaries[..., :dim]), target(lookup.device)
    bounds = summaries.shape[3] > dim
    if refused is None and constants(1, group, dim, summaries.element_size(), on, bounds=bounds) is None:
        return f"tiles of head size {dim} in {summaries.dtype} need more shared memory than there is"
    return refused


def constants(
    pieces: int, group: int, dim: int, size: int, on: Target, *, bounds: bool = False, side_by_side: bool = False
) -> dict[str, Any] | None:
    """Sizes of the tiles of `score_run`, and launch options, for summaries of `size` bytes per element.

    None: nothing fits. With `bounds` there are twice `dim` elements. With `side_by_side`, the summaries of a block are
    neighbours in memory and read in pairs.
    """
    b_group = power_of_2(group)
    b_d = min(power_of_2(dim, 16), 128 if size < 4 else 32)
    # a product takes 16 rows at least; what pieces don't fill goes to heads
    b_p = max(1, min(power_of_2(pieces), (_ROWS if size < 4 else 16) // b_group))
    b_group = max(b_group, 16 // b_p)
    rows, halves, together = b_group * b_p, 2 if bounds else 1, 2 if side_by_side else 1
    width = halves * dim
    b_n = (64 if width <= 128 and size < 4 else 32) // together
    tile_bytes = (rows + b_n * together) * (halves * power_of_2(dim, 16) if size < 4 else b_d) * size
    stages = min(1 if size == 4 else 3 if width <= 128 else 2, on.shared // tile_bytes)
    if stages == 0:
        return None
    sizes = {
        "BG": b_group,
        "BP": b_p,
        "BD": b_d,
        "BN": b_n,
        "BR": together,
        "num_warps": 8 if width > 256 or (b_p > 1 and width <= 128) else 4,
        "num_stages": stages,
    }
    if b_p == 1 and (width <= 128 or size == 4):
        # left alone, ptxas spills a few bytes to fit more programs than the shared memory allows
        sizes["maxnreg"] = 232
    return sizes


class Run(NamedTuple):
    """What one launch scores.

    Attributes:
        part: Summaries.
        splits: Programs that share them.
        first, i_partial: Blocks, and partial moments, ahead of its own.
        constants: Shapes and sizes of tiles, launch options.
    """

    part: torch.Tensor
    splits: int
    first: int
    i_partial: int
    constants: dict[str, Any]


class Choice:
    """The launches of a choice, and what they write.

    Args:
        device: Where the lookup vectors lie, and what is written; parts may lie in pinned memory of the host.
        pieces, heads: Of the lookup vectors.
        parts, scopes, question, weight, bounds: As :func:`qllm_kernels.choice.choose_blocks` takes them.
        k: Blocks wanted; 0: scores alone.

    Attributes:
        chooses: The launch that scores chooses as well.
    """

    def __init__(
        self, device: torch.device, pieces: int, heads: int, parts: Sequence[torch.Tensor], k: int, *, scopes: int,
        question: torch.Tensor | None = None, weight: float = 0.0, bounds: bool = False,
    ) -> None:  # fmt: skip
        self._runs: list[Run] = []
        first = self._n_partials = 0
        for part in parts:
            n_heads, r, n, width = part.shape
            group, together, dim = (
                heads // n_heads,
                r > 1 and part.stride(1) < part.stride(2),
                width // (2 if bounds else 1),
            )
            sizes = constants(
                pieces, group, dim, part.element_size(), target(device), bounds=bounds, side_by_side=together
            )
            assert sizes is not None
            shape = {"HEADS": n_heads // scopes, "GROUP": group, "R": r, "D": dim, "BOUNDS": bounds}
            splits = max(1, min(triton.cdiv(n, sizes["BN"]), choose.PARTIALS))
            self._runs.append(Run(part, splits, first, self._n_partials, shape | sizes))
            first, self._n_partials = first + n, self._n_partials + splits
        self._pieces, self._k, self._question, self._weight = pieces, min(k, first), question, float(weight)
        self.chooses = pieces == 1 and len(parts) == 1 and k > 0
        self.scores = torch.empty(pieces, scopes, first, device=device)
        self._moments = self.ids = self.valid = self.scores
        if question is not None:
            self._moments = torch.empty(pieces, scopes, self._n_partials, 5, device=device)
        if self.chooses:
            self.ids = torch.empty(1, scopes, self._k, dtype=torch.int64, device=device)
            self.valid = torch.empty(1, scopes, self._k, dtype=torch.bool, device=device)

    def launches(self, n_eligible: torch.Tensor | None) -> Iterator[tuple[Run, tuple[Any, ...], dict[str, Any]]]:
        """Each run with the arguments of `score_run` from `summaries` on, programs left out, and constants."""
        question = self.scores if self._question is None else self._question
        tensors = (self.scores, self._moments, question, completion_counters(self.scores.device), self.ids, self.valid)
        flags = {"COUNTED": n_eligible is not None, "GUIDED": self._question is not None, "CHOOSES": self.chooses}
        n_all = self.scores.shape[2]
        # one part has no more: compiled once, however the text grows
        guided = self.chooses and self._question is not None
        sizes = {"BS": choose.PARTIALS if guided else 1, "BC": choose.TILE if self.chooses else 1}
        for run in self._runs:
            numbers = (
                self._pieces, run.part.shape[2], run.first, n_all, self._k, self._weight, run.i_partial, self._n_partials,
                0 if self._question is None else question.stride(0),
            )  # fmt: skip
            given = self.scores if n_eligible is None else n_eligible
            yield run, (run.part, given, *tensors, *numbers), flags | sizes | run.constants

    def score(self, lookup: torch.Tensor, n_eligible: torch.Tensor | None) -> None:
        """Launch all runs."""
        for run, arguments, sizes in self.launches(n_eligible):
            grid = (run.splits, self.scores.shape[1], triton.cdiv(self._pieces, sizes["BP"]))
            score_blocks[grid](lookup, *arguments, *lookup.stride()[:2], *run.part.stride()[:3], **sizes)

    def best(self, n_eligible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and valid; one launch more where scoring does not choose."""
        if self.chooses:
            return self.ids, self.valid
        return choose_best(
            self.scores, n_eligible, self._k, moments=self._moments, question=self._question, weight=self._weight
        )


def block_scores(lookup: torch.Tensor, summaries: torch.Tensor, *, scopes: int) -> torch.Tensor:
    """See :func:`qllm_kernels.select.block_scores`."""
    choice = Choice(lookup.device, lookup.shape[0], lookup.shape[1], [summaries], 0, scopes=scopes)
    choice.score(_rows(lookup, summaries), None)
    return choice.scores


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
    choice = Choice(
        lookup.device, lookup.shape[0], lookup.shape[1], parts, topk,
        scopes=scopes, question=question, weight=weight, bounds=bounds,
    )  # fmt: skip
    n_eligible = counts if isinstance(counts, torch.Tensor) else to_device(counts, lookup.device)
    choice.score(_rows(lookup, parts[0]), n_eligible)
    ids, valid = choice.best(n_eligible)
    return ids, None if always_full(counts, ids.shape[2]) else valid, choice.scores


def _rows(lookup: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Lookup vectors as `score_blocks` reads them; those of many pieces in the summaries' dtype, as they are read often."""
    return lookup.to(like.dtype).contiguous() if len(lookup) > 1 or lookup.stride(-1) != 1 else lookup
