"""Random histories of a memory against its definition: odd sizes, calls of any length, questions and forks at any place."""

from __future__ import annotations

import random

import pytest
import torch
from definition import Naive
from rope import Rope
from test_block_memory import DIM, SCORING, feed, tokens

from qllm_runtime.config import MemoryConfig
from qllm_runtime.memory.base import Scoring
from qllm_runtime.memory.block import BlockMemory


def sizes(draw: random.Random) -> MemoryConfig:
    block, n_local = draw.choice([1, 2, 3, 5, 8]), draw.choice([3, 5, 13, 16])
    return MemoryConfig(
        policy=draw.choice(["qllm", "qllm", "qllm", "infllm", "streaming", "lm-infinite"]),
        n_init=draw.choice([0, 1, 4, 7]),
        n_local=n_local,
        block_size=block,
        topk=draw.choice([1, 2, 3, 9]),
        repr_topk=draw.choice([1, block, draw.randint(1, block)]),
        exec_block_size=draw.randint(1, n_local),
        chunk_size=draw.choice([1, 8, 33, 64]),
        query_weight=draw.choice([0.0, 1.5]),
        summary=draw.choice(["max", "max", "mean", "published"]),
        selection=draw.choice(["shared", "per_kv_head"]),
    )


@pytest.mark.parametrize("seed", range(24))
def test_history(seed: int) -> None:
    draw = random.Random(seed)
    config = sizes(draw)
    kv_heads = draw.choice([1, 2])
    heads = kv_heads * draw.choice([1, 2, 3])
    scoring = draw.choice([SCORING, Scoring(0.3, 1.5), Scoring(0.3, None, torch.linspace(-1, 1, heads))])
    rope = Rope(DIM)
    memory, naive = BlockMemory(config, rope), Naive(config, rope.at, scoring)
    n_total = draw.randint(40, 110)
    whole = tokens(n_total, heads, kv_heads, seed)
    stray = tokens(draw.randint(1, 20), heads, kv_heads, seed + 1)
    at = 0
    while at < n_total:
        n = min(n_total - at, draw.choice([1, 1, 1, 2, 3, draw.randint(1, 40)]))
        event = draw.choice(["question", "fork", "fork goes on", "parent goes on", None, None, None, None])
        start = at + draw.randrange(n)
        if event == "question" and all(end <= start for _, end in naive.spans):
            naive.spans.append((start, draw.randint(start + 1, start + 12)))
            memory.set_query(*naive.spans[-1])
        elif event == "fork":
            memory = memory.fork()
        elif event == "fork goes on":
            feed(memory.fork(), stray, scoring)
        elif event == "parent goes on":
            parent, memory = memory, memory.fork()
            feed(parent, stray, scoring)
        if draw.random() < 0.3:  # weights are asked for
            memory.on_weights = lambda weights, positions: None
        part = tuple(x[:, at : at + n] for x in whole)
        chunk = config.exec_block_size * draw.randint(1, 3)
        torch.testing.assert_close(feed(memory, part, scoring, chunk), naive.feed(*part), atol=4e-5, rtol=2e-4)
        at += n


@pytest.mark.parametrize("selection", ["shared", "per_kv_head"])
def test_forks_that_write_in_turns(selection: str) -> None:
    """Keys that stay in place from step to step belong to one side alone, whose blocks have the other side's numbers."""
    config = MemoryConfig(
        n_init=2, n_local=8, block_size=4, topk=3, repr_topk=4, exec_block_size=4, chunk_size=16, selection=selection
    )
    trunk, *sides = (tokens(n, seed=seed) for seed, n in enumerate((50, 30, 30)))
    parent = BlockMemory(config, Rope(DIM))
    feed(parent, trunk, chunk=1)
    forks = [parent.fork() for _ in sides]
    expected = []
    for side in sides:
        alone = BlockMemory(config, Rope(DIM))
        feed(alone, trunk, chunk=1)
        expected.append(feed(alone, side, chunk=1))
    for t in range(30):
        for fork, side, outs in zip(forks, sides, expected, strict=True):
            out = feed(fork, tuple(x[:, t : t + 1] for x in side))
            torch.testing.assert_close(out, outs[t : t + 1], atol=2e-5, rtol=1e-4)
