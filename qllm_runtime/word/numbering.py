"""The numbers of paragraphs ("3.2", "(a)"), which Word counts and does not store."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from qllm_runtime.word.names import is_on, number, value, w

_PLACE = re.compile(r"%([1-9])")  # of a level's number in a label
_ROMAN = (
    (1000, "m"), (900, "cm"), (500, "d"), (400, "cd"), (100, "c"), (90, "xc"), (50, "l"), (40, "xl"), (10, "x"),
    (9, "ix"), (5, "v"), (4, "iv"), (1, "i"),
)  # fmt: skip
_ENDINGS = {1: "st", 2: "nd", 3: "rd"}


@dataclass
class _List:
    """A list: the count it takes part in, its levels, and the levels that start anew with it."""

    counted_as: str
    levels: dict[int, Any]
    starts: dict[int, int] = field(default_factory=dict)


class Numbering:
    """Counts the paragraphs of a document, which are to be given in their order.

    Args:
        definitions: `w:numbering`, or None.
        styles: `w:styles`, or None.
    """

    def __init__(self, definitions: Any, styles: Any) -> None:
        self._abstract = _by_id(definitions, "abstractNum", "abstractNumId")
        self._numbers = _by_id(definitions, "num", "numId")
        self._styles = _by_id(styles, "style", "styleId")
        plain = (name for name, style in self._styles.items() if _is_default(style))
        self._default_style = next(plain, None)
        self._lists: dict[str, _List | None] = {}
        self._counts: dict[str, dict[int, int]] = {}
        self._started: set[tuple[str, int]] = set()

    def label(self, paragraph: Any) -> str | None:
        """What stands ahead of a paragraph, with its white space: "" for bullets, None outside of lists."""
        name, level, style = self._place(paragraph)
        numbered = self._list(name) if name else None
        if name is None or numbered is None:
            return None
        if level is None:
            level = next((n for n, one in numbered.levels.items() if style and value(one, "pStyle") == style), 0)
        if level not in numbered.levels:
            return None
        definition = numbered.levels[level]
        counts = self._count(name, numbered, level)
        if _format(definition) == "bullet":
            return ""
        legal = is_on(definition, "isLgl")

        def shown(found: re.Match[str]) -> str:
            place = int(found[1]) - 1
            kind = _format(numbered.levels.get(place))
            return _spelled(counts.get(place, _start(numbered, place)), "decimal" if legal else kind)

        text = _PLACE.sub(shown, value(definition, "lvlText") or "")
        return f"{text} " if text.strip() and value(definition, "suff") != "nothing" else text

    def _place(self, paragraph: Any) -> tuple[str | None, int | None, str | None]:
        """Which list a paragraph is in, on which level, and the style that says so."""
        properties = paragraph.find(w("pPr"))
        style = value(properties, "pStyle") or self._default_style
        level = value(properties, "numPr", "ilvl")
        name, origin = value(properties, "numPr", "numId"), None
        seen: set[str] = set()
        while name is None and style in self._styles and style not in seen:
            seen.add(style)
            definition = self._styles[style]
            level = level or value(definition, "pPr", "numPr", "ilvl")
            name, origin = value(definition, "pPr", "numPr", "numId"), style
            style = value(definition, "basedOn")
        return name, None if level is None else number(level), origin

    def _list(self, name: str) -> _List | None:
        if name not in self._lists:
            self._lists[name] = self._resolved(name, set())
        return self._lists[name]

    def _resolved(self, name: str | None, seen: set[str]) -> _List | None:
        found = self._numbers.get(name or "")
        if found is None or name is None or name in seen:
            return None
        kind = value(found, "abstractNumId") or ""
        abstract = self._abstract.get(kind)
        if link := value(abstract, "numStyleLink"):
            other = value(self._styles.get(link), "pPr", "numPr", "numId")
            resolved = self._resolved(other, seen | {name})
        else:
            resolved = None if abstract is None else _List(kind, _levels(abstract))
        if resolved is None:
            return None
        resolved = _List(resolved.counted_as, dict(resolved.levels))
        for override in found.findall(w("lvlOverride")):
            level = number(override.get(w("ilvl")))
            resolved.levels |= _levels(override)
            if (start := value(override, "startOverride")) is not None:
                resolved.starts[level] = number(start)
        return resolved

    def _count(self, name: str, numbered: _List, level: int) -> dict[int, int]:
        """Count a paragraph; returns the counts of all levels."""
        counts = self._counts.setdefault(numbered.counted_as, {})
        begins = level in numbered.starts and (name, level) not in self._started
        if begins or level not in counts:
            counts[level] = _start(numbered, level)
            self._started.add((name, level))
        else:
            counts[level] += 1
        for deeper in [one for one in counts if one > level]:
            after = value(numbered.levels.get(deeper), "lvlRestart")
            if after is None or level < number(after):
                del counts[deeper]
        return counts


def _by_id(root: Any, tag: str, key: str) -> dict[str, Any]:
    found = () if root is None else root.findall(w(tag))
    return {element.get(w(key), ""): element for element in found}


def _is_default(style: Any) -> bool:
    return style.get(w("type")) == "paragraph" and style.get(w("default")) in ("1", "true", "on")


def _levels(parent: Any) -> dict[int, Any]:
    return {number(level.get(w("ilvl"))): level for level in parent.findall(w("lvl"))}


def _start(numbered: _List, level: int) -> int:
    return numbered.starts.get(level, number(value(numbered.levels.get(level), "start")))


def _format(level: Any) -> str:
    # a newer format stands beside the one that takes its place in older versions
    found = None if level is None else next(level.iter(w("numFmt")), None)
    return "decimal" if found is None else str(found.get(w("val"), "decimal"))


def _spelled(count: int, kind: str) -> str:
    if kind == "none":
        return ""
    if kind == "decimalZero":
        return f"{count:02}"
    if kind == "ordinal":
        return f"{count}{'th' if count // 10 % 10 == 1 else _ENDINGS.get(count % 10, 'th')}"
    if kind in ("lowerLetter", "upperLetter") and 0 < count <= 780:  # a to z, aa to zz
        text = chr(ord("a") + (count - 1) % 26) * ((count - 1) // 26 + 1)
    elif kind in ("lowerRoman", "upperRoman") and 0 < count < 4000:
        text, left = "", count
        for worth, numeral in _ROMAN:
            text += numeral * (left // worth)
            left %= worth
    else:
        return str(count)
    return text.upper() if kind.startswith("upper") else text
