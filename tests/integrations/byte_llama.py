"""A small random Llama with one token per byte: what the tiny models of both integrations are made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def byte_tokenizer(specials: Sequence[str], template: str | None = None, **settings: Any) -> PreTrainedTokenizerFast:
    """The first two of `specials` begin and end a text."""
    vocabulary = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    return fast_tokenizer(backend, specials, template, **settings)


def fast_tokenizer(
    backend: Tokenizer, specials: Sequence[str], template: str | None = None, **settings: Any
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of transformers around `backend`."""
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=specials[0],
        eos_token=specials[1],
        additional_special_tokens=list(specials[2:]),
        **settings,
    )
    tokenizer.chat_template = template
    return tokenizer


def random_llama(tokenizer: PreTrainedTokenizerFast, hidden_size: int, seed: int = 0) -> LlamaForCausalLM:
    """Two layers, four heads over two."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> str:
    """Write a checkpoint and return its path."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
