"""Whether a model can be served, found out from its configuration alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qllm_runtime.errors import ModelNotFoundError, UnsupportedModelError
from qllm_runtime.seam import examine

# sizes of the stand-in; everything else (kinds of layers, rotation, norms, caps) stays as configured
_SIZES = {
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 128,
}
_LAYERS = 8


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
        model: A folder, a hub id, or a configuration of transformers.

    Raises:
        ModelNotFoundError: There is no such model.
    """
    try:
        config = model if isinstance(model, PreTrainedConfig) else _configuration(os.fspath(model))
    except UnsupportedModelError as error:
        return Support(False, str(error))
    kind = config.model_type
    if not getattr(config.get_text_config(), "num_attention_heads", None):
        return Support(False, f"{kind} has no attention layers to give a memory to.")
    try:
        stand_in = _stand_in(config)
    except ValueError as error:
        return Support(False, f"{kind} is no decoder-only language model of transformers ({_first_line(error)})")
    except Exception as error:
        reason = f"{type(error).__name__}: {_first_line(error)}"
        return Support(False, f"{kind} cannot be built from its configuration ({reason})")
    try:
        examine(stand_in)
    except UnsupportedModelError as error:
        return Support(False, str(error))
    trained = getattr(config.get_text_config(), "max_position_embeddings", None)
    return Support(True, f"{kind}" + (f", trained for {trained:,} tokens" if trained else ""))


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
        model: PreTrainedModel = AutoModelForCausalLM.from_config(_shrunk(config), dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:  # fresh norms are all ones, which hides what they do
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _shrunk(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a model of the same make with few, narrow layers."""
    values = config.to_dict()
    text = config.get_text_config()
    small = type(text)(**_small(text, values if text is config else text.to_dict()))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(small, name, None if name == "pad_token_id" else 1)
    return small


def _small(text: Any, values: dict[str, Any]) -> dict[str, Any]:
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    group = max(1, heads // kv_heads)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    changed: dict[str, Any] = {name: size for name, size in _SIZES.items() if isinstance(values.get(name), int)}
    changed["num_attention_heads"] = 2 * group
    if "num_key_value_heads" in values:
        changed["num_key_value_heads"] = 2
    changed["hidden_size"] = 2 * group * head_dim
    changed["vocab_size"] = 128
    layers = min(text.num_hidden_layers, _LAYERS)
    changed["num_hidden_layers"] = layers
    for name, value in values.items():
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            changed[name] = value[:layers]
    return {**values, **changed}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
