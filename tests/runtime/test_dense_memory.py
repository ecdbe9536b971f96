"""Dense memories against plain attention, with forks at any place."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rope import Rope
from test_block_memory import DIM, SCORING, cut, feed, tokens

from qllm_kernels import attention
from qllm_runtime.memory import dense
from qllm_runtime.memory.base import Scoring
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


@pytest.mark.parametrize("heads", [1, 32, 128])
@pytest.mark.parametrize("keys", [100, 32_768, 131_072, 500_000])
def test_logits_that_are_stored_have_a_limit(heads: int, keys: int) -> None:
    size = dense.tile_size(heads, keys)
    assert 1 <= size <= dense._TILE
    assert 4 * size * heads * keys <= 2**28
    assert size == dense._TILE or 4 * (size + 1) * heads * keys > 2**28


@pytest.mark.parametrize("window", [None, 24])
def test_small_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """On a CPU, logits are stored where they are capped."""
    stored: list[int] = []
    logits = attention.segment_logits

    def watched(*args: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        found = logits(*args, **kwargs)
        stored.append(found.nbytes)
        return found

    monkeypatch.setattr(attention, "segment_logits", watched)
    scoring, text, outs = Scoring(DIM**-0.5, 5.0), tokens(300), []
    for limit in (dense._LOGITS, 20_000):
        monkeypatch.setattr(dense, "_LOGITS", limit)
        stored.clear()
        memory = DenseMemory(Rope(DIM), window)
        outs.append(torch.cat([feed(memory, part, scoring) for part in cut(text, [200, 100])]))
        assert max(stored) <= limit
    torch.testing.assert_close(*outs, atol=2e-5, rtol=1e-4)


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
