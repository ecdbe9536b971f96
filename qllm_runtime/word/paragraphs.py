"""The text of one paragraph of a Word file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

from qllm_runtime.word.formulas import formula
from qllm_runtime.word.names import COMPATIBILITY, MATH, child, is_on, number, value, w
from qllm_runtime.word.symbols import plain, symbol

# deleted or moved away in tracked changes; properties; readings (they follow what they belong to)
SKIPPED = frozenset(map(w, ("del", "moveFrom", "pPr", "rPr", "sdtPr", "tblPr", "trPr", "tcPr", "sectPr", "rt")))
_SIGNS = {
    w("tab"): "\t", w("ptab"): "\t", w("br"): "\n", w("cr"): "\n", w("noBreakHyphen"): "-",
}  # fmt: skip
_RUN, _TEXT, _SYMBOL, _FIELD = w("r"), w("t"), w("sym"), w("fldChar")
_NOTES = {w("footnoteReference"): "footnote", w("endnoteReference"): "endnote"}
_BOX, _RUBY, _FORMULA = w("txbxContent"), w("ruby"), MATH + "oMath"
_WRITTEN = frozenset((_TEXT, _SYMBOL, *_SIGNS))
_CONTENT = (_TEXT, _SYMBOL, f"{MATH}t", *_NOTES)  # what a version must have to be read
_LINES = str.maketrans("\r\n", "  ")


class Paragraph:
    """What a paragraph says.

    Attributes:
        text: Its text, without its number.
        boxes: Text boxes that hang on it.

    Args:
        element: `w:p`.
        cite: Called with "footnote" or "endnote" and the reference to one; returns its mark.
    """

    def __init__(self, element: Any, cite: Callable[[str, Any], str]) -> None:
        self.boxes: list[Any] = []
        self._cite = cite
        self._parts: list[str] = []
        self._codes = _field_codes(element)
        self._read(element, None)
        self.text = "".join(self._parts)

    def _read(self, element: Any, font: str | None) -> None:
        for one in parts(element):
            tag = one.tag
            if one in self._codes:
                continue
            if tag == _RUN:
                if not is_on(one, "rPr", "vanish"):
                    fonts = child(one, "rPr", "rFonts")
                    self._read(one, None if fonts is None else fonts.get(w("ascii")))
            elif tag == _TEXT:
                self._parts.append(plain((one.text or "").translate(_LINES), font))
            elif tag in _SIGNS:
                self._parts.append(_SIGNS[tag])
            elif tag == _SYMBOL:
                self._parts.append(symbol(one.get(w("font")), _hexadecimal(one.get(w("char")))))
            elif tag == _FIELD:
                self._parts.append(_form(one))
            elif tag in _NOTES:
                self._parts.append(self._cite(_NOTES[tag], one))
            elif tag == _FORMULA:
                self._parts.append(formula(one))
            elif tag == _BOX:
                self.boxes.append(one)
            else:
                self._read(one, font)
                if tag == _RUBY and (reading := child(one, "rt")) is not None:
                    self._parts.append("(")
                    self._read(reading, font)
                    self._parts.append(")")


def parts(element: Any) -> Iterator[Any]:
    """The children that make up the text of an element; of contents for several versions of Word, one."""
    for one in element:
        if not isinstance(one.tag, str) or one.tag in SKIPPED:
            continue
        if one.tag == f"{COMPATIBILITY}AlternateContent":
            choices = [choice for choice in one if isinstance(choice.tag, str)]
            chosen = (choice for choice in choices if next(choice.iter(*_CONTENT), None) is not None)
            yield from (part for choice in (next(chosen, None),) if choice is not None for part in parts(choice))
        else:
            yield one


def _field_codes(paragraph: Any) -> frozenset[Any]:
    """What is written in the codes of fields and not in their results. A field that has no end is none."""
    written: list[Any] = []
    open_fields: list[int | None] = []  # where the code of each begins; None past it
    ends = Counter[int]()
    for one in paragraph.iter(_FIELD, *_WRITTEN):
        kind = one.get(w("fldCharType"))
        if one.tag != _FIELD:
            written.append(one)
        elif kind == "begin":
            open_fields.append(len(written))
        elif open_fields:
            begin = open_fields.pop()
            if begin is not None:
                ends[begin] += 1
                ends[len(written)] -= 1
            if kind == "separate":
                open_fields.append(None)
    depths = accumulate(ends[at] for at in range(len(written)))
    return frozenset(one for one, depth in zip(written, depths, strict=True) if depth)


def _form(field: Any) -> str:
    """What the field of a form shows that has no text of its own: a box to tick, a list to choose from."""
    data = child(field, "ffData")
    box, choices = child(data, "checkBox"), child(data, "ddList")
    if box is not None:
        ticked = "checked" if child(box, "checked") is not None else "default"
        return "☒" if is_on(box, ticked) else "☐"
    if choices is not None:
        entries = [entry.get(w("val"), "") for entry in choices.findall(w("listEntry"))]
        chosen = number(value(choices, "result") or value(choices, "default"))
        return entries[chosen] if 0 <= chosen < len(entries) else ""
    return ""


def _hexadecimal(text: str | None) -> int:
    try:
        return int(text or "", 16)
    except ValueError:
        return 0
