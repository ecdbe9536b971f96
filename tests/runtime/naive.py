"""The block memory's attention written down from its definition: whole history, absolute positions, a loop over queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from qllm_runtime.config import MemoryConfig
from qllm_runtime.memory.base import Scoring

Rotate = Callable[[torch.Tensor, int], torch.Tensor]  # ([heads, head_dim], position) -> [heads, head_dim]


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

    def feed(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        c = self.config
        first = 0 if self.q is None else self.q.shape[1]
        self.q = q if self.q is None else torch.cat((self.q, q), 1)
        self.k = k if self.k is None else torch.cat((self.k, k), 1)
        self.v = v if self.v is None else torch.cat((self.v, v), 1)
        outs = []
        for start in range(first, first + q.shape[1], c.exec_block_size):
            end = min(start + c.exec_block_size, first + q.shape[1])
            outs.append(self._piece(start, end))
        return torch.cat(outs)

    def _question(self, start: int) -> tuple[int, int] | None:
        """The span in force for a piece: the last one that was complete before it."""
        if self.config.policy != "qllm":
            return None
        done = [span for span in self.spans if span[1] <= start]
        return done[-1] if done else None

    def _summary(self, block: int) -> torch.Tensor:
        """[heads, r, head_dim]."""
        c, group = self.config, self.q.shape[0] // self.k.shape[0]
        lo = c.n_init + block * c.block_size
        keys = self.k[:, lo : lo + c.block_size].repeat_interleave(group, 0)
        if c.summary == "mean":
            return keys.mean(1, keepdim=True)
        scores = torch.zeros(self.k.shape[0], c.block_size)
        for i in range(c.block_size):
            token = lo + i
            for j in range(1, c.n_local + 1):
                turned = self.rotate(self.q[:, token + j], j).view(self.k.shape[0], group, -1).sum(1)
                scores[:, i] += (turned * self.rotate(self.k[:, token], 0)).sum(-1)
        top = scores.topk(c.repr_topk, -1).indices.repeat_interleave(group, 0)
        return keys.gather(1, top[..., None].expand(-1, -1, keys.shape[-1]))

    def _best_match(self, turned: torch.Tensor, block: int) -> torch.Tensor:
        """[heads] dot product with the best representative of the block."""
        return torch.stack([(turned * self.rotate(r, 0)).sum(-1) for r in self._summary(block).unbind(1)]).amax(0)

    def _far_logit(self, q: torch.Tensor, k: torch.Tensor, position: int) -> torch.Tensor:
        c = self.config
        if c.policy == "streaming":
            return (self.rotate(q, c.n_init + c.n_local - 1) * self.rotate(k, position)).sum(-1)
        return (self.rotate(q, c.n_local - 1) * self.rotate(k, 0)).sum(-1)

    def _piece(self, start: int, end: int) -> torch.Tensor:
        c = self.config
        heads, kv_heads = self.q.shape[0], self.k.shape[0]
        group = heads // kv_heads
        count = max(0, (start - c.n_local - c.n_init) // c.block_size)
        oldest = c.n_init + count * c.block_size if count else 0
        far: list[set[int]] = [set(range(c.n_init)) if count else set() for _ in range(kv_heads)]
        if count and c.uses_blocks:
            span = self._question(start)
            lookup = self.q[:, start:end].mean(1)
            if span is not None:
                lookup = lookup + c.query_weight * self.q[:, span[0] : span[1]].mean(1)
            turned = self.rotate(lookup, c.n_local - 1)
            scores = torch.stack([self._best_match(turned, block) for block in range(count)], -1)
            per_kv = scores.view(kv_heads, group, count).sum(1)
            if c.selection == "shared":
                per_kv = per_kv.sum(0, keepdim=True).expand(kv_heads, -1)
            self.chosen[start] = per_kv.topk(min(c.topk, count), -1).indices.sort(-1).values
            for g in range(kv_heads):
                for block in self.chosen[start][g].tolist():
                    lo = c.n_init + block * c.block_size
                    far[g] |= set(range(lo, lo + c.block_size))
                if span is not None:
                    far[g] |= {t for t in range(*span) if t < oldest}
        out = torch.zeros(end - start, heads, self.v.shape[-1])
        for p in range(start, end):
            for h in range(heads):
                g = h // group
                q = self.q[h : h + 1, p]
                near = range(oldest, p + 1)
                logits = [(self.rotate(q, p - j) * self.rotate(self.k[g : g + 1, j], 0)).sum() for j in near]
                distant = sorted(far[g])
                logits += [self._far_logit(q, self.k[g : g + 1, j], j).sum() for j in distant]
                x = torch.stack(logits) * self.scoring.scale
                if self.scoring.softcap:
                    x = self.scoring.softcap * torch.tanh(x / self.scoring.softcap)
                if self.scoring.sinks is not None:
                    x = torch.cat((x, self.scoring.sinks[h : h + 1]))
                weights = torch.softmax(x, 0)[: len(near) + len(distant)]
                out[p - start, h] = weights @ self.v[g, [*near, *distant]]
        return out
