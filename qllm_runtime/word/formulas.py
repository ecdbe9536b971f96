"""Formulas of Word files on a line, spelled as those of HTML pages are."""

from __future__ import annotations

import re
from typing import Any

from qllm_runtime.html_text import is_enclosed
from qllm_runtime.word.names import MATH

_WORD = re.compile(r"[\w.,]*")
# what stands ahead of the parts of an element, in the order in which they are read
_PARTS = {
    "f": (("num", ""), ("den", "/")),
    "sSup": (("e", ""), ("sup", "^")),
    "sSub": (("e", ""), ("sub", "_")),
    "sSubSup": (("e", ""), ("sub", "_"), ("sup", "^")),
    "sPre": (("sub", "_"), ("sup", "^"), ("e", " ")),
    "limLow": (("e", ""), ("lim", "_")),
    "limUpp": (("e", ""), ("lim", "^")),
    "func": (("fName", ""), ("e", " ")),
    "rad": (("deg", ""), ("e", "√")),
    "nary": (("sub", "_"), ("sup", "^"), ("e", " ")),
}


def formula(element: Any) -> str:
    """The text of a formula or of a part of one: `/`, `^` and `_` for what is set above or below."""
    return "".join(_spelled(child) for child in element if isinstance(child.tag, str))


def _spelled(element: Any) -> str:
    name = element.tag.removeprefix(MATH)
    if name == "t":
        return element.text or ""
    if name in _PARTS:
        sign = _sign(element, "naryPr", "chr", "∫") if name == "nary" else ""
        parts = ((ahead, element.find(MATH + part)) for part, ahead in _PARTS[name])
        texts = ((ahead, "" if part is None else formula(part)) for ahead, part in parts)
        return sign + "".join(ahead + (text if ahead == " " else _together(text)) for ahead, text in texts if text)
    if name == "d":
        inside = _sign(element, "dPr", "sepChr", "|").join(map(formula, element.findall(f"{MATH}e")))
        return f"{_sign(element, 'dPr', 'begChr', '(')}{inside}{_sign(element, 'dPr', 'endChr', ')')}"
    if name == "m":
        rows = (", ".join(map(formula, row.findall(f"{MATH}e"))) for row in element.findall(f"{MATH}mr"))
        return f"[{'; '.join(rows)}]"
    if name == "eqArr":
        return "; ".join(map(formula, element.findall(f"{MATH}e")))
    if name == "acc":
        return formula(element) + _sign(element, "accPr", "chr", "\u0302")
    return formula(element)


def _sign(element: Any, properties: str, name: str, default: str) -> str:
    found = element.find(f"{MATH}{properties}/{MATH}{name}")
    return default if found is None else found.get(f"{MATH}val", "")


def _together(text: str) -> str:
    return text if _WORD.fullmatch(text) or is_enclosed(text) else f"({text})"
