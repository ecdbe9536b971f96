"""Tokenizers of several kinds, trained on a few sentences, and how transformers wraps them."""

import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "Who wrote the letter? It was a dark and stormy night; the rain fell in torrents.\r\n\r\nThe captain said: I know.",
    "system user assistant model System: User: Assistant: [INST] [/INST] Be good. <|im_start|> <s> naïve café 12345 \t",
] * 50


def _train(model, trainer, pre_tokenizer, decoder, normalizer=None):
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _byte_level(add_prefix_space=False):
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _train(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
        pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space),
        decoders.ByteLevel(),
    )


def _bpe_vocabulary():
    trained = _train(
        models.BPE(unk_token="<unk>"),
        trainers.BpeTrainer(
            vocab_size=500, special_tokens=[*SPECIAL, *(f"<0x{b:02X}>" for b in range(256))], show_progress=False
        ),
        pre_tokenizers.Metaspace(prepend_scheme="always"),
        decoders.Metaspace(),
    )
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _llama_like(scheme):
    """BPE with byte fallback: the prefix comes from the normalizer (legacy) or from Metaspace ("first", "always")."""
    vocabulary, merges = _bpe_vocabulary()
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def _unigram():
    return _train(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=300,
            special_tokens=SPECIAL,
            unk_token="<unk>",
            show_progress=False,
            initial_alphabet=[chr(c) for c in range(32, 127)] + list("\r\n\t▁ïéé👩‍🚀"),
        ),
        pre_tokenizers.Metaspace(prepend_scheme="first"),
        decoders.Metaspace(prepend_scheme="first"),
    )


BUILDERS = {
    "byte-level": _byte_level,
    "byte-level-prefix": lambda: _byte_level(add_prefix_space=True),
    "llama-first": lambda: _llama_like("first"),
    "llama-always": lambda: _llama_like("always"),
    "llama-legacy": lambda: _llama_like("legacy"),
    "unigram": _unigram,
}


def wrap(backend, template=CHATML, adds_bos=False):
    if adds_bos:
        backend = Tokenizer.from_str(backend.to_str())
        bos = backend.token_to_id("<s>")
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    if template:
        tokenizer.chat_template = template
    return tokenizer
