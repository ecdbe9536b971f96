"""Faithful mode against an independent naive implementation, on random layouts and in float64."""

import itertools
import random

import numpy as np
import pytest
import torch
from naive import NaiveLayer, PublishedCodeFails, Sizes, Undefined

from qllm_runtime.config import MemoryConfig
from qllm_runtime.errors import InvalidConfigError, InvalidRequestError, UnsupportedModelError
from qllm_runtime.memory.base import Rotation, Scoring
from qllm_runtime.memory.published import PublishedMemory, PublishedWindow
from qllm_runtime.memory.record import Lookup

TOLERANCE = 1e-9


class HalfRotation(Rotation):
    """Rotate-half embedding in the dtype of its input."""

    def __init__(self, theta: float) -> None:
        self.theta = theta

    def _turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        angles = positions[:, None] * self.theta ** (-torch.arange(half, dtype=x.dtype) / half)
        cos, sin = angles.cos(), angles.sin()
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def rotate(self, x: torch.Tensor, start: int) -> torch.Tensor:
        return self._turn(x, torch.arange(start, start + x.shape[1], dtype=x.dtype))

    def rotate_pair(self, a: torch.Tensor, b: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rotate(a, start), self.rotate(b, start)

    def rotate_all(self, x: torch.Tensor, position: int) -> torch.Tensor:
        return self._turn(x, torch.tensor([position], dtype=x.dtype))


def memory_of(sizes: Sizes) -> PublishedMemory | PublishedWindow:
    config = MemoryConfig(
        policy=sizes.policy,
        faithful=True,
        summary="published",
        n_init=sizes.n_init,
        n_local=sizes.n_local,
        block_size=sizes.block_size,
        topk=sizes.topk,
        repr_topk=sizes.repr_topk,
        exec_block_size=sizes.piece,
        query_weight=sizes.weight,
    )
    kind = PublishedMemory if config.uses_blocks else PublishedWindow
    return kind(config, HalfRotation(sizes.theta), sizes.span)


def tokens(n: int, heads: int, kv_heads: int, dim: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((n, h, dim)) * 1.5 for h in (heads, kv_heads, kv_heads))  # type: ignore[return-value]


def feed(memory, call) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Append one call given as [n, heads, d] arrays."""
    q, k, v = (torch.from_numpy(x).transpose(0, 1) for x in call)
    return memory.append(q, k, v, Scoring(scale=q.shape[2] ** -0.5)).numpy()


def cut(lengths: list[int], arrays: tuple[np.ndarray, ...]) -> list[tuple[np.ndarray, ...]]:
    edges = np.cumsum([0, *lengths])
    return [tuple(x[a:b] for x in arrays) for a, b in itertools.pairwise(edges)]


def compare(sizes: Sizes, lengths: list[int], heads: int, kv_heads: int, dim: int, seed: int) -> NaiveLayer:
    """Feed both implementations; they agree in every number, or fail together; stops where a tie decides."""
    naive, memory = NaiveLayer(sizes), memory_of(sizes)
    records: list[Lookup] = []
    if isinstance(memory, PublishedMemory):
        memory.on_lookup = records.append
    for call in cut(lengths, tokens(sum(lengths), heads, kv_heads, dim, seed)):
        try:
            expected = naive.append(*call)
        except PublishedCodeFails:
            with pytest.raises(InvalidRequestError, match="published"):
                feed(memory, call)
            return naive
        except Undefined:
            return naive
        np.testing.assert_allclose(feed(memory, call), expected, atol=TOLERANCE, rtol=0)
    if not isinstance(memory, PublishedMemory):
        return naive
    got = [(r.start, r.length, r.n_blocks, r.ids.tolist()) for r in records]
    assert got == [(s.start, s.length, s.n_blocks, s.ids) for s in naive.selections]
    for record, selection in zip(records, naive.selections, strict=True):
        assert (record.scores is None) == (selection.n_blocks == 0)
        if record.scores is not None:
            np.testing.assert_allclose(record.scores.numpy(), selection.scores, atol=1e-8, rtol=0)
    assert memory.n_initial == naive.captured
    assert memory.n_blocks == len(naive.representatives)
    if memory.summaries is not None:
        np.testing.assert_allclose(memory.summaries.numpy(), np.array(naive.representatives), atol=TOLERANCE, rtol=0)
    assert (memory.query_vector is None) == (naive.question is None)
    if memory.query_vector is not None:
        np.testing.assert_allclose(memory.query_vector.numpy(), naive.question, atol=TOLERANCE, rtol=0)
    assert memory.remainder_scores is not None
    np.testing.assert_allclose(
        memory.remainder_scores.T.numpy(), np.array(naive.mass[naive.start :]), atol=TOLERANCE, rtol=0
    )
    return naive


def calls(length: int, chunk: int, decode: int) -> list[int]:
    """The published way of driving: chunks of all but the last token, the last alone, then one by one."""
    chunks = [min(chunk, length - 1 - a) for a in range(0, length - 1, chunk)]
    return [*chunks, 1, *[1] * decode]


@pytest.mark.parametrize("seed", range(60))
def test_blocks_agree(seed: int) -> None:
    rng = random.Random(seed)
    n_local = rng.randint(2, 24)
    block = rng.randint(1, 8)
    length = rng.choice([1, rng.randint(1, n_local), n_local + 1, rng.randint(2, 110), rng.randint(60, 110)])
    start = rng.choice([0, 0, 1, 2, rng.randint(0, length), rng.randint(-6, 6)])
    sizes = Sizes(
        policy=rng.choice(["qllm", "qllm", "qllm", "infllm"]),
        n_init=rng.choice([0, 1, rng.randint(0, 12), rng.randint(0, 40)]),
        n_local=n_local,
        block_size=block,
        topk=rng.randint(1, 5),
        repr_topk=rng.randint(1, block),
        piece=rng.randint(1, n_local),
        weight=rng.choice([0.0, 1.0, 4.0]),
        span=rng.choice([None, (-1, -1), *[(start, start + rng.randint(1, 9))] * 6]),
        theta=rng.choice([100.0, 10000.0]),
    )
    kv_heads, group = rng.choice([(1, 1), (1, 2), (2, 2), (1, 4), (2, 1), (3, 1), (1, 3)])
    chunk = rng.choice([rng.randint(1, 30), rng.randint(20, 90), 1000])
    decode = rng.choice([3, 12, n_local + 2 * block])
    compare(sizes, calls(length, chunk, decode), kv_heads * group, kv_heads, rng.choice([2, 4, 6]), seed)


@pytest.mark.parametrize(
    ("length", "chunk", "span", "n_init", "has_question"),
    [
        pytest.param(90, 200, (2, 9), 4, True, id="question in the first capture"),
        pytest.param(90, 200, (60, 64), 4, True, id="late question, no longer than repr_topk"),
        pytest.param(90, 40, (50, 58), 4, False, id="late question, in a later call"),
        pytest.param(90, 12, (2, 9), 4, True, id="chunk within the window: queries of other tokens"),
        pytest.param(14, 200, (2, 9), 4, False, id="prompt within the window"),
        pytest.param(14, 200, (0, 1), 4, True, id="prompt within the window, span of the first token"),
        pytest.param(90, 200, (2, 9), 0, True, id="no initial tokens"),
        pytest.param(90, 37, (2, 9), 60, True, id="initial tokens captured over many pieces"),
        pytest.param(90, 200, (-3, 2), 4, False, id="span from before the beginning"),
        pytest.param(90, 200, (-80, -77), 4, True, id="span counted from the end"),
        pytest.param(1, 200, (0, 1), 2, True, id="one token"),
    ],
)
def test_question_quirks(length: int, chunk: int, span: tuple[int, int], n_init: int, has_question: bool) -> None:
    sizes = Sizes("qllm", n_init, 16, block_size=5, topk=3, repr_topk=4, piece=7, weight=2.0, span=span)
    naive = compare(sizes, calls(length, chunk, 30), 4, 2, 4, seed=length)
    assert (naive.question is not None) == has_question


@pytest.mark.parametrize("span", [(0, 2), (0, 9)])
@pytest.mark.parametrize("repr_topk", [2, 4])
def test_question_out_of_reach_is_a_typed_error(span: tuple[int, int], repr_topk: int) -> None:
    sizes = Sizes("qllm", 4, 16, block_size=5, repr_topk=repr_topk, piece=8, span=span)
    memory, naive = memory_of(sizes), NaiveLayer(sizes)
    *prompt, last = cut(calls(10, 100, 7), tokens(17, 2, 1, 4, 0))
    for call in prompt:
        feed(memory, call)
        naive.append(*call)
    with pytest.raises(PublishedCodeFails):
        naive.append(*last)
    with pytest.raises(InvalidRequestError, match="chunk_size"):
        feed(memory, last)


@pytest.mark.parametrize("policy", ["streaming", "lm-infinite"])
@pytest.mark.parametrize("seed", range(8))
def test_windows_agree(policy: str, seed: int) -> None:
    rng = random.Random(seed)
    n_local = rng.randint(1, 20)
    sizes = Sizes(policy, rng.choice([0, 1, 5, 30]), n_local, piece=rng.randint(1, n_local))
    compare(sizes, calls(rng.choice([1, 9, 70]), rng.choice([7, 25, 100]), 15), 4, rng.choice([1, 2, 4]), 4, seed)


def test_too_many_initial_tokens_for_streaming() -> None:
    naive = compare(Sizes("streaming", 30, 8, piece=8), [20, 5], 2, 2, 4, seed=0)
    assert len(naive.q) == 20


def test_fork_continues_independently() -> None:
    for policy in ("qllm", "streaming"):
        sizes = Sizes(policy, 4, 16, block_size=5, topk=2, repr_topk=2, piece=8, span=(1, 7))
        first, *rest = cut([60, 9, 9, 1], tokens(79, 4, 2, 4, 1))
        whole, memory = memory_of(sizes), memory_of(sizes)
        expected = [feed(whole, call) for call in (first, *rest)][1:]
        feed(memory, first)
        other, used = memory.fork(), memory.nbytes()
        feed(other, cut([9], tokens(9, 4, 2, 4, 2))[0])
        assert memory.nbytes() == used > 0
        for call, output in zip(rest, expected, strict=True):
            np.testing.assert_array_equal(feed(memory, call), output)


@pytest.mark.parametrize("policy", ["qllm", "streaming"])
def test_weights_of_a_step_belong_to_their_keys(policy: str) -> None:
    sizes = Sizes(policy, 4, 16, block_size=5, topk=2, repr_topk=2, piece=8)
    memory = memory_of(sizes)
    reported: list[tuple[torch.Tensor, torch.Tensor]] = []
    memory.on_weights = lambda weights, positions: reported.append((weights, positions))
    arrays = tokens(70, 4, 2, 4, 5)
    # values that name their own token turn the output into the weights by token
    arrays = (*arrays[:2], np.broadcast_to(np.eye(70)[:, None], (70, 2, 70)).copy())
    *_, last = (feed(memory, call) for call in cut([69, 1], arrays))
    ((weights, positions),) = reported
    by_token = torch.zeros(2, 70, dtype=weights.dtype).scatter_add_(1, positions, weights)
    np.testing.assert_allclose(by_token.numpy(), last[0].reshape(2, 2, 70).sum(axis=1), atol=TOLERANCE)


def test_question_comes_before_the_first_token() -> None:
    sizes = Sizes("qllm", 4, 16, block_size=5, repr_topk=2, piece=8)
    late, early = memory_of(sizes), memory_of(sizes)
    early.set_query(2, 7)
    call = cut([40], tokens(40, 2, 1, 4, 3))[0]
    for memory in (early, late):
        feed(memory, call)
    assert isinstance(early, PublishedMemory)
    assert early.query_vector is not None
    with pytest.raises(InvalidRequestError, match="faithful=False"):
        late.set_query(2, 7)
    for policy in ("infllm", "streaming"):
        memory = memory_of(Sizes(policy, 4, 16, piece=8))
        feed(memory, call)
        memory.set_query(2, 7)


def test_what_the_published_code_does_not_know() -> None:
    memory, window = memory_of(Sizes("qllm", 4, 16)), memory_of(Sizes("streaming", 4, 16))
    q, k, v = (torch.zeros(1, 2, 4) for _ in range(3))
    for each in (memory, window):
        with pytest.raises(UnsupportedModelError, match="soft caps"):
            each.append(q, k, v, Scoring(1.0, softcap=30.0))
    with pytest.raises(InvalidConfigError, match="PublishedWindow"):
        PublishedMemory(window._config, HalfRotation(1e4))
    with pytest.raises(InvalidConfigError, match="PublishedMemory"):
        PublishedWindow(memory._config, HalfRotation(1e4))
