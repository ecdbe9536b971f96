"""A tiny random Llama that writes printable text without end: for tests of the real engine that need no sense."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.integrations.byte_llama import byte_tokenizer, random_llama, save

TEMPLATE = (
    "<s>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
PRINTABLE = "abcdefghijklmnopqrstuvwxyz0123456789"


def save_tiny(folder: Path) -> str:
    """Write the checkpoint and return its path."""
    tokenizer = byte_tokenizer(SPECIALS, TEMPLATE)
    model = random_llama(tokenizer, 32)
    silent = [i for i in range(len(tokenizer)) if tokenizer.convert_ids_to_tokens(i) not in PRINTABLE]
    with torch.no_grad():
        model.get_output_embeddings().weight[silent] = 0.0
    return save(folder, model, tokenizer)
