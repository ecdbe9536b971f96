"""The block memory's attention written down from its definition: whole history, absolute positions, a loop over queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from qllm_runtime.config import MemoryConfig
from qllm_runtime.memory.base import Scoring

Rotate = Callable[[torch.Tensor, int], torch.Tensor]  # ([rows, head_dim], position) -> [rows, head_dim]


@dataclass
class Naive:
    """Feed whole segments; every feed restarts the grid of pieces."""

    config: MemoryConfig
    rotate: Rotate
    scoring: Scoring
    spans: list[tuple[int, int]] = field(default_factory=list)
    chosen: dict[int, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.q = self.k = self.v = None
        self._lse: dict[tuple[int, int], torch.Tensor] = {}
        self._turns: list[torch.Tensor] = []
        self._summaries: dict[int, torch.Tensor] = {}

    def feed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        c = self.config
        first = 0 if self.q is None else self.q.shape[1]
        self.q = q if self.q is None else torch.cat((self.q, q), 1)
        self.k = k if self.k is None else torch.cat((self.k, k), 1)
        self.v = v if self.v is None else torch.cat((self.v, v), 1)
        outs = []
        end = first
        while end < first + q.shape[1]:
            start = end
            end = start + c.exec_block_size - (start - first) % c.exec_block_size
            for lo, hi in self.spans if c.policy == "qllm" and self._count(start) else []:
                if lo <= start < hi:
                    end = start + 1
                elif start < lo < end:
                    end = lo
            end = min(end, first + q.shape[1])
            outs.append(self._piece(start, end))
        return torch.cat(outs)

    def _count(self, start: int) -> int:
        """Blocks that a piece starting here may look up."""
        return max(0, (start - self.config.n_local - self.config.n_init) // self.config.block_size)

    @property
    def _group(self) -> int:
        return self.q.shape[0] // self.k.shape[0]

    def _turn(self, distance: int) -> torch.Tensor:
        """Matrix M with q M k = <q rotated to `distance`, k rotated to 0>."""
        eye = torch.eye(self.q.shape[-1])
        while len(self._turns) <= distance:
            self._turns.append(self.rotate(eye, len(self._turns)) @ self.rotate(eye, 0).T)
        return self._turns[distance]

    def _at_distance(self, q: torch.Tensor, k: torch.Tensor, distances: Sequence[int]) -> torch.Tensor:
        """[rows, m] dot products of `q` [rows, d] with `k` [m, d], each at its own distance."""
        if not len(distances):
            return q.new_zeros(q.shape[0], 0)
        return torch.einsum("rd,mde,me->rm", q, torch.stack([self._turn(x) for x in distances]), k)

    def _weigh(self, dots: torch.Tensor) -> torch.Tensor:
        x = dots * self.scoring.scale
        return self.scoring.softcap * torch.tanh(x / self.scoring.softcap) if self.scoring.softcap else x

    def _question(self, start: int) -> tuple[int, int] | None:
        """The span in force for a piece: the last one that was complete before it."""
        if self.config.policy != "qllm":
            return None
        done = [span for span in self.spans if span[1] <= start]
        return done[-1] if done else None

    def _token_score(self, token: int) -> torch.Tensor:
        """[heads] eq. 4 (summed over the group, the same for all its heads), or the mass received, as published."""
        c, group, kv_heads = self.config, self._group, self.k.shape[0]
        scores = []
        for g in range(kv_heads):
            rows = slice(g * group, (g + 1) * group)
            if c.summary == "max":
                later = range(token + 1, token + c.n_local + 1)
                dots = [self._at_distance(self.q[rows, p], self.k[g, [token]], [p - token]) for p in later]
                scores.append(torch.stack(dots).sum().expand(group))
            else:
                seen = range(token, token + c.n_local)
                logits = [
                    self._weigh(self._at_distance(self.q[rows, p], self.k[g, [token]], [p - token])[:, 0]) for p in seen
                ]
                scores.append(sum(torch.exp(x - self._lse[g, p]) for x, p in zip(logits, seen, strict=True)))
        return torch.cat(scores)

    def _summary(self, block: int) -> torch.Tensor:
        """[heads, r, head_dim]."""
        c = self.config
        lo = c.n_init + block * c.block_size
        keys = self.k[:, lo : lo + c.block_size].repeat_interleave(self._group, 0)
        if c.summary == "mean":
            return keys.mean(1, keepdim=True)
        scores = torch.stack([self._token_score(lo + i) for i in range(c.block_size)], -1)
        top = scores.topk(c.repr_topk, -1).indices
        best = keys.gather(1, top[..., None].expand(-1, -1, keys.shape[-1]))
        return best.mean(1, keepdim=True) if c.summary == "published" else best

    def _match(self, lookup: torch.Tensor, block: int, means: bool = False, bounds: bool = False) -> torch.Tensor:
        """[heads] dot product with the best representative of the block, at the far distance.

        Or with the mean of its keys; or the largest product that keys within their bounds can have.
        """
        if block not in self._summaries:
            self._summaries[block] = self._summary(block)
        turned = lookup @ self._turn(self.config.n_local - 1)
        keys = self._summaries[block]
        if means:
            return (turned * keys.mean(1)).sum(1)
        if bounds:
            return torch.maximum(turned * keys.amax(1), turned * keys.amin(1)).sum(1)
        return torch.einsum("hd,hrd->hr", turned, keys).amax(1)

    def _far_dots(self, q: torch.Tensor, g: int, positions: list[int]) -> torch.Tensor:
        c = self.config
        if c.policy == "streaming":
            turned = self.rotate(q, c.n_init + c.n_local - 1)
            keys = [self.rotate(self.k[g, [j]], j) for j in positions]
            return turned @ torch.cat(keys).T if keys else q.new_zeros(q.shape[0], 0)
        return self._at_distance(q, self.k[g, positions], [c.n_local - 1] * len(positions))

    def _choose(self, start: int, end: int, count: int) -> torch.Tensor:
        """[kv_heads, k] blocks."""
        c, kv_heads = self.config, self.k.shape[0]
        span = self._question(start)

        def scores(lookup: torch.Tensor, **how: bool) -> torch.Tensor:
            """[kv_heads, count]."""
            found = torch.stack([self._match(lookup, block, **how) for block in range(count)], -1)
            per_kv = found.view(kv_heads, -1, count).sum(1)
            return per_kv.sum(0, keepdim=True).expand(kv_heads, -1) if c.selection == "shared" else per_kv

        def level(x: torch.Tensor) -> torch.Tensor:
            spread = x.std(-1, keepdim=True, correction=0)
            return torch.where(spread > 0, (x - x.mean(-1, keepdim=True)) / spread, 0)

        asked = torch.zeros(kv_heads, count)
        guided = span is not None and c.query_weight > 0
        if guided:
            asked = c.query_weight * level(torch.stack([scores(self.q[:, t]) for t in range(*span)]).sum(0))

        def total(current: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
            """Current tokens' scores of some blocks [kv_heads, n] and the question's together."""
            return level(current) + asked.gather(1, blocks) if guided else current

        lookup, every_key = self.q[:, start:end].mean(1), c.summary == "max" and c.repr_topk == c.block_size
        blocks = torch.arange(count).expand(kv_heads, -1)
        if every_key and end == start + 1 and not (c.policy == "qllm" and self._asks(start)):
            # candidates first: all there are, if they are few
            rough = total(scores(lookup, bounds=True), blocks)
            blocks = rough.topk(min(4 * c.topk, count), -1).indices.sort(-1).values
        current = scores(lookup, means=every_key and end > start + 1).gather(1, blocks)
        best = total(current, blocks).topk(min(c.topk, count), -1).indices
        return blocks.gather(1, best).sort(-1).values

    def _asks(self, token: int) -> bool:
        return any(lo <= token < hi for lo, hi in self.spans)

    def _piece(self, start: int, end: int) -> torch.Tensor:
        c, group = self.config, self._group
        heads, kv_heads = self.q.shape[0], self.k.shape[0]
        count = self._count(start)
        oldest = c.n_init + count * c.block_size if count else 0
        far: list[set[int]] = [set(range(c.n_init)) if count else set() for _ in range(kv_heads)]
        if count and c.uses_blocks:
            span = self._question(start)
            self.chosen[start] = self._choose(start, end, count)
            for g in range(kv_heads):
                for block in self.chosen[start][g].tolist():
                    lo = c.n_init + block * c.block_size
                    far[g] |= set(range(lo, lo + c.block_size))
                if span is not None:
                    far[g] |= {t for t in range(*span) if t < oldest}
        out = torch.zeros(end - start, heads, self.v.shape[-1])
        for p in range(start, end):
            near = list(range(oldest, p + 1))
            for g in range(kv_heads):
                rows = slice(g * group, (g + 1) * group)
                q = self.q[rows, p]
                distant = sorted(far[g])
                logits = [self._at_distance(q, self.k[g, near], [p - j for j in near]), self._far_dots(q, g, distant)]
                x = self._weigh(torch.cat(logits, 1))
                if self.scoring.sinks is not None:
                    x = torch.cat((x, self.scoring.sinks[rows, None]), 1)
                self._lse[g, p] = x.logsumexp(1)
                out[p - start, rows] = torch.softmax(x, 1)[:, : len(near) + len(distant)] @ self.v[g, near + distant]
        return out
