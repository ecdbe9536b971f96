"""Dense attention: every token (policy `full`), or the exact sliding window of a model's own sliding layers."""

from __future__ import annotations

import copy
import weakref
from typing import Self

import torch
from typing_extensions import override

from qllm_kernels.attention import apply_sinks, attend, merge, segment_logits
from qllm_kernels.dispatch import attend_pieces, attend_step, backend, rotate_append, step_mass
from qllm_kernels.rotary import Arrival, Destination
from qllm_runtime.errors import InvalidRequestError
from qllm_runtime.memory.base import GraphStep, Rotation, Scoring, State, Tables
from qllm_runtime.memory.graph_step import GraphStepMemory, step_span, window_positions
from qllm_runtime.memory.places import DevicePlace, Place

_TILE = 512
_LOGITS = 2**28  # bytes of fp32 logits at a time where they are stored
_ROOM = 1024  # tokens of questions and answers that fit after what was expected


class DenseMemory(GraphStepMemory):
    """All tokens, or those of a sliding window, at their true distances.

    Forks that see everything share their buffers: what was read stays in place, and the first to go on writes after it. Who
    would write where another one has written already takes a copy.

    Args:
        rotation: The layer's rotary embedding.
        window: A query sees itself and the window - 1 tokens before it; None: everything.
        reserve: Tokens expected; sizes the first buffer.
    """

    def __init__(self, rotation: Rotation, window: int | None = None, reserve: int = 0) -> None:
        self._rotation = rotation
        self._window = window
        self._capacity = reserve + _ROOM if window is None else window + 4 * _TILE
        self._most = 2 * _TILE  # tokens taken in at a time
        short = rotation.original_max_position_embeddings
        if window is not None and short is not None:  # one kind of frequencies in all slots
            self._capacity = min(self._capacity, max(short, window + 1))
            self._most = min(self._most, self._capacity - window)
        self._base = 0  # absolute index of the buffers' first slot; a key is rotated at its slot
        self._key: torch.Tensor | None = None
        self._key_raw: torch.Tensor | None = None
        self._value: torch.Tensor | None = None
        self._sharers: weakref.WeakSet[DenseMemory] = weakref.WeakSet([self])  # of the buffers
        self._tables: Tables | None = None  # what single tokens are rotated by on Triton
        self._nowhere: torch.Tensor | None = None  # the row of un-rotated keys that are not kept

    def set_query(self, start: int, end: int) -> None:
        """Dense attention looks nothing up; a query has no influence."""

    @override
    def append(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        attended = self.step(query, key, value, scoring)
        if attended is not None:
            return attended
        if self._window is None:
            return self._append(query, key, value, scoring)
        rows = [slice(lo, lo + self._most) for lo in range(0, query.shape[1], self._most)]
        return torch.cat([self._append(query[:, part], key[:, part], value[:, part], scoring) for part in rows])

    @override
    def prepare_step(self) -> GraphStep | None:
        if self._key is None or self._value is None:
            return None
        self._make_room(self._key, self._value, 1)
        if self._tables is None:
            return None
        slot = self.n_seen - self._base
        first = 0 if self._window is None else max(0, slot - self._window + 1)
        place = Place(self.n_seen, slot, first, slot - first, self._base + first, n_blocks=0, n_chosen=0)
        return GraphStep((self._key, self._value, self._tables, self.on_weights), place)

    @override
    def count(self) -> None:
        self.n_seen += 1

    @override
    def step_at(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring, place: DevicePlace
    ) -> torch.Tensor:
        assert self._key is not None and self._value is not None and self._key_raw is not None
        assert self._tables is not None
        cos, sin, interleaved = self._tables
        raw = place.slot if self._nowhere is None else self._nowhere
        places = Destination(self._key, self._value, place.slot), Destination(self._key_raw, None, raw)
        near, _ = rotate_append(Arrival(query, key, value, cos, sin, place.slot, *places, interleaved))
        span = step_span(place, scoring)
        out, lse = attend_step(near, self._key, self._value, None, **span)
        if scoring.sinks is not None:
            out, lse = apply_sinks(out, lse, scoring.sinks)
        if self.on_weights is not None:
            mass = step_mass(near, self._key, None, lse, **span).window
            assert mass is not None
            self.on_weights(mass[0], window_positions(place, mass.shape[2]).expand(mass.shape[1], -1))
        return out

    def _append(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        n = query.shape[1]
        self._make_room(key, value, n)
        assert self._key is not None and self._value is not None and self._key_raw is not None
        start = self.n_seen - self._base
        query, rotated = self._rotation.rotate_pair(query, key, start)
        self._key[:, start : start + n] = rotated
        self._value[:, start : start + n] = value
        if self._window is not None:
            self._key_raw[:, start : start + n] = key
        self.n_seen += n
        if n == 1 and self.on_weights is not None:
            return self._step(query, start, scoring)
        if self._window is None and backend(query.device) == "triton":
            return self._pieces(query, start, scoring)
        keys = start + n if self._window is None else min(start + n, self._window + _TILE)
        stored = query.device.type != "cpu" or scoring.softcap is not None
        size = tile_size(query.shape[0], keys) if stored else _TILE
        outs = [self._tile(query[:, i : i + size], start + i, scoring) for i in range(0, n, size)]
        return torch.cat(outs, dim=1).transpose(0, 1)

    def _pieces(self, query: torch.Tensor, start: int, scoring: Scoring) -> torch.Tensor:
        """Attention of queries at slots start, start + 1, ... to everything, no logits stored: [n, heads, value_dim]."""
        assert self._key is not None and self._value is not None
        span = {"slot": 0, "back": start, "length": query.shape[1]}
        out, lse = attend_pieces(
            query, self._key, self._value, None, **span, scale=scoring.scale, softcap=scoring.softcap
        )
        return (out if scoring.sinks is None else apply_sinks(out, lse, scoring.sinks)[0]).transpose(0, 1)

    def _step(self, query: torch.Tensor, slot: int, scoring: Scoring) -> torch.Tensor:
        """Attention of the token at `slot` with its weights at hand: [1, heads, value_dim]."""
        assert self._key is not None and self._value is not None and self.on_weights is not None
        heads, _, dim = query.shape
        kv_heads = self._key.shape[0]
        rows = slice(0 if self._window is None else max(0, slot - self._window + 1), slot + 1)
        logits = segment_logits(
            query.reshape(kv_heads, -1, dim), self._key[:, rows], scale=scoring.scale, softcap=scoring.softcap
        )
        if scoring.sinks is not None:
            logits = torch.cat((logits, scoring.sinks.float().view(kv_heads, -1, 1)), -1)
        weights = torch.softmax(logits, -1)[..., : rows.stop - rows.start]
        positions = torch.arange(self._base + rows.start, self._base + rows.stop, device=query.device)
        self.on_weights(weights.sum(1), positions.expand(kv_heads, -1))
        return (weights.to(self._value.dtype) @ self._value[:, rows]).reshape(1, heads, -1)

    def _tile(self, query: torch.Tensor, start: int, scoring: Scoring) -> torch.Tensor:
        """Attention of queries at slots start .. start + n: [heads, n, value_dim]."""
        assert self._key is not None and self._value is not None
        heads, n, dim = query.shape
        kv_heads = self._key.shape[0]
        group = heads // kv_heads
        packed = query.reshape(1, kv_heads, group * n, dim)
        first = 0 if self._window is None else max(0, start - self._window + 1)
        # keys before `inner` are seen by every query of the tile, the others are masked
        inner = start if self._window is None else min(start, max(first, start + n - self._window))

        def part(lo: int, hi: int) -> tuple[torch.Tensor, torch.Tensor]:
            if hi - 1 <= start and (self._window is None or start + n - 1 - lo < self._window):
                return self._attend(packed, lo, hi, scoring, None)
            rows = torch.arange(start, start + n, device=query.device)[:, None]
            cols = torch.arange(lo, hi, device=query.device)
            seen = cols <= rows
            if self._window is not None:
                seen &= rows - cols < self._window
            bias = torch.zeros(n, hi - lo, device=query.device, dtype=query.dtype).masked_fill_(~seen, float("-inf"))
            return self._attend(packed, lo, hi, scoring, bias.repeat(group, 1))

        if self._window is None and inner > 0:
            out, lse = merge(self._attend(packed, 0, inner, scoring, None), part(inner, start + n))
        else:
            out, lse = part(first, start + n)
        out, lse = out.reshape(heads, n, -1), lse.reshape(heads, n)
        return out if scoring.sinks is None else apply_sinks(out, lse, scoring.sinks)[0]

    def _attend(
        self, packed: torch.Tensor, lo: int, hi: int, scoring: Scoring, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._key is not None and self._value is not None
        return attend(
            packed,
            self._key[None, :, lo:hi],
            self._value[None, :, lo:hi],
            scale=scoring.scale,
            bias=bias,
            softcap=scoring.softcap,
        )

    def _make_room(self, key: torch.Tensor, value: torch.Tensor, n: int) -> None:
        used = self.n_seen - self._base
        if self._key is None or self._value is None:
            self._capacity = max(self._capacity, n)
            self._key = key.new_empty(key.shape[0], self._capacity, key.shape[2])
            self._value = value.new_empty(value.shape[0], self._capacity, value.shape[2])
            self._key_raw = key.new_empty(key.shape[0], self._capacity if self._window else 0, key.shape[2])
            self._prepare_steps()
        slots = self._key.shape[1]
        if any(other.n_seen > self.n_seen for other in self._sharers):
            self._move(self._key, self._value, max(slots, used + n))
        elif used + n > slots and self._window is None:
            self._move(self._key, self._value, max(2 * slots, used + n))
        elif used + n > slots:
            self._slide(self._key, self._value, used)

    def _move(self, key: torch.Tensor, value: torch.Tensor, slots: int) -> None:
        """Take what is seen into buffers of its own with `slots` slots."""
        used = self.n_seen
        self._key, self._value = (old.new_empty(old.shape[0], slots, old.shape[2]) for old in (key, value))
        for new, old in ((self._key, key), (self._value, value)):
            new[:, :used] = old[:, :used]
        self._sharers.discard(self)
        self._sharers = weakref.WeakSet([self])
        self._prepare_steps()

    def _slide(self, key: torch.Tensor, value: torch.Tensor, used: int) -> None:
        """Keep what the next query sees, at the start of the buffers."""
        assert self._key_raw is not None
        assert self._window is not None
        keep = min(used, self._window - 1)
        for buffer in (self._key_raw, value):
            buffer[:, :keep] = buffer[:, used - keep : used].clone()
        self._base = self.n_seen - keep
        key[:, :keep] = self._rotation.rotate(self._key_raw[:, :keep], 0)

    def _prepare_steps(self) -> None:
        """Have what `step_at` needs for buffers that are new."""
        assert self._key is not None and self._value is not None
        if backend(self._key.device) == "triton":
            self._tables = self._rotation.tables(self._key.shape[1], self._key.device)
            if self._window is None:  # full attention moves no keys
                self._nowhere = torch.full((1,), -1, device=self._key.device)
            # torch functions that stand in for a kernel look at all slots
            for buffer in (self._key, self._value):
                buffer[:, self.n_seen - self._base :] = 0

    @override
    def state(self) -> State:
        if self._key is None or self._key_raw is None or self._value is None:
            return {"counts": torch.tensor([0, 0])}
        end = self.n_seen - self._base
        rows = slice(0 if self._window is None else max(0, end - self._window + 1), end)
        kept = self._key if self._window is None else self._key_raw  # full attention keeps keys as they are rotated
        counts = torch.tensor([self.n_seen, self._rotation.original_max_position_embeddings or 0])
        return {"counts": counts, "key": kept[:, rows].cpu(), "value": self._value[:, rows].cpu()}

    @override
    def restore(self, state: State, device: torch.device) -> None:
        n_seen, short = state["counts"].tolist()
        if not n_seen:
            return
        if self._window is None and short != (self._rotation.original_max_position_embeddings or 0):
            raise InvalidRequestError(
                "These documents were read with the rotary frequencies of shorter texts, which a reading of this length does "
                "not have; read all of them at once and save that."
            )
        key, value = state["key"].to(device), state["value"].to(device)
        n = key.shape[1]
        self.n_seen, self._base = n_seen, n_seen - n
        self._make_room(key, value, 0)
        assert self._key is not None and self._key_raw is not None and self._value is not None
        self._value[:, :n] = value
        if self._window is None:
            self._key[:, :n] = key
        else:
            self._key_raw[:, :n] = key
            self._key[:, :n] = self._rotation.rotate(key, 0)

    @override
    def fork(self) -> Self:
        child = copy.copy(self)
        child.on_weights = child.numbers = None
        if self._window is None and self._key is not None:
            self._sharers.add(child)
            return child
        child._sharers = weakref.WeakSet([child])
        for name in ("_key", "_key_raw", "_value"):  # a window moves within its buffers
            buffer = getattr(self, name)
            setattr(child, name, None if buffer is None else buffer.clone())
        return child

    @override
    def nbytes(self) -> int:
        return sum(b.nbytes for b in (self._key, self._key_raw, self._value) if b is not None)


def tile_size(heads: int, keys: int) -> int:
    """Queries that are compared with `keys` keys at a time, so that the logits of all heads stay below `_LOGITS` bytes."""
    return max(1, min(_TILE, _LOGITS // (4 * heads * keys)))
