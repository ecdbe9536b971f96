"""A tiny Llama whose answer is known: whatever it reads, it says "Ishmael" and wants to stop. Its lookups are random
but real.

A token decides the next one: I -> s -> h -> m -> a -> e -> l -> end, a digit -> end, anything else -> I. One hidden
dimension per state carries that through the residual stream; all other weights are random.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.integrations import byte_llama

REPLY = "Ishmael"
SPECIALS = ("<s>", "</s>", "<|start|>", "<|end|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    return byte_llama.byte_tokenizer(SPECIALS, TEMPLATE, clean_up_tokenization_spaces=False)


def model(tokens: PreTrainedTokenizerFast, seed: int = 0, reply: str = REPLY) -> LlamaForCausalLM:
    """The model; `seed` draws the random part. No byte of `reply` may come twice."""
    llama = byte_llama.random_llama(tokens, 64, seed)
    chain = [*tokens.encode(reply, add_special_tokens=False), tokens.eos_token_id]
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


def save(folder: Path, seed: int = 0, reply: str = REPLY) -> str:
    """Write model and tokenizer as a checkpoint and return its path."""
    tokens = tokenizer()
    return byte_llama.save(folder, model(tokens, seed, reply), tokens)


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges cross words, so that text is cut differently depending on what stands around it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "Who wrote the letter? And who read it?\n\nThink.\n\nWho wrote the letter? Be brief. Call me Ishmael. user\n"
    backend.train_from_iterator([text] * 20, trainer)
    return byte_llama.fast_tokenizer(backend, SPECIALS, TEMPLATE, clean_up_tokenization_spaces=False)
