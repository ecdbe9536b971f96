"""The local window's buffers: what they take and what forks share."""

from __future__ import annotations

import pytest
import torch
from rope import Rope
from test_block_memory import BASE, DIM, SCORING, cut, feed, tokens

from qllm_runtime.config import MemoryConfig
from qllm_runtime.memory.block import BlockMemory
from qllm_runtime.memory.window import Window

WIDE = MemoryConfig(**{**BASE, "chunk_size": 4000})


def slots(memory: BlockMemory) -> int:
    return memory._window.key.shape[1]


def test_buffers_fit_what_they_take_in() -> None:
    parent = BlockMemory(WIDE, Rope(DIM))
    q, k, v = tokens(4200)
    feed(parent, (q[:, :4000], k[:, :4000], v[:, :4000]))
    assert slots(parent) == 4000 + 24
    child = parent.fork()
    assert child._window.key is parent._window.key  # nothing is copied yet
    for t in range(4000, 4050):  # token by token, far less room is needed
        child.append(q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], SCORING)
        assert slots(child) == 24 + 24 // 4
    feed(child, (q[:, 4050:4150], k[:, 4050:4150], v[:, 4050:4150]))
    assert slots(child) == 24 + 100
    assert slots(parent) == 4000 + 24
    assert child.nbytes() < parent.nbytes() / 1.5


def test_launches_stay_within_the_length_that_keeps_its_frequencies() -> None:
    rotation = Rope(DIM)
    assert Window(WIDE, rotation).launch_size == 4000
    rotation.original_max_position_embeddings = 64
    assert Window(WIDE, rotation).launch_size == (64 - 24) // WIDE.exec_block_size * WIDE.exec_block_size


@pytest.mark.parametrize("summary", ["max", "published", "mean"])
def test_either_side_of_a_fork_may_go_on_first(summary: str) -> None:
    """Tokens of one side never reach the other."""
    config = MemoryConfig(**{**BASE, "summary": summary, "chunk_size": 32})
    trunk, left, right = cut(tokens(150), [70, 40, 40])

    def alone(*parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        memory = BlockMemory(config, Rope(DIM))
        return [feed(memory, part, chunk=8) for part in parts][-1]

    parent = BlockMemory(config, Rope(DIM))
    feed(parent, trunk, chunk=8)
    children = [parent.fork() for _ in range(2)]
    torch.testing.assert_close(feed(parent, left, chunk=8), alone(trunk, left))
    torch.testing.assert_close(feed(children[0], right, chunk=8), alone(trunk, right))
    late = parent.fork()
    torch.testing.assert_close(feed(children[1], left, chunk=8), alone(trunk, left))
    torch.testing.assert_close(feed(late, right, chunk=8), alone(trunk, left, right))
    torch.testing.assert_close(feed(parent, trunk, chunk=8), alone(trunk, left, trunk))
