"""The seam to transformers: stock models run unpatched while every layer's attention is served by a memory.

`installed` puts the hooks in place and takes them away again. `probe` finds out which layers attend, how each of them rotates
and which carry states; `self_test` compares with the stock attention once per model, and what cannot work is refused by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from qllm_runtime.cache import MemoryCache, MemoryFactory, Slot
from qllm_runtime.errors import InvalidConfigError, UnsupportedModelError
from qllm_runtime.hooks import decoder_of, device_of, evaluating, hooked, identity, is_out_of_memory, stand_in_mask
from qllm_runtime.memory.base import LayerMemory, Rotation
from qllm_runtime.memory.dense import DenseMemory
from qllm_runtime.probing import Call, ProbeTables, observe
from qllm_runtime.rotary import Layout, NoRotation, PairRotation, RotaryTable, learn_layout, unchanged

#: Roundings by which half precision may differ: they make routers choose other experts, and add up from layer to layer.
_ROUNDINGS = 3.0
_SELF_TEST_PARTS = (40, 20, 1, 1)  # a text and its continuation, then single tokens
_SHIFT = 5  # tokens that a probe pretends to have seen


@dataclass
class LayerFacts:
    """What the probe learned of one layer's attention."""

    module: torch.nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    layout: Layout | None
    layer_type: str | None
    sliding_window: int | None
    device: torch.device

    @property
    def rotary(self) -> bool:
        """Whether the layer rotates at all."""
        return self.layout is not None


@dataclass
class ModelFacts:
    """What the probe learned of a model.

    Attributes:
        rotary: Its rotary embedding, if any.
        layers: Those that attend, by index, in order.
        slots: What every layer keeps.
    """

    rotary: torch.nn.Module | None
    takes_layer_type: bool = False
    lead: tuple[int, ...] = (1,)
    layers: dict[int, LayerFacts] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)
    tables: dict[tuple[str | None, torch.device, bool], RotaryTable] = field(default_factory=dict)
    rotations: dict[tuple[object, ...], Rotation] = field(default_factory=dict)

    def cache(self, factory: MemoryFactory) -> MemoryCache:
        """A cache for this model; `factory` makes the memory of (layer, row)."""
        return MemoryCache(self.slots, factory)

    def rotation(self, layer_idx: int, device: torch.device, frame: int = 0) -> Rotation:
        """The layer's rotation on `device`, for positions below `frame`; layers of one kind share it."""
        facts = self.layers[layer_idx]
        if facts.layout is None or self.rotary is None:
            return NoRotation()
        for long in (False, True):
            key = (facts.layer_type if self.takes_layer_type else None, device, long)
            if key not in self.tables:
                self.tables[key] = RotaryTable(self.rotary, *key, self.lead)
            short = self.tables[key].original_max_position_embeddings
            if short is None or frame <= short:  # one kind of frequencies throughout
                break
            if self.tables[key].kind == "dynamic":
                raise InvalidConfigError(
                    f"This model's frequencies change with every length beyond {short} tokens (rope_type 'dynamic'), and "
                    f"{frame} are to be in view; lower n_local or topk, or with policy 'full' shorten the text."
                )
        kind = (*key, facts.layout, facts.head_dim)
        if kind not in self.rotations:
            self.rotations[kind] = PairRotation(facts.layout, self.tables[key], facts.head_dim)
        return self.rotations[kind]


def _rotary_module(model: PreTrainedModel) -> torch.nn.Module | None:
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder; only decoder-only models can be served."
        )
    found = [part for part in decoder_of(model).children() if "rotaryembedding" in type(part).__name__.lower()]
    if len(found) > 1:
        raise UnsupportedModelError(f"{type(model).__name__} has several rotary embeddings side by side.")
    return found[0] if found else None


@contextmanager
def installed(model: PreTrainedModel) -> Iterator[ModelFacts]:
    """Serve `model`'s attention from memories inside the block; outside it the model is exactly as it was.

    Yields:
        The probe's facts.

    Raises:
        UnsupportedModelError: The architecture cannot be served; the message says why.
    """
    facts = examine(model)
    with hooked(model, facts.rotary, identity):
        yield facts


def probe(model: PreTrainedModel) -> ModelFacts:
    """Find the model's attention layers and how each of them rotates, by a few tokens with tables of our own."""
    name = type(model).__name__
    rotary = _rotary_module(model)
    tables = {kind: ProbeTables(kind) for kind in ("plain", "quarter", "angled")}
    try:
        plain, quarter, angled = (observe(model, rotary, hook) for hook in tables.values())
        later = observe(model, rotary, ProbeTables("plain"), _SHIFT)
    except UnsupportedModelError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"{name} does not run with a replaced attention ({type(error).__name__}: {_first_line(error)}): its layers work on "
            "cached keys by themselves, or keep states in ways of their own."
        ) from error
    facts = ModelFacts(rotary, tables["plain"].takes_layer_type, tables["plain"].lead)
    for index, call in sorted(plain.calls.items()):
        if not torch.allclose(call.heads, later.calls[index].heads, rtol=1e-2, atol=1e-4):
            raise UnsupportedModelError(
                f"{name} has no rotary position embedding that its layers share; positions are part of what they compute with "
                "(learned, sinusoidal, or a rotation that each layer makes for itself) and cannot be re-assigned."
            )
        kind = _layer_type(call.module, index)
        if kind == "chunked_attention":
            raise UnsupportedModelError(
                f"{name} attends within fixed chunks of a text (chunked_attention), which no memory keeps."
            )
        try:
            angles = tables["angled"].angles.get(
                kind if facts.takes_layer_type else None
            )  # none for kinds that never rotate
            layout = (
                learn_layout(call.heads, quarter.calls[index].heads, angled.calls[index].heads, *angles)
                if angles
                else None
            )
        except ValueError as error:
            raise UnsupportedModelError(
                f"{name} does more than to rotate pairs of dimensions by its angles (a weighted norm after the rotation, for "
                "one): its positions cannot be re-assigned."
            ) from error
        facts.layers[index] = LayerFacts(
            module=call.module,
            heads=call.query.shape[1],
            kv_heads=call.kv_heads,
            head_dim=call.query.shape[-1],
            value_dim=call.value_dim,
            layout=layout,
            layer_type=kind,
            sliding_window=_sliding_window(call, kind),
            device=call.query.device,
        )
    for index, slot in enumerate(plain.used_slots()):
        layout = facts.layers[index].layout if slot.attends else None
        facts.slots.append(replace(slot, order=layout.order) if layout else slot)
    return facts


def _layer_type(module: Any, index: int) -> str | None:
    types = getattr(module.config, "layer_types", None)
    return types[index] if types else None


def _sliding_window(call: Call, kind: str | None) -> int | None:
    """Tokens that a layer sees, or None for all."""
    config, width = call.module.config, call.sliding_window
    if width is None and kind in (None, "sliding_attention", "hybrid_sliding"):  # some apply it through their mask only
        width = getattr(config, "sliding_window", None)
    trained = getattr(config, "max_position_embeddings", None)
    if width is not None and trained and width >= trained:
        return None  # all that the model was trained on lies within it, as in Phi-3
    return width


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def self_test(model: PreTrainedModel, facts: ModelFacts) -> None:
    """Compare logits on a short random text with the model's stock attention.

    Raises:
        UnsupportedModelError: They differ by more than rounding, e.g. because keys are weighted after the rotation.
    """
    name = type(model).__name__
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (1, sum(_SELF_TEST_PARTS)), generator=generator).to(device_of(model))

    def factory(layer: int, row: int) -> LayerMemory:
        info = facts.layers[layer]
        return DenseMemory(facts.rotation(layer, info.device), info.sliding_window)

    with torch.no_grad():
        cache = facts.cache(factory)
        try:
            with unchanged(facts.rotary) if facts.rotary is not None else nullcontext():
                expected = model(input_ids=tokens, use_cache=False).logits.float()
            with hooked(model, facts.rotary, identity):
                shared = {"attention_mask": stand_in_mask(tokens.device), "past_key_values": cache, "use_cache": True}
                parts = [
                    model(input_ids=part, **shared).logits for part in torch.split(tokens, list(_SELF_TEST_PARTS), 1)
                ]
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            raise UnsupportedModelError(f"{name} does not run on a memory: {type(error).__name__}: {error}") from error
    limit = 1e-3 if model.dtype == torch.float32 else 5e-2
    error_ratio = _difference(torch.cat(parts, 1), expected)
    if not error_ratio <= limit and model.dtype != torch.float32:
        limit = max(limit, _ROUNDINGS * _difference(_rounded(model, facts, tokens), expected))
    if (
        not error_ratio <= limit
        and cache.recurrent
        and _difference(parts[0], expected[:, : _SELF_TEST_PARTS[0]]) <= limit
    ):
        raise UnsupportedModelError(
            f"{name} cannot be read in chunks: transformers' implementation of its recurrent layers carries no state into "
            "several tokens."
        )
    if not error_ratio <= limit:
        raise UnsupportedModelError(
            f"{name} gives other logits with re-assigned positions (rms difference {error_ratio:.1e} of their spread, limit "
            f"{limit:.0e}): its attention does more between rotation and softmax than can be reproduced from outside."
        )


def _rounded(model: PreTrainedModel, facts: ModelFacts, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the stock model with rotary tables and attention outputs that are off by a rounding each."""
    generator = torch.Generator().manual_seed(0)

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        if not isinstance(value, torch.Tensor):
            return value
        noise = torch.randn(value.shape, generator=generator).to(value.device) * (torch.finfo(model.dtype).eps / 2)
        return (value * (1 + noise)).to(value.dtype)

    with torch.no_grad(), ExitStack() as hooks:
        modules = [layer.module for layer in facts.layers.values()]
        if facts.rotary is not None:
            hooks.enter_context(unchanged(facts.rotary))
            modules.append(facts.rotary)
        for module in modules:
            hooks.callback(module.register_forward_hook(lambda _, __, output: moved(output)).remove)
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of what they differ by, as a share of the spread of what was expected."""
    return ((actual.float() - expected).pow(2).mean().sqrt() / expected.std().clamp(min=1e-6)).item()


_examined: weakref.WeakKeyDictionary[PreTrainedModel, ModelFacts] = weakref.WeakKeyDictionary()


def examine(model: PreTrainedModel) -> ModelFacts:
    """Probe and self-test a model, once, and again when its rotary embedding was exchanged.

    Raises:
        UnsupportedModelError: The architecture cannot be served; the message names it and the reason.
    """
    known = _examined.get(model)
    if known is None or known.rotary is not _rotary_module(model):
        with evaluating(model):
            facts = probe(model)
            self_test(model, facts)
        _examined[model] = facts
    return _examined[model]
