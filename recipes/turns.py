"""One question as a turn of a chat: its thought, its answer, and what their tokens weigh."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tokenizers import Tokenizer

from qllm_bench.questions.facts import Question
from recipes.tokenizer import ANSWER, END, THINK

FIRST_WEIGHT = 3.0
BRANCH = 8  # characters of a quote that weigh more where it parts from other statements
REST_WEIGHT = 0.2  # of what an answer repeats from its question
ABSENT_WEIGHT = 1.5  # of what decides for declining
DIRECT = 0.3  # share of the turns that are to be answered without a thought
Span = tuple[int, int]


def turn(
    rng: random.Random, tokenizer: Tokenizer, question: Question, depths: Sequence[float], statements: Sequence[str]
) -> tuple[list[int], list[int], list[float]]:
    """Question tokens, tokens of thought and answer with the end mark, and the weights of the latter.

    A value alone is found in two steps: a thought quotes what the text says about the question, the answer picks from it.

    Args:
        rng: Decides whether there is a thought.
        tokenizer: The reader's tokenizer.
        question: The question.
        depths: Where in the document each statement stands; several values are told in that order.
        statements: What the document states.
    """
    values, quotes = list(question.values), list(question.quotes)
    text = question.answer
    told = bool(values) and text == " ".join(quotes)
    if len(values) > 1:
        order = sorted(range(len(values)), key=lambda i: depths[question.needs[i]])
        values, quotes = [values[i] for i in order], [quotes[i] for i in order]
        text = " ".join(quotes) if told else text.replace(", ".join(question.values), ", ".join(values))
    # A lower-case word keeps the space it has inside a sentence, so that its tokens can be copied from there; what
    # stands in quotes has none.
    quoted = any(f'"{v}' in statements[i] for v in values[:1] for i in question.needs)
    space = " " * int(text[:1].islower() and not quoted)
    decide = 1.0 if values else ABSENT_WEIGHT
    ids: list[int] = []
    weights: list[float] = []
    if rng.random() < DIRECT:
        ids, weights = [THINK, ANSWER], [0.0, 0.0]
    elif question.short and values:
        found = quoted_in(question, values, quotes, statements)
        inner, marked = weighted(tokenizer, " ".join(quotes), found, FIRST_WEIGHT, 1.0)
        ids, weights = [THINK, *inner, ANSWER], [1.0, *marked, 1.0]
    found = quoted_in(question, values, quotes, statements) if told else values_in(text, question, values)
    first = FIRST_WEIGHT if values and len(ids) < 3 else decide
    answer, marked = weighted(
        tokenizer, space + text, [(a + len(space), b + len(space)) for a, b in found], first, decide
    )
    # The first two tokens decide between answering and declining.
    marked = [max(weight, decide) if i < 2 else weight for i, weight in enumerate(marked)]
    weights = [*weights, *marked, 1.0 if question.short else 0.3]
    asked = tokenizer.encode(question.text, add_special_tokens=False)
    return list(asked.ids), [*ids, *answer, END], weights


def weighted(
    tokenizer: Tokenizer, text: str, spans: Sequence[Span], first: float, rest: float
) -> tuple[list[int], list[float]]:
    """Tokens of a text with their weights: `first` and `rest` for those of the given spans."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    weights = [REST_WEIGHT] * len(encoding.ids)
    for span in spans:
        a, b = token_span(encoding.offsets, span, 0)
        for i in range(a, min(b + 1, len(weights))):
            weights[i] = max(weights[i], first if i == a else rest)
    return list(encoding.ids), weights


def quoted_in(
    question: Question, values: Sequence[str], quotes: Sequence[str], statements: Sequence[str]
) -> list[Span]:
    """Where quotes, joined by spaces, name what had to be found.

    That is where each begins, its value or what stands between two hops, and wherever another statement that begins with
    the same words goes on with others.
    """
    spans: list[Span] = []
    start = 0
    for n, quote in enumerate(quotes):
        begins = {parting(quote, other) for other in statements} - {len(quote)} | {0}
        spans += [(start + at, start + min(len(quote), at + BRANCH)) for at in begins]
        if values:
            value = values[n] if len(values) > 1 else values[0] if n == len(quotes) - 1 else question.middle
            at = max(0, quote.lower().find(value.lower()))
            spans.append((start + at, start + at + len(value)))
        start += len(quote) + 1
    return spans


def values_in(text: str, question: Question, values: Sequence[str]) -> list[Span]:
    """Where an answer in words of its own names the values, or declines."""
    spans: list[Span] = []
    at = max(0, text.rfind(", ".join(values))) if values and not question.short else 0
    for v in values or ("text",):
        start = text.find(v, at)
        at = start + len(v)
        spans.append((start, at))
    return spans


def parting(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def token_span(offsets: Sequence[tuple[int, int]], span: tuple[int, int], shift: int) -> tuple[int, int]:
    """Tokens that overlap a character span, as a half-open range moved by ``shift``."""
    inside = [i for i, (a, b) in enumerate(offsets) if a < span[1] and b > span[0]]
    return (inside[0] + shift, inside[-1] + 1 + shift) if inside else (shift, shift)
