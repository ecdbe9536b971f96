"""The choice among candidates by every key of theirs of the Triton kernel against the torch function."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import examples, poisoned, random

from qllm_kernels import refine
from qllm_kernels.choice import Pinned
from qllm_kernels.gpu import refine as gpu
from qllm_kernels.gpu.counters import completion_counters

NAN = float("nan")


def check(lookup, page_key, table, candidates, counts, topk, pins=0, **kind) -> None:
    pinned, wanted = None, None
    if pins:
        draw, pieces = torch.Generator().manual_seed(pins), len(lookup)
        block = candidates.flatten()[torch.randint(0, candidates.numel(), (pins,), generator=draw)]
        hidden = torch.zeros(pieces, kind["scopes"], pins, dtype=torch.bool)
        pinned = Pinned(block, torch.arange(pins), torch.arange(pieces) + pins - 1, hidden)
        wanted = pinned._replace(hidden=torch.zeros_like(hidden))
    expected = refine.refine_pages(lookup, page_key, table, candidates, counts, topk, **kind, pinned=wanted)
    with poisoned():
        actual = gpu.refine_pages(lookup, page_key, table, candidates, counts, topk, **kind, pinned=pinned)
    if pinned is not None:
        assert torch.equal(pinned.hidden, wanted.hidden)
        assert pinned.hidden[0, :, -1].all()  # the last one is in the window
    for piece, count in enumerate(torch.as_tensor(counts).tolist()):
        found, wanted = actual[2][piece, :, :count], expected[2][piece, :, :count]
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(actual[0], expected[0])
    assert (actual[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        assert torch.equal(actual[1], expected[1])
    assert not completion_counters(torch.device("cpu")).any()


@examples(10)
@given(
    group=st.sampled_from([1, 3, 16]),
    kv_heads=st.sampled_from([1, 2]),
    per_head=st.booleans(),
    block=st.sampled_from([1, 5, 16, 40]),
    dim=st.sampled_from([16, 20]),
    m=st.sampled_from([1, 4, 9]),
    topk=st.integers(1, 10),
    pieces=st.sampled_from([1, 1, 2]),
    asked=st.booleans(),
    short=st.booleans(),
    pins=st.sampled_from([0, 1, 70]),
    seed=st.integers(0, 99),
)
def test_refine_pages(group, kv_heads, per_head, block, dim, m, topk, pieces, asked, short, pins, seed):
    """Pages of candidates lie anywhere; others are NaN, and so are the question's scores of blocks that are not there."""
    n_blocks, scopes = 300, kv_heads if per_head else 1
    draw = torch.Generator().manual_seed(seed)
    candidates = torch.rand(pieces, scopes, n_blocks, generator=draw).argsort(-1)[..., :m].sort(-1).values
    table = torch.rand(pieces, scopes, 12, generator=draw).argsort(-1)[..., :m]
    page_key = random(kv_heads, 12, block, dim, seed=seed)
    for unused in set(range(12)) - set(table.flatten().tolist()):
        page_key[:, unused] = NAN
    question = torch.full((scopes, n_blocks + 20), NAN)
    question[:, :n_blocks] = 3 * random(scopes, n_blocks, seed=seed + 1) + 100
    counts = [n_blocks] * pieces
    if short:  # fewer blocks than candidates are wanted
        counts = torch.randint(1, m + 1, (pieces,), generator=draw)
        candidates = torch.arange(m).expand(pieces, scopes, m)
    kind = {"scopes": scopes, "question": question if asked else None, "weight": 0.7}
    check(random(pieces, kv_heads * group, dim, seed=seed + 2), page_key, table, candidates, counts, topk, pins, **kind)


def test_each_piece_and_scope_hides_what_it_chose_itself() -> None:
    draw = torch.Generator().manual_seed(1)
    candidates = torch.rand(2, 2, 90, generator=draw).argsort(-1)[..., :9].sort(-1).values
    table = torch.rand(2, 2, 12, generator=draw).argsort(-1)[..., :9]
    lookup, page_key = random(2, 4, 16), random(2, 12, 5, 16, seed=1)
    check(lookup, page_key, table, candidates, [90, 90], 3, 70, scopes=2, question=None, weight=0.0)


def test_equal_scores_go_to_the_lower_block() -> None:
    page_key, table = torch.ones(1, 6, 4, 16), torch.tensor([[[5, 1, 3, 0, 2]]])
    candidates = torch.tensor([[[3, 40, 41, 60, 90]]])
    kind = {"scopes": 1, "question": torch.zeros(1, 100), "weight": 1.0}
    for question, best in ((None, [3, 40]), (torch.zeros(1, 100), [3, 40])):
        kind["question"] = question
        ids = gpu.refine_pages(torch.ones(1, 1, 16), page_key, table, candidates, [100], 2, **kind)[0]
        assert ids.tolist() == [[best]]
    kind["question"][0, 90] = 1.0
    ids = gpu.refine_pages(torch.ones(1, 1, 16), page_key, table, candidates, [100], 2, **kind)[0]
    assert ids.tolist() == [[[3, 90]]]


def test_half_precision() -> None:
    lookup, page_key = random(1, 4, 32), random(2, 9, 16, 32, seed=1).half()
    table, candidates = torch.tensor([[[8, 0, 4, 2, 7]]]), torch.tensor([[[1, 7, 30, 31, 69]]])
    kind = {"scopes": 1, "question": random(1, 70, seed=2), "weight": 1.0}
    ids, _, scores = gpu.refine_pages(lookup, page_key, table, candidates, [70], 3, **kind)
    expected = refine.refine_pages(lookup.half().float(), page_key.float(), table, candidates, [70], 3, **kind)[2]
    torch.testing.assert_close(scores, expected, atol=2e-2, rtol=1e-2)
    assert torch.equal(ids, candidates.gather(-1, scores.topk(3).indices).sort().values)


@pytest.mark.parametrize(("heads", "m", "reason"), [(17, 4, "17 heads"), (4, 1025, "1025 candidates"), (4, 4, None)])
def test_what_is_refused(heads: int, m: int, reason: str | None) -> None:
    found = gpu.cannot_serve(random(1, heads, 16), random(1, 3, 4, 16), torch.zeros(1, 1, m, dtype=torch.int64))
    assert found is None if reason is None else reason in found


def test_what_one_launch_cannot_count_is_refused() -> None:
    """A choice is a piece's and scope's; each has a counter."""
    lookup, page_key = random(1, 4, 16).expand(20_000, -1, -1), random(4, 3, 4, 16)
    found = gpu.cannot_serve(lookup, page_key, torch.zeros(1, 1, 1).expand(20_000, 4, 5))
    assert found is not None and "80000 choices" in found
