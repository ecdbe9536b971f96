"""The visible text of an HTML page."""

from __future__ import annotations

import re
from collections.abc import Sequence

from selectolax.lexbor import LexborHTMLParser, LexborNode


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# never shown as text
_HIDDEN = _names(
    "script style template noscript title svg iframe object canvas select datalist annotation annotation-xml"
)
# start on a line of their own
_BLOCK = _names(
    "address article aside blockquote body caption center dd details dialog div dl dt fieldset figcaption figure "
    "footer form h1 h2 h3 h4 h5 h6 header hr html legend li main menu nav ol p pre section summary table tbody tfoot "
    "thead tr ul"
)
# separated from their neighbours by an empty line
_SPACED = _names("article blockquote dl figure h1 h2 h3 h4 h5 h6 ol p pre section table ul")
# children of MathML elements that are set above or below one another, and what stands between them on a line
_BETWEEN = {
    "mfrac": "/", "msup": "^", "msub": "_", "mover": "^", "munder": "_", "msubsup": "_^", "munderover": "_^",
}  # fmt: skip
# MathML elements that hold text, one symbol each
_SYMBOLS = _names("mi mn mo mtext ms")
_OPENING, _CLOSING = ("(", "[", "{"), (")", "]", "}")
_WORD = re.compile(r"[\w.,]*")
_WRAPPERS = 16  # elements with a single one inside that are looked through
_WHOLE_NUMBER = re.compile(r"\s*[-+\u2212]?\d+\s*")
_INVISIBLE_STYLE = re.compile(r"(?:^|;)\s*(?:display\s*:\s*none|visibility\s*:\s*hidden)", re.IGNORECASE)
# XHTML ends these at once; to HTML all that follows would be inside
_EMPTY = "|".join(sorted(_HIDDEN - {"svg"} | _names("textarea xmp noembed noframes")))
# what is not markup: comments, and elements that hold text only
_VERBATIM = "script|style|textarea|title|xmp|iframe|noembed|noframes"
_TO_CLOSE = re.compile(
    rf"<(?P<empty>{_EMPTY})(?P<attributes>(?:\s[^<>]*)?)/>"
    r"|<!--(?:-?>|.*?(?:--!?>|\Z))"
    rf"|<(?P<verbatim>{_VERBATIM})(?:[\s/][^<>]*)?>.*?(?:</(?P=verbatim)(?=[\s/>])|\Z)",
    re.IGNORECASE | re.DOTALL,
)


class _Text:
    """Text as it is put together, with the white space due ahead of what comes next."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._breaks = 0
        self._space = False
        self._preformatted = 0  # open elements in which white space stays as it is
        self._cells = 0  # of the present table row
        self._row = 0  # number of parts ahead of it
        self._joined = 0  # number of parts after which no space comes
        self._enclosed: list[int] = []  # open elements that a parenthesis was put ahead of

    def __str__(self) -> str:
        return "".join(self._parts)

    def enter(self, node: LexborNode) -> bool:
        """Write a text, or what an element begins with; returns whether there is more inside to be seen."""
        if node.is_text_node:
            self._add(node.text_content or "")
            return False
        tag = node.tag or ""
        if tag in _HIDDEN or not (node.is_element_node or node.is_document_node):
            return False
        attributes = node.attributes
        if "hidden" in attributes or _INVISIBLE_STYLE.search(attributes.get("style") or ""):
            return False
        self._line(tag)
        self._preformatted += tag == "pre"
        if tag == "br":
            self._breaks += 1
        elif tag == "tr":
            self._cells, self._row = 0, len(self._parts)
        elif tag in ("td", "th"):
            # a cell whose content ended its line is separated already
            if self._cells and (not self._breaks or len(self._parts) == self._row):
                self._space = False
                self._append("\t")
            self._cells += 1
        elif between := _BETWEEN.get(node.parent.tag or "") if node.parent else None:
            if place := _ahead(node):
                self._parts.append(between[place - 1 : place])
                self._joined = len(self._parts)
            if _is_compound(node):
                self._append("(")
                self._joined = len(self._parts)
                self._enclosed.append(node.mem_id)
        elif tag == "sup" and self._ends_in_digit() and _WHOLE_NUMBER.fullmatch(node.text()):
            self._parts.append("^")
        return True

    def leave(self, node: LexborNode) -> None:
        """End an element that was entered."""
        if self._enclosed and self._enclosed[-1] == node.mem_id:
            self._enclosed.pop()
            self._parts.append(")")
            self._space = False
        self._line(node.tag or "")
        self._preformatted -= node.tag == "pre"

    def _line(self, tag: str) -> None:
        if tag in _BLOCK:
            self._breaks = max(self._breaks, 2 if tag in _SPACED else 1)

    def _ends_in_digit(self) -> bool:
        return not (self._breaks or self._space) and bool(self._parts) and self._parts[-1][-1:].isdigit()

    def _add(self, text: str) -> None:
        """Add text; outside preformatted elements any white space is one space."""
        if not self._preformatted:
            self._space = self._space or text[:1].isspace()
            ends_in_space = text[-1:].isspace()
            text = " ".join(text.split())
        if text:
            self._append(text)
            self._space = not self._preformatted and ends_in_space

    def _append(self, text: str) -> None:
        """Add text as it is, after the white space that is due."""
        if self._breaks:
            if self._parts:
                self._parts.append("\n" * min(self._breaks, 2))
        elif self._space and len(self._parts) > self._joined and not self._parts[-1].endswith(("\n", "\t", " ")):
            self._parts.append(" ")
        self._breaks, self._space = 0, False
        self._parts.append(text)


def _ahead(node: LexborNode) -> int:
    """Number of elements of the same parent ahead of one, up to three."""
    count, one = 0, node.prev
    while one is not None and count < 3:
        count += one.is_element_node
        one = one.prev
    return count


def _is_compound(node: LexborNode) -> bool:
    """Whether a part of a formula has more than one element inside, and no parentheses around them yet."""
    for _ in range(_WRAPPERS):
        if node.tag in _SYMBOLS:
            return False
        inside = [child for child in node.iter(include_text=True) if _is_seen(child)]
        if len(inside) != 1:
            return len(inside) > 1 and not is_enclosed([child.text(deep=False).strip() for child in inside])
        (node,) = inside
        if node.is_text_node:
            text = (node.text_content or "").strip()
            return not (_WORD.fullmatch(text) or is_enclosed(text))
    return False


def _is_seen(node: LexborNode) -> bool:
    if node.is_text_node:
        return bool((node.text_content or "").strip())
    return node.is_element_node and node.tag not in _HIDDEN and node.tag != "mspace"


def is_enclosed(symbols: Sequence[str]) -> bool:
    """Whether the first symbol of a formula opens the parenthesis that the last one closes."""
    depth = 0
    for at, symbol in enumerate(symbols):
        depth += (symbol in _OPENING) - (symbol in _CLOSING)
        if depth <= 0:
            return at > 0 and at == len(symbols) - 1
    return False


def _close(found: re.Match[str]) -> str:
    name = found["empty"]
    return f"<{name}{found['attributes']}></{name}>" if name else found[0]


def html_to_text(html: str) -> str:
    """The text a reader of the page sees: no scripts, styles or hidden elements; block elements become line breaks.

    White space is collapsed as a browser does it, except inside `<pre>`. Table cells are separated by tabs, and what is
    set above or below by `/`, `^` and `_` (in formulas, where parentheses keep together what has several elements, and in
    powers of ten in text).
    """
    text = _Text()
    node: LexborNode | None = LexborHTMLParser(_TO_CLOSE.sub(_close, html)).root
    while node is not None:
        if text.enter(node):
            if node.first_child is not None:
                node = node.first_child
                continue
            text.leave(node)
        while node is not None and node.next is None:
            node = node.parent
            if node is not None:
                text.leave(node)
        node = node.next if node is not None else None
    return str(text)
