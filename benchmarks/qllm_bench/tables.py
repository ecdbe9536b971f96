"""Results as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def cell(summary: Mapping[str, Any] | None) -> str:
    """A score with its interval and number of questions: ``0.75 (0.60-0.86, 40)``; ``-`` when there is none."""
    if summary is None:
        return "-"
    low, high = summary["interval"]
    return f"{summary['share']:.2f} ({low:.2f}-{high:.2f}, {summary['total']})"


def count(summary: Mapping[str, Any] | None) -> str:
    """Right answers of questions asked, with the interval in per cent: ``3/4 (30-95)``; ``-`` when there is none."""
    if summary is None:
        return "-"
    low, high = summary["interval"]
    return f"{summary['right']}/{summary['total']} ({100 * low:.0f}-{100 * high:.0f})"


def points(difference: Mapping[str, Any] | None) -> str:
    """A difference of two shares in points, with its interval: ``-12 (-20 to -4)``; ``-`` when there is none."""
    if difference is None:
        return "-"
    low, high = difference["interval"]
    return f"{100 * difference['share']:+.0f} ({100 * low:+.0f} to {100 * high:+.0f})"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(item) for item in line) + " |" for line in lines)


def pivot(
    cells: Sequence[Mapping[str, Any]],
    row: Sequence[str],
    column: str,
    names: Mapping[Any, str] | None = None,
    write: Callable[[Mapping[str, Any] | None], str] = cell,
) -> str:
    """Summaries (`scores.cells`) as a table: rows by some labels, columns by one, in order of appearance.

    Args:
        cells: Summaries with their labels.
        row: Labels that make a row.
        column: Label that makes a column; its values are sorted.
        names: How values of ``column`` are written.
        write: How a summary is written.
    """
    columns = sorted({c[column] for c in cells})
    rows: dict[tuple[Any, ...], dict[Any, Mapping[str, Any]]] = {}
    for c in cells:
        rows.setdefault(tuple(c[name] for name in row), {})[c[column]] = c
    header = [*row, *(str((names or {}).get(value, value)) for value in columns)]
    return markdown(
        header, [[*map(str, labels), *(write(found.get(value)) for value in columns)] for labels, found in rows.items()]
    )
