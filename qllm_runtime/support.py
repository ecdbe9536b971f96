"""Whether a model can be served, found out from its configuration alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qllm_runtime.errors import ModelNotFoundError, UnsupportedModelError
from qllm_runtime.loading import auto_class, locate
from qllm_runtime.seam import examine

_VOCABULARY = 128
# sizes of the stand-in; everything else (kinds of layers, rotation, norms, caps) stays as configured
_SIZES = {
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "num_expert_group": 1,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "mamba_chunk_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": _VOCABULARY,
}
_LAYERS = 8
#: Heads, their size, and how often the hidden size goes into the two together, of state-space layers.
_STATES = (
    ("mamba_n_heads", "mamba_d_head", "mamba_expand"),
    ("n_mamba_heads", "mamba_headdim", "mamba_expand"),
    ("mamba_num_heads", "mamba_head_dim", "expand"),
)


@dataclass(frozen=True)
class Support:
    """Verdict on a model.

    Attributes:
        ok: Whether it can be served.
        reason: Why not; for a supported model what it is.
    """

    ok: bool
    reason: str


def check_support(model: str | os.PathLike[str] | PreTrainedConfig) -> Support:
    """Build a small stand-in with random weights from a model's configuration, and examine it as a real one would be.

    Args:
        model: "reader", "reader-plain", a folder, a hub id, or a configuration of transformers.

    Raises:
        ModelNotFoundError: There is no such model.
    """
    try:
        config = model if isinstance(model, PreTrainedConfig) else _configuration(locate(model))
    except UnsupportedModelError as error:
        return Support(False, str(error))
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        return Support(False, f"{kind} is an encoder-decoder; only decoder-only models can be served.")
    if not getattr(config.get_text_config(), "num_attention_heads", None):
        return Support(False, f"{kind} has no attention layers to give a memory to.")
    try:
        stand_in = _stand_in(config)
    except ValueError as error:
        return Support(False, f"{kind} is not a decoder-only language model of transformers ({_first_line(error)})")
    except Exception as error:
        reason = f"{type(error).__name__}: {_first_line(error)}"
        return Support(False, f"{kind} cannot be built from its configuration ({reason})")
    try:
        facts = examine(stand_in)
    except UnsupportedModelError as error:
        return Support(False, str(error))
    trained = getattr(config.get_text_config(), "max_position_embeddings", None)
    recurrent = any(slot.states for slot in facts.slots)
    return Support(
        True,
        kind
        + (f", trained for {trained:,} tokens" if trained else "")
        + ("; lookups in its layers with attention, recurrent layers keep their states" if recurrent else ""),
    )


def _configuration(where: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(where)
    except Exception as error:  # hub, file and schema errors of many kinds
        if os.path.exists(os.path.join(where, "config.json")):
            raise UnsupportedModelError(f"transformers cannot read its configuration: {_first_line(error)}") from error
        raise ModelNotFoundError(
            f"No model {where!r}: {_first_line(error)} Give a local folder, a Hugging Face hub id that this machine "
            "can reach, or 'reader'."
        ) from error


def _stand_in(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        small = _shrunk(config)
        kind = auto_class(small) or AutoModelForCausalLM
        model: PreTrainedModel = kind.from_config(small, dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:  # fresh norms are all ones, which hides what they do
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a model of the same make with few, narrow layers; of its text part alone where that is a model."""
    values = config.to_dict()
    text = config.get_text_config()
    small = type(text)(**_small(text, values if text is config else text.to_dict()))
    if text is config or auto_class(small) is not None:
        return small
    parts = {name: _shallow(values[name]) for name in config.sub_configs if isinstance(values.get(name), dict)}
    name = next(name for name in config.sub_configs if getattr(config, name, None) is text)
    whole = type(config)(**{**values, **parts, name: small.to_dict()})
    whole.eos_token_id = 1
    return whole


def _shallow(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a part that sees or hears, of a single layer."""
    return {name: 1 if name in ("depth", "num_hidden_layers", "num_layers") else x for name, x in values.items()}


def _small(text: Any, values: dict[str, Any]) -> dict[str, Any]:
    heads = text.num_attention_heads
    kv_heads = values.get("num_key_value_heads") or heads
    group = max(1, heads // kv_heads)
    hidden = 2 * group * (values.get("head_dim") or text.hidden_size // heads)
    changed: dict[str, Any] = {name: size for name, size in _SIZES.items() if isinstance(values.get(name), int)}
    changed |= {
        _own(text, "num_attention_heads"): 2 * group,
        _own(text, "hidden_size"): hidden,
        "vocab_size": _VOCABULARY,
    }
    changed |= {
        name: _VOCABULARY - 1 for name, value in values.items() if name.endswith("_token_id") and value is not None
    }
    changed |= {"bos_token_id": 1, "eos_token_id": 1}
    if isinstance(values.get("attention_hidden_size"), int):  # wider than the layers between
        changed["attention_hidden_size"] = values["attention_hidden_size"] // text.hidden_size * hidden
        changed["attention_head_dim"] = changed["attention_hidden_size"] // (2 * group)
    if "num_key_value_heads" in values:
        changed["num_key_value_heads"] = 2
    return {**values, **changed, **_states(values, hidden), **_layers(text, values)}


def _own(text: Any, name: str) -> str:
    """What a configuration calls one of the attributes that all have."""
    return str(text.attribute_map.get(name, name))


def _states(values: dict[str, Any], hidden: int) -> dict[str, Any]:
    """Sizes of recurrent layers that go with a hidden size."""
    changed: dict[str, Any] = {}
    for heads, size, times in _STATES:
        if all(isinstance(values.get(name), int) for name in (heads, size, times)):
            changed[heads] = max(1, values[times] * hidden // values[size])
            changed[size] = values[times] * hidden // changed[heads]
            changed |= {name: 1 for name in ("mamba_n_groups", "mamba_ngroups", "n_groups") if name in values}
            if values.get("mamba_d_ssm"):
                changed["mamba_d_ssm"] = changed[heads] * changed[size]
    if isinstance(values.get("linear_num_key_heads"), int):
        changed["linear_num_key_heads"] = 2
        changed["linear_num_value_heads"] = 2 * (values["linear_num_value_heads"] // values["linear_num_key_heads"])
    return changed


def _layers(text: Any, values: dict[str, Any]) -> dict[str, Any]:
    """A few layers, those of every kind at both ends among them, as some hand their keys on to the last ones."""
    total = text.num_hidden_layers
    kinds = getattr(text, "layers_block_type", None) or getattr(text, "layer_types", None) or [None] * total
    ends = [{kind: i for i, kind in order} for order in (enumerate(kinds), reversed(list(enumerate(kinds))))]
    kept = {i for end in ends for i in end.values()} if len(ends[0]) > 1 else set()
    kept |= set(range(min(total, max(0, _LAYERS - len(kept)))))
    kept |= set(range(min(total, _LAYERS))) if len(kept) < min(total, _LAYERS) else set()
    chosen = sorted(kept)
    changed: dict[str, Any] = {_own(text, "num_hidden_layers"): len(chosen)}
    for name, value in values.items():
        if isinstance(value, list) and len(value) == total:
            changed[name] = [_SIZES["intermediate_size"] if name == "intermediate_size" else value[i] for i in chosen]
    if isinstance(values.get("per_layer_config"), dict):
        known = {int(i): x for i, x in values["per_layer_config"].items()}
        changed["per_layer_config"] = {at: known[i] for at, i in enumerate(chosen) if i in known}
    for name in ("attn_layer_indices", "hybrid_layer_ids"):
        if values.get(name):
            changed[name] = [chosen.index(i) for i in values[name] if i in kept]
    if values.get("num_kv_shared_layers"):
        changed["num_kv_shared_layers"] = sum(i >= total - values["num_kv_shared_layers"] for i in chosen)
    return changed


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
