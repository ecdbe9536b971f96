"""Names of elements and attributes in Word files, and what switches say."""

from __future__ import annotations

from typing import Any

_MAIN = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
MATH = "{http://schemas.openxmlformats.org/officeDocument/2006/math}"
COMPATIBILITY = "{http://schemas.openxmlformats.org/markup-compatibility/2006}"
RELATION = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id"


def w(name: str) -> str:
    """A name of WordprocessingML as the parser spells it."""
    return _MAIN + name


VAL = w("val")


def child(element: Any, *path: str) -> Any:
    """The element at the end of a path of children, None where one of them is not there."""
    for name in path:
        element = element.find(w(name)) if element is not None else None
    return element


def value(element: Any, *path: str) -> str | None:
    """`w:val` of the element at the end of a path of children, if there is one."""
    found = child(element, *path)
    return None if found is None else found.get(VAL)


def is_on(element: Any, *path: str) -> bool:
    """Whether the switch at the end of a path of children is there and not turned off."""
    found = child(element, *path)
    return found is not None and found.get(VAL) not in ("0", "false", "off")


def number(text: str | None) -> int:
    """The whole number that a value is; 0 for none."""
    try:
        return int(text or "")
    except ValueError:
        return 0
