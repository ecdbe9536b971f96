"""Put the tables of `benchmarks/results` into `docs/results.md`: `python -m benchmarks.fill_results`.

A table stands between `<!-- table: needle.md -->` and `<!-- end -->`; the name is a file of `benchmarks/results`. What stands
between them stays while there is no such file.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "results.md"
RESULTS = ROOT / "benchmarks" / "results"
_PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """The text with every table replaced by its file."""

    def replace(place: re.Match[str]) -> str:
        path = RESULTS / place[2]
        if not path.exists():
            return place[0]
        return f"{place[1]}{path.read_text(encoding='utf-8').strip()}\n{place[3]}"

    return _PLACE.sub(replace, text)


if __name__ == "__main__":
    DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
