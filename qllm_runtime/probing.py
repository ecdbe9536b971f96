"""A look at what a model's layers ask of their attention: a few tokens, tables of our own, and an attention of zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from typing_extensions import override

from qllm_runtime.cache import MemoryCache, Slot, states_of
from qllm_runtime.errors import UnsupportedModelError
from qllm_runtime.hooks import decoder_of, device_of, hooked, identity
from qllm_runtime.memory.base import LayerMemory, Scoring
from qllm_runtime.memory.dense import DenseMemory
from qllm_runtime.rotary import NoRotation, split

_TOKENS = 8
#: Layers of stock caches that hold keys and values as they are, or states of their own.
_PLAIN_LAYERS = (
    "DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer", "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer",
)  # fmt: skip


@dataclass
class Call:
    """What a layer asked of its attention."""

    module: Any
    query: torch.Tensor
    kv_heads: int
    value_dim: int
    sliding_window: int | None

    @property
    def heads(self) -> torch.Tensor:
        """[rows, head_dim] the queries of all heads and tokens."""
        return self.query.flatten(0, 2).float()


class ProbeCache(MemoryCache):
    """Notes what layers ask for and answers with zeros, so that no layer's input depends on how another one rotates."""

    def __init__(self, model: PreTrainedModel, seen: int) -> None:
        self._name = type(model).__name__
        self.calls: dict[int, Call] = {}
        self.stock = DynamicCache(config=model.config).layers

        def pretended(layer: int, row: int) -> LayerMemory:
            memory = DenseMemory(NoRotation())
            memory.n_seen = seen
            return memory

        super().__init__([self._slot(layer) for layer in self.stock], pretended)
        if not self.attention:
            raise UnsupportedModelError(f"{self._name} has no attention layers to give a memory to.")
        self.prepare(1)

    def _slot(self, layer: Any) -> Slot:
        if type(layer).__name__ not in _PLAIN_LAYERS:
            raise UnsupportedModelError(
                f"{self._name} keeps more than keys and values ({type(layer).__name__}): its layers choose or compress the "
                "tokens that they attend to by themselves."
            )
        states = layer.number_of_states if isinstance(layer, LinearAttentionCacheLayerMixin) else 0
        return Slot(attends=type(layer).__name__ != "LinearAttentionLayer", states=states)

    @override
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        if layer_idx >= len(self.layers):
            raise UnsupportedModelError(
                f"{self._name} has a layer whose layer_idx is {layer_idx}, but its configuration makes a cache of "
                f"{len(self.layers)} layers, as where layers were taken out; renumber layer_idx of its attention modules "
                "(0, 1, 2, ...)."
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def used_slots(self) -> list[Slot]:
        """What each layer turned out to keep.

        Raises:
            UnsupportedModelError: Some attend on their own.
        """
        dummies = {index for index, layer in enumerate(self.stock) if type(layer).__name__ == "DummyLayer"}
        missing = [i for i, slot in enumerate(self._slots) if slot.attends and i not in self.calls and i not in dummies]
        if missing:
            raise UnsupportedModelError(
                f"{self._name}: layers {missing} do not use transformers' AttentionInterface (or hold no attention)."
            )
        found = []
        for index in range(
            max(len(self._slots), max(self.calls) + 1)
        ):  # stock caches may end before layers that share keys
            states = self._slots[index].states if index < len(self._slots) else 0
            found.append(Slot(index in self.calls, states if states and states_of(self.layers[index]) else 0))
        return found

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
        index = self.layer_of(module)
        if index in self.calls or key.shape[2] != query.shape[2]:
            raise UnsupportedModelError(
                f"{self._name} attends several times in a layer, or to other keys than those of its tokens; a memory holds one "
                "set of keys per layer."
            )
        self.calls[index] = Call(module, query, key.shape[1], value.shape[-1], sliding_window)
        batch, heads, n, _ = query.shape
        return query.new_zeros(batch, n, heads, value.shape[-1])


class ProbeTables:
    """Forward hook on the rotary embedding that hands out tables of our own; it notes how it is called.

    Args:
        kind: "plain" (nothing is rotated), "quarter" (cos = 0, sin = 1) or "angled" (an angle per frequency).

    Attributes:
        takes_layer_type: Layers of several kinds share the module.
        lead: Dimensions ahead of the positions that it is called with.
        angles: Cosines and sines [columns] that were handed out, by kind of layer.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.takes_layer_type = False
        self.lead: tuple[int, ...] = (1,)
        self.angles: dict[str | None, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """What the layers get in place of `output`."""
        kind = args[2] if len(args) > 2 else kwargs.get("layer_type")
        self.takes_layer_type |= kind is not None
        positions = args[1] if len(args) > 1 else kwargs.get("position_ids")
        if positions is not None:
            self.lead = tuple(positions.shape[:-1])
        if self.kind == "plain":
            return identity(module, args, kwargs, output)
        is_complex = isinstance(output, torch.Tensor)
        cos, sin = (output.real, output.imag) if is_complex else output
        if self.kind == "quarter":
            given = torch.zeros_like(cos), torch.ones_like(sin)
        else:
            angle = _angle_per_frequency(cos, sin)
            given = angle.cos().to(cos.dtype).expand_as(cos), angle.sin().to(sin.dtype).expand_as(sin)
        columns = split(given)
        self.angles[kind] = columns[0][0], columns[1][0]
        return torch.complex(*given) if is_complex else given


def _angle_per_frequency(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """An angle for each column [..., 1, columns] of tables; columns that are the same at all positions get the same one."""
    columns = torch.cat(split((cos, sin))).double()
    which = cast(torch.Tensor, torch.unique(columns, dim=1, return_inverse=True)[1])
    spread = 0.1 + 2.9 * (which.double() + 0.5) / (which.max() + 1)
    return spread.view(*cos.shape[:-2], cos.shape[-1])[..., None, :]


def observe(model: PreTrainedModel, rotary: torch.nn.Module | None, tables: ProbeTables, seen: int = 0) -> ProbeCache:
    """Run a few tokens; the cache tells what the layers asked for."""
    cache = ProbeCache(model, seen)
    tokens = torch.arange(1, _TOKENS + 1, device=device_of(model))[None] % model.config.get_text_config().vocab_size
    with torch.no_grad(), hooked(model, rotary, tables):
        decoder_of(model)(input_ids=tokens, past_key_values=cache, use_cache=True)
    return cache
