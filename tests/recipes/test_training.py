"""Pieces of the training code against plain definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from recipes.attention import attend, causal_bias
from recipes.lookup import cross_entropy
from recipes.optim import orthogonalise

BATCH, HEADS, KV_HEADS, LENGTH, DIM = 3, 8, 4, 20, 16


def heads(n: int) -> torch.Tensor:
    return torch.randn(BATCH, n, LENGTH, DIM, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("clamped", [False, True])
def test_attention_and_its_gradients(clamped: bool) -> None:
    torch.manual_seed(0)
    q, k, v, far_q, far_k = (heads(n) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS, KV_HEADS))
    bias = causal_bias(LENGTH, q.device)
    near = torch.rand(BATCH, 1, LENGTH, LENGTH) > 0.5 if clamped else None
    out = attend(q, k, v, bias, near, (far_q, far_k) if clamped else None)
    wide = [x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v, far_k)]
    scores = q @ wide[0].mT
    if near is not None:
        scores = torch.where(near, scores, far_q @ wide[2].mT)
    expected = (scores * DIM**-0.5 + bias).softmax(-1) @ wide[1]
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    inputs = (q, k, v, far_q, far_k) if clamped else (q, k, v)
    for mine, theirs in zip(
        torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_lookup_loss_falls_with_the_wanted_block_alone() -> None:
    wanted = torch.tensor([[True, False, True], [False, True, False]])
    scores = torch.tensor([[4.0, 0.0, 4.0, 0.0], [0.0, 4.0, 0.0, 0.0]])
    one = -F.log_softmax(torch.tensor([4.0, 0.0, 0.0]), -1)[0]
    two = -F.log_softmax(torch.tensor([4.0, 0.0, 0.0, 0.0]), -1)[0]
    torch.testing.assert_close(cross_entropy(scores, wanted), (one + two) / 2)
    assert cross_entropy(-scores, wanted) > 4.0


def test_muon_update_is_nearly_orthogonal() -> None:
    torch.manual_seed(0)
    for shape in ((24, 64), (64, 24)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)).float())
        assert values.min() > 0.5
        assert values.max() < 1.4
