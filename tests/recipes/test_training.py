"""Pieces of the training code against plain definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from qllm_bench.questions.facts import Question
from recipes.attention import attend, causal_bias
from recipes.batches import Sampler
from recipes.evaluate import MODELS, story_prose
from recipes.init import GROWN, grow, initialise
from recipes.lookup import cross_entropy
from recipes.model import Reader, ReaderConfig
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


def test_a_grown_network_computes_what_it_did() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 32}
    shallow, deep = (Reader(ReaderConfig(layers=n, **sizes)) for n in (len(GROWN), len(GROWN) + 2))
    initialise(shallow, None, 1)
    initialise(deep, None, 2)
    ids, positions = torch.randint(0, 64, (2, 12)), torch.arange(12).expand(2, -1)
    expected = shallow(ids, positions)[0]
    assert not torch.allclose(deep(ids, positions)[0], expected)
    grow(deep, shallow.state_dict())
    torch.testing.assert_close(deep(ids, positions)[0], expected)


def test_several_values_are_right_in_any_order() -> None:
    tokenizer = Tokenizer.from_file(str(MODELS / "reader" / "tokenizer.json"))
    sampler = Sampler(3, tokenizer, story_prose(), ["pond"])
    values = ("4711", "4213", "pond")
    question = Question("Which?", "The numbers are 4711, 4213, pond.", values, "multi", False, (0, 1, 2))
    orders = set()
    for _ in range(20):
        _, ids, weights, right = sampler.turn(question)
        text = tokenizer.decode(ids)
        told = text.removeprefix("The numbers are ").removesuffix(".").split(", ")
        orders.add(tuple(told))
        assert sorted(told) == sorted(values)
        assert len(ids) == len(weights)
        assert all(tokens[0] == ids[i] for i, tokens in right.items())
        first = min(i for i, tokens in right.items() if len(tokens) > 1)
        assert {tokenizer.id_to_token(t)[:2] for t in right[first]} >= {"\u0120", "\u0120p"}
        if told[0] == "4711":
            four = next(i for i in sorted(right) if tokenizer.id_to_token(ids[i]) == "4")
            assert [tokenizer.id_to_token(t) for t in right[four + 1]] == ["7", "2"]
            assert all(len(right[four + n]) == 1 for n in (2, 3))
    assert len(orders) > 3
