"""From attention mass per prompt token to passages of the original documents."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import regex
from numpy.typing import NDArray

from qllm_runtime.prompt import DocumentSpan, Prompt
from qllm_runtime.types import Document, Source, is_blank

WINDOW = 32  # tokens looked at together when searching for peaks
REACH = 320  # characters a passage may grow on each side to end where a sentence or line does
SURROUNDINGS = 256  # tokens on each side whose mean is what a passage has to stand out from
MIN_SHARE = 0.25  # a further passage must stand out at least this much as the best one does ...
MIN_LIFT = 1.5  # ... and hold this many times the mass of its surroundings

# the end of a sentence with its closing quotes, or of a paragraph, with the white space after it
_SENTENCE_END = re.compile(r"[.!?…。！？][\"'”’»)\]*_]*\s+|\n[ \t\r]*\n\s*")
_CHARACTER = regex.compile(r"\X")
_LONGEST_CHARACTER = 64  # code points looked back at
_LINE_END = re.compile(r"\r?\n")
_ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Prof|Rev|Gen|Col|Capt|No|vs|etc|e\.g|i\.e)|\b[A-Z])\.$")


@dataclass
class _Passage:
    document: int
    start: int
    end: int
    mass: float
    prominence: float


def passages(
    mass: NDArray[np.floating], prompt: Prompt, documents: Sequence[Document], *, limit: int = 5
) -> tuple[Source, ...]:
    """The passages that received the most attention.

    A passage has to stand out from its surroundings: recent text receives attention for being recent, so mass by itself
    says little. A single token (punctuation collects attention) does not count for more than its neighbours together.
    Peaks are grown to the sentences or lines around them and merged where they touch; those that hold most are kept. A
    passage's score is what stands out in it, as a share of all mass that fell on documents. Mass spread evenly over a document
    yields one passage, not many.

    Args:
        mass: [n] attention mass per prompt token (any scale; n may exceed the prompt: generated tokens are ignored).
        prompt: The prompt, for the spans of its documents.
        documents: The documents in order of appearance.
        limit: Most passages to return.

    Returns:
        Passages, best first; `text == documents[document].text[start:end]`, never cut inside a character as a reader
        sees it (emoji sequences, accents, line ends of two characters).
    """
    weights = [
        np.maximum(np.nan_to_num(np.asarray(mass[s.start : s.end], np.float64)), 0) for s in prompt.document_spans
    ]
    total = float(sum(weight.sum() for weight in weights))
    if total <= 0 or limit < 1:
        return ()
    left = [_prominence(weight) for weight in weights]
    if max(_heaviest(left)[3], 0.0) <= 1e-9 * total:  # nothing does: a short or evenly read text
        left = [weight.copy() for weight in weights]
    prominence = [np.maximum(weight, 0) for weight in left]
    found: list[_Passage] = []
    best = 0.0
    for _ in range(4 * limit):
        which, start, end, peak = _heaviest(left)
        if peak <= 0 or peak < MIN_SHARE * best:
            break
        span = prompt.document_spans[which]
        first, last = _core(weights[which][start:end])
        text = documents[span.document].text
        grown = _grow(text, *_characters(span, start + first, start + last))
        if is_blank(text[slice(*grown)]):  # what stands beside it in the window may be a passage
            weights[which][start + first : start + last] = left[which][start + first : start + last] = 0
            continue
        best = max(best, peak)
        held = float(weights[which][start:end].sum())
        left[which][start:end] = 0
        if found and held < MIN_LIFT * (held - peak):
            continue
        _merge(found, span, weights[which], prominence[which], grown, text)
        if len(found) > limit:
            break
    most = sorted(found, key=lambda passage: -passage.mass)[:limit]
    most.sort(key=lambda passage: -passage.prominence)
    return tuple(_source(passage, documents[passage.document], total) for passage in most)


def surroundings(start: int, end: int, prompt: Prompt, documents: Sequence[Document]) -> list[Source]:
    """The sentences or lines around tokens [start, end) of a prompt, a passage of each document that is not blank there."""
    found = []
    for span in prompt.document_spans:
        first, last = max(start, span.start) - span.start, min(end, span.end) - span.start
        if first < last:
            document = documents[span.document]
            low, high = _grow(document.text, *_characters(span, first, last))
            if is_blank(document.text[low:high]):
                continue
            found.append(Source(span.document, document.title, low, high, 0.0, document.text[low:high]))
    return found


def in_order(found: Sequence[Source], documents: Sequence[Document]) -> tuple[Source, ...]:
    """Passages as they stand in their documents, those that touch made one with the higher score."""
    joined: list[Source] = []
    for source in sorted(found, key=lambda source: (source.document, source.start)):
        last = joined[-1] if joined else None
        text = documents[source.document].text
        if last is not None and last.document == source.document and not text[last.end : source.start].strip():
            end = max(last.end, source.end)
            score = max(last.score, source.score)
            joined[-1] = replace(last, end=end, score=score, text=text[last.start : end])
        else:
            joined.append(source)
    return tuple(joined)


def trace_back(
    mass: NDArray[np.floating], prompt: Prompt, excerpts: Sequence[Source]
) -> tuple[NDArray[np.floating], Prompt]:
    """Move the mass of passages that were read again to where they stand in their documents.

    In the window every token receives some attention for being near, so what a passage moves is what stands out from the mean
    over all of them; a long passage would otherwise come before the right one.

    Args:
        mass: [n] attention mass per prompt token.
        prompt: The prompt; its last document spans are those of `excerpts`.
        excerpts: The passages, in order.

    Returns:
        [n] mass, and the prompt without the spans of the passages.
    """
    if not excerpts:
        return mass, prompt
    border = len(prompt.document_spans) - len(excerpts)
    own, again = prompt.document_spans[:border], prompt.document_spans[border:]
    moved = mass.copy()
    mean = np.concatenate([mass[span.start : span.end] for span in again]).mean()
    for span, excerpt in zip(again, excerpts, strict=True):
        home = own[excerpt.document]
        places = np.searchsorted(home.offsets[:, 0], excerpt.start + span.offsets[:, 0], side="right") - 1
        np.add.at(moved, home.start + np.maximum(places, 0), np.maximum(mass[span.start : span.end] - mean, 0))
    return moved, replace(prompt, document_spans=own)


def _prominence(weight: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n] mass of each token above the mean of its surroundings, single tokens held down to their neighbours' sum."""
    near, _ = _around(weight, WINDOW // 2)
    held = np.minimum(weight, near - weight)
    wide, n_wide = _around(held, SURROUNDINGS)
    inner, n_inner = _around(held, WINDOW)
    background: NDArray[np.float64] = (wide - inner) / np.maximum(n_wide - n_inner, 1)
    return np.subtract(held, background)


def _around(weight: NDArray[np.float64], reach: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sum over, and number of, the tokens at most `reach` away from each."""
    sums = np.concatenate([[0.0], np.cumsum(weight)])
    places = np.arange(len(weight))
    low, high = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(weight))
    return sums[high] - sums[low], high - low


def _heaviest(weights: Sequence[NDArray[np.float64]]) -> tuple[int, int, int, float]:
    """Document, tokens [start, end) and mass of the window that holds the most."""
    best = (0, 0, 0, -1.0)
    for index, weight in enumerate(weights):
        width = min(WINDOW, len(weight))
        if width == 0:
            continue
        sums = np.concatenate([[0.0], np.cumsum(weight)])
        windows = sums[width:] - sums[:-width]
        start = int(windows.argmax())
        if windows[start] > best[3]:
            best = (index, start, start + width, float(windows[start]))
    return best


def _core(weight: NDArray[np.float64]) -> tuple[int, int]:
    """The part of a window around its heaviest token that holds four fifths of its mass."""
    centre = int(weight.argmax())
    first, last, held, enough = centre, centre + 1, float(weight[centre]), 0.8 * float(weight.sum())
    while held < enough and (first > 0 or last < len(weight)):
        left = weight[first - 1] if first > 0 else -1.0
        right = weight[last] if last < len(weight) else -1.0
        if left > right:
            first -= 1
        else:
            last += 1
        held += float(max(left, right))
    return first, last


def _characters(span: DocumentSpan, first: int, last: int) -> tuple[int, int]:
    offsets = span.offsets[first:last]
    return int(offsets[:, 0].min()), int(offsets[:, 1].max())


def _merge(
    found: list[_Passage],
    span: DocumentSpan,
    weight: NDArray[np.float64],
    prominence: NDArray[np.float64],
    grown: tuple[int, int],
    text: str,
) -> None:
    """Add a passage, or join it to those it touches."""
    start, end = grown
    touching = [
        other
        for other in found
        if other.document == span.document and not text[min(end, other.end) : max(start, other.start)].strip()
    ]
    for other in touching:
        found.remove(other)
        start, end = min(start, other.start), max(end, other.end)
    inside = (span.offsets[:, 0] < end) & (span.offsets[:, 1] > start)
    held = float(weight[inside].sum()), float(prominence[inside].sum())
    found.append(_Passage(span.document, start, end, *held))


def _grow(text: str, start: int, end: int) -> tuple[int, int]:
    """The sentences or lines around [start, end), without white space at either end."""
    start, end = _trim(text, start, end)
    start, end = _start_of_sentence(text, start), _end_of_sentence(text, end)
    start, end = _trim(text, start, end)
    while start > 0 and not _separable(text, start):
        start -= 1
    while end < len(text) and not _separable(text, end):
        end += 1
    return start, end


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    if not piece.strip():
        return start, end
    return start + len(piece) - len(piece.lstrip()), end - (len(piece) - len(piece.rstrip()))


def _start_of_sentence(text: str, start: int) -> int:
    low = max(0, start - REACH)
    before = text[low:start]
    ends = [m.end() for m in _SENTENCE_END.finditer(before) if not _ABBREVIATION.search(before[: m.start() + 1])]
    if ends:
        return low + ends[-1]
    if low == 0:
        return 0
    lines = [m.end() for m in _LINE_END.finditer(before)]
    if lines:
        return low + lines[-1]
    space = max(before.rfind(" "), before.rfind("\t"))
    return low + space + 1 if space >= 0 else start


def _end_of_sentence(text: str, end: int) -> int:
    high = min(len(text), end + REACH)
    low = max(0, end - 8)  # the passage may end with its full stop already
    for match in _SENTENCE_END.finditer(text, low, high):
        stop = match.start() + len(match.group().rstrip())
        if stop >= end and not _ABBREVIATION.search(text[max(0, match.start() - 8) : match.start() + 1]):
            return stop
    if high == len(text):
        return high
    line = _LINE_END.search(text, end, high)
    if line:
        return line.start()
    space = text.rfind(" ", end, high)
    return space if space >= 0 else end


def _separable(text: str, index: int) -> bool:
    """Whether a reader sees two characters, not one, left and right of `index`."""
    low = max(0, index - _LONGEST_CHARACTER)
    low = max(text.rfind(" ", low, index), text.rfind("\n", low, index), low)  # a character begins there for certain
    return any(match.end() == index for match in _CHARACTER.finditer(text, low, index + 1))


def _source(passage: _Passage, document: Document, total: float) -> Source:
    text = document.text[passage.start : passage.end]
    score = min(1.0, passage.prominence / total)
    return Source(passage.document, document.title, passage.start, passage.end, score, text)
