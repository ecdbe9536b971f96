"""Word and EPUB files made for tests, odd ones among them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

WORD = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
EPUB = "application/epub+zip"
_SPACES = {
    "w": "http://schemas.openxmlformats.org/wordprocessingml/2006/main",
    "r": "http://schemas.openxmlformats.org/officeDocument/2006/relationships",
    "m": "http://schemas.openxmlformats.org/officeDocument/2006/math",
    "mc": "http://schemas.openxmlformats.org/markup-compatibility/2006",
    "wps": "http://schemas.microsoft.com/office/word/2010/wordprocessingShape",
    "v": "urn:schemas-microsoft-com:vml",
}
_NAMES = " ".join(f'xmlns:{prefix}="{name}"' for prefix, name in _SPACES.items())
_MAIN = "application/vnd.openxmlformats-officedocument.wordprocessingml"
CONTAINER = (
    '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container" version="1.0"><rootfiles>'
    '<rootfile full-path="{}" media-type="application/oebps-package+xml"/></rootfiles></container>'
)


def elements(markup: str) -> list[Any]:
    """Elements of WordprocessingML."""
    from docx.oxml.parser import parse_xml

    return list(parse_xml(f"<x {_NAMES}>{markup}</x>"))


def word(*blocks: str, numbering: str | None = None, styles: str = "", **parts: str) -> bytes:
    """A Word file.

    Args:
        blocks: Paragraphs, as text or as markup.
        numbering: Markup in `w:numbering`, in place of what the template has.
        styles: Markup added to `w:styles`.
        parts: Markup of further parts by kind, e.g. `footnotes`.
    """
    import docx
    from docx.opc.packuri import PackURI
    from docx.opc.part import Part

    document = docx.Document()
    for block in blocks:
        if not block.startswith("<"):
            document.add_paragraph(block)
        else:
            for element in elements(block):
                document.element.body.insert(len(document.element.body) - 1, element)
    if numbering is not None:
        root = document.part.numbering_part.element
        root[:] = elements(numbering)
    document.styles.element.extend(elements(styles))
    for kind, markup in parts.items():
        data = f"<w:{kind} {_NAMES}>{markup}</w:{kind}>".encode()
        part = Part(PackURI(f"/word/{kind}.xml"), f"{_MAIN}.{kind}+xml", data, document.part.package)
        document.part.relate_to(part, f"{_SPACES['r']}/{kind}")
    data = io.BytesIO()
    document.save(data)
    return data.getvalue()


def packed(members: Mapping[str, str | bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip archive."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as archive:
        for path, content in members.items():
            archive.writestr(path, content)
    return data.getvalue()


def unpacked(data: bytes) -> dict[str, bytes]:
    """The members of a zip archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {path: archive.read(path) for path in archive.namelist()}


def epub(
    *chapters: str | bytes,
    items: Iterable[str] | None = None,
    spine: Iterable[str] | None = None,
    members: Mapping[str, str | bytes] | None = None,
    package: str = "OEBPS/content.opf",
) -> bytes:
    """A book.

    Args:
        chapters: Contents of `OEBPS/c1.xhtml` and on; plain text becomes a page with one paragraph.
        items: Markup of further items in the list of files.
        spine: Markup of the order of reading, one `itemref` for each chapter without it.
        members: Further files, or others in place of what stands there.
        package: Path of the package file.
    """
    count = range(1, len(chapters) + 1)
    listed = "".join(f'<item id="c{n}" href="c{n}.xhtml" media-type="application/xhtml+xml"/>' for n in count)
    order = "".join(f'<itemref idref="c{n}"/>' for n in count) if spine is None else "".join(spine)
    pages = {f"OEBPS/c{n}.xhtml": _page(chapter) for n, chapter in enumerate(chapters, 1)}
    return packed(
        {
            "mimetype": EPUB,
            "META-INF/container.xml": CONTAINER.format(package),
            package: '<?xml version="1.0"?><package xmlns="http://www.idpf.org/2007/opf" version="3.0"><metadata/>'
            f"<manifest>{listed}{''.join(items or ())}</manifest><spine>{order}</spine></package>",
            **pages,
            **(members or {}),
        }
    )


def _page(chapter: str | bytes) -> str | bytes:
    if isinstance(chapter, bytes) or chapter.startswith("<"):
        return chapter
    return (
        f'<html xmlns="http://www.w3.org/1999/xhtml"><head><title>T</title></head><body><p>{chapter}</p></body></html>'
    )
