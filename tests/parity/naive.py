"""The published algorithm once more, as plainly as possible: whole history, absolute positions, one query at a time.

Written from its description alone and in numpy, so that it shares nothing with the runtime. Slow on purpose.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class PublishedCodeFails(Exception):
    """The published code would crash on this input."""


class Undefined(Exception):
    """A tie decides; any answer is right."""


@dataclass
class Sizes:
    policy: str
    n_init: int
    n_local: int
    block_size: int = 1
    topk: int = 1
    repr_topk: int = 1
    piece: int = 1
    weight: float = 1.0
    span: tuple[int, int] | None = None
    theta: float = 10000.0


@dataclass
class Selection:
    start: int
    length: int
    n_blocks: int
    ids: list[int]
    scores: list[float]


def rope(x: Array, position: int, theta: float) -> Array:
    """Rotate pairs (i, i + d/2) as complex numbers."""
    half = len(x) // 2
    z = x[:half] + 1j * x[half:]
    z = z * np.exp(1j * position * theta ** (-2.0 * np.arange(half) / len(x)))
    return np.concatenate((z.real, z.imag))


def softmax(logits: list[float]) -> Array:
    e = np.exp(np.array(logits) - max(logits))
    return np.asarray(e / e.sum())


def best(scores: list[float], count: int) -> list[int]:
    """Indices of the `count` highest scores."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    if count and count < len(order) and abs(scores[order[count - 1]] - scores[order[count]]) < 1e-9:
        raise Undefined
    return order[:count]


@dataclass
class NaiveLayer:
    """One layer of one sequence. Rows are tokens: q[t][h], k[t][g], v[t][g] are vectors."""

    sizes: Sizes
    q: list[Array] = field(default_factory=list)
    k: list[Array] = field(default_factory=list)
    v: list[Array] = field(default_factory=list)
    mass: list[Array] = field(default_factory=list)
    selections: list[Selection] = field(default_factory=list)
    representatives: list[Array] = field(default_factory=list)
    question: Array | None = None
    captured: int = 0
    complete: bool = False
    start: int = 0

    def append(self, q: Array, k: Array, v: Array) -> Array:
        """One call with [n, heads, d], [n, kv_heads, d], [n, kv_heads, d]; returns [n, heads, d]."""
        begin, self.call_remainder = len(self.q), self.start
        self.q, self.k, self.v = self.q + list(q), self.k + list(k), self.v + list(v)
        self.mass += [np.zeros(q.shape[1]) for _ in range(len(q))]
        end = len(self.q)
        if self.sizes.policy in ("streaming", "lm-infinite"):
            return np.array([self.window_attention(p, end) for p in range(begin, end)])
        rows: list[Array] = []
        a = begin
        while a < end:
            z = min(a + self.sizes.piece, end)
            blocks = self.choose(a, z)
            rows += [self.attention(p, z, blocks) for p in range(a, z)]
            self.after_piece(z, begin)
            a = z
        return np.array(rows)

    def far(self, t: int, h: int, angle: int | None = None) -> Array:
        return rope(self.q[t][h], self.sizes.n_local - 1 if angle is None else angle, self.sizes.theta)

    def kv_head(self, h: int) -> int:
        return h // (self.q[0].shape[0] // self.k[0].shape[0])

    def block(self, i: int) -> range:
        first = self.sizes.n_init + i * self.sizes.block_size
        return range(first, first + self.sizes.block_size)

    def choose(self, a: int, z: int) -> list[int]:
        heads = self.q[0].shape[0]
        mean = np.concatenate([sum(self.far(t, h) for t in range(a, z)) / (z - a) for h in range(heads)])
        scores = []
        for vector in self.representatives:
            score = float(vector @ mean)
            if self.question is not None:
                score += self.sizes.weight * float(vector @ self.question)
            scores.append(score)
        ids = sorted(best(scores, min(self.sizes.topk, len(scores))))
        self.selections.append(Selection(a, z - a, len(scores), ids, scores))
        return ids

    def attention(self, p: int, z: int, blocks: list[int]) -> Array:
        s = self.sizes
        near = list(range(max(0, p - s.n_local + 1), p + 1))
        distant = [t for i in blocks for t in self.block(i)]
        distant += list(range(self.captured)) + list(range(self.start, max(self.start, z - s.n_local)))
        rows = []
        for h in range(self.q[0].shape[0]):
            g = self.kv_head(h)
            root = np.sqrt(len(self.q[p][h]))
            turned = rope(self.q[p][h], p, s.theta)
            logits = [float(turned @ rope(self.k[j][g], j, s.theta)) / root for j in near]
            logits += [float(self.far(p, h) @ self.k[j][g]) / root for j in distant]
            weights = softmax(logits)
            for weight, j in zip(weights, near, strict=False):
                self.mass[j][h] += weight
            rows.append(sum(w * self.v[j][g] for w, j in zip(weights, near + distant, strict=True)))
        return np.array(rows)

    def after_piece(self, z: int, begin: int) -> None:
        s = self.sizes
        if not self.complete and z - self.start > s.n_local:
            move = min(s.n_init - self.captured, z - self.start - s.n_local)
            self.captured += move
            self.start += move
            self.complete = self.captured == s.n_init
            if s.policy == "qllm" and self.question is None and s.span is not None and s.span[1] > s.span[0]:
                self.take_question(begin)
        while self.complete and z - self.start >= s.n_local + s.block_size:
            vectors = []
            tokens = range(self.start, self.start + s.block_size)
            for h in range(self.q[0].shape[0]):
                chosen = best([float(self.mass[t][h]) for t in tokens], s.repr_topk)
                vectors.append(sum(self.k[tokens[i]][self.kv_head(h)] for i in chosen) / s.repr_topk)
            self.representatives.append(np.concatenate(vectors))
            self.start += s.block_size

    def take_question(self, begin: int) -> None:
        assert self.sizes.span is not None
        part = slice(*self.sizes.span)
        queries = list(range(begin, len(self.q)))[part]
        keys = list(range(self.call_remainder, len(self.q)))[part]
        if not queries:
            return
        if not keys:
            raise PublishedCodeFails
        vectors = []
        for h in range(self.q[0].shape[0]):
            chosen = best([float(self.mass[t][h]) for t in keys], min(self.sizes.repr_topk, len(keys)))
            if max(chosen) >= len(queries):
                raise PublishedCodeFails
            vectors.append(sum(self.far(queries[i], h) for i in chosen) / len(chosen))
        self.question = np.concatenate(vectors)

    def window_attention(self, p: int, end: int) -> Array:
        s = self.sizes
        if s.policy == "streaming" and s.n_local < end < s.n_init:
            raise PublishedCodeFails
        near = list(range(max(0, p - s.n_local + 1), p + 1))
        distant = [j for j in range(min(s.n_init, end)) if p - j >= s.n_local]
        angle = s.n_local - 1 + (s.n_init if s.policy == "streaming" else 0)
        rows = []
        for h in range(self.q[0].shape[0]):
            g = self.kv_head(h)
            root = np.sqrt(len(self.q[p][h]))
            turned = rope(self.q[p][h], p, s.theta)
            logits = [float(turned @ rope(self.k[j][g], j, s.theta)) / root for j in near]
            for j in distant:
                position = j if s.policy == "streaming" else 0
                logits.append(float(self.far(p, h, angle) @ rope(self.k[j][g], position, s.theta)) / root)
            weights = softmax(logits)
            rows.append(sum(w * self.v[j][g] for w, j in zip(weights, near + distant, strict=True)))
        return np.array(rows)
