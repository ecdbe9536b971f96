"""The text of a Word file."""

from __future__ import annotations

import io
import posixpath
import re
import zipfile
from typing import Any
from xml.etree import ElementTree

from qllm_runtime.archives import Archive
from qllm_runtime.charsets import declared_charset, decode, unreadable
from qllm_runtime.errors import DocumentError
from qllm_runtime.html_text import html_to_text
from qllm_runtime.word.body import Body
from qllm_runtime.word.names import RELATION, w
from qllm_runtime.word.numbering import Numbering

CONTENT_TYPES = "[Content_Types].xml"
_RELATED = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/"
_NOTES = ("footnote", "endnote")
_TEXT_PARTS = (".xml", ".rels", ".htm", ".html", ".xhtml", ".txt")
_HTML_TYPES = ("text/html", "application/xhtml+xml")
# the namespaces of "Strict Open XML", and those that everybody else writes
_STRICT = re.compile(rb"http://purl\.oclc\.org/ooxml/(wordprocessingml|officeDocument|drawingml)/")
_USUAL = rb"http://schemas.openxmlformats.org/\1/2006/"


def docx_to_text(archive: Archive) -> str:
    """The text of a Word file: paragraphs with their numbers, tables, text boxes, foot- and endnotes.

    Tracked changes are taken as accepted. Left out are headers and footers, comments, hidden text, pictures and charts.

    Raises:
        DocumentError: Protected, damaged, without text, with parts that cannot be read; or python-docx is not installed.
    """
    try:
        from docx.package import Package
    except ImportError:
        raise DocumentError(
            f"Reading {archive.name} needs python-docx; install it with: pip install 'qllm-integrations[docx]'."
        ) from None
    try:
        main = Package.open(_unpacked(archive)).main_document_part
        numbering = Numbering(_root(main, "numbering"), _root(main, "styles"))
        notes = {kind: _by_id(_root(main, f"{kind}s"), kind) for kind in _NOTES}
        body = Body(numbering, notes, lambda element: _included(main, element, archive.name))
        text = body.text(_parsed(main).find(w("body")))
    except DocumentError:
        raise
    except Exception as error:  # a damaged file makes python-docx and lxml raise nearly anything
        raise unreadable(
            archive.name,
            f"is a damaged Word file: {' '.join(str(error).split()) or type(error).__name__}; open it in Word and "
            "save it again.",
        ) from error
    if not text.strip():
        raise unreadable(archive.name, "is a Word file without text (pages of pictures?); run OCR on it first.")
    return text


def _unpacked(archive: Archive) -> io.BytesIO:
    """The same file for python-docx, which unpacks all of it: bounded, without what holds no text, free of dead links."""
    package = io.BytesIO()
    with zipfile.ZipFile(package, "w") as copy:
        for path in archive:
            if path.lower().endswith(".rels"):
                data = _living(archive, path)
            else:
                data = archive.read(path) if path.lower().endswith(_TEXT_PARTS) else b""
            copy.writestr(path, _STRICT.sub(_USUAL, data))
    package.seek(0)
    return package


def _living(archive: Archive, path: str) -> bytes:
    """A file of relations without those that lead nowhere, which Word passes over."""
    folder = posixpath.dirname(posixpath.dirname(path))
    relations = archive.read_xml(path)
    for relation in list(relations):
        if relation.get("TargetMode") == "External":
            continue
        found = archive.find(posixpath.join(f"/{folder}", relation.get("Target", "")))
        if found is None:
            relations.remove(relation)
        else:
            relation.set("Target", f"/{found}")
    return ElementTree.tostring(relations)


def _root(main: Any, kind: str) -> Any:
    """The root of the part of a kind that belongs to the main one, if there is one."""
    related = (relation for relation in main.rels.values() if relation.reltype == _RELATED + kind)
    found = next((relation.target_part for relation in related if not relation.is_external), None)
    return None if found is None else _parsed(found)


def _parsed(part: Any) -> Any:
    from docx.oxml.parser import parse_xml

    root = getattr(part, "element", None)
    if root is None:  # a kind of part that python-docx does not know
        root = parse_xml(part.blob)
    if root.getroottree().docinfo.internalDTD is not None:
        raise ValueError("it declares entities")
    return root


def _by_id(root: Any, tag: str) -> dict[str, Any]:
    return {} if root is None else {note.get(w("id")): note for note in root.findall(w(tag))}


def _included(main: Any, element: Any, name: str) -> str:
    """The text of a file inside of the document that Word takes in when it opens it."""
    if element.tag == w("subDoc"):
        raise unreadable(name, "is a master document, whose text is in other files; unlink them in Word and save it.")
    part = main.related_parts[element.get(RELATION)]
    kind = part.content_type
    if part.blob and kind in _HTML_TYPES:
        return html_to_text(decode(part.blob, name, declared_charset(part.blob)))
    if part.blob and kind == "text/plain":
        return decode(part.blob, name)
    raise unreadable(
        name, f"holds another file ({kind}), which Word takes in when it opens it; open it in Word and save it again."
    )
