"""Page copies and the table of resident pages of the Triton kernels against the torch functions and a model of LRU."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import NAN, examples, random

from qllm_kernels import pages, residency
from qllm_kernels.gpu import pages as gpu
from qllm_kernels.gpu import residency as gpu_residency
from qllm_kernels.residency import Residency


def listed(rows: int, n_source: int, n_target: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    length = min(n_target, 6)
    targets = torch.rand(rows, n_target, generator=draw).argsort(-1)[:, :length]
    moves = torch.stack((torch.randint(0, n_source, (rows, length), generator=draw), targets), -1)
    counts = torch.randint(0, length + 1, (rows,), generator=draw, dtype=torch.int32)
    for row, count in enumerate(counts):
        moves[row, count:] = 10**9  # never read
    return moves, counts


SHAPES = {
    "heads": st.sampled_from([1, 2, 4]),
    "per_head": st.booleans(),
    "sizes": st.sampled_from([(1, 20), (16, 32), (5, 64), (40, 128)]),
    "n_source": st.integers(1, 9),
    "n_target": st.integers(1, 9),
    "seed": st.integers(0, 99),
}


@examples(15)
@given(half=st.booleans(), **SHAPES)
def test_copy_pages(half, heads, per_head, sizes, n_source, n_target, seed):
    dtype = torch.float16 if half else torch.float32
    source = random(n_source, heads, *sizes, seed=seed).to(dtype).transpose(0, 1)  # a slab of the host, pages first
    moves, counts = listed(heads if per_head else 1, n_source, n_target, seed)
    targets = [torch.full((heads, n_target, *sizes), NAN, dtype=dtype) for _ in range(2)]
    pages.copy_pages(source, targets[0], moves, counts)
    gpu.copy_pages(source, targets[1], moves, counts)
    torch.testing.assert_close(targets[1], targets[0], equal_nan=True, atol=0, rtol=0)


@examples(15)
@given(half=st.booleans(), **SHAPES)
def test_fp8_and_back(half, heads, per_head, sizes, n_source, n_target, seed):
    dtype = torch.float16 if half else torch.float32
    source = (random(heads, n_source, *sizes, seed=seed) * 10.0 ** (seed % 7 - 3)).to(dtype)
    source[:, 0] = 0.0
    moves, counts = listed(heads if per_head else 1, n_source, n_target, seed)
    stored = []
    for module in (pages, gpu):
        bytes_, scales = torch.full((heads, n_target, *sizes), 7, dtype=torch.uint8), torch.full((heads, n_target), NAN)
        module.quantise_pages(source, bytes_.view(torch.float8_e4m3fn), scales, moves, counts)
        stored.append((bytes_, scales))
    torch.testing.assert_close(stored[1][1], stored[0][1], equal_nan=True)
    assert torch.equal(stored[1][0] & 0x7F, stored[0][0] & 0x7F)
    back = moves.flip(-1)
    restored = [torch.full_like(source, NAN) for _ in range(2)]
    for module, target in zip((pages, gpu), restored, strict=True):
        fp8, scales = stored[0][0].view(torch.float8_e4m3fn), stored[0][1]
        module.dequantise_pages(fp8, scales, target, _distinct(back, counts), counts.clamp(max=1))
    torch.testing.assert_close(restored[1], restored[0], equal_nan=True)
    kept = ~restored[1].isnan()
    largest = source.float().abs().amax((2, 3), keepdim=True).expand_as(source)[kept]
    error = (restored[1].float() - source.float())[kept].abs()
    # half a step of 3 bits of mantissa, or of the smallest numbers
    assert (error <= source.float()[kept].abs() * 2**-4 + largest * 2**-10 / 448 * 1.01 + 1e-7).all()


def _distinct(moves: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Sources may repeat, so only the first entry of each row is moved back."""
    return moves[:, :1] if moves.shape[1] else moves


def test_every_byte_of_fp8():
    every = torch.arange(256, dtype=torch.uint8)
    every[[127, 255]] = 0  # NaN
    source, scales = every.view(1, 1, 16, 16).view(torch.float8_e4m3fn), torch.ones(1, 1)
    moves, counts, target = (
        torch.zeros(1, 1, 2, dtype=torch.int64),
        torch.ones(1, dtype=torch.int32),
        torch.zeros(1, 1, 16, 16),
    )
    gpu.dequantise_pages(source, scales, target, moves, counts)
    assert torch.equal(target, source.float())
    # numbers between two of fp8, halfway ones among them, go where torch sends them
    between = torch.cat([target.flatten().sort().values.unfold(0, 2, 1).mean(1), torch.tensor([448.0])]).view(
        1, 1, 16, 16
    )
    stored = torch.zeros(1, 1, 16, 16, dtype=torch.float8_e4m3fn)
    gpu.quantise_pages(between, stored, scales, moves, counts)
    assert scales.item() == 1.0
    assert torch.equal(stored.float(), between.to(torch.float8_e4m3fn).float())


class LeastRecentlyUsed:
    """One row in plain Python: slots in the order of their last use, those of one piece by number."""

    def __init__(self, n_slots: int) -> None:
        self.held: OrderedDict[int, int | None] = OrderedDict((slot, None) for slot in range(n_slots))

    def serve(self, pieces: list[list[int]]) -> tuple[list[list[int]], list[tuple[int, int]]]:
        fetched, answers, protected = [], [], set()
        for chosen in pieces:
            where = {page: slot for slot, page in self.held.items()}
            protected |= {where[page] for page in chosen if page in where}
            givers = iter([slot for slot in self.held if slot not in protected])
            for page in chosen:
                if page not in where:
                    slot = next(givers)
                    where[page], self.held[slot] = slot, page
                    protected.add(slot)
                    fetched.append((page, slot))
            for slot in sorted(where[page] for page in chosen):
                self.held.move_to_end(slot)
            answers.append([where[page] for page in chosen])
        return answers, fetched


@pytest.mark.parametrize("module", [residency, gpu_residency])
@examples(6)
@given(
    rows=st.integers(1, 2),
    k=st.integers(1, 5),
    pieces=st.integers(1, 3),
    spare=st.integers(0, 7),
    seed=st.integers(0, 99),
)
def test_evictions(module, rows, k, pieces, spare, seed):
    """Pages are where the tables say, and they give way in the order of the model."""
    draw = torch.Generator().manual_seed(seed)
    n_pages, n_slots = 2 * k * pieces + 3, k * pieces + spare
    state = Residency.empty(rows, n_pages, n_slots, torch.device("cpu"))
    models = [LeastRecentlyUsed(n_slots) for _ in range(rows)]
    slab, hot = random(rows, n_pages, 2, 8), torch.full((rows, n_slots, 2, 8), NAN)
    tally = torch.zeros(rows, 2, dtype=torch.int64)
    for step in range(5):
        # neighbours in time choose alike
        ids = (torch.rand(pieces, rows, n_pages, generator=draw) + torch.arange(n_pages).roll(step) / 9).argsort(-1)[
            ..., :k
        ]
        valid = torch.rand(pieces, rows, k, generator=draw) < 0.8 if step % 2 else None
        slots, moves, counts = module.admit_pages(state, ids, valid)
        gpu.copy_pages(slab, hot, moves, counts)
        for row, model in enumerate(models):
            chosen = [
                [int(i) for p, i in enumerate(ids[piece, row]) if valid is None or valid[piece, row, p]]
                for piece in range(pieces)
            ]
            answers, fetched = model.serve(chosen)
            tally[row] += torch.tensor([sum(map(len, chosen)), len(fetched)])
            assert [tuple(x) for x in moves[row, : counts[row]].tolist()] == fetched
            for piece, answer in enumerate(answers):
                counted = slice(None) if valid is None else valid[piece, row]
                assert slots[piece, row][counted].tolist() == answer
                assert torch.equal(hot[row, answer], slab[row, chosen[piece]])
    assert torch.equal(state.tally, tally)


def test_a_buffer_that_is_too_small():
    state = Residency.empty(1, 9, 3, torch.device("cpu"))
    for module in (residency, gpu_residency):
        with pytest.raises(ValueError, match="2 pieces may choose 4 pages, the buffer has 3 slots"):
            module.admit_pages(state, torch.zeros(2, 1, 2, dtype=torch.int64), None)


def test_what_is_refused():
    whole = random(1, 2, 4, 8)
    assert gpu.cannot_serve(whole, whole.transpose(0, 1)) is None
    assert "not contiguous" in gpu.cannot_serve(whole, whole.transpose(1, 2))
    state = Residency.empty(1, 2, 5000, torch.device("cpu"))
    assert "5000 slots" in gpu_residency.cannot_serve(state, torch.zeros(1, 1, 1))
