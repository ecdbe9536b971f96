"""The seam to transformers: stock models run unpatched while every layer's attention is served by a memory.

* A forward hook on the decoder's `rotary_emb` returns cos = 1, sin = 0: queries and keys arrive un-rotated.
* A cache whose layers hand *themselves* to the attention function in place of the keys.
* One attention function registered under our name gives queries, keys and values to the layer's memory.

`installed` puts this in place and takes it away again. `probe` finds out which layers rotate at all, `self_test` compares
with the stock attention once per model, and what cannot work is refused by name.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from typing_extensions import override

from qllm_kernels.dispatch import on_device
from qllm_runtime.errors import InvalidConfigError, InvalidRequestError, UnsupportedModelError
from qllm_runtime.memory.base import LayerMemory, Rotation, Scoring
from qllm_runtime.memory.dense import DenseMemory
from qllm_runtime.rotary import ArchitectureRotation, NoRotation, RotaryTable, unchanged

ATTENTION = "qllm_memory"
_SELF_TEST_TOKENS = 64


@dataclass
class LayerFacts:
    """What the probe learned of one layer's attention."""

    module: torch.nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    rotary: bool
    layer_type: str | None
    sliding_window: int | None


@dataclass
class ModelFacts:
    """What the probe learned of a model."""

    rotary: torch.nn.Module
    takes_layer_type: bool
    layers: dict[int, LayerFacts] = field(default_factory=dict)
    tables: dict[tuple[str | None, torch.device, bool], RotaryTable] = field(default_factory=dict)
    rotations: dict[tuple[object, ...], Rotation] = field(default_factory=dict)

    def rotation(self, layer_idx: int, device: torch.device, frame: int = 0) -> Rotation:
        """The layer's rotation on `device`, for positions below `frame`; layers of one kind share it."""
        facts = self.layers[layer_idx]
        if not facts.rotary:
            return NoRotation()
        for long in (False, True):
            key = (facts.layer_type if self.takes_layer_type else None, device, long)
            if key not in self.tables:
                self.tables[key] = RotaryTable(self.rotary, *key)
            short = self.tables[key].comfortable_length
            if short is None or frame <= short:  # one kind of frequencies throughout
                break
            if self.tables[key].kind == "dynamic":
                raise InvalidConfigError(
                    f"This model's frequencies change with every length beyond {short} tokens (rope_type 'dynamic'), and "
                    f"{frame} are to be in view; lower n_local or topk, or with policy 'full' shorten the text."
                )
        kind = (*key, type(facts.module), facts.head_dim)
        if kind not in self.rotations:
            self.rotations[kind] = ArchitectureRotation(facts.module, self.tables[key], facts.head_dim)
        return self.rotations[kind]


#: Makes the memory of (layer index, row of the batch).
MemoryFactory = Callable[[int, int], LayerMemory]


@dataclass
class _Rows:
    """What the layers of a cache share; they do not know the cache, which is freed when its last user lets go of it."""

    factory: MemoryFactory
    lengths: list[int] | None = None


class MemoryLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of the cache: a memory per row of the batch. Stands in for the keys on their way to the attention function."""

    is_sliding = False

    def __init__(self, shared: _Rows, layer_idx: int) -> None:
        super().__init__()
        self._shared, self._layer_idx = shared, layer_idx
        self.rows: list[LayerMemory] = []

    @override
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    @override
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._key = key_states
        return self, value_states

    def prepare(self, rows: int) -> None:
        """Make the memories of the first `rows` rows."""
        while len(self.rows) < rows:
            self.rows.append(self._shared.factory(self._layer_idx, len(self.rows)))

    def attend(self, query: torch.Tensor, value: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """Hand one call's tokens to the rows' memories.

        Args:
            query: [batch, heads, n, head_dim].
            value: [batch, kv_heads, n, value_dim].
            scoring: Scale, soft cap and sinks.

        Returns:
            [batch, n, heads, value_dim]; rows of zeros where a row has no token in this call.
        """
        key = self._key
        del self._key
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


class MemoryCache(Cache):  # type: ignore[misc]
    """The `past_key_values` of a model whose attention is served by memories.

    Args:
        n_layers: Layers of the model.
        factory: Makes the memory of (layer, row) when its first tokens arrive.
    """

    def __init__(self, n_layers: int, factory: MemoryFactory) -> None:
        self._shared = _Rows(factory)
        super().__init__(layers=[MemoryLayer(self._shared, index) for index in range(n_layers)])

    @property
    def lengths(self) -> list[int] | None:
        """Valid tokens of each row in the next call (rows are padded on the right), or None when all are."""
        return self._shared.lengths

    @lengths.setter
    def lengths(self, lengths: list[int] | None) -> None:
        self._shared.lengths = lengths

    def prepare(self, rows: int) -> None:
        """Make the memories of `rows` sequences ahead of the first call."""
        for layer in self.layers:
            layer.prepare(rows)

    def memories(self, row: int = 0) -> list[LayerMemory]:
        """The layers' memories of one row, first layer first."""
        return [layer.rows[row] for layer in self.layers]

    def nbytes(self) -> int:
        """Bytes held by all layers and rows."""
        return sum(memory.nbytes() for layer in self.layers for memory in layer.rows)

    def fork(self) -> MemoryCache:
        """A cache that continues from here and shares what has been read."""
        child = MemoryCache(len(self.layers), self._shared.factory)
        for mine, theirs in zip(self.layers, child.layers, strict=True):
            theirs.rows = [row.fork() for row in mine.rows]
        return child


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Any,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    if isinstance(key, _ProbeLayer):
        return key.note(module, query, value, kwargs.get("sliding_window")), None
    if not isinstance(key, MemoryLayer):
        raise InvalidRequestError(
            "While a memory is installed the model must be called with a MemoryCache as past_key_values."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return key.attend(query, value, Scoring(scale, softcap, s_aux)), None


def stand_in_mask(device: torch.device) -> torch.Tensor:
    """Stands in for an attention mask that is made already, so that transformers makes none; memories look at none."""
    return torch.zeros(1, 1, 1, 1, device=device)


def _no_mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    return attention_mask


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


def _rotary_module(model: PreTrainedModel) -> torch.nn.Module:
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; only decoder-only models can be served.")
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    if not isinstance(rotary, torch.nn.Module):
        raise UnsupportedModelError(
            f"{name} has no rotary position embedding that its layers share (`rotary_emb` of the decoder); other kinds of "
            "positions, and rotations that each layer computes for itself, cannot be re-assigned."
        )
    return rotary


def _implementations(model: PreTrainedModel) -> dict[str, str]:
    """The attention of the model and of its parts (text, vision), as `set_attn_implementation` takes it."""
    parts = {name: getattr(model.config, name, None) for name in getattr(model.config, "sub_configs", {})}
    found = {"": model.config, **{name: part for name, part in parts.items() if part is not None}}
    return {name: part._attn_implementation for name, part in found.items()}


@contextmanager
def _hooked(model: PreTrainedModel, rotary: torch.nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    previous = _implementations(model)
    handle = rotary.register_forward_hook(hook)
    model.set_attn_implementation(ATTENTION)
    try:
        if model.config._attn_implementation != ATTENTION:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not route its attention through transformers' AttentionInterface."
            )
        with unchanged(rotary):
            yield
    finally:
        handle.remove()
        model.set_attn_implementation(previous)


def _identity(module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> Any:
    return torch.ones_like(output[0]), torch.zeros_like(output[1])


@contextmanager
def installed(model: PreTrainedModel) -> Iterator[ModelFacts]:
    """Serve `model`'s attention from memories inside the block; outside it the model is exactly as it was.

    Yields:
        The probe's facts.

    Raises:
        UnsupportedModelError: The architecture cannot be served; the message says why.
    """
    facts = examine(model)
    with _hooked(model, facts.rotary, _identity):
        yield facts


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of the many ways in which host and device say that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


class _ProbeLayer(CacheLayerMixin):  # type: ignore[misc]
    is_sliding = False

    def __init__(self, found: dict[int, LayerFacts]) -> None:
        super().__init__()
        self._found = found

    @override
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    @override
    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._kv_heads = key_states.shape[1]
        return self, value_states

    def note(self, module: Any, query: torch.Tensor, value: torch.Tensor, sliding_window: int | None) -> torch.Tensor:
        batch, heads, n, dim = query.shape
        types = getattr(module.config, "layer_types", None)
        kind = types[module.layer_idx] if types else None
        if sliding_window is None and kind in (None, "sliding_attention"):  # some apply it through their mask only
            sliding_window = getattr(module.config, "sliding_window", None)
        trained = getattr(module.config, "max_position_embeddings", None)
        if sliding_window is not None and trained and sliding_window >= trained:
            sliding_window = None  # all that the model was trained on lies within it, as in Phi-3
        self._found[module.layer_idx] = LayerFacts(
            module=module,
            heads=heads,
            kv_heads=self._kv_heads,
            head_dim=dim,
            value_dim=value.shape[-1],
            rotary=bool((query == 0).all(dim=(0, 1, 2)).any()),
            layer_type=kind,
            sliding_window=sliding_window,
        )
        return query.new_zeros(batch, n, heads, value.shape[-1])

    @override
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    @override
    def get_seq_length(self) -> int:
        return 0

    @override
    def get_max_length(self) -> int:
        return -1


def probe(model: PreTrainedModel) -> ModelFacts:
    """Find the model's attention layers and which of them rotate, by one call on four tokens with cos = sin = 0."""
    name = type(model).__name__
    rotary = _rotary_module(model)
    facts = ModelFacts(rotary, takes_layer_type=False)

    def zeros(module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        facts.takes_layer_type |= len(args) > 2 or "layer_type" in kwargs
        return torch.zeros_like(output[0]), torch.zeros_like(output[1])

    n_layers = model.config.get_text_config().num_hidden_layers
    cache = Cache(layers=[_ProbeLayer(facts.layers) for _ in range(n_layers)])
    tokens = torch.arange(1, 5, device=model.device)[None] % model.config.get_text_config().vocab_size
    previous = _implementations(model)
    handle = rotary.register_forward_hook(zeros, with_kwargs=True)
    try:
        model.set_attn_implementation(ATTENTION)
        with torch.no_grad():
            model.get_decoder()(input_ids=tokens, past_key_values=cache, use_cache=True)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"{name} does not run with a replaced attention ({type(error).__name__}): its layers work on the cached keys "
            "themselves or keep other states (latent or linear attention, convolutions, recurrence)."
        ) from error
    finally:
        handle.remove()
        model.set_attn_implementation(previous)
    if len(facts.layers) != n_layers:
        missing = sorted(set(range(n_layers)) - set(facts.layers))
        raise UnsupportedModelError(
            f"{name}: layers {missing} do not use transformers' AttentionInterface (or hold no attention)."
        )
    for layer in facts.layers.values():
        if layer.rotary and not hasattr(sys.modules[type(layer.module).__module__], "apply_rotary_pos_emb"):
            raise UnsupportedModelError(
                f"{name} does not define apply_rotary_pos_emb; its rotation cannot be applied from outside."
            )
    return facts


def self_test(model: PreTrainedModel, facts: ModelFacts) -> None:
    """Compare logits on a short random text with the model's stock attention.

    Raises:
        UnsupportedModelError: They differ by more than rounding, e.g. because keys are normalised after the rotation.
    """
    name = type(model).__name__
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (1, _SELF_TEST_TOKENS), generator=generator).to(model.device)

    def factory(layer: int, row: int) -> LayerMemory:
        info = facts.layers[layer]
        return DenseMemory(facts.rotation(layer, next(info.module.parameters()).device), info.sliding_window)

    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits.float()
        cache = MemoryCache(len(facts.layers), factory)
        try:
            with _hooked(model, facts.rotary, _identity):
                shared = {"attention_mask": stand_in_mask(model.device), "past_key_values": cache, "use_cache": True}
                parts = [model(input_ids=part, **shared).logits for part in (tokens[:, :40], tokens[:, 40:])]
        except (RuntimeError, TypeError, AttributeError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            raise UnsupportedModelError(f"{name} does not run on a memory: {type(error).__name__}: {error}") from error
    spread = expected.std().clamp(min=1e-6)
    error_ratio = ((torch.cat(parts, 1).float() - expected).pow(2).mean().sqrt() / spread).item()
    limit = 1e-3 if model.dtype == torch.float32 else 5e-2
    if not error_ratio <= limit:
        raise UnsupportedModelError(
            f"{name} gives other logits with re-assigned positions (rms difference {error_ratio:.1e} of their spread, limit "
            f"{limit:.0e}): its attention does more between rotation and softmax than can be reproduced from outside."
        )


_examined: weakref.WeakKeyDictionary[PreTrainedModel, ModelFacts] = weakref.WeakKeyDictionary()


def examine(model: PreTrainedModel) -> ModelFacts:
    """Probe and self-test a model, once, and again when its rotary embedding was exchanged.

    Raises:
        UnsupportedModelError: The architecture cannot be served; the message names it and the reason.
    """
    known = _examined.get(model)
    if known is None or known.rotary is not _rotary_module(model):
        facts = probe(model)
        self_test(model, facts)
        _examined[model] = facts
    return _examined[model]
