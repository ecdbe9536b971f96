"""The choice by current tokens and question of the Triton kernels against the torch function."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import examples, poisoned, random

from qllm_kernels import choice
from qllm_kernels.gpu import choose
from qllm_kernels.gpu import select as gpu
from qllm_kernels.gpu.counters import completion_counters

NAN = float("nan")
CPU = torch.device("cpu")


def check(
    lookup: torch.Tensor, parts: Sequence[torch.Tensor], counts: Sequence[int] | torch.Tensor, topk: int, **kind
) -> None:
    expected = choice.choose_blocks(lookup, parts, counts, topk, **kind)
    with poisoned():
        actual = gpu.choose_blocks(lookup, parts, counts, topk, **kind)
    for piece, count in enumerate(torch.as_tensor(counts).tolist()):
        found, wanted = actual[2][piece, :, :count], expected[2][piece, :, :count]
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(actual[0], expected[0])
    assert (actual[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        assert torch.equal(actual[1], expected[1])
    assert not completion_counters(CPU).any()


@examples(12)
@given(
    bounds=st.booleans(),
    group=st.sampled_from([1, 3, 16]),
    summary_heads=st.sampled_from([1, 2]),
    per_head=st.booleans(),
    r=st.sampled_from([1, 3]),
    lengths=st.sampled_from([[1], [9], [140], [64, 3], [5, 70, 20]]),
    topk=st.integers(1, 20),
    pieces=st.sampled_from([1, 1, 3, 5]),
    asked=st.booleans(),
    on_device=st.booleans(),
    alike=st.booleans(),
    seed=st.integers(0, 99),
)
def test_choose_blocks(bounds, group, summary_heads, per_head, r, lengths, topk, pieces, asked, on_device, alike, seed):
    n_blocks, scopes = sum(lengths), summary_heads if per_head else 1
    r, width = (1, 32) if bounds else (r, 16)
    parts = []
    for i, n in enumerate(lengths):
        buffer = torch.full((summary_heads, r, n + 3, width), NAN)
        buffer[:, :, :n] = random(summary_heads, r, n, width, seed=seed + i)
        parts.append(buffer[:, :, :n])
    question = torch.full((scopes, n_blocks + 5), NAN)
    question[:, :n_blocks] = 3 * random(scopes, n_blocks, seed=seed + 9) + 100
    drawn = torch.randint(1, n_blocks + 1, (pieces,), generator=torch.Generator().manual_seed(seed))
    counts = torch.full((pieces,), n_blocks) if alike else drawn.sort().values
    check(
        random(pieces, summary_heads * group, 16, seed=seed + 8),
        parts,
        counts if on_device else counts.tolist(),
        topk,
        scopes=scopes,
        question=question[:, :n_blocks] if asked else None,
        weight=0.7,
        bounds=bounds,
    )


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("parts", [1, 2])
def test_scores_of_several_programs_are_read_in_several_tiles(
    monkeypatch: pytest.MonkeyPatch, parts: int, asked: bool
) -> None:
    monkeypatch.setattr(choose, "TILE", 32)
    monkeypatch.setattr(choose, "PARTIALS", 2)
    each, question = [random(1, 2, 200 // parts, 16, seed=1)] * parts, random(1, 200) if asked else None
    for pieces, counts in ((2, [40, 199]), (2, [0, 5]), (1, [150]), (1, [0])):
        for k in (7, 60):
            lookup = random(pieces, 1, 16)
            check(lookup, each, torch.tensor(counts), k, scopes=1, question=question, weight=2.0)


@examples(30)
@given(
    n=st.integers(1, 90),
    k=st.integers(1, 90),
    kind=st.sampled_from(["normal", "few values", "huge", "infinite", "signed zeros", "neighbours"]),
    seed=st.integers(0, 99),
)
def test_bisection_finds_what_a_sort_finds(n: int, k: int, kind: str, seed: int) -> None:
    """Ties, both zeros, infinities, neighbouring floats: as many as wanted, the best, among equal ones the first."""
    scores = random(2, 1, n, seed=seed)
    if kind == "few values":
        scores = scores.round()
    elif kind == "huge":
        scores = scores * 3e38
    elif kind == "infinite":
        scores = torch.where(scores.abs() > 1, scores * float("inf"), scores)
    elif kind == "signed zeros":
        scores = torch.where(scores > 0.5, 0.0, torch.where(scores < 0, -0.0, scores))
    elif kind == "neighbours":
        drawn = torch.randint(0, 3, scores.shape, generator=torch.Generator().manual_seed(seed)).int()
        scores = (drawn + (1 if seed % 2 else 0x3F800000)).view(torch.float32)
    counts, k = torch.tensor([n, n // 2]), min(k, n)
    ids, valid = choose.choose_best(scores, counts, k)
    for row, count in enumerate(counts.tolist()):
        order = (scores[row, 0, :count] + 0.0).sort(descending=True, stable=True).indices
        best = sorted(order[:k].tolist())
        assert ids[row, 0].tolist() == best + [max(count - 1, 0)] * (k - len(best))
        assert valid[row, 0].tolist() == [True] * len(best) + [False] * (k - len(best))


def test_scores_far_from_zero_keep_their_variance() -> None:
    """Sums of squares would lose it: a mean of 3000 with a deviation of 0.1."""
    parts = [random(1, 1, 200, 16, seed=2) * 0.1 + 750.0]
    lookup = torch.zeros(1, 1, 16)
    lookup[..., :4] = 1.0
    expected = choice.choose_blocks(lookup.double(), [parts[0].double()], [200], 5, scopes=1)[2]
    question = parts[0][:, 0, :, 5].contiguous()
    expected = (expected - expected.mean()) / expected.std(correction=0)
    exact = question.double()
    expected = expected + 0.5 * (exact - exact.mean()) / exact.std(correction=0)
    actual = gpu.choose_blocks(lookup, parts, [200], 5, scopes=1, question=question, weight=0.5)[2]
    torch.testing.assert_close(actual.double(), expected, atol=5e-3, rtol=5e-3)


def test_equal_scores_go_to_the_lower_block() -> None:
    parts = [torch.ones(1, 1, 90, 16), torch.ones(1, 1, 90, 16)]
    question = torch.zeros(1, 180)
    question[0, [20, 100, 110, 170]] = 1.0
    for asked, best in ((question, [20, 100, 110]), (None, [0, 1, 2]), (torch.zeros(1, 180), [0, 1, 2])):
        ids = gpu.choose_blocks(torch.ones(1, 1, 16), parts, [180], 3, scopes=1, question=asked, weight=1.0)[0]
        assert ids.tolist() == [[best]]


def test_half_precision() -> None:
    lookup, parts, question = random(2, 4, 32), [random(2, 2, 70, 32, seed=1).half()], random(1, 70, seed=2)
    ids, _, scores = gpu.choose_blocks(lookup, parts, [70, 70], 4, scopes=1, question=question, weight=1.0)
    kind = {"scopes": 1, "question": question, "weight": 1.0}
    expected = choice.choose_blocks(lookup.half().float(), [parts[0].float()], [70, 70], 4, **kind)[2]
    torch.testing.assert_close(scores, expected, atol=2e-2, rtol=1e-2)
    assert torch.equal(ids, scores.topk(4).indices.sort().values)


def test_what_a_choice_writes_lies_where_its_queries_do() -> None:
    """Summaries may lie in pinned memory of the host; a GPU writes to its own."""
    part = torch.empty(2, 4, 60, 16, device="meta")
    made = gpu.Choice(CPU, 1, 4, [part], 3, scopes=1, question=torch.zeros(1, 60), weight=1.0)
    assert {x.device.type for x in (made.scores, made._moments, made.ids, made.valid)} == {"cpu"}


def test_a_growing_text_compiles_nothing_anew() -> None:
    def sizes(n: int) -> dict[str, object]:
        part = torch.zeros(2, 4, n, 16)
        made = gpu.Choice(part.device, 1, 4, [part], 3, scopes=1, question=torch.zeros(1, n), weight=1.0)
        return next(iter(made.launches(torch.tensor([n]))))[2]

    assert sizes(40) == sizes(400) == sizes(40_000)
