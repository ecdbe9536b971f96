"""The cache a model runs on while memories serve it: a memory per attention layer and row, states of layers that keep some.

Keys and values pass through unchanged: whatever a model does to those of new tokens on their way to the attention function
(expanding latents, handing them on to later layers) it does to what the memories then take in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionLayer
from typing_extensions import override

from qllm_kernels.dispatch import on_device
from qllm_runtime.memory.base import LayerMemory, Scoring, State

#: Where recurrent layers hold their states, and how they take them in.
_STATES = {"conv_states": "update_conv_state", "recurrent_states": "update_recurrent_state"}
#: Makes the memory of (layer index, row of the batch).
MemoryFactory = Callable[[int, int], LayerMemory]


@dataclass(frozen=True)
class Slot:
    """What one layer of a model keeps.

    Attributes:
        attends: It has attention, hence a memory.
        states: Recurrent and convolution states it carries on from chunk to chunk; 0: none.
        order: Dimensions of a head as the memory's rotation takes them, or None where they are in that order already.
    """

    attends: bool
    states: int
    order: tuple[int, ...] | None = None


class ServingCache(Cache):  # type: ignore[misc]
    """A cache that computes the attention of a model's layers."""

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scoring: Scoring,
        sliding_window: int | None,
    ) -> torch.Tensor:
        """Attention of new tokens, un-rotated: [batch, n, heads, value_dim]; see `MemoryLayer.attend`."""
        raise NotImplementedError


class _Rows:
    """What the layers of a cache share; they do not know the cache, which is freed when its last user lets go of it."""

    def __init__(self, factory: MemoryFactory) -> None:
        self.factory = factory
        self.lengths: list[int] | None = None
        self.arrived: int | None = None  # layer whose keys are on their way to the attention function


class MemoryLayer(CacheLayerMixin):  # type: ignore[misc]
    """An attention layer: a memory per row of the batch."""

    is_sliding = False

    def __init__(self, shared: _Rows, layer_idx: int, order: Sequence[int] | None = None) -> None:
        super().__init__()
        self._shared, self._layer_idx = shared, layer_idx
        self._order = None if order is None else torch.tensor(order)
        self.rows: list[LayerMemory] = []

    @override
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    @override
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._shared.arrived = self._layer_idx
        return key_states, value_states

    def prepare(self, rows: int) -> None:
        """Make the memories of the first `rows` rows."""
        while len(self.rows) < rows:
            self.rows.append(self._shared.factory(self._layer_idx, len(self.rows)))

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """Hand one call's tokens to the rows' memories.

        Args:
            query: [batch, heads, n, head_dim].
            key: [batch, kv_heads, n, head_dim].
            value: [batch, kv_heads, n, value_dim].
            scoring: Scale, soft cap and sinks.

        Returns:
            [batch, n, heads, value_dim]; rows of zeros where a row has no token in this call.
        """
        if self._order is not None:
            self._order = self._order.to(query.device)
            query, key = query.index_select(-1, self._order), key.index_select(-1, self._order)
        batch, heads, n, _ = query.shape
        lengths = self._shared.lengths or [n] * batch
        self.prepare(batch)
        with on_device(query.device):
            if batch == 1 and lengths[0] == n:
                return self.rows[0].append(query[0], key[0], value[0], scoring)[None]
            out = query.new_zeros(batch, n, heads, value.shape[-1])
            for row, length in enumerate(lengths):
                if length:
                    out[row, :length] = self.rows[row].append(
                        query[row, :, :length], key[row, :, :length], value[row, :, :length], scoring
                    )
        return out

    @override
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    @override
    def get_seq_length(self) -> int:
        return max((row.n_seen for row in self.rows), default=0)

    @override
    def get_max_length(self) -> int:
        return -1


class _BothLayer(LinearAttentionLayer, MemoryLayer):  # type: ignore[misc]
    """Attention and states side by side."""

    def __init__(self, shared: _Rows, layer_idx: int, order: Sequence[int] | None, states: int) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=states)
        MemoryLayer.__init__(self, shared, layer_idx, order)

    @override
    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        if kwargs:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    @override
    def get_max_length(self) -> int:
        return -1


class MemoryCache(ServingCache):
    """The `past_key_values` of a model whose attention is served by memories.

    States of recurrent layers are small and of constant size; they are the model's own, and copied for a fork.

    Args:
        slots: What each layer of the model keeps.
        factory: Makes the memory of (layer, row) when its first tokens arrive.
    """

    def __init__(self, slots: Sequence[Slot], factory: MemoryFactory) -> None:
        self._slots, self._shared = slots, _Rows(factory)
        self._alone: list[MemoryCache] = []
        super().__init__(layers=[self._layer(index, slot) for index, slot in enumerate(slots)])

    def _layer(self, index: int, slot: Slot) -> Any:
        if not slot.attends:
            return LinearAttentionLayer(number_of_states=max(slot.states, 1))
        if slot.states:
            return _BothLayer(self._shared, index, slot.order, slot.states)
        return MemoryLayer(self._shared, index, slot.order)

    @property
    def lengths(self) -> list[int] | None:
        """Valid tokens of each row in the next call (rows are padded on the right), or None when all are."""
        return self._shared.lengths

    @lengths.setter
    def lengths(self, lengths: list[int] | None) -> None:
        self._shared.lengths = lengths

    @property
    def recurrent(self) -> bool:
        """Layers carry states, which padding would enter: rows are to run one by one, see `alone`."""
        return any(slot.states for slot in self._slots)

    @property
    def attention(self) -> list[MemoryLayer]:
        """The layers that have memories, first layer first."""
        return [layer for layer in self.layers if isinstance(layer, MemoryLayer)]

    def prepare(self, rows: int) -> None:
        """Make the memories of `rows` sequences ahead of the first call."""
        for layer in self.attention:
            layer.prepare(rows)

    def memories(self, row: int = 0) -> list[LayerMemory]:
        """The memories of one row, of the first layer with attention first."""
        return [layer.rows[row] for layer in self.attention]

    def states(self) -> list[torch.Tensor]:
        """States of recurrent layers, which a step changes in place."""
        held = [x for layer in self.layers if isinstance(layer, LinearAttentionLayer) for x in states_of(layer)]
        return held + [x for cache in self._alone for x in cache.states()]

    def alone(self, row: int) -> MemoryCache:
        """One row as a cache of its own, with its memories; where there are several, it has the row's states."""
        if len(self.attention[0].rows) == 1:
            return self
        for index in range(len(self._alone), row + 1):
            single = MemoryCache(self._slots, self._shared.factory)
            for mine, theirs in zip(self.attention, single.attention, strict=True):
                theirs.rows = [mine.rows[index]]
            self._alone.append(single)
        return self._alone[row]

    def layer_of(self, module: Any) -> int:
        """The layer that attends: whose keys came last, or, where keys of another layer are used again, the module's own."""
        arrived, self._shared.arrived = self._shared.arrived, None
        return int(module.layer_idx if arrived is None else arrived)

    @override
    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scoring: Scoring,
        sliding_window: int | None,
    ) -> torch.Tensor:
        layer: MemoryLayer = self.layers[self.layer_of(module)]
        return layer.attend(query, key, value, scoring)

    def kind(self, index: int) -> type:
        """What kind of memory a layer has; its own type where it has none."""
        layer = self.layers[index]
        return type(layer.rows[0] if isinstance(layer, MemoryLayer) else layer)

    def state(self, index: int) -> State:
        """All that a layer of a cache of one row holds of what was read, on the host; see `LayerMemory.state`."""
        layer = self.layers[index]
        found = layer.rows[0].state() if isinstance(layer, MemoryLayer) else {}
        if isinstance(layer, LinearAttentionLayer):
            for name in _STATES:
                kept = {i: x for i, x in getattr(layer, name).items() if x is not None}
                found |= {f"{name}.{i}": x.cpu() for i, x in kept.items()}
        return found

    def restore(self, index: int, state: State, device: torch.device) -> None:
        """Take in what `state` of this layer returned; nothing was read yet."""
        layer = self.layers[index]
        if isinstance(layer, MemoryLayer):
            layer.rows[0].restore(state, device)
        for name, update in _STATES.items() if isinstance(layer, LinearAttentionLayer) else ():
            for key, kept in state.items():
                if key.startswith(f"{name}."):
                    getattr(layer, update)(kept.to(device), state_idx=int(key.rpartition(".")[2]))

    def nbytes(self) -> int:
        """Bytes held by all layers and rows."""
        held = sum(memory.nbytes() for layer in self.attention for memory in layer.rows)
        return held + sum(state.nbytes for state in self.states())

    def fork(self) -> MemoryCache:
        """A cache that continues from here and shares what has been read."""
        child = MemoryCache(self._slots, self._shared.factory)
        for mine, theirs in zip(self.layers, child.layers, strict=True):
            if isinstance(mine, MemoryLayer):
                theirs.rows = [row.fork() for row in mine.rows]
            if isinstance(mine, LinearAttentionLayer):
                _copy_states(mine, theirs)
        for row in range(len(self._alone)):
            for mine, theirs in zip(self._alone[row].layers, child.alone(row).layers, strict=True):
                if isinstance(mine, LinearAttentionLayer):
                    _copy_states(mine, theirs)
        return child


def states_of(layer: Any) -> list[torch.Tensor]:
    """What a recurrent layer carries on."""
    return [x for kind in (layer.conv_states, layer.recurrent_states) for x in kind.values() if x is not None]


def _copy_states(source: Any, target: Any) -> None:
    for name, value in vars(source).items():
        if isinstance(value, dict):
            copied = {i: x.clone() if isinstance(x, torch.Tensor) else x for i, x in value.items()}
            setattr(target, name, copied)
    target.device, target.dtype = source.device, source.dtype
