"""A tiny random model with a byte-level tokenizer: enough for everything that needs no sense."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qllm_runtime.config import MemoryConfig

TEMPLATE = (
    "<s>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
MEMORY = MemoryConfig(
    n_init=8, n_local=48, block_size=8, topk=2, repr_topk=2, exec_block_size=16, chunk_size=64, query_weight=2.0
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and one for the word `the`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*SPECIAL, *alphabet, "th", "the"]
    backend = Tokenizer(
        models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[("t", "h"), ("th", "e")])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", additional_special_tokens=SPECIAL[2:]
    )
    fast.chat_template = TEMPLATE
    return fast


def model(seed: int = 0, vocab_size: int = 264, ends: bool = False) -> LlamaForCausalLM:
    """`ends`: end tokens are as likely as others, otherwise they never come."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    network = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(4.0 if parameter.ndim == 2 else 1.0)
        if not ends:
            network.lm_head.weight[: len(SPECIAL)] = 0
    return network
