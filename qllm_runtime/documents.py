"""Files, standard input and bytes as `Document`s."""

from __future__ import annotations

import bisect
import io
import re
import sys
from collections.abc import Sequence
from email.message import Message
from pathlib import Path
from typing import Any

from qllm_runtime.archives import Archive, is_archive
from qllm_runtime.charsets import declared_charset, decode, unreadable
from qllm_runtime.epub_text import CONTAINER, epub_to_text
from qllm_runtime.errors import DocumentError
from qllm_runtime.html_text import html_to_text
from qllm_runtime.types import Document, is_blank
from qllm_runtime.word import CONTENT_TYPES, docx_to_text

_HTML_SUFFIXES = (".html", ".htm", ".xhtml")
_HTML_TYPES = ("text/html", "application/xhtml+xml")
_MEDIA_TYPES = ("image/", "audio/", "video/", "font/")
_READABLE = "text, HTML, PDF, Word (.docx) and EPUB"
# what the main part of a package of Office says it is
_WORD = re.compile(rb"(wordprocessingml\.(document|template)|ms-word\.(document|template)\.macroEnabled\w*)\.main\+xml")
_OFFICE = {
    b"spreadsheetml.": "an Excel workbook; save its sheets as .csv",
    b"presentationml.": "a presentation; save it as PDF",
}
_OPEN_DOCUMENT = b"application/vnd.oasis.opendocument"
_OLD_OFFICE, _RICH_TEXT = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", b"{\\rtf1"
_LONGEST_NAME = 256  # of a text that may be a path by mistake, in characters


def load_document(path: str | Path) -> Document:
    r"""Read a document from a file, or from standard input for `-`.

    `.html` becomes its visible text (in the encoding that it names, UTF-8 where it names none), `.pdf` the text of its
    pages (needs the extra `pdf`), `.docx` its text with tracked changes taken as accepted (needs the extra `docx`), `.epub`
    the text of its chapters; every other file must be text in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark.
    Text is kept exactly as stored: `Document.text` equals `bytes.decode("utf-8")` (or "utf-16"), so a UTF-8 byte-order
    mark is its first character and `\r\n` stays two. Character spans in sources refer to this text.

    Args:
        path: File, or "-" for standard input.

    Returns:
        The document, titled with the file's name (U+FFFD for what is not UTF-8 in it; no title for standard input).
        `metadata["source"]` is `path` as given, `metadata["page_starts"]` (PDF) the offset at which each page starts.

    Raises:
        DocumentError: Missing, a directory, unreadable, empty, binary, badly encoded, of an unsupported kind, damaged,
            protected, or without text.
    """
    name = str(path)
    if name == "-":
        if sys.stdin is None:  # closed by the shell
            raise DocumentError(
                "Standard input is closed: there is nothing to read; pipe a text into it or name a file."
            )
        try:
            data = sys.stdin.buffer.read()
        except OSError as error:
            raise DocumentError(f"Cannot read standard input: {error.strerror or error}.") from error
        return _document(data, "standard input", None, {"source": "-"})
    file = Path(path)
    if not name:
        raise DocumentError("The name of the document is empty.")
    if "\0" in name:
        raise DocumentError(f"Cannot read {name!r}: a path cannot hold a NUL character.")
    try:
        if file.is_dir():
            raise DocumentError(f"{name!r} is a directory; name a file in it.")
        data = file.read_bytes()
    except FileNotFoundError:
        raise DocumentError(f"There is no file {name!r}.") from None
    except OSError as error:
        raise DocumentError(f"Cannot read {name!r}: {error.strerror or error}.") from error
    suffix = file.suffix.lower()
    if suffix in _NAMED and data:
        _refuse_old(data, repr(name))
        kind, fits = _NAMED[suffix]
        if not fits(data):
            raise DocumentError(f"{name!r} is named {suffix} but is not {kind} file.")
    mime_type = "text/html" if suffix in _HTML_SUFFIXES else None
    return _document(data, repr(name), join_surrogates(file.name), {"source": name}, mime_type)


def document_from_bytes(data: bytes, mime_type: str | None = None, title: str | None = None) -> Document:
    """A document from the bytes of a file and its MIME type.

    The content decides where it can: bytes that are a PDF, Word or EPUB file are one whatever the type says, and text
    declared as one is read as text. A `charset` parameter of the type is honoured, as browsers do: latin-1 is read as
    windows-1252.

    Args:
        data: The bytes of the file.
        mime_type: MIME type, e.g. "text/plain; charset=iso-8859-1", "text/html", "application/pdf" or
            "application/epub+zip".
        title: Title of the document.

    Raises:
        DocumentError: Empty, binary, badly encoded, of an unsupported type, damaged, protected, or without text.
    """
    name = f"document {title!r}" if title else "the document"
    return _document(data, name, title, {}, mime_type)


def document_from_text(text: str) -> Document:
    """A document of this text.

    Raises:
        DocumentError: The text is the name of a file that exists.
    """
    try:
        names_a_file = len(text) < _LONGEST_NAME and "\n" not in text and Path(text).is_file()
    except (OSError, ValueError):  # no name that a file could have
        names_a_file = False
    if names_a_file:
        raise DocumentError(
            f"{text!r} is the name of a file, and strings are read as text; pass pathlib.Path({text!r})."
        )
    return Document(text)


def page_span(page_starts: Sequence[int], start: int, end: int) -> tuple[int, int]:
    """First and last page, counted from 1, that a passage stands on.

    Args:
        page_starts: Character at which each page starts, as in `Document.metadata["page_starts"]`; at least one.
        start, end: Character span of the passage. The separator after a page counts as its end.
    """
    first = max(1, bisect.bisect_right(page_starts, start))
    return first, max(first, bisect.bisect_left(page_starts, end))


def _document(
    data: bytes, name: str, title: str | None, metadata: dict[str, Any], mime_type: str | None = None
) -> Document:
    kind, charset = _parse_type(mime_type)
    if not data:
        raise unreadable(name, "is empty.")
    if kind.startswith(_MEDIA_TYPES):
        raise unreadable(name, f"has type {kind}; only {_READABLE} can be read.")
    _refuse_old(data, name)
    if _is_pdf(data):
        text, starts = _pdf_text(data, name)
        metadata = {**metadata, "page_starts": starts}
    elif is_archive(data):
        text = _archive_text(data, name)
    elif kind in _HTML_TYPES:
        text = html_to_text(decode(data, name, charset or declared_charset(data)).removeprefix("\ufeff"))
        if not text.strip():
            raise unreadable(name, "has no visible text.")
    else:
        text = decode(data, name, charset)
    if is_blank(text):
        raise unreadable(name, "holds nothing but white space.")
    return Document(text, title, metadata)


def _parse_type(mime_type: str | None) -> tuple[str, str | None]:
    if not mime_type:
        return "", None
    message = Message()
    message["Content-Type"] = mime_type.replace("\n", " ").replace("\r", " ")
    return message.get_content_type() if "/" in mime_type else mime_type.lower(), message.get_content_charset()


def _archive_text(data: bytes, name: str) -> str:
    archive = Archive(data, name)
    types = archive.read(CONTENT_TYPES) if archive.find(CONTENT_TYPES) else b""
    if _WORD.search(types):
        return docx_to_text(archive)
    if archive.find(CONTAINER):
        return epub_to_text(archive)
    for mark, what in _OFFICE.items():
        if mark in types:
            raise unreadable(name, f"is {what}.")
    if archive.find("mimetype") and archive.read("mimetype").startswith(_OPEN_DOCUMENT):
        raise unreadable(name, "is an OpenDocument file (.odt, .ods, ...); save it as .docx or PDF.")
    raise unreadable(name, "is a zip archive, but neither a Word nor an EPUB file; unpack it and name the files in it.")


def _refuse_old(data: bytes, name: str) -> None:
    """Refuse files that word processors wrote before .docx, which they still can open and save."""
    if data.lstrip(b"\xef\xbb\xbf\r\n\t ").startswith(_RICH_TEXT):
        raise unreadable(name, "is rich text (.rtf); save it as .docx or PDF.")
    if data.startswith(_OLD_OFFICE):
        if "EncryptedPackage".encode("utf-16-le") in data:
            raise unreadable(name, "is protected by a password; save it without one.")
        raise unreadable(name, "is in an old binary format of Office (.doc, .xls, ...); save it as .docx or PDF.")


def _is_pdf(data: bytes) -> bool:
    return data[:1024].lstrip(b"\xef\xbb\xbf\r\n\t ").startswith(b"%PDF-")


def _pdf_text(data: bytes, name: str) -> tuple[str, tuple[int, ...]]:
    try:
        import pypdf
    except ImportError:
        raise DocumentError(
            f"Reading {name} needs pypdf; install it with: pip install 'qllm-integrations[pdf]'."
        ) from None
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise unreadable(name, "is protected by a password; save it without one.")
        pages = [join_surrogates(page.extract_text()) for page in reader.pages]
    except DocumentError:
        raise
    except Exception as error:  # a damaged file makes pypdf raise nearly anything
        raise unreadable(name, f"is a damaged PDF: {' '.join(str(error).split()) or type(error).__name__}.") from error
    if not any(page.strip() for page in pages):
        raise unreadable(name, "is a PDF without a text layer (scanned pages); run OCR on it first.")
    starts, position = [], 0
    for page in pages:
        starts.append(position)
        position += len(page) + 2
    return "\n\n".join(pages), tuple(starts)


_NAMED = {".pdf": ("a PDF", _is_pdf), ".docx": ("a Word", is_archive), ".epub": ("an EPUB", is_archive)}


def join_surrogates(text: str) -> str:
    """Characters outside the basic plane that are spelled as two halves, as one; lone halves as U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
