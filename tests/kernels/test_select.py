"""Scores of blocks and the choice among them against loops."""

from __future__ import annotations

import pytest
import torch

from qllm_kernels import select
from qllm_kernels.select import block_scores, bound_lookup, select_blocks
from qllm_kernels.summary import key_bounds


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("heads", "summary_heads", "scopes"), [(4, 2, 1), (4, 2, 2), (4, 4, 1), (4, 4, 2), (6, 2, 2), (2, 2, 2), (4, 1, 1)]
)
@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("pieces", [1, 5])
def test_block_scores(heads, summary_heads, scopes, r, pieces):
    lookup, summaries = random(pieces, heads, 8), random(summary_heads, r, 7, 8, seed=1)
    expected = torch.zeros(pieces, scopes, 7, dtype=torch.double)
    for piece in range(pieces):
        for h in range(heads):
            dots = summaries[h * summary_heads // heads].double() @ lookup[piece, h].double()  # [r, 7]
            expected[piece, h * scopes // heads] += dots.amax(0)
    actual = block_scores(lookup, summaries, scopes=scopes)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("heads", [2, 6])
def test_bounds_of_keys_bound_their_scores(heads, size):
    lookup, key = random(3, heads, 8), random(2, 7, size, 8, seed=1)
    corners = torch.stack((key.amin(2), key.amax(2)))  # [2, kv_heads, n_blocks, head_dim]
    actual = block_scores(bound_lookup(lookup), key_bounds(key), scopes=1)
    best = torch.einsum("phd,chnd->cphnd", lookup, corners.repeat_interleave(heads // 2, 1)).amax(0).sum((1, 3))
    torch.testing.assert_close(actual[:, 0], best, atol=1e-5, rtol=1e-5)
    exact = block_scores(lookup, key.transpose(1, 2), scopes=1)
    if size == 1:
        torch.testing.assert_close(actual, exact, atol=1e-5, rtol=1e-5)
    else:
        assert (actual > exact).all()


@pytest.mark.parametrize("r", [1, 2])
def test_block_scores_of_a_slice(r):
    """Stores hand out views of a larger buffer."""
    lookup, buffer = random(2, 4, 8), random(2, r, 20, 8, seed=1)
    torch.testing.assert_close(
        block_scores(lookup, buffer[:, :, :7], scopes=1), block_scores(lookup, buffer[:, :, :7].clone(), scopes=1)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("r", [1, 3])
def test_block_scores_of_half_precision_are_fp32(dtype, r):
    """Not a bit is lost but those of the summaries themselves."""
    lookup, summaries = random(2, 4, 8), random(2, r, 50, 8, seed=1).to(dtype)
    actual = block_scores(lookup, summaries, scopes=2)
    torch.testing.assert_close(actual, block_scores(lookup, summaries.float(), scopes=2), atol=0, rtol=0)


@pytest.mark.parametrize("r", [1, 2, 5])
@pytest.mark.parametrize("layout", ["rows", "columns", "pages"])
def test_block_scores_in_tiles_and_any_layout(monkeypatch, r, layout):
    lookup, summaries = random(2, 6, 8), random(3, r, 40, 8, seed=1)
    expected = block_scores(lookup, summaries, scopes=3)
    if layout == "columns":
        summaries = summaries.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "pages":
        summaries = summaries.transpose(1, 2).contiguous().transpose(1, 2)
    for tile in (1, 3 * 8 * r * 7, 1 << 20):
        monkeypatch.setitem(select._TILE, "cpu", tile)
        for n in (40, 33, 1):
            actual = block_scores(lookup, summaries[:, :, :n], scopes=3)
            torch.testing.assert_close(actual, expected[:, :, :n], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("topk", [1, 3, 9, 40])
@pytest.mark.parametrize("scopes", [1, 2])
def test_select_blocks(topk, scopes):
    eligible = [1, 2, 5, 9]
    scores = random(4, scopes, 9)
    ids, valid = select_blocks(scores, torch.tensor(eligible), topk)
    assert ids.shape == valid.shape == (4, scopes, min(topk, 9))
    for piece, count in enumerate(eligible):
        for scope in range(scopes):
            row = scores[piece, scope, :count].tolist()
            best = sorted(sorted(range(count), key=lambda i, row=row: -row[i])[:topk])
            chosen = ids[piece, scope][valid[piece, scope]].tolist()
            assert chosen == best
            assert valid[piece, scope].tolist() == [True] * len(best) + [False] * (min(topk, 9) - len(best))
            assert set(ids[piece, scope, len(best) :].tolist()) <= {count - 1}


def test_select_blocks_with_scores_of_minus_infinity():
    scores = torch.full((1, 1, 4), float("-inf"))
    scores[0, 0, 2] = 1.0
    ids, valid = select_blocks(scores, torch.tensor([4]), 2)
    assert bool(valid.all())
    assert 2 in ids[0, 0].tolist()
    assert len(set(ids[0, 0].tolist())) == 2
