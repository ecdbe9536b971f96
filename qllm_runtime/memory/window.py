"""The local window of one layer: recent keys, raw and rotated, in buffers that are allocated once."""

from __future__ import annotations

import copy
from typing import Self

import torch

from qllm_kernels.dispatch import backend, linear_top_keys, mean_keys, published_means, query_prefix, rotate_append
from qllm_kernels.rotary import Arrival, Destination
from qllm_runtime.config import MemoryConfig
from qllm_runtime.memory.base import Rotation, Scoring, State, Tables


class Window:
    """Keys and values from the oldest visible token on.

    A key is stored raw (that is how it becomes part of a block) and rotated to its slot. Only differences of positions
    matter, so slots serve as positions until the buffer is full; then what is still visible moves to the front and is
    rotated anew, once in `launch_size` tokens at the most.

    A fork shares the buffers until either side takes in tokens; that side then copies what is still visible to buffers
    that fit what it takes in.

    Args:
        config: Sizes.
        rotation: The layer's rotary embedding.

    Attributes:
        base: Absolute index of the token in slot 0.
        used: Slots filled.
        launch_size: Most tokens one launch may bring: whole pieces.
        weighs_tokens: Summaries need the attention mass of tokens, hence `note_lse`.
        key, key_raw: [kv_heads, slots, head_dim] rotated and un-rotated keys.
        value: [kv_heads, slots, value_dim].
        tables: What tokens are rotated by as they are written; None: by the rotation's own function, ahead of it.
    """

    def __init__(self, config: MemoryConfig, rotation: Rotation) -> None:
        self._config = config
        self._rotation = rotation
        self.base = self.used = 0
        piece = config.exec_block_size
        held = config.n_init + config.n_local + config.block_size
        room = max(config.chunk_size, piece)
        if rotation.original_max_position_embeddings is not None:
            room = min(room, max(rotation.original_max_position_embeddings - held, piece))
        self._ranks_tokens = config.uses_blocks and config.summary == "max" and not config.every_key
        self.weighs_tokens = config.uses_blocks and config.summary == "published"
        self.launch_size = piece if self.weighs_tokens else room // piece * piece
        self._held = held  # most slots that stay visible
        self._frozen = False  # the buffers are shared with a fork
        self.key = self.key_raw = self.value = torch.empty(0, 0)
        self._query = torch.empty(
            0, 0
        )  # un-rotated: per kv head the sum over its group, or per head for attention mass
        self._lse = torch.empty(0, 0)
        self.tables: Tables | None = None

    def append(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, oldest: int) -> torch.Tensor:
        """Take in n tokens.

        Args:
            query: [heads, n, head_dim], un-rotated.
            key, value: [kv_heads, n, head_dim].
            oldest: Absolute index of the oldest token that is still needed.

        Returns:
            The queries rotated to their slots.
        """
        kv_heads, n, dim = key.shape
        if self._lacks(n):
            self._make_room(n, query, key, value, oldest - self.base)
        new = slice(self.used, self.used + n)
        if self.tables is not None:
            near = self.place(query, key, value, torch.arange(new.start, new.stop, device=key.device))
            self.used += n
            return near
        near, rotated = self._rotation.rotate_pair(query, key, self.used)
        self.key[:, new] = rotated
        self.key_raw[:, new] = key
        self.value[:, new] = value
        if self._ranks_tokens:
            self._query[:, new] = query.reshape(kv_heads, -1, n, dim).sum(1)
        elif self.weighs_tokens:
            self._query[:, new] = query
        self.used += n
        return near

    def place(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Write n tokens to `slots`, [n] int64 on the device, and return their rotated queries; the host counts nothing."""
        near, _ = rotate_append(self.arrival(query, key, value, slots))
        self.place_query(slots, query)
        return near

    def arrival(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> Arrival:
        """What `rotate_append` takes to write these tokens to `slots`."""
        assert self.tables is not None
        rotated, raw = Destination(self.key, self.value, slots), Destination(self.key_raw, None, slots)
        cos, sin, interleaved = self.tables
        return Arrival(query, key, value, cos, sin, slots, rotated, raw, interleaved)

    def place_query(self, slots: torch.Tensor, query: torch.Tensor) -> None:
        """Remember the queries of tokens in `slots`, if summaries need them."""
        if self._ranks_tokens:
            heads, n, dim = query.shape
            kv_heads = self._query.shape[0]
            self._query.index_copy_(1, slots, query.reshape(kv_heads, heads // kv_heads, n, dim).sum(1))
        elif self.weighs_tokens:
            self._query.index_copy_(1, slots, query)

    def make_room(self, oldest: int) -> None:
        """Have a slot for one more token; absolute index `oldest` and what follows stays. There was a token before."""
        if self._lacks(1):
            self._make_room(1, self._query, self.key_raw, self.value, oldest - self.base)

    def _lacks(self, n: int) -> bool:
        return self._frozen or self.used + n > self.key.shape[1]

    def _make_room(self, n: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, oldest: int) -> None:
        """Move the slots from `oldest` on to the front, in buffers that take n more tokens."""
        kept = slice(oldest, self.used)
        n_kept = self.used - oldest
        self.base += oldest
        self.used = n_kept
        if not self._frozen and n_kept + n <= self.key.shape[1]:
            for buffer in (self.key_raw, self.value, self._query, self._lse):
                if buffer.numel():
                    buffer[:, :n_kept] = buffer[:, kept].clone()
        else:
            # token by token, moving once in a while is enough
            capacity = self._held + min(self.launch_size, max(n, self._held // 4))
            self.key_raw = _grown(self.key_raw, key, kept, capacity)
            self.value = _grown(self.value, value, kept, capacity)
            if self._ranks_tokens:
                self._query = _grown(self._query, key, kept, capacity)
            if self.weighs_tokens:
                self._query = _grown(self._query, query, kept, capacity)
                self._lse = _grown(self._lse, query[:, :, 0].float(), kept, capacity)
            self.key = torch.empty_like(self.key_raw)
            self._frozen = False
            if backend(key.device) == "triton":
                self.tables = self._rotation.tables(capacity, key.device)
                # torch functions that stand in for a kernel look at all slots
                self.key[:, n_kept:] = self.value[:, n_kept:] = 0
        if n_kept:
            self.key[:, :n_kept] = self._rotation.rotate(self.key_raw[:, :n_kept], 0)

    def note_lse(self, start: int, lse: torch.Tensor) -> None:
        """Remember the log-sum-exp [heads, n] of the queries from absolute index `start` on, if summaries need it."""
        if self.weighs_tokens:
            slot = start - self.base
            self._lse[:, slot : slot + lse.shape[1]] = lse

    def place_lse(self, slots: torch.Tensor, lse: torch.Tensor) -> None:
        """`note_lse` of tokens in `slots`, [n] int64 on the device."""
        if self.weighs_tokens:
            self._lse.index_copy_(1, slots, lse)

    def blocks(
        self, start: int, n_blocks: int, scoring: Scoring
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys, values and summaries of the blocks that begin at absolute index `start`.

        Returns:
            keys [kv_heads, n_blocks, block_size, head_dim], values likewise, summaries [summary_heads, r, n_blocks, head_dim]
            or None: every key represents its block.
        """
        config = self._config
        size = config.block_size
        lo = start - self.base
        rows = slice(lo, lo + n_blocks * size)
        key = self.key_raw[:, rows].reshape(-1, n_blocks, size, self.key_raw.shape[-1])
        value = self.value[:, rows].reshape(-1, n_blocks, size, self.value.shape[-1])
        if config.summary == "mean":
            return key, value, mean_keys(key)
        if not (self._ranks_tokens or self.weighs_tokens):
            return key, value, None
        n = n_blocks * size
        reach = n + config.n_local - 1
        query = self._rotation.rotate(self._query[:, lo : lo + reach + 1], lo)
        rotated = self.key[:, lo : lo + n]
        if self._ranks_tokens:
            return key, value, linear_top_keys(key, rotated, query_prefix(query), config.n_local, config.repr_topk)
        summaries = published_means(
            key,
            rotated,
            query[:, :reach],
            self._lse[:, lo : lo + reach],
            n_local=config.n_local,
            repr_topk=config.repr_topk,
            scale=scoring.scale,
            softcap=scoring.softcap,
        )
        return key, value, summaries

    def state(self, oldest: int) -> State:
        """What is visible from absolute index `oldest` on, on the host."""
        rows = slice(oldest - self.base, self.used)
        parts = {"key": self.key_raw, "value": self.value, "query": self._query, "lse": self._lse}
        return {name: part[:, rows].cpu() for name, part in parts.items() if part.numel()}

    def restore(self, oldest: int, state: State, device: torch.device) -> None:
        """Begin at absolute index `oldest` with what `state` returned."""
        self.base = oldest
        if not state:
            return
        found = {name: part.to(device) for name, part in state.items()}
        key, value, n = found["key"], found["value"], found["key"].shape[1]
        self._make_room(n, found.get("query", key), key, value, 0)
        self.key_raw[:, :n], self.value[:, :n] = key, value
        self.key[:, :n] = self._rotation.rotate(key, 0)
        for name, buffer in (("query", self._query), ("lse", self._lse)):
            if name in found:
                buffer[:, :n] = found[name]
        self.used = n

    def fork(self) -> Self:
        """An independent continuation."""
        self._frozen = True
        return copy.copy(self)

    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(b.nbytes for b in (self.key, self.key_raw, self.value, self._query, self._lse))


def _grown(buffer: torch.Tensor, like: torch.Tensor, kept: slice, capacity: int) -> torch.Tensor:
    """A buffer of `capacity` slots for tensors like `like` [heads, n, ...] that begins with the kept slots of `buffer`."""
    new = like.new_empty(like.shape[0], capacity, *like.shape[2:])
    if kept.stop > kept.start:
        new[:, : kept.stop - kept.start] = buffer[:, kept]
    return new
