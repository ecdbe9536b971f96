"""Tiny random models of many architectures, each the size of a test."""

from __future__ import annotations

from functools import cache

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qllm_runtime.config import MemoryConfig

N = 100
WIDE = MemoryConfig(n_local=128, exec_block_size=16, chunk_size=32, n_init=4, block_size=16)
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
_LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 12, "head_dim": 8, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
_CONV = {"layer_types": ["conv", "full_attention"] * 2}
_SSM = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2,
    "mamba_chunk_size": 16,
}  # fmt: skip
_SHARED_KV = {
    "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 128, "num_kv_shared_layers": 2, "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip
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
    "afmoe": ("afmoe", {**_DIM, **_MIXED, **_MOE, "num_dense_layers": 1, "num_shared_experts": 1}),
    "jetmoe": ("jetmoe", {"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "minimax_m2": ("minimax_m2", {**_DIM, **_MOE}),
    "nanochat": ("nanochat", {}),
    "modernbert-decoder": ("modernbert-decoder", {**_MIXED, "num_key_value_heads": 4}),
    # keys and values that are made from a latent, rotated only in part
    "deepseek_v2": ("deepseek_v2", {**_LATENT, "topk_method": "greedy", "moe_intermediate_size": 48, "num_experts_per_tok": 2}),
    "deepseek_v3": ("deepseek_v3", {**_LATENT, "moe_intermediate_size": 48, "num_experts_per_tok": 2}),
    "deepseek_v3-yarn": (
        "deepseek_v3",
        {**_LATENT, "moe_intermediate_size": 48, "num_experts_per_tok": 2,
         **_scaled(rope_type="yarn", factor=8.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=1.0)},
    ),
    "glm4_moe_lite": ("glm4_moe_lite", {**_LATENT, "moe_intermediate_size": 48, "num_experts_per_tok": 2}),
    "minicpm3": ("minicpm3", _LATENT),
    # layers that use keys and values of others
    "gemma3n": ("gemma3n_text", {**_DIM, **_SHARED_KV, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4}),
    "gemma4": ("gemma4_text", {**_DIM, **_SHARED_KV, "global_head_dim": 32}),
    # recurrent layers between, or beside, those with attention
    "qwen3_next": ("qwen3_next", {**_DIM, **_MOE, **_DELTA, "shared_expert_intermediate_size": 48}),
    "qwen3_5": ("qwen3_5_text", {**_DIM, **_DELTA}),
    "olmo_hybrid": ("olmo_hybrid", {**_DELTA, "linear_num_value_heads": 2}),
    "kimi_linear": ("kimi_linear", {**_LATENT, **_MOE, "layer_types": _DELTA["layer_types"]}),
    "lfm2": ("lfm2", _CONV),
    "lfm2_moe": ("lfm2_moe", {**_CONV, **_MOE, "num_dense_layers": 1}),
    "bamba": ("bamba", {**_SSM, "attn_layer_indices": [1, 3]}),
    "falcon_h1": ("falcon_h1", {**_SSM, "mamba_d_ssm": 128}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {**_SSM, "layer_types": ["mamba", "attention"] * 2, "position_embedding_type": None, "shared_intermediate_size": 48,
         "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "nemotron_h": (
        "nemotron_h",
        {**_DIM, "layers_block_type": ["mamba", "attention", "mlp", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 16,
         "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16},
    ),
    "zamba2": (
        "zamba2",
        {"num_mem_blocks": 1, "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_expand": 2, "mamba_d_state": 16,
         "use_mem_rope": True, "attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4,
         "layers_block_type": ["mamba", "hybrid"] * 2, "chunk_size": 16},
    ),
}  # fmt: skip

#: Rounding grows in these where weights are large.
_SENSITIVE = ("gemma4_text", "minicpm3", "nemotron_h", "zamba2")
_EAGER = ("gemma2", "gpt_oss", "bloom", "mamba")

#: Refused by name: the reason is part of the message.
REFUSED: dict[str, tuple[str, dict[str, object]]] = {
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "hunyuan": ("hunyuan_v1_dense", _DIM),
    "diffllama": ("diffllama", {}),
    "doge": ("doge", {}),
    "jamba": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4, "mamba_d_state": 16}),
    "recurrent_gemma": ("recurrent_gemma", {"lru_width": 64, "attention_window_size": 32, "head_dim": 16}),
    "llama4": (
        "llama4_text",
        {**_DIM, "attention_chunk_size": 32, "num_local_experts": 4, "intermediate_size_mlp": 96},
    ),
    "deepseek_v32": ("deepseek_v32", {**_LATENT, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 16}),
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
                parameter.mul_(2.0 if model_type in _SENSITIVE else 4.0)
    return model.eval()


@cache
def model_of(name: str) -> PreTrainedModel:
    return build(*SUPPORTED[name])


def text(model: PreTrainedModel, n: int = N) -> torch.Tensor:
    """Distinct tokens: repeated ones have equal keys in the first layer, hence blocks of equal score."""
    return 3 + torch.randperm(model.config.vocab_size - 3, generator=torch.Generator().manual_seed(1))[None, :n]


def stock(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    spread = max(1.0, expected.std().item())
    torch.testing.assert_close(actual / spread, expected / spread, atol=1e-5, rtol=0)
