"""Block selection of the Triton kernels against the torch functions."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from making import examples, poisoned, random

from qllm_kernels import choice, select
from qllm_kernels.gpu import select as gpu
from qllm_kernels.gpu.shapes import Target

NAN = float("nan")


def check(lookup: torch.Tensor, summaries: torch.Tensor, counts: list[int], topk: int, scopes: int) -> None:
    expected = choice.choose_blocks(lookup, [summaries], counts, topk, scopes=scopes)
    with poisoned():
        actual = gpu.choose_blocks(lookup, [summaries], counts, topk, scopes=scopes)
        scores = gpu.block_scores(lookup, summaries, scopes=scopes)
    plain = select.block_scores(lookup, summaries, scopes=scopes)
    torch.testing.assert_close(scores, plain, atol=1e-4, rtol=1e-4)
    for piece, count in enumerate(counts):
        found, wanted = actual[2][piece, :, :count], expected[2][piece, :, :count]
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(actual[0], expected[0])
    assert (actual[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        assert torch.equal(actual[1], expected[1])


SHAPES = {
    "group": st.sampled_from([1, 2, 3, 7, 16]),
    "summary_heads": st.sampled_from([1, 2, 4]),
    "per_head": st.booleans(),
    "dim": st.sampled_from([20, 32, 64]),
    "n_blocks": st.integers(1, 140),
    "topk": st.integers(1, 20),
    "pieces": st.sampled_from([1, 1, 3, 5]),
    "seed": st.integers(0, 99),
}


def eligible_counts(pieces: int, n_blocks: int, seed: int) -> list[int]:
    counts = torch.randint(0, n_blocks + 1, (pieces,), generator=torch.Generator().manual_seed(seed))
    return [*sorted(counts.tolist())[1:], n_blocks]


@examples(4)
@given(r=st.sampled_from([1, 2, 4]), **SHAPES)
def test_choice_by_current_tokens(group, summary_heads, per_head, r, dim, n_blocks, topk, pieces, seed):
    # a view of a larger buffer whose unused places would spoil everything
    buffer = torch.full((summary_heads, r, n_blocks + 3, dim), NAN)
    buffer[:, :, :n_blocks] = random(summary_heads, r, n_blocks, dim, seed=seed + 1)
    lookup = random(pieces, summary_heads * group, dim, seed=seed)
    counts = eligible_counts(pieces, n_blocks, seed)
    check(lookup, buffer[:, :, :n_blocks], counts, topk, summary_heads if per_head else 1)


@examples(4)
@given(size=st.sampled_from([1, 5, 16]), **{**SHAPES, "n_blocks": st.integers(1, 70)})
def test_every_key_of_pages(group, summary_heads, per_head, size, dim, n_blocks, topk, pieces, seed):
    pages = torch.full((summary_heads, n_blocks + 2, size, dim), NAN)
    pages[:, :n_blocks] = random(summary_heads, n_blocks, size, dim, seed=seed + 1)
    lookup = random(pieces, summary_heads * group, dim, seed=seed)
    every_key = pages[:, :n_blocks].transpose(1, 2)
    assert every_key.data_ptr() == pages.data_ptr()
    counts = eligible_counts(pieces, n_blocks, seed)
    check(lookup, every_key, counts, topk, summary_heads if per_head else 1)


@examples(4)
@given(r=st.sampled_from([1, 4]), **{**SHAPES, "n_blocks": st.integers(1, 60)})
def test_counts_that_only_the_device_knows(group, summary_heads, per_head, r, dim, n_blocks, topk, pieces, seed):
    """The summaries have room for more blocks than there are; there may be none at all."""
    counts = torch.tensor([0] if pieces == 1 and seed % 3 == 0 else eligible_counts(pieces, n_blocks, seed))
    buffer = torch.full((summary_heads, r, n_blocks + 90, dim), NAN)
    buffer[:, :, :n_blocks] = random(summary_heads, r, n_blocks, dim, seed=seed + 1)
    lookup = random(pieces, summary_heads * group, dim, seed=seed)
    scopes = summary_heads if per_head else 1
    with poisoned():
        ids, valid, _ = gpu.choose_blocks(lookup, [buffer], counts, topk, scopes=scopes)
    expected = choice.choose_blocks(lookup, [buffer], counts, topk, scopes=scopes)
    assert torch.equal(ids, expected[0])
    assert torch.equal(valid, expected[1])


def test_more_pieces_than_rows_of_a_tile(monkeypatch):
    monkeypatch.setattr(gpu, "_ROWS", 16)
    check(random(20, 1, 16), random(1, 1, 9, 16, seed=1), [3] * 19 + [9], 2, 1)


def test_ties_go_to_the_lower_block():
    summaries = torch.zeros(1, 1, 200, 16)
    summaries[0, 0, [5, 77, 130, 131, 199], 0] = 1.0
    summaries[0, 0, 7, 0] = -0.0
    lookup = torch.zeros(1, 1, 16)
    lookup[0, 0, 0] = 1.0
    assert gpu.choose_blocks(lookup, [summaries], [200], 3, scopes=1)[0].tolist() == [[[5, 77, 130]]]
    assert gpu.choose_blocks(lookup, [summaries], [200], 7, scopes=1)[0].tolist() == [[[0, 1, 5, 77, 130, 131, 199]]]
    assert gpu.choose_blocks(-lookup, [summaries], [200], 2, scopes=1)[0].tolist() == [[[0, 1]]]


def test_half_precision():
    lookup, summaries = random(2, 4, 32), random(2, 2, 70, 32, seed=1).half()
    ids, _, scores = gpu.choose_blocks(lookup, [summaries], [70, 70], 4, scopes=1)
    expected = select.block_scores(lookup.half().float(), summaries.float(), scopes=1)
    torch.testing.assert_close(scores, expected, atol=2e-2, rtol=1e-2)
    assert torch.equal(ids, scores.topk(4).indices.sort().values)


def test_what_is_refused(monkeypatch):
    summaries = random(1, 1, 4, 16)
    assert gpu.cannot_serve(random(1, 4, 16), summaries) is None
    assert "17 heads" in gpu.cannot_serve(random(1, 17, 16), summaries)
    assert "head size 512" in gpu.cannot_serve(random(1, 1, 512), random(1, 1, 4, 512))
    assert "float64" in gpu.cannot_serve(random(1, 1, 16), summaries.double())
    assert "70000 pieces" in gpu.cannot_serve(random(1, 1, 16).expand(70_000, -1, -1), summaries)
    monkeypatch.setattr(gpu, "target", lambda device: Target(False, 8 * 1024))
    assert "more shared memory" in gpu.cannot_serve(random(1, 1, 256), random(1, 1, 4, 256).half())
