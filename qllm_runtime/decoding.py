"""From logits to tokens and from tokens to text: sampling, stop strings, incremental detokenisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qllm_runtime.errors import InvalidConfigError
from qllm_runtime.types import Sampling, TokenLogprob

_GREEDY = 1e-6  # temperatures below it


def check_sampling(sampling: Sampling) -> None:
    """Refuse settings out of range.

    Raises:
        InvalidConfigError: Names the setting, its value and the range.
    """
    most = 2**31 - 1
    rules: list[tuple[str, Callable[[Any], bool], str]] = [
        ("max_tokens", lambda x: _whole(x) and 1 <= x <= most, f"a whole number from 1 to {most}"),
        ("temperature", lambda x: 0 <= x < float("inf"), "at least 0 (0 is greedy)"),
        ("top_p", lambda x: x is None or 0 < x <= 1, "above 0 and at most 1"),
        ("top_k", lambda x: x is None or (_whole(x) and x >= 1), "a whole number of at least 1"),
        ("min_p", lambda x: x is None or 0 <= x <= 1, "between 0 and 1"),
        ("repetition_penalty", lambda x: x is None or 0 < x < float("inf"), "above 0"),
        ("seed", lambda x: x is None or (_whole(x) and 0 <= x < 2**63), "a whole number from 0 to 2**63 - 1"),
        (
            "stop",
            lambda x: not isinstance(x, str) and all(isinstance(s, str) and s for s in x),
            "a sequence of non-empty strings",
        ),
        ("logprobs", lambda x: x is None or (_whole(x) and 0 <= x <= 50), "a whole number from 0 to 50"),
    ]
    for name, rule, expected in rules:
        value = getattr(sampling, name)
        try:
            fine = rule(value)
        except (TypeError, ValueError):  # numpy arrays raise the latter
            fine = False
        if not fine:
            raise InvalidConfigError(f"{name}={value!r} is out of range: it must be {expected}.")


def _whole(x: Any) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)


class Sampler:
    """Chooses the next token of one row.

    Args:
        sampling: Settings; greedy at temperatures below 1e-6 (float32 may not hold logits divided by less).
        processors: Further processors; they see unmodified logits, before any truncation.
    """

    def __init__(self, sampling: Sampling, processors: Sequence[LogitsProcessor] = ()) -> None:
        check_sampling(sampling)
        self.processors = tuple(processors)
        chain: list[Any] = []
        if sampling.repetition_penalty is not None and sampling.repetition_penalty != 1:
            chain.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
        chain.extend(processors)
        self._greedy = sampling.temperature < _GREEDY
        if not self._greedy:
            if sampling.temperature != 1:
                chain.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k is not None:
                chain.append(TopKLogitsWarper(int(sampling.top_k)))
            if sampling.top_p is not None and sampling.top_p < 1:
                chain.append(TopPLogitsWarper(float(sampling.top_p)))
            if sampling.min_p:
                chain.append(MinPLogitsWarper(float(sampling.min_p)))
        self._chain = LogitsProcessorList(chain)
        self._generator: torch.Generator | None = None
        self._seed = None if sampling.seed is None else int(sampling.seed)
        self._n_logprobs = None if sampling.logprobs is None else int(sampling.logprobs)
        self.ids: list[int] = []

    def choose(self, logits: torch.Tensor) -> int:
        """Pick the token that follows `ids`, given its logits [vocab], and append it to `ids`."""
        scores = logits[None].float()
        if self._chain:
            scores = self._chain(torch.tensor([self.ids], dtype=torch.long, device=logits.device), scores)
        if self._greedy:
            token = int(scores.argmax(-1))
        else:
            if self._generator is None:
                self._generator = torch.Generator(device=logits.device)
                if self._seed is None:
                    self._generator.seed()
                else:
                    self._generator.manual_seed(self._seed)
            token = int(torch.multinomial(torch.softmax(scores, -1), 1, generator=self._generator))
        self.ids.append(token)
        self._scores = scores[0]
        return token

    def logprob(self, tokenizer: Any) -> TokenLogprob | None:
        """Log-probability of the last token and its best alternatives under the distribution it was drawn from."""
        if self._n_logprobs is None:
            return None
        logprobs = torch.log_softmax(self._scores, -1)

        def name(token: int) -> str:
            return "" if tokenizer is None else str(tokenizer.decode([token]))

        best = logprobs.topk(min(self._n_logprobs, len(logprobs)))
        possible = best.values > float("-inf")  # processors may have ruled out the rest
        top = zip(best.indices[possible].tolist(), best.values[possible].tolist(), strict=True)
        token = self.ids[-1]
        return TokenLogprob(name(token), token, float(logprobs[token]), tuple((name(t), t, p) for t, p in top))


class TextStream:
    """Turns tokens into text as they come, never splitting a character and never showing any of a stop string.

    Args:
        tokenizer: Decodes the ids.
        stop: Strings that end the text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._context = self._read = 0  # tokens decoded again for context, tokens turned into text
        self._held = ""
        self._shown = 0  # characters given out
        self._leads = False
        self.stopped = False

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def lead(self) -> None:
        """Leave out white space ahead of the next text."""
        self._leads = True

    def push(self, token: int) -> str:
        """The text that is certain after this token."""
        self._ids.append(token)
        return self._count(self._advance(final=False))

    def finish(self) -> str:
        """The text held back so far."""
        return self._count(self._advance(final=True))

    def kept(self) -> list[int]:
        """The tokens that lie before the stop string."""
        ids = list(self._ids)
        while ids and len(self._decode(ids)) > self._shown:
            ids.pop()
        return ids

    def _count(self, text: str) -> str:
        self._shown += len(text)
        return text

    def _advance(self, final: bool) -> str:
        if self.stopped:
            return ""
        known = self._decode(self._ids[self._context : self._read])
        text = self._decode(self._ids[self._context :])
        # an incomplete character decodes to the replacement character; wait for the rest of it
        if len(text) > len(known) and (final or not text.endswith("\ufffd")):
            self._held += text[len(known) :]
            self._context, self._read = self._read, len(self._ids)
        if self._leads:
            self._held = self._held.lstrip()
            self._leads = not self._held
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            ready, self._held = self._held[: min(found)], ""
            return ready
        keep = 0 if final else self._partial_stop()
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready

    def _partial_stop(self) -> int:
        """Length of the longest end of the held text that may become a stop string."""
        longest = 0
        for stop in self._stop:
            for n in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:n]):
                    longest = n
                    break
        return longest
