"""Keyword arguments of a request: those of `QLLM.ask`, `stream`, `chat`, `generate`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict

from qllm_runtime.errors import InvalidConfigError, InvalidRequestError
from qllm_runtime.types import Mode, Progress, Sampling

if TYPE_CHECKING:
    from transformers import LogitsProcessor

    from qllm_runtime.memory.record import LayerLookupHook


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen: the fields of `Sampling` one by one, or all of them as `sampling`."""

    sampling: Sampling | None
    max_tokens: int
    temperature: float
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    logprobs: int | None


class AskOptions(SamplingOptions, total=False):
    """Options of `QLLM.ask` and `QLLM.stream`.

    Attributes:
        mode: "query_aware" or "read_once"; by default `request.DEFAULT_MODE`, query_aware for `faithful`.
        reread: Whether the passages behind a draft are read again, next to the question, before the answer is written, when
            documents are longer than the window and looked up in; they are by default.
        progress: Called with (tokens read, tokens in all). The first question about a long text (8192 tokens or more) counts
            a story of about 2,000 tokens as well: each model reads it once, which tells the layer whose lookups find facts.
        on_lookup: Called with (layer, record) for every lookup while reading and writing, as it happens.
        cancel: Set it to stop within one chunk or one token.
    """

    mode: Mode | None
    reread: bool
    progress: Progress | None
    on_lookup: LayerLookupHook | None
    cancel: threading.Event | None


class ChatOptions(AskOptions, total=False):
    """Options of `QLLM.chat` and `QLLM.chat_stream`.

    Attributes:
        tools: Tools in the format of OpenAI functions, for the chat template.
        logits_processors: Fresh processors for this request, e.g. of a grammar; applied before any truncation.
        template_kwargs: Further variables for the chat template.
    """

    tools: Sequence[Mapping[str, Any]] | None
    logits_processors: Sequence[LogitsProcessor] | None
    template_kwargs: Mapping[str, Any] | None


def _list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


# what nothing else checks: whether a value has the right type, and what is expected
_TYPES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "sampling": (lambda x: isinstance(x, Sampling), "a Sampling"),
    "reread": (lambda x: isinstance(x, bool), "True or False"),
    "progress": (callable, "a function of (tokens read, tokens in all)"),
    "on_lookup": (callable, "a function of (layer, record)"),
    "cancel": (lambda x: callable(getattr(x, "is_set", None)), "a threading.Event"),
    "tools": (lambda x: _list(x) and all(isinstance(tool, Mapping) for tool in x), "a list of dictionaries"),
    "logits_processors": (lambda x: _list(x) and all(map(callable, x)), "a list of logits processors"),
    "template_kwargs": (lambda x: isinstance(x, Mapping), "a dictionary"),
}


def split(options: Mapping[str, Any], kind: type) -> tuple[Sampling, dict[str, Any]]:
    """The sampling settings of a request, and its other options.

    Args:
        options: Keyword arguments of the caller.
        kind: One of the classes above: what is known.

    Raises:
        InvalidConfigError: An option has an unknown name.
        InvalidRequestError: An option has a value of the wrong type.
    """
    known: frozenset[str] = kind.__optional_keys__  # type: ignore[attr-defined]
    unknown = sorted(options.keys() - known)
    if unknown:
        raise InvalidConfigError(f"Unknown option {', '.join(unknown)}; known are: {', '.join(sorted(known))}.")
    for name, (fits, expected) in _TYPES.items():
        value = options.get(name)
        if not (value is None or fits(value)):
            raise InvalidRequestError(f"{name}= is of type {type(value).__name__}; it takes {expected}.")
    rest = dict(options)
    sampling = rest.pop("sampling", None) or Sampling()
    changes = {name: rest.pop(name) for name in Sampling.__dataclass_fields__ if name in rest}
    if "stop" in changes:
        stop = changes["stop"]
        if stop is None:
            changes["stop"] = ()
        elif isinstance(stop, str):
            changes["stop"] = (stop,)
        elif isinstance(stop, Iterable):  # anything else is refused where settings are checked
            changes["stop"] = tuple(stop)
    return replace(sampling, **changes), rest
