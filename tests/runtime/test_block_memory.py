"""The block memory against its definition (definition.py), and its forks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from definition import Naive
from rope import Rope

from qllm_runtime.config import MemoryConfig
from qllm_runtime.errors import InvalidRequestError
from qllm_runtime.memory.base import Scoring
from qllm_runtime.memory.block import BlockMemory
from qllm_runtime.memory.record import Lookup

DIM = 8
BASE = {
    "n_init": 4, "n_local": 16, "block_size": 4, "topk": 2, "repr_topk": 2, "exec_block_size": 8, "chunk_size": 16,
    "query_weight": 1.5,
}  # fmt: skip
SCORING = Scoring(DIM**-0.5)


def tokens(n: int, heads: int = 4, kv_heads: int = 2, seed: int = 0, dim: int = DIM) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of n tokens; keys drift, so that blocks differ."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(heads, n, dim, generator=generator)
    k = torch.randn(kv_heads, n, dim, generator=generator)
    k = k + torch.randn(kv_heads, n // 4 + 1, dim, generator=generator).repeat_interleave(4, 1)[:, :n]
    return q, k, torch.randn(kv_heads, n, dim, generator=generator)


def feed(
    memory: BlockMemory, qkv: tuple[torch.Tensor, ...], scoring: Scoring = SCORING, chunk: int | None = None
) -> torch.Tensor:
    n = qkv[0].shape[1]
    parts = [[x[:, at : at + (chunk or n)] for x in qkv] for at in range(0, n, chunk or n)]
    return torch.cat([memory.append(*part, scoring) for part in parts])


def cut(qkv: tuple[torch.Tensor, ...], lengths: list[int]) -> list[tuple[torch.Tensor, ...]]:
    return list(zip(*(x.split(lengths, 1) for x in qkv), strict=True))


def check(
    lengths: list[int],
    spans: list[tuple[int, int]] = (),
    scoring: Scoring = SCORING,
    heads: int = 4,
    kv_heads: int = 2,
    chunk: int | None = None,
    scaling: float = 1.2,
    **settings: Any,
) -> BlockMemory:
    """Feed segments of these lengths to memory and oracle; outputs and choices of blocks must agree."""
    config = MemoryConfig(**{**BASE, **settings})
    rope = Rope(DIM, scaling=scaling)
    memory, naive = BlockMemory(config, rope), Naive(config, rope.at, scoring, list(spans))
    lookups: list[Lookup] = []
    memory.on_lookup = lookups.append
    for span in spans:
        memory.set_query(*span)
    for part in cut(tokens(sum(lengths), heads, kv_heads), lengths):
        torch.testing.assert_close(feed(memory, part, scoring, chunk), naive.feed(*part), atol=2e-5, rtol=1e-4)
    assert memory.n_seen == sum(lengths)
    chosen = {each.start: each.ids.expand(kv_heads, -1) for each in lookups}
    assert chosen.keys() == naive.chosen.keys()
    assert all(torch.equal(chosen[start], naive.chosen[start]) for start in chosen)
    assert bool(chosen) == (config.uses_blocks and sum(lengths) > config.n_init + config.n_local + config.block_size)
    return memory


DECODE = [1] * 9


@pytest.mark.parametrize("policy", ["qllm", "infllm", "streaming", "lm-infinite"])
@pytest.mark.parametrize("n_init", [0, 4])
def test_policies(policy: str, n_init: int) -> None:
    check([70, *DECODE], [(5, 9)], policy=policy, n_init=n_init)


@pytest.mark.parametrize(
    "summary",
    [
        {"summary": "max"},
        {"summary": "max", "repr_topk": 1},
        {"summary": "max", "repr_topk": 4},
        {"summary": "mean"},
        {"summary": "published"},
    ],
    ids=["max", "one", "every key", "mean", "published"],
)
@pytest.mark.parametrize("selection", ["shared", "per_kv_head"])
@pytest.mark.parametrize("heads", [2, 4, 8])
def test_summaries(summary: dict[str, Any], selection: str, heads: int) -> None:
    check([60, 12, *DECODE], [(5, 9)], heads=heads, selection=selection, **summary)


@pytest.mark.parametrize("summary", ["max", "published"])
@pytest.mark.parametrize("policy", ["qllm", "streaming"])
@pytest.mark.parametrize(
    "scoring",
    [
        Scoring(0.3, softcap=1.5),
        Scoring(0.3, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
        Scoring(0.3, 1.5, torch.ones(4)),
    ],
    ids=["softcap", "sinks", "both"],
)
def test_softcap_and_sinks(policy: str, summary: str, scoring: Scoring) -> None:
    check([60, *DECODE], [(5, 9)], scoring, policy=policy, summary=summary)


@pytest.mark.parametrize(
    "sizes",
    [
        {"exec_block_size": 6},
        {"exec_block_size": 7, "chunk_size": 30},
        {"exec_block_size": 1},
        {"exec_block_size": 16, "chunk_size": 8},
        {"block_size": 5, "n_init": 3, "n_local": 13},
        {"block_size": 1, "repr_topk": 1},
        {"block_size": 16, "n_local": 8, "exec_block_size": 3},
        {"n_local": 1, "exec_block_size": 1},
        {"topk": 50},
        {"query_weight": 0.0},
        {"n_init": 40},
    ],
    ids=str,
)
def test_sizes(sizes: dict[str, int]) -> None:
    check([75, 10, *DECODE], [(9, 14)], **sizes)


@pytest.mark.parametrize(
    "spans",
    [
        [],
        [(0, 3)],  # among the initial tokens
        [(2, 7)],  # partly
        [(5, 6)],
        [(13, 19)],  # across the border of two chunks
        [(40, 43)],
        [(30, 50)],  # longer than the local window
        [(58, 60)],  # the last of its segment
        [(60, 64)],  # while decoding
        [(4, 8), (41, 47)],
        [(4, 8), (8, 11)],
        [(24, 27), (27, 30)],  # complete within one piece
    ],
    ids=str,
)
@pytest.mark.parametrize("selection", ["shared", "per_kv_head"])
def test_questions(spans: list[tuple[int, int]], selection: str) -> None:
    check([60, *DECODE], spans, chunk=16, selection=selection)


@pytest.mark.parametrize("policy", ["qllm", "infllm"])
@pytest.mark.parametrize("exec_block_size", [1, 3, 8])
def test_tokens_of_a_question_among_other_single_ones(policy: str, exec_block_size: int) -> None:
    """They are compared with every key, tokens before and behind them with the keys' bounds."""
    spans = [(41, 44), (52, 53)]
    check([60, *DECODE], spans, policy=policy, repr_topk=4, exec_block_size=exec_block_size)


@pytest.mark.parametrize("policy", ["streaming", "lm-infinite"])
def test_pieces_longer_than_the_window(policy: str) -> None:
    check([90, 5, *DECODE], policy=policy, n_local=6, exec_block_size=20, chunk_size=40)


def test_question_announced_between_segments() -> None:
    config, rope = MemoryConfig(**BASE), Rope(DIM)
    memory, naive = BlockMemory(config, rope), Naive(config, rope.at, SCORING)
    first, second, third = cut(tokens(90), [50, 20, 20])
    torch.testing.assert_close(feed(memory, first), naive.feed(*first), atol=2e-5, rtol=1e-4)
    memory.set_query(52, 57)
    naive.spans.append((52, 57))
    for part in (second, third):
        torch.testing.assert_close(feed(memory, part), naive.feed(*part), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("policy", ["qllm", "streaming"])
@pytest.mark.parametrize("lengths", [[1] * 60, [3, 40, 17, 2, 25], [4, 16, 1, 1, 30, 9], [24, 25, 26]], ids=str)
def test_segments(policy: str, lengths: list[int]) -> None:
    check(lengths, [(5, 9)], policy=policy)


@pytest.mark.parametrize("summary", ["max", "published", "mean"])
def test_buffers_move_many_times(summary: str) -> None:
    memory = check([20, *[1] * 85], [(5, 9)], summary=summary, chunk_size=8)
    assert memory._window.base > 3 * 8


@pytest.mark.parametrize("policy", ["qllm", "infllm", "streaming", "lm-infinite"])
@pytest.mark.parametrize(("summary", "repr_topk"), [("max", 2), ("max", 4), ("published", 2)])
def test_chunks_do_not_matter(policy: str, summary: str, repr_topk: int) -> None:
    qkv = tokens(200)
    settings = {**BASE, "policy": policy, "summary": summary, "repr_topk": repr_topk}
    outs = []
    for chunk_size, call in ((8, 8), (24, 24), (16, 200), (400, 200), (64, 40)):
        memory = BlockMemory(MemoryConfig(**{**settings, "chunk_size": chunk_size}), Rope(DIM))
        memory.set_query(5, 60)
        outs.append(feed(memory, qkv, chunk=call))
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], atol=1e-5, rtol=1e-5)


def test_within_the_window_it_is_plain_attention() -> None:
    q, k, v = tokens(19)
    rope = Rope(DIM)
    expected = torch.nn.functional.scaled_dot_product_attention(
        rope.rotate(q, 0)[None], rope.rotate(k, 0)[None], v[None], is_causal=True, enable_gqa=True
    )
    for policy in ("qllm", "infllm", "streaming", "lm-infinite"):
        memory = BlockMemory(MemoryConfig(**{**BASE, "policy": policy}), rope)
        memory.set_query(2, 5)
        torch.testing.assert_close(feed(memory, (q, k, v), chunk=8), expected[0].transpose(0, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("span", [(3, 3), (5, 2), (4, 12), (0, 20)])
def test_bad_question_spans(span: tuple[int, int]) -> None:
    memory = BlockMemory(MemoryConfig(**BASE), Rope(DIM))
    feed(memory, tokens(10))
    with pytest.raises(InvalidRequestError, match="not read yet"):
        memory.set_query(*span)


# ---------------------------------------------------------------------- forks


@pytest.mark.parametrize("policy", ["qllm", "streaming"])
@pytest.mark.parametrize(("summary", "repr_topk"), [("max", 2), ("max", 4), ("published", 2)])
def test_forks_continue_as_if_alone(policy: str, summary: str, repr_topk: int) -> None:
    config = MemoryConfig(**{**BASE, "policy": policy, "summary": summary, "repr_topk": repr_topk})
    trunk, left, right = cut(tokens(140), [60, 40, 40])

    def alone(*parts: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        memory = BlockMemory(config, Rope(DIM))
        return [feed(memory, part) for part in parts]

    parent = BlockMemory(config, Rope(DIM))
    feed(parent, trunk)
    a, b = parent.fork(), parent.fork()
    outs: dict[str, list[torch.Tensor]] = {"a": [], "b": []}
    for piece_a, piece_b in zip(cut(left, [8] * 5), cut(right, [8] * 5), strict=True):  # in turns
        outs["a"].append(feed(a, piece_a))
        outs["b"].append(feed(b, piece_b))
    torch.testing.assert_close(torch.cat(outs["a"]), alone(trunk, left)[1])
    torch.testing.assert_close(torch.cat(outs["b"]), alone(trunk, right)[1])
    again = parent.fork()
    torch.testing.assert_close(feed(again, left), alone(trunk, left)[1])
    grandchild = a.fork()
    torch.testing.assert_close(feed(grandchild, right), alone(trunk, left, right)[2])
    torch.testing.assert_close(feed(a.fork(), trunk), alone(trunk, left, trunk)[2])
    assert parent.n_seen == 60
    torch.testing.assert_close(feed(parent, left), alone(trunk, left)[1])


def test_a_fork_leaves_its_parent_untouched() -> None:
    parent = BlockMemory(MemoryConfig(**BASE), Rope(DIM))
    parent.set_query(5, 9)
    trunk, rest = cut(tokens(120), [70, 50])
    feed(parent, trunk)
    parent.on_weights = parent.on_lookup = lambda *_: None
    before = [x.clone() for x in kept(parent)]
    size = parent.nbytes()
    for _ in range(3):
        child = parent.fork()
        assert child.on_weights is None
        assert child.on_lookup is None
        child.set_query(75, 80)
        feed(child, rest)
    assert parent.nbytes() == size
    assert all(torch.allclose(x, y, 0, 0, equal_nan=True) for x, y in zip(before, kept(parent), strict=True))


def kept(memory: BlockMemory) -> list[torch.Tensor]:
    return tensors([memory._far_context, memory._window])


def tensors(thing: object, seen: set[int] | None = None) -> list[torch.Tensor]:
    """All tensors an object holds."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return []
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, dict | list | tuple):
        inner = list(thing.values()) if isinstance(thing, dict) else list(thing)
    else:
        inner = list(vars(thing).values()) if type(thing).__module__.startswith("qllm_runtime.memory") else []
    return [x for each in inner for x in tensors(each, seen)]


def test_a_fork_replaces_the_question() -> None:
    """What a fork asks counts; what its parent asked does not any more."""
    config = MemoryConfig(**BASE)
    trunk, rest = cut(tokens(110), [70, 40])
    rope = Rope(DIM)
    parent = BlockMemory(config, rope)
    parent.set_query(5, 9)
    feed(parent, trunk)
    child = parent.fork()
    child.set_query(71, 76)
    naive = Naive(config, rope.at, SCORING, [(5, 9), (71, 76)])
    naive.feed(*trunk)
    torch.testing.assert_close(feed(child, rest), naive.feed(*rest), atol=2e-5, rtol=1e-4)


def test_weights_of_a_step_belong_to_distinct_tokens_and_sum_to_one() -> None:
    for scoring, total in ((SCORING, 1.0), (Scoring(SCORING.scale, sinks=torch.ones(4)), None)):
        memory = BlockMemory(MemoryConfig(**{**BASE, "selection": "per_kv_head"}), Rope(DIM))
        memory.set_query(20, 26)
        q, k, v = tokens(90)
        found = []
        memory.on_weights = lambda weights, positions: found.append((weights, positions))  # noqa: B023
        feed(memory, (q[:, :80], k[:, :80], v[:, :80]), scoring)
        found.clear()
        for t in range(80, 90):
            out = feed(memory, (q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1]), scoring)
            weights, positions = found[-1]
            assert weights.shape == positions.shape
            for g in range(2):
                carrying = positions[g][weights[g] > 0].tolist()
                assert len(carrying) == len(set(carrying))
                assert max(carrying) == t
                expected = out[0, 2 * g : 2 * g + 2].sum(0)
                torch.testing.assert_close(weights[g] @ v[g, positions[g]], expected, atol=1e-5, rtol=1e-5)
            if total:
                torch.testing.assert_close(weights.sum(1), torch.full((2,), 2 * total))
        assert len(found) == 10
