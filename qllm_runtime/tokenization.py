"""Segments as token ids: template text as the model's tokenizer reads it, other text inert and without a prefix."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qllm_runtime.errors import CancelledError, InvalidRequestError, UnsupportedModelError
from qllm_runtime.types import Cancelled, never

_CACHE: weakref.WeakKeyDictionary[Any, tuple[tuple[str, int], SegmentTokenizer]] = weakref.WeakKeyDictionary()

#: Pairs of marks that reasoning models think between, each a token of its own in their vocabularies.
THOUGHT_MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>"))
CHUNK = 16384  # characters tokenised at a time; short, so that event loops of other threads go on in between
_LINE_START = re.compile(r"\n(?=\w)")


class SegmentTokenizer:
    """Tokenises the segments of a prompt one by one.

    Documents, questions and other texts go through a private copy of the tokenizer in which special tokens are ordinary
    characters (no chat markup in a document can act as such) and which puts no space ahead of a text that stands in the
    middle of a prompt (SentencePiece-style tokenizers do). Being private it is also safe to use from any thread and
    does not truncate.

    Attributes:
        control: Matches every token that may act as markup: special tokens, marks of thoughts, and added tokens of
            the template.
        prefixes: Whether the tokenizer puts a space ahead of a text of its own accord.
    """

    control: re.Pattern[str] | None
    prefixes: bool

    def __init__(self, tokenizer: Any, template: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not hasattr(backend, "to_str"):
            raise UnsupportedModelError(
                f"{type(tokenizer).__name__} is not a fast tokenizer; save the tokenizer in the tokenizer.json format."
            )
        from tokenizers import Tokenizer

        try:
            specification = json.loads(backend.to_str())
        except Exception as error:  # custom Python components cannot be serialised
            raise UnsupportedModelError(f"{type(tokenizer).__name__} cannot be copied: {error}") from error
        added = {token["content"]: token for token in specification["added_tokens"]}
        thoughts = {mark for marks in THOUGHT_MARKS for mark in marks}
        control = {c for c, token in added.items() if token["special"] or c in template or c in thoughts}
        control |= {token for token in tokenizer.all_special_tokens if token in added}
        control = {content for content in control if content.strip()}
        for content in control:
            added[content]["special"] = True
        specification.update(
            truncation=None,
            padding=None,
            post_processor=None,
            normalizer=_without_prefix(specification["normalizer"]),
            pre_tokenizer=_without_prefix(specification["pre_tokenizer"]),
        )
        self._inert = Tokenizer.from_str(json.dumps(specification))
        self._inert.encode_special_tokens = True
        self._tokenizer = weakref.proxy(tokenizer)
        self._markup = {int(added[content]["id"]): content for content in control}
        longest_first = sorted(control, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first))) if control else None
        self.prefixes = self._parse("a") != self._inert.encode("a", add_special_tokens=False).ids

    @classmethod
    def of(cls, tokenizer: Any, template: str) -> SegmentTokenizer:
        """The one for this tokenizer; built once."""
        key = (template, len(tokenizer))
        cached = _CACHE.get(tokenizer)
        if cached is None or cached[0] != key:
            cached = (key, cls(tokenizer, template))
            _CACHE[tokenizer] = cached
        return cached[1]

    def template(self, text: str, *, first: bool) -> list[int]:
        """Ids of template text, special tokens parsed. `first`: it opens the prompt."""
        if first or not self.prefixes:
            return self._parse(text)
        match = self.control.search(text) if self.control else None
        cut = match.start() if match else len(text)
        head = self._inert.encode(text[:cut], add_special_tokens=False).ids
        return [*head, *(self._parse(text[cut:]) if cut < len(text) else [])]

    def text(
        self, text: str, *, space: bool = False, cancelled: Cancelled = never
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and character offsets [n, 2] of any other text, special tokens inert.

        Args:
            text: The text.
            space: A space ahead of it belongs to its first word (and to no offset).
            cancelled: Polled every few thousand words.

        Raises:
            CancelledError: `cancelled` returned True.
        """
        shift = 1 if space else 0
        text = " " * shift + text
        edges = _chunk_edges(text)
        parts = []
        for a, b in pairwise(edges):
            if cancelled():
                raise CancelledError("Cancelled before the text was read.")
            parts.append(self._encode(text[a:b]))
        return concatenate([ids for ids, _ in parts]), np.maximum(_shifted(parts, edges) - shift, 0)

    def _parse(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"])

    def _encode(self, text: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        # encode_batch lets other threads run, encode does not
        encoding = self._inert.encode_batch([text], add_special_tokens=False)[0]
        ids = np.array(encoding.ids, dtype=np.int64)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        cuts = self._cuts(text, ids, offsets)
        if not cuts:
            return ids, offsets
        edges = [0, *cuts, len(text)]
        parts = [self._encode(text[a:b]) for a, b in pairwise(edges)]
        return concatenate([ids for ids, _ in parts]), _shifted(parts, edges)

    def _cuts(self, text: str, ids: NDArray[np.int64], offsets: NDArray[np.int64]) -> list[int]:
        """Where to cut the text because the vocabulary itself (not the added tokens) spells markup in one piece."""
        cuts: list[int] = []
        for index in np.flatnonzero(np.isin(ids, list(self._markup))).tolist():
            content = self._markup[int(ids[index])]
            start, end = offsets[index].tolist()
            at = text.find(content, start, end)
            if at < 0:  # an unknown character
                continue
            if len(content) == 1:
                raise InvalidRequestError(
                    f"The text holds {content!r}, which this model's tokenizer takes for a control token."
                )
            cuts.append(at + 1)
        return cuts


def concatenate(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Ids in a row; an empty array for no parts."""
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _shifted(parts: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], edges: Sequence[int]) -> NDArray[np.int64]:
    """Offsets of consecutive pieces of a text as offsets into the whole."""
    return np.concatenate([np.zeros((0, 2), np.int64), *(o + edge for (_, o), edge in zip(parts, edges, strict=False))])


def _chunk_edges(text: str) -> list[int]:
    """Where to cut a long text: ahead of words, where no token crosses, so that memory and time stay linear."""
    edges = [0]
    while len(text) - edges[-1] > CHUNK:
        start, end = edges[-1], edges[-1] + CHUNK
        breaks = [match.end() for match in _LINE_START.finditer(text, end - CHUNK // 8, end)]
        edge = breaks[-1] if breaks else text.rfind(" ", start + 1, end)
        edges.append(edge if edge > start else end)
    return [*edges, len(text)]


def _without_prefix(component: Any) -> Any:
    """A normalizer or pre-tokenizer specification that puts no space ahead of a text."""
    if not isinstance(component, dict):
        return component
    if component.get("type") == "Prepend":
        return None
    changed = dict(component)
    if component.get("type") == "Metaspace":
        changed["prepend_scheme"] = "never"
        changed.pop("add_prefix_space", None)
    elif component.get("type") == "ByteLevel":
        changed["add_prefix_space"] = False
    for key in ("normalizers", "pretokenizers"):
        if key in changed:
            kept = [_without_prefix(part) for part in changed[key]]
            changed[key] = [part for part in kept if part is not None]
    return changed
