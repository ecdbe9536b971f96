"""Counts of right answers with their uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

CHARS_PER_TOKEN = 3.05


@dataclass(frozen=True)
class Score:
    """Exact matches among questions, with a 95 % Wilson interval."""

    right: int
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
