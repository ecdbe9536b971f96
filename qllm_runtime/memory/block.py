"""The block memory: initial tokens, pinned question, looked-up blocks and local window under one softmax (paper eq. 2).

A query attends to

* its window: at least `n_local` preceding tokens at their true distance, from a block boundary on;
* once blocks have left the window: the initial tokens, the question's tokens (pinned) and the `topk` blocks its piece
  looked up, all at the single distance `n_local - 1`.

Every token is counted once. Pieces of `exec_block_size` queries share a lookup; a block is eligible for a piece when all of
it lies at least `n_local` tokens before the piece, so results do not depend on where a text is cut between pieces.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Self

import torch

from qllm_kernels.attention import apply_sinks, attend, merge, segment_logits
from qllm_kernels.select import block_scores, select_blocks
from qllm_runtime.config import MemoryConfig
from qllm_runtime.errors import InvalidRequestError
from qllm_runtime.memory.base import LayerMemory, Rotation, Scoring
from qllm_runtime.memory.query import PinnedQuery
from qllm_runtime.memory.record import Lookup
from qllm_runtime.memory.store import BlockStore
from qllm_runtime.memory.window import Window

_TILE = 128


class BlockMemory(LayerMemory):
    """Memory of the policies qllm, infllm, streaming and lm-infinite.

    Args:
        config: Sizes and policy.
        rotation: The layer's rotary embedding.
        reserve: Tokens expected; sizes the pages.
    """

    def __init__(self, config: MemoryConfig, rotation: Rotation, reserve: int = 0) -> None:
        self.config = config
        self._rotation = rotation
        self._store = BlockStore(reserve=reserve // config.block_size)
        self._n_blocks = 0  # blocks that left the window; those of streaming policies are not kept
        self._window = Window(config, rotation)
        self._query = PinnedQuery()
        self._initial: tuple[torch.Tensor, torch.Tensor] | None = None
        self._far_map: torch.Tensor | None = None
        self._biases: dict[tuple[int, int, int], torch.Tensor] = {}

    def set_query(self, start: int, end: int) -> None:
        if start < self.n_seen or end <= start:
            raise InvalidRequestError(f"Query span ({start}, {end}) must be a non-empty span of tokens that were not read yet.")
        if self.config.policy == "qllm":
            self._query.announce(start, end)

    def append(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        n = query.shape[1]
        outs = []
        done = 0
        while done < n:
            size = self._launch_size(n - done)
            rows = slice(done, done + size)
            launch = self._step if size == 1 else self._launch
            outs.append(launch(query[:, rows], key[:, rows], value[:, rows], scoring))
            done += size
        return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)).transpose(0, 1)

    def _launch_size(self, left: int) -> int:
        """Tokens of the next launch: whole pieces, none after the piece in which a question becomes complete."""
        size = min(left, self._window.launch_size)
        complete = self._query.completes_at(self.n_seen, size)
        if complete is not None:
            piece = self.config.exec_block_size
            size = min(size, -(-complete // piece) * piece)
        return size

    # -------------------------------------------------------------- what is where

    def _eligible(self, start: int) -> int:
        """Blocks that a piece starting at `start` may look up."""
        config = self.config
        return max(0, (start - config.n_local - config.n_init) // config.block_size)

    def _oldest(self, n_eligible: int) -> int:
        """Absolute index of the oldest token in the window of a piece with so many eligible blocks."""
        return self.config.n_init + n_eligible * self.config.block_size if n_eligible else 0

    def _evict(self, n_eligible: int, scoring: Scoring) -> None:
        """Turn the tokens of newly eligible blocks into pages."""
        new = n_eligible - self._n_blocks
        if new <= 0:
            return
        start = self.config.n_init + self._n_blocks * self.config.block_size
        self._n_blocks = n_eligible
        if self.config.uses_blocks:
            self._store.append(*self._window.blocks(start, new, scoring))

    def _admit(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """Write new tokens to the window; returns their queries rotated for it."""
        first = self.n_seen
        ready = self._eligible(first)
        self._evict(ready, scoring)
        if first < self.config.n_init:
            self._keep_initial(first, key, value)
        near = self._window.append(query, key, value, self._oldest(ready))
        self.n_seen += query.shape[1]
        return near

    def _keep_initial(self, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        rows = slice(0, self.config.n_init - first)
        key = key[:, rows]
        # StreamingLLM keeps initial tokens at positions 0, 1, ...; elsewhere far keys stay un-rotated
        key = self._rotation.rotate(key, first) if self.config.policy == "streaming" else key.clone()
        new = (key, value[:, rows].clone())
        if self._initial is not None:
            new = (torch.cat((self._initial[0], new[0]), 1), torch.cat((self._initial[1], new[1]), 1))
        self._initial = new

    def _far(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate queries [..., head_dim] to the far distance, such that un-rotated keys can be multiplied."""
        if self._far_map is None:
            config = self.config
            eye = torch.eye(x.shape[-1], device=x.device)[None]
            if config.policy == "streaming":
                self._far_map = self._rotation.rotate_all(eye, config.n_init + config.n_local - 1)[0]
            else:
                # position 0 of a key may still scale it (yarn, longrope), so that factor belongs to the query
                at_zero = self._rotation.rotate_all(eye, 0)[0]
                self._far_map = self._rotation.rotate_all(eye, config.n_local - 1)[0] @ at_zero.T
        return (x.float() @ self._far_map).to(x.dtype)

    # -------------------------------------------------------------- lookup

    def _look_up(self, lookup: torch.Tensor, starts: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose blocks for pieces.

        Args:
            lookup: [pieces, heads, head_dim] fp32, mean un-rotated query of each piece.
            starts: Absolute index of each piece's first token.
            length: Tokens per piece, for the record.

        Returns:
            ids [pieces, scopes, k] ascending and valid [pieces, scopes, k].
        """
        config = self.config
        vector = self._query.vector
        if vector is not None and config.query_weight:
            lookup = lookup + config.query_weight * vector
        counts = [self._eligible(start) for start in starts]
        summaries = self._store.summaries()[:, : counts[-1]]
        scores = block_scores(self._far(lookup), summaries, per_kv_head=config.selection == "per_kv_head")
        ids, valid = select_blocks(scores, torch.tensor(counts, device=scores.device), config.topk)
        if self.on_lookup is not None:
            for piece, (start, count) in enumerate(zip(starts, counts, strict=True)):
                chosen = ids[piece, :, : min(config.topk, count)]
                seen = scores[piece, :, :count]
                shared = config.selection == "shared"
                self.on_lookup(Lookup(start, length, count, chosen[0] if shared else chosen, seen[0] if shared else seen))
        return ids, valid

    def _far_segment(
        self, lookup: torch.Tensor, starts: list[int], length: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Everything outside the window that the pieces see.

        Returns:
            keys [kv_heads, pieces, m, head_dim], values, bias [pieces, scopes, 1, m] or None, and the chosen ids or None.
        """
        config = self.config
        pieces = len(starts)
        keys, values, hidden = [], [], []
        if self._initial is not None:
            for part, x in zip((keys, values), self._initial, strict=True):
                part.append(x[:, None].expand(-1, pieces, -1, -1))
            hidden.append(None)
        ids = valid = None
        if config.uses_blocks:
            ids, valid = self._look_up(lookup, starts, length)
            scopes, k = ids.shape[1:]
            rows = ids.transpose(0, 1).reshape(scopes, pieces * k)
            for part, x in zip((keys, values), self._store.gather(rows), strict=True):
                part.append(x.reshape(x.shape[0], pieces, k * config.block_size, x.shape[-1]))
            some_missing = self._eligible(starts[0]) < k
            hidden.append(~valid.repeat_interleave(config.block_size, dim=-1) if some_missing else None)
            if self._query.vector is not None and len(self._query.positions):
                keys.append(self._query.key[:, None].expand(-1, pieces, -1, -1))
                values.append(self._query.value[:, None].expand(-1, pieces, -1, -1))
                hidden.append(self._question_hidden(ids, starts))
        key, value = torch.cat(keys, 2), torch.cat(values, 2)
        if all(part is None for part in hidden):
            return key, value, None, ids
        scopes = 1 if ids is None else ids.shape[1]
        bias = key.new_zeros(pieces, scopes, 1, key.shape[2])
        lo = 0
        for part, x in zip(hidden, keys, strict=True):
            if part is not None:
                bias[:, :, 0, lo : lo + x.shape[2]].masked_fill_(part, float("-inf"))
            lo += x.shape[2]
        return key, value, bias, ids

    def _question_hidden(self, ids: torch.Tensor, starts: list[int]) -> torch.Tensor:
        """Where the pinned copy of a question token would be its second appearance: [pieces, scopes, tokens]."""
        positions = self._query.positions
        oldest = torch.tensor([self._oldest(self._eligible(start)) for start in starts], device=ids.device)
        block = torch.div(positions - self.config.n_init, self.config.block_size, rounding_mode="floor")
        in_window = (positions >= oldest[:, None])[:, None]
        return in_window | (ids[..., None] == block).any(dim=2)

    # -------------------------------------------------------------- attention of many pieces

    def _launch(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """Attention of one run of pieces (the last may be short): [heads, n, value_dim]."""
        first, n = self.n_seen, query.shape[1]
        near = self._admit(query, key, value, scoring)
        self._evict(self._eligible(first + (n - 1) // self.config.exec_block_size * self.config.exec_block_size), scoring)
        outs = []
        for starts, length in self._batches(first, n):
            rows = slice(starts[0] - first, starts[-1] - first + length)
            out, lse = self._local(near[:, rows], starts, length, scoring)
            if self._eligible(starts[0]) and (self._initial is not None or self.config.uses_blocks):
                out, lse = merge(self._outside(query[:, rows], starts, length, scoring), (out, lse))
            self._window.note_lse(starts[0], lse)
            outs.append(out if scoring.sinks is None else apply_sinks(out, lse, scoring.sinks))
        self._query.capture(first, query, key, value, self.config.n_init)
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    def _batches(self, first: int, n: int) -> Iterator[tuple[list[int], int]]:
        """Runs of equally long pieces whose windows begin equally far before them: (starts, length)."""
        piece = self.config.exec_block_size
        run: list[int] = []
        reach = None
        for start in range(first, first + n, piece):
            length = min(piece, first + n - start)
            count = self._eligible(start)
            back = (count > 0, start - self._oldest(count))
            if run and (back != reach or length < piece):
                yield run, piece
                run = []
            if length < piece:
                yield [start], length
                return
            run.append(start)
            reach = back
        if run:
            yield run, piece

    def _local(
        self, near: torch.Tensor, starts: list[int], length: int, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention to the window: output [heads, rows, value_dim] and log-sum-exp [heads, rows]."""
        window = self._window
        kv_heads = window.key.shape[0]
        pieces, heads, dim = len(starts), near.shape[0], near.shape[-1]
        group = heads // kv_heads
        oldest = self._oldest(self._eligible(starts[0]))
        back, slot = starts[0] - oldest, oldest - window.base
        queries = near.view(kv_heads, group, pieces, length, dim).permute(2, 0, 1, 3, 4)
        outs, lses = [], []
        for row in range(0, length, _TILE):
            size = min(_TILE, length - row)
            span = back + row + size

            def tiles(x: torch.Tensor, span: int = span) -> torch.Tensor:
                width = x.shape[-1]
                # overlapping views, one per piece; nothing is copied
                return x.as_strided(
                    (pieces, kv_heads, span, width), (length * width, x.stride(0), width, 1), slot * width
                )

            out, lse = attend(
                queries[:, :, :, row : row + size].reshape(pieces, kv_heads, group * size, dim),
                tiles(window.key),
                tiles(window.value),
                scale=scoring.scale,
                bias=self._causal_bias(group, size, span, near),
                softcap=scoring.softcap,
            )
            outs.append(out.reshape(pieces, kv_heads, group, size, -1))
            lses.append(lse.reshape(pieces, kv_heads, group, size))
        out = (outs[0] if len(outs) == 1 else torch.cat(outs, 3)).permute(1, 2, 0, 3, 4)
        lse = (lses[0] if len(lses) == 1 else torch.cat(lses, 3)).permute(1, 2, 0, 3)
        return out.reshape(heads, pieces * length, -1), lse.reshape(heads, pieces * length)

    def _causal_bias(self, group: int, size: int, span: int, like: torch.Tensor) -> torch.Tensor:
        """[group * size, span]: the last `size` keys are the queries' own tokens."""
        if (group, size, span) not in self._biases:
            if len(self._biases) > 8:
                self._biases.clear()
            later = torch.ones(size, span, dtype=torch.bool, device=like.device).triu(span - size + 1)
            bias = torch.zeros(size, span, dtype=like.dtype, device=like.device).masked_fill_(later, float("-inf"))
            self._biases[group, size, span] = bias.repeat(group, 1)
        return self._biases[group, size, span]

    def _outside(
        self, query: torch.Tensor, starts: list[int], length: int, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention to everything outside the window: output [heads, rows, value_dim] and log-sum-exp [heads, rows]."""
        heads, rows, dim = query.shape
        pieces = len(starts)
        means = query.reshape(heads, pieces, length, dim).float().mean(2).transpose(0, 1)
        key, value, bias, _ = self._far_segment(means, starts, length)
        kv_heads = key.shape[0]
        group = heads // kv_heads
        far = self._far(query).view(kv_heads, group, pieces, length, dim).permute(2, 0, 1, 3, 4)
        out, lse = attend(
            far.reshape(pieces, kv_heads, group * length, dim),
            key.transpose(0, 1),
            value.transpose(0, 1),
            scale=scoring.scale,
            bias=bias,
            softcap=scoring.softcap,
        )
        out = out.reshape(pieces, kv_heads, group, length, -1).permute(1, 2, 0, 3, 4)
        lse = lse.reshape(pieces, kv_heads, group, length).permute(1, 2, 0, 3)
        return out.reshape(heads, rows, -1), lse.reshape(heads, rows)

    # -------------------------------------------------------------- attention of one token

    def _step(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """Attention of a single token: [heads, 1, value_dim]. Its weights are at hand, so they can be recorded."""
        first = self.n_seen
        near = self._admit(query, key, value, scoring)
        window = self._window
        kv_heads = key.shape[0]
        heads, _, dim = query.shape
        count = self._eligible(first)
        oldest = self._oldest(count)
        rows = slice(oldest - window.base, window.used)
        logits = segment_logits(
            near.view(kv_heads, -1, dim), window.key[:, rows], scale=scoring.scale, softcap=scoring.softcap
        )
        values = window.value[:, rows]
        ids = None
        n_far = 0
        if count and (self._initial is not None or self.config.uses_blocks):
            far_key, far_value, bias, ids = self._far_segment(query.float().transpose(0, 1), [first], 1)
            n_far = far_key.shape[2]
            far = self._far(query).view(kv_heads, -1, dim)
            far_logits = segment_logits(far, far_key[:, 0], scale=scoring.scale, softcap=scoring.softcap)
            if bias is not None:
                far_logits = far_logits + bias[0]
            logits = torch.cat((far_logits, logits), -1)
        if scoring.sinks is not None:
            logits = torch.cat((logits, scoring.sinks.float().view(kv_heads, -1, 1)), -1)
        weights = torch.softmax(logits, -1)
        if scoring.sinks is not None:
            weights = weights[..., :-1]
        if self.on_weights is not None:
            self.on_weights(weights.sum(1), self._positions(ids, oldest, kv_heads))
        weights = weights.to(values.dtype)
        out = weights[..., n_far:] @ values
        if n_far:
            out = out + weights[..., :n_far] @ far_value[:, 0]
        self._window.note_lse(first, torch.logsumexp(logits, -1).view(heads, 1))
        self._query.capture(first, query, key, value, self.config.n_init)
        return out.view(heads, 1, -1)

    def _positions(self, ids: torch.Tensor | None, oldest: int, kv_heads: int) -> torch.Tensor:
        """Absolute index of every key of a step, in the order of its weights: [kv_heads, m]."""
        device = self._window.key.device
        parts = []
        if oldest and self._initial is not None:
            parts.append(torch.arange(self._initial[0].shape[1], device=device).expand(kv_heads, -1))
        if ids is not None:
            size = self.config.block_size
            spread = ids[0, :, :, None] * size + self.config.n_init + torch.arange(size, device=device)
            parts.append(spread.flatten(1).expand(kv_heads, -1))
            if self._query.vector is not None and len(self._query.positions):
                parts.append(self._query.positions.expand(kv_heads, -1))
        parts.append(torch.arange(oldest, self.n_seen, device=device).expand(kv_heads, -1))
        return torch.cat(parts, 1)

    # -------------------------------------------------------------- life

    def fork(self) -> Self:
        child = copy.copy(self)
        child._store = self._store.fork()
        child._window = self._window.fork()
        child._query = self._query.fork()
        child.on_lookup = child.on_weights = None
        return child

    def nbytes(self) -> int:
        pinned = [] if self._initial is None else list(self._initial)
        return self._store.nbytes() + self._window.nbytes() + sum(x.nbytes for x in pinned)
