"""The story made on the spot: the same everywhere, in English, with its facts in it."""

from __future__ import annotations

import re

from qllm_runtime.samples import sample_document


def test_a_seed_gives_one_text_with_its_facts() -> None:
    text, questions = sample_document(3, n_facts=12, min_chars=20_000)
    assert (text, questions) == sample_document(3, n_facts=12, min_chars=20_000)
    assert text != sample_document(4, n_facts=12, min_chars=20_000)[0]
    assert len(text) >= 20_000
    assert len({question for question, _ in questions}) == 12
    for _, answer in questions:
        assert set(re.findall(r"\w+", answer)) - {"The", "number"} <= set(re.findall(r"\w+", text))


def test_articles() -> None:
    for seed in range(4):
        text, questions = sample_document(seed, n_facts=48, min_chars=60_000)
        text += " ".join(answer for _, answer in questions)
        assert not re.findall(r"\b[Aa] (?:[aeiou]|honest)\w*", text)
        assert not re.findall(r"\b[Aa]n (?!honest)[^aeiou\W]\w*", text)
