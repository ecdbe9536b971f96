"""A tiny Llama whose answer is known: whatever it reads, it says "Ishmael" and wants to stop. Its lookups are random
but real.

A token decides the next one: I -> s -> h -> m -> a -> e -> l -> end, a digit -> end, anything else -> I. One hidden
dimension per state carries that through the residual stream; all other weights are random.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPLY = "Ishmael"
BOS, EOS, START, END = "<s>", "</s>", "<|start|>", "<|end|>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([BOS, EOS, START, END, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _fast(backend)


def _fast(backend: Tokenizer) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[START, END],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast


def model(tokens: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """The model; `seed` draws the random part."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        tie_word_embeddings=False,
    )
    llama = LlamaForCausalLM(config).eval()
    chain = [*tokens.convert_tokens_to_ids(list(REPLY)), tokens.eos_token_id]
    state = dict.fromkeys(range(len(tokens)), 0) | {token: i + 1 for i, token in enumerate(chain[:-1])}
    state |= dict.fromkeys(tokens.convert_tokens_to_ids(list("0123456789")), len(chain) - 1)
    with torch.no_grad():
        embedding, head = llama.get_input_embeddings().weight, llama.get_output_embeddings().weight
        embedding[:, : len(chain)] = 0
        head[:, : len(chain)] = 0
        for token, wanted in state.items():
            embedding[token, wanted] = 1.0
        for i, token in enumerate(chain):
            head[token, i] = 1.0
    return llama


def save(folder: Path, seed: int = 0) -> str:
    """Write model and tokenizer as a checkpoint and return its path."""
    tokens = tokenizer()
    model(tokens, seed).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return str(folder)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges cross words, so that text is cut differently depending on what stands around it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[BOS, EOS, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "Who wrote the letter? And who read it?\n\nThink.\n\nWho wrote the letter? Be brief. Call me Ishmael. user\n"
    backend.train_from_iterator([text] * 20, trainer)
    return _fast(backend)
