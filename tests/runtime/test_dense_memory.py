"""Dense memories against plain attention, with forks at any place."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from rope import Rope
from test_block_memory import DIM, SCORING, cut, feed, tokens

from qllm_runtime.memory.dense import _ROOM, DenseMemory


def plain(qkv: tuple[torch.Tensor, ...], window: int | None) -> torch.Tensor:
    """Attention over everything at once: [n, heads, dim]."""
    query, key, value = qkv
    n = query.shape[1]
    query, key = Rope(DIM).rotate_pair(query, key, 0)
    distance = torch.arange(n)[:, None] - torch.arange(n)
    seen = (distance >= 0) & (distance < (window or n))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True).transpose(0, 1)


def join(*parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True))


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("seed", range(8))
def test_any_family_of_forks(window: int | None, seed: int) -> None:
    """Forks go on, fork again and go away in any order; each sees what it was given and nothing else."""
    draw = random.Random(seed)
    living = [(DenseMemory(Rope(DIM), window, reserve=-_ROOM + 40), tokens(0))]
    for _ in range(40):
        memory, past = draw.choice(living)
        if draw.random() < 0.3:
            living.append((memory.fork(), past))
        elif draw.random() < 0.2 and len(living) > 1:
            living = [(m, p) for m, p in living if m is not memory]
        else:
            new = tokens(draw.choice([1, 1, 2, 9, 30]), seed=draw.randrange(10**6))
            whole = join(past, new)
            living = [(m, whole if m is memory else p) for m, p in living]
            if draw.random() < 0.5:
                memory.on_weights = lambda weights, positions: None
            got = feed(memory, new)
            torch.testing.assert_close(got, plain(whole, window)[-len(got) :], atol=2e-5, rtol=1e-4)
        del memory


def test_questions_in_turn_copy_nothing() -> None:
    trunk, one, other = cut(tokens(300), [200, 50, 50])
    parent = DenseMemory(Rope(DIM), reserve=200)
    feed(parent, trunk)
    place = parent._key.data_ptr()
    for side in (one, other):
        child = parent.fork()
        torch.testing.assert_close(feed(child, side), plain(join(trunk, side), None)[200:], atol=2e-5, rtol=1e-4)
        assert child._key.data_ptr() == place
        del child
    a, b = parent.fork(), parent.fork()
    for fork in (a, b):  # at the same time
        feed(fork, one)
    assert a._key.data_ptr() == place and b._key.data_ptr() != place
    assert parent.n_seen == 200
    torch.testing.assert_close(
        feed(parent, other, SCORING), plain(join(trunk, other), None)[200:], atol=2e-5, rtol=1e-4
    )
