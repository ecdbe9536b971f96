"""What lies outside the local window: initial tokens, pinned question and the blocks that are looked up."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from qllm_kernels.select import block_scores, select_blocks
from qllm_runtime.config import MemoryConfig
from qllm_runtime.memory.base import Rotation
from qllm_runtime.memory.query import PinnedQuery
from qllm_runtime.memory.record import Lookup, LookupHook
from qllm_runtime.memory.store import BlockStore


@dataclass(frozen=True)
class Part:
    """One kind of far keys.

    Attributes:
        key, value: [kv_heads, pieces or 1, m, head_dim].
        hidden: True where a key is not seen, [pieces, scopes, m]; None when all are.
        positions: Absolute indices [scopes, m] for a single piece.
    """

    key: torch.Tensor
    value: torch.Tensor
    hidden: torch.Tensor | None
    positions: Callable[[], torch.Tensor]


class Outside:
    """Far keys of one layer. All of them are seen at the single distance `n_local - 1`, un-rotated.

    Args:
        config: Sizes and policy.
        rotation: The layer's rotary embedding.
        reserve: Blocks expected.
    """

    def __init__(self, config: MemoryConfig, rotation: Rotation, reserve: int) -> None:
        self._config = config
        self._rotation = rotation
        self.store = BlockStore(reserve=reserve)
        self.query = PinnedQuery()
        self._initial: tuple[torch.Tensor, torch.Tensor] | None = None
        self._far_map: torch.Tensor | None = None
        self._fetched: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._guide: tuple[torch.Tensor, torch.Tensor] | None = None  # a question's vector and its far, weighted form

    @property
    def empty(self) -> bool:
        """Whether nothing can be seen here, now or later."""
        return self._config.n_init == 0 and not self._config.uses_blocks

    def keep_initial(self, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep the initial tokens among tokens first, first + 1, ... ([kv_heads, n, head_dim])."""
        if first >= self._config.n_init:
            return
        rows = slice(0, self._config.n_init - first)
        key = key[:, rows]
        # StreamingLLM keeps initial tokens at positions 0, 1, ...; elsewhere far keys stay un-rotated
        key = self._rotation.rotate(key, first) if self._config.policy == "streaming" else key.clone()
        new = (key, value[:, rows].clone())
        if self._initial is not None:
            new = (torch.cat((self._initial[0], new[0]), 1), torch.cat((self._initial[1], new[1]), 1))
        self._initial = new

    def far(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate queries [..., head_dim] to the far distance, such that un-rotated keys can be multiplied."""
        if self._far_map is None:
            config = self._config
            eye = torch.eye(x.shape[-1], device=x.device)[None]
            if config.policy == "streaming":
                self._far_map = self._rotation.rotate_all(eye, config.n_init + config.n_local - 1)[0]
            else:
                # position 0 of a key may still scale it (yarn, longrope), so that factor belongs to the query
                at_zero = self._rotation.rotate_all(eye, 0)[0]
                self._far_map = self._rotation.rotate_all(eye, config.n_local - 1)[0] @ at_zero.T
        return (x.float() @ self._far_map).to(x.dtype)

    def look_up(
        self, lookup: torch.Tensor, counts: Sequence[int], starts: Sequence[int], length: int, hook: LookupHook | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Choose blocks for pieces.

        Args:
            lookup: [pieces, heads, head_dim] fp32, each piece's mean query in far form.
            counts: Eligible blocks of each piece, ascending.
            starts, length: The pieces' first tokens and common length, for the record.
            hook: Gets the record of each lookup.

        Returns:
            ids [pieces, scopes, k] ascending, and valid [pieces, scopes, k] or None when all are.
        """
        config = self._config
        vector = self.query.vector
        if vector is not None and config.query_weight:
            if self._guide is None or self._guide[0] is not vector:
                self._guide = (vector, config.query_weight * self.far(vector))
            lookup = lookup + self._guide[1]
        summaries = self.store.summaries()[:, :, : counts[-1]]
        scores = block_scores(lookup, summaries, per_kv_head=config.selection == "per_kv_head")
        valid = None
        if counts[0] == counts[-1]:
            ids = scores.topk(min(config.topk, counts[0]), dim=-1).indices.sort(dim=-1).values
        else:
            ids, valid = select_blocks(scores, torch.tensor(counts, device=scores.device), config.topk)
            if counts[0] >= config.topk:
                valid = None
        if hook is not None:
            shared = config.selection == "shared"
            for piece, (start, count) in enumerate(zip(starts, counts, strict=True)):
                chosen, seen = ids[piece, :, : min(config.topk, count)], scores[piece, :, :count]
                hook(Lookup(start, length, count, chosen[0] if shared else chosen, seen[0] if shared else seen))
        return ids, valid

    def parts(
        self,
        lookup: torch.Tensor,
        counts: Sequence[int],
        oldest: Sequence[int],
        starts: Sequence[int],
        length: int,
        hook: LookupHook | None,
    ) -> list[Part]:
        """All far keys that pieces see; `oldest` is the first token of each piece's window, the rest as in `look_up`."""
        config = self._config
        parts: list[Part] = []
        if self._initial is not None:
            key, value = self._initial
            parts.append(Part(key[:, None], value[:, None], None, lambda: torch.arange(key.shape[1], device=key.device)[None]))
        if not config.uses_blocks:
            return parts
        ids, valid = self.look_up(lookup, counts, starts, length, hook)
        pieces, scopes, k = ids.shape
        size = config.block_size
        block_key, block_value = self._fetch(ids)

        def block_positions() -> torch.Tensor:
            return (ids[0, :, :, None] * size + config.n_init + torch.arange(size, device=ids.device)).flatten(1)

        missing = None if valid is None else ~valid.repeat_interleave(size, dim=-1)
        parts.append(Part(block_key, block_value, missing, block_positions))
        query = self.query
        if query.vector is not None and len(query.positions):
            hidden = self._question_hidden(ids, oldest)
            parts.append(Part(query.key[:, None], query.value[:, None], hidden, lambda: query.positions[None]))
        return parts

    def _fetch(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [kv_heads, pieces, k * block_size, head_dim] of chosen blocks [pieces, scopes, k]."""
        pieces, scopes, k = ids.shape
        single = pieces == 1 and ids.device.type == "cpu"
        if single and self._fetched is not None and torch.equal(self._fetched[0], ids):
            return self._fetched[1], self._fetched[2]
        gathered = self.store.gather(ids.transpose(0, 1).reshape(scopes, pieces * k))
        size = k * self._config.block_size
        key, value = (x.reshape(x.shape[0], pieces, size, x.shape[-1]) for x in gathered)
        # one token after another mostly looks up the same blocks
        self._fetched = (ids, key, value) if single else None
        return key, value

    def _question_hidden(self, ids: torch.Tensor, oldest: Sequence[int]) -> torch.Tensor:
        """Where the pinned copy of a question token would be its second appearance: [pieces, scopes, tokens]."""
        positions = self.query.positions
        block = torch.div(positions - self._config.n_init, self._config.block_size, rounding_mode="floor")
        hidden = (ids[..., None] == block).any(dim=2)
        if self.query.end > min(oldest):
            in_window = positions >= torch.tensor(oldest, device=ids.device)[:, None]
            hidden = hidden | in_window[:, None]
        return hidden

    def fork(self) -> Self:
        """An independent continuation that shares initial tokens and blocks."""
        child = copy.copy(self)
        child.store = self.store.fork()
        child.query = self.query.fork()
        return child

    def nbytes(self) -> int:
        """Bytes of pages and initial tokens."""
        return self.store.nbytes() + (0 if self._initial is None else sum(x.nbytes for x in self._initial))
