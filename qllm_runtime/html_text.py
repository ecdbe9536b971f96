"""The visible text of an HTML page, with the standard library's parser."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from html.parser import HTMLParser


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
_VOID = _names("area base br col embed hr img input link meta param source track wbr")
_FORMATTING = _names("a b big code em font i nobr s small strike strong tt u")
_HEADINGS = _names("h1 h2 h3 h4 h5 h6")
_TABLE_PARTS = _names("caption colgroup tbody td tfoot th thead tr")

# Where HTML's parser stops looking for the open element that a tag closes, see
# https://html.spec.whatwg.org/multipage/parsing.html#tree-construction
_SPECIAL = _BLOCK | _names(
    "applet button colgroup dir head hgroup iframe listing marquee noembed noframes noscript object script search "
    "select style td template textarea th title xmp"
)
_SCOPE = _names("applet caption html marquee object table td template th")
_TABLE_SCOPE = _names("html table template")
_ITEM_SCOPE = _SPECIAL - _names("address div p")
_PARAGRAPH_SCOPE = _SCOPE | {"button"}
_END_SCOPES = {
    **dict.fromkeys(_SPECIAL, _SCOPE),
    **dict.fromkeys(_FORMATTING, _SCOPE),
    **dict.fromkeys(_TABLE_PARTS | {"table"}, _TABLE_SCOPE),
    **dict.fromkeys(_HIDDEN, _names("")),
    "li": _SCOPE | _names("ol ul"),
    "p": _PARAGRAPH_SCOPE,
}
# a start tag ends open elements of these names, one after the other, found within a scope
_SIBLINGS = {
    "li": ((_names("li"), _ITEM_SCOPE),),
    **dict.fromkeys(("dd", "dt"), ((_names("dd dt"), _ITEM_SCOPE),)),
    "option": ((_names("option"), _SPECIAL),),
    "optgroup": ((_names("option"), _SPECIAL), (_names("optgroup"), _SPECIAL)),
    **dict.fromkeys(("rp", "rt"), ((_names("rb rp rt"), _SPECIAL | _names("rtc ruby")),)),
    **dict.fromkeys(("rb", "rtc"), ((_names("rb rp rt"), _SPECIAL | {"ruby"}), (_names("rtc"), _SPECIAL | {"ruby"}))),
}
_ENDS_PARAGRAPH = (_BLOCK | _names("dir hgroup listing search xmp")) - _TABLE_PARTS - _names("body html legend")
# a start tag ends everything that is open inside the nearest of these
_PARENTS = {
    **dict.fromkeys(_TABLE_PARTS, _TABLE_SCOPE),
    "tr": _TABLE_SCOPE | _names("tbody tfoot thead"),
    **dict.fromkeys(("td", "th"), _TABLE_SCOPE | _names("tbody tfoot thead tr")),
}
_INVISIBLE_STYLE = re.compile(r"(?:^|;)\s*(?:display\s*:\s*none|visibility\s*:\s*hidden)", re.IGNORECASE)


class _VisibleText(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._open: list[str] = []  # elements, outermost first
        self._count: Counter[str] = Counter()  # of the open elements
        self._hidden: int | None = None  # place of the outermost hidden element among the open ones
        self._breaks = 0  # line breaks due before the next text
        self._space = False  # a space due before the next text
        self._cells = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._end_implied(tag)
        attributes = dict(attrs)
        invisible = "hidden" in attributes or _INVISIBLE_STYLE.search(attributes.get("style") or "")
        if tag not in _VOID:
            if self._hidden is None and (tag in _HIDDEN or invisible):
                self._hidden = len(self._open)
            self._open.append(tag)
            self._count[tag] += 1
        if self._hidden is not None:
            return
        self._line(tag)
        if tag == "br":
            self._breaks += 1
        elif tag == "tr":
            self._cells = 0
        elif tag in ("td", "th"):
            if self._cells and not self._breaks:
                self._parts.append("\t")
            self._cells += 1
            self._space = False

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        # XHTML writes an empty <script/> so, and within these two HTML does as well
        if tag not in _VOID and (tag in _HIDDEN or self._count["svg"] or self._count["math"]):
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        hidden = self._hidden
        if tag not in ("body", "html"):  # whatever follows is part of the body still
            place = self._find(_HEADINGS if tag in _HEADINGS else {tag}, _END_SCOPES.get(tag, _SPECIAL))
            if place is not None:
                self._end(place, tag)
                if place == hidden:
                    return
        if self._hidden is None:
            self._line(tag)

    def _end_implied(self, tag: str) -> None:
        """End the elements whose end tags may be left out ahead of this start tag."""
        for names, scope in _SIBLINGS.get(tag, ()):
            self._cut(self._find(names, scope))
        if tag in _ENDS_PARAGRAPH:
            self._cut(self._find({"p"}, _PARAGRAPH_SCOPE))
        if tag in _PARENTS:
            parent = self._find(_PARENTS[tag], frozenset())
            self._cut(None if parent is None else parent + 1)

    def _end(self, place: int, tag: str) -> None:
        """End an open element, and those inside it; formatting ends by itself where blocks begin inside it."""
        if tag not in _FORMATTING or not any(name in _SPECIAL for name in self._open[place:]):
            self._cut(place)
            return
        del self._open[place]
        self._count[tag] -= 1
        if self._hidden is not None and self._hidden >= place:
            self._hidden = None if self._hidden == place else self._hidden - 1

    def _find(self, names: Collection[str], scope: Collection[str]) -> int | None:
        """Place of the innermost open element of these names, unless one of the scope's stands inside it."""
        if not any(self._count[name] for name in names):
            return None
        for place in range(len(self._open) - 1, -1, -1):
            if self._open[place] in names:
                return place
            if self._open[place] in scope:
                return None
        return None

    def _cut(self, place: int | None) -> None:
        """End all open elements from a place on."""
        if place is None:
            return
        self._count.subtract(self._open[place:])
        del self._open[place:]
        if self._hidden is not None and self._hidden >= place:
            self._hidden = None

    def handle_data(self, data: str) -> None:
        if self._hidden is not None or not data:
            return
        if self._count["pre"]:
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

    Elements end where HTML says so, also without an end tag: a hidden `<p>` or `<li>` hides nothing behind it.

    White space is collapsed as a browser does it, except inside `<pre>`. Table cells are separated by tabs.
    """
    parser = _VisibleText()
    parser.feed(html)
    parser.close()
    return parser.text()
