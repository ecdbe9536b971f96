"""Scores with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CHARS_PER_TOKEN = 3.05  # of the embedded reader's tokenizer on its prose


@dataclass(frozen=True)
class Score:
    """Exact matches among questions (or the sum of scores between 0 and 1), with a 95 % Wilson interval."""

    right: float
    total: int

    @property
    def share(self) -> float:
        """Share answered exactly."""
        return self.right / max(1, self.total)

    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval."""
        n, p, z = max(1, self.total), self.share, 1.96
        centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))

    def to_json(self) -> dict[str, Any]:
        """Numbers for a report."""
        low, high = self.interval()
        return {
            "right": self.right,
            "total": self.total,
            "share": round(self.share, 4),
            "interval": [round(low, 4), round(high, 4)],
        }


def summarise(scores: Sequence[float]) -> dict[str, Any]:
    """Mean and 95 % interval of scores between 0 and 1.

    Wilson's interval where every score is 0 or 1 (exact match). Else (F1, ROUGE) the wider of that and the percentiles of 2,000
    bootstrap means, which have no width where few or equal scores are all there is; Wilson's is on the safe side, as no scores
    of a mean between 0 and 1 vary more than those of 0 and 1.

    Args:
        scores: At least one.

    Returns:
        ``share`` (the mean), ``interval`` (low, high), ``total``; ``right`` too where scores are 0 or 1.
    """
    if all(score in (0, 1) for score in scores):
        return Score(int(sum(scores)), len(scores)).to_json()
    values = np.asarray(scores, float)
    drawn = np.random.default_rng(0).choice(values, (2000, len(values))).mean(1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    wilson = Score(float(values.sum()), len(values)).interval()
    if wilson[1] - wilson[0] > high - low:
        low, high = wilson
    return {
        "total": len(values),
        "share": round(float(values.mean()), 4),
        "interval": [round(float(low), 4), round(float(high), 4)],
    }


def mean(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean of shares of different questions, each weighing the same, with a 95 % interval from theirs.

    The interval is that of Zou and Donner (2008, method of variance estimates recovery), which for two shares and their
    difference is Newcombe's.

    Args:
        summaries: Of `summarise`, at least one.

    Returns:
        ``share``, ``interval`` (low, high) and ``total`` (all questions).
    """
    n, share = len(summaries), sum(s["share"] for s in summaries) / len(summaries)
    below = math.hypot(*(s["share"] - s["interval"][0] for s in summaries)) / n
    above = math.hypot(*(s["interval"][1] - s["share"] for s in summaries)) / n
    return {
        "total": sum(s["total"] for s in summaries),
        "share": round(share, 4),
        "interval": [round(share - below, 4), round(share + above, 4)],
    }


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """How much larger one share is than another of other questions, with a 95 % interval (Newcombe 1998, method 10).

    Args:
        a, b: Summaries of `summarise`.

    Returns:
        ``share`` (a minus b) and ``interval`` (low, high).
    """
    (low_a, high_a), (low_b, high_b) = a["interval"], b["interval"]
    between = a["share"] - b["share"]
    below = math.hypot(a["share"] - low_a, high_b - b["share"])
    above = math.hypot(high_a - a["share"], b["share"] - low_b)
    return {"share": round(between, 4), "interval": [round(between - below, 4), round(between + above, 4)]}


def cells(rows: Iterable[Mapping[str, Any]], by: Sequence[str]) -> list[dict[str, Any]]:
    """Rows grouped by some of their labels, each group with the summary of its ``score``; in order of appearance."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(float(row["score"]))
    return [{**dict(zip(by, group, strict=True)), **summarise(scores)} for group, scores in groups.items()]
