"""The visible text of an HTML page, with the standard library's parser."""

from __future__ import annotations

import re
from html.parser import HTMLParser


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# never shown as text
_HIDDEN = _names("script style template noscript title svg math iframe object canvas select datalist")
# start on a line of their own
_BLOCK = _names(
    "address article aside blockquote body caption center dd details dialog div dl dt fieldset figcaption figure "
    "footer form h1 h2 h3 h4 h5 h6 header hr html legend li main menu nav ol p pre section summary table tbody tfoot "
    "thead tr ul"
)
# separated from their neighbours by an empty line
_SPACED = _names("article blockquote dl figure h1 h2 h3 h4 h5 h6 ol p pre section table ul")
_VOID = _names("area base br col embed hr img input link meta param source track wbr")
_INVISIBLE_STYLE = re.compile(r"(?:^|;)\s*(?:display\s*:\s*none|visibility\s*:\s*hidden)", re.IGNORECASE)


class _VisibleText(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._hidden: str | None = None  # tag whose end makes text visible again
        self._depth = 0  # open elements of that name
        self._pre = 0
        self._breaks = 0  # line breaks due before the next text
        self._space = False  # a space due before the next text
        self._cells = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._hidden is not None:
            self._depth += tag == self._hidden
            return
        attributes = dict(attrs)
        invisible = "hidden" in attributes or _INVISIBLE_STYLE.search(attributes.get("style") or "")
        if tag not in _VOID and (tag in _HIDDEN or invisible):
            self._hidden, self._depth = tag, 1
            return
        self._line(tag)
        if tag == "br":
            self._breaks += 1
        elif tag == "pre":
            self._pre += 1
        elif tag == "tr":
            self._cells = 0
        elif tag in ("td", "th"):
            if self._cells and not self._breaks:
                self._parts.append("\t")
            self._cells += 1
            self._space = False

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag in _HIDDEN:  # a self-closed <script/> is how XHTML writes an empty one
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._hidden is not None:
            self._depth -= tag == self._hidden
            if self._depth == 0:
                self._hidden = None
            return
        self._line(tag)
        if tag == "pre":
            self._pre = max(0, self._pre - 1)

    def handle_data(self, data: str) -> None:
        if self._hidden is not None or not data:
            return
        if self._pre:
            self._write(data)
            return
        words = data.split()
        if not words:
            self._space = True
            return
        self._space = self._space or data[0].isspace()
        self._write(" ".join(words))
        self._space = data[-1].isspace()

    def _line(self, tag: str) -> None:
        if tag in _BLOCK:
            self._breaks = max(self._breaks, 2 if tag in _SPACED else 1)

    def _write(self, text: str) -> None:
        if self._breaks:
            if self._parts:
                self._parts.append("\n" * min(self._breaks, 2))
        elif self._space and self._parts and not self._parts[-1].endswith(("\n", "\t", " ")):
            self._parts.append(" ")
        self._breaks, self._space = 0, False
        self._parts.append(text)

    def text(self) -> str:
        return "".join(self._parts)


def html_to_text(html: str) -> str:
    """The text a reader of the page sees: no scripts, styles or hidden elements; block elements become line breaks.

    White space is collapsed as a browser does it, except inside `<pre>`. Table cells are separated by tabs.
    """
    parser = _VisibleText()
    parser.feed(html)
    parser.close()
    return parser.text()
