"""The reader's tokenizer: byte-level BPE over words, single digits, and its chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIALS = ("<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
BOS, END, PAD, SYSTEM, USER, ASSISTANT = range(6)
# What stands between them is not part of the answer. Added behind the vocabulary, and plain tokens, as in other models.
THOUGHTS = ("<think>", "</think>")
VOCABULARY = 2048
THINK, ANSWER = VOCABULARY, VOCABULARY + 1
# A space joins a following lower-case word or mark, but stands alone before capitals and digits,
# so that names and numbers have the same tokens wherever they stand.
PATTERN = r"\p{N}| ?\p{Ll}+|\p{Lu}\p{Ll}+|\p{Lu}+| ?[^\s\p{L}\p{N}]+|\p{L}+|\n+|\s"
CHAT_TEMPLATE = (
    "{{- '<|bos|>' -}}{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}"
    "{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think></think>' -}}{%- endif -%}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCABULARY) -> Tokenizer:
    """Learn the vocabulary from texts, and add the marks of thoughts behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # An answer may begin with a lower-case word as it stands inside a sentence, with its space; text has none there.
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in THOUGHTS])
    return tokenizer


def save_tokenizer_config(folder: Path, max_length: int) -> None:
    """Write what ``AutoTokenizer`` reads beside ``tokenizer.json``; ``max_length`` is the model's context in tokens."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
