"""The text of an EPUB book."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence, Set
from html import escape
from urllib.parse import unquote
from xml.etree.ElementTree import Element

from qllm_runtime.archives import Archive
from qllm_runtime.charsets import decode, unreadable, xml_charset
from qllm_runtime.html_text import html_to_text
from qllm_runtime.types import is_blank

CONTAINER = "META-INF/container.xml"
_ENCRYPTION = "META-INF/encryption.xml"
_PACKAGE_TYPE = "application/oebps-package+xml"
# in MIME types (or else names) of chapters; XML that is none
_MARKUP, _NO_CHAPTERS = ("htm", "xml", "oeb1"), ("svg", "ncx")
_CDATA = re.compile(r"<!\[CDATA\[(.*?)\]\]>", re.DOTALL)  # HTML takes it for a comment


def epub_to_text(archive: Archive) -> str:
    """The chapters of a book in the order of reading, with an empty line between them.

    The navigation is left out; what the book sets apart from that order (`linear="no"`: notes, answers) comes last.

    Raises:
        DocumentError: Protected, damaged, or without text.
    """
    encrypted = _encrypted(archive)
    package = _package_path(archive)
    _check_protection(archive, [package], encrypted)
    chapters = _chapters(archive, package)
    _check_protection(archive, chapters, encrypted)
    texts = [_chapter(archive, path) for path in chapters]
    if not any(texts):
        raise unreadable(archive.name, "is a book without text (pages of pictures?); run OCR on it first.")
    return "\n\n".join(text for text in texts if text)


def _package_path(archive: Archive) -> str:
    files = archive.read_xml(CONTAINER).findall(".//{*}rootfile")
    files.sort(key=lambda file: file.get("media-type") != _PACKAGE_TYPE)
    path = files[0].get("full-path") if files else None
    if not path:
        raise unreadable(archive.name, f"is a damaged book: {CONTAINER!r} names no package in it.")
    return _existing(archive, path)


def _encrypted(archive: Archive) -> set[str | None]:
    if not archive.find(_ENCRYPTION):
        return set()
    references = archive.read_xml(_ENCRYPTION).iterfind(".//{*}CipherReference")
    return {archive.find(_existing(archive, reference.get("URI", ""))) for reference in references} - {None}


def _check_protection(archive: Archive, paths: Sequence[str], encrypted: Set[str | None]) -> None:
    if any(archive.find(path) in encrypted for path in paths):
        raise unreadable(
            archive.name, "is a book with copy protection (DRM), its text is encrypted; get a copy without it."
        )


def _chapters(archive: Archive, package: str) -> list[str]:
    """Paths of the chapters in the order of reading."""
    root = archive.read_xml(package)
    items = {item.get("id"): item for item in root.iterfind(".//{*}manifest/{*}item")}
    linear: list[str] = []
    apart: list[str] = []
    for reference in root.iterfind(".//{*}spine/{*}itemref"):
        item = items.get(reference.get("idref"))
        if item is None:
            raise unreadable(
                archive.name, f"is a damaged book: its chapter {reference.get('idref')!r} is not in its list of files."
            )
        page = _as_page(archive, item, items)
        if page is not None and "nav" not in page.get("properties", "").split():
            path = posixpath.join(posixpath.dirname(package), page.get("href", "").partition("#")[0])
            paths = apart if reference.get("linear") == "no" else linear
            paths.append(_existing(archive, path))
    if not linear and not apart:
        raise unreadable(archive.name, "is a book without chapters.")
    return list(dict.fromkeys(linear + apart))


def _as_page(archive: Archive, item: Element, items: Mapping[str | None, Element]) -> Element | None:
    """The item itself, or what stands in for it, if that is a page of text; None for pictures and navigation."""
    seen: list[Element] = []
    one: Element | None = item
    while one is not None and one not in seen:
        kind = (one.get("media-type") or one.get("href") or "").lower()
        if any(mark in kind for mark in _MARKUP) and not any(mark in kind for mark in _NO_CHAPTERS):
            return one
        seen.append(one)
        one = items.get(one.get("fallback"))
    kind = item.get("media-type", "")
    if not (kind.startswith("image/") or "ncx" in kind):
        raise unreadable(
            archive.name,
            f"is a book whose chapter {item.get('href')!r} is of type {kind!r}, which cannot be read; save it as PDF.",
        )
    return None


def _existing(archive: Archive, path: str) -> str:
    """A path as it is written, or with its percent signs decoded if only that is there."""
    return path if archive.find(path) else unquote(path)


def _chapter(archive: Archive, path: str) -> str:
    data = archive.read(path)
    page = decode(data, f"chapter {path!r} of {archive.name}", xml_charset(data)).removeprefix("\ufeff")
    text = html_to_text(_CDATA.sub(lambda found: escape(found[1]), page))
    return "" if is_blank(text) else text.strip("\n")
