"""Tiny random models of many architectures, each the size of a test."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_DIM = {"head_dim": 16}
_ROPE = {"rope_theta": 10000.0}


def _scaled(**kind: object) -> dict[str, object]:
    return {"rope_parameters": {**_ROPE, **kind}}


_LONG = {"short_factor": [1.0 + 0.05 * i for i in range(8)], "long_factor": [2.0 + 0.3 * i for i in range(8)]}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 24}

#: name -> (model_type, settings on top of the common ones)
SUPPORTED: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama-llama3": (
        "llama",
        _scaled(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "llama-yarn": ("llama", _scaled(rope_type="yarn", factor=8.0, original_max_position_embeddings=64)),
    "llama-linear": ("llama", _scaled(rope_type="linear", factor=4.0)),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-sliding": ("mistral", {"sliding_window": 24}),
    "ministral": ("ministral", {**_DIM, "layer_types": ["full_attention"] * 4}),
    "mixtral": ("mixtral", _MOE),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", _DIM),
    "qwen3_moe": ("qwen3_moe", {**_DIM, **_MOE}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {}),
    "phi3-longrope": (
        "phi3",
        {**_scaled(rope_type="longrope", **_LONG), "original_max_position_embeddings": 256},
    ),
    "gemma": ("gemma", _DIM),
    "gemma2": ("gemma2", {**_DIM, **_MIXED, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", {**_DIM, **_MIXED, "query_pre_attn_scalar": 16}),
    "glm": ("glm", _DIM),
    "glm4": ("glm4", _DIM),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {**_MIXED, **_DIM}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", _MIXED),
    "granite": ("granite", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.25}),
    "gpt_neox": ("gpt_neox", {}),
    "nemotron": ("nemotron", {}),
    "seed_oss": ("seed_oss", _DIM),
    "helium": ("helium", _DIM),
    "ernie4_5": ("ernie4_5", _DIM),
    "apertus": ("apertus", {}),
    "exaone4": ("exaone4", {**_DIM, **_MIXED}),
    "persimmon": ("persimmon", {"partial_rotary_factor": 0.5}),
    "gpt_oss": ("gpt_oss", {**_DIM, **_MIXED, **_MOE}),
}

_EAGER = ("gemma2", "gpt_oss", "bloom", "mamba")

#: Refused by name: the reason is part of the message.
REFUSED: dict[str, tuple[str, dict[str, object]]] = {
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "hunyuan": ("hunyuan_v1_dense", _DIM),
    "bloom": ("bloom", {}),
    "mamba": ("mamba", {}),
    "t5": ("t5", {}),
    "falcon": ("falcon", {"new_decoder_architecture": False, "multi_query": False}),
}


def build(model_type: str, settings: dict[str, object], seed: int = 0) -> PreTrainedModel:
    """A random model whose norms and biases are random as well, so that nothing hides behind ones and zeros."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**_BASE, **settings})
    kind = AutoModelForCausalLM
    if config.is_encoder_decoder:
        from transformers import AutoModelForSeq2SeqLM as kind
    # those without a stock sdpa attention are compared with their own plain one
    stock = "sdpa" if kind is AutoModelForCausalLM and model_type not in _EAGER else "eager"
    model = kind.from_config(config, attn_implementation=stock)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(4.0)
    return model.eval()
