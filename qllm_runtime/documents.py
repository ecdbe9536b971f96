"""Files, standard input and bytes as `Document`s."""

from __future__ import annotations

import bisect
import codecs
import io
import re
import sys
from collections.abc import Sequence
from email.message import Message
from pathlib import Path
from typing import Any

from qllm_runtime.errors import DocumentError
from qllm_runtime.html_text import html_to_text
from qllm_runtime.types import Document, is_blank

# longest first: the UTF-32 mark begins with the UTF-16 one
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HTML_SUFFIXES = (".html", ".htm", ".xhtml")
_HTML_TYPES = ("text/html", "application/xhtml+xml")
_MEDIA_TYPES = ("image/", "audio/", "video/", "font/")
# what browsers read under a declared name (https://encoding.spec.whatwg.org), where Python knows it as something narrower
_WIDER = {
    "ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "iso8859-11": "cp874", "tis-620": "cp874",
    "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949",
}  # fmt: skip
# ways of spelling text in Python's own notation or in names of hosts
_NO_CHARSETS = ("unicode-escape", "raw-unicode-escape", "idna", "punycode", "undefined")
_META_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
_LONGEST_NAME = 256  # of a text that may be a path by mistake, in characters
# control characters that no text file holds (tab, line feed, form feed, return and escape excepted)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")


def load_document(path: str | Path) -> Document:
    r"""Read a document from a file, or from standard input for `-`.

    `.html` becomes its visible text (in the encoding that a `<meta>` tag names, UTF-8 without one), `.pdf` the text of its
    pages (needs the extra `pdf`); every other file must be text in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark.
    Text is kept exactly as stored: `Document.text` equals `bytes.decode("utf-8")` (or "utf-16"), so a UTF-8 byte-order
    mark is its first character and `\r\n` stays two. Character spans in sources refer to this text.

    Args:
        path: File, or "-" for standard input.

    Returns:
        The document, titled with the file's name (U+FFFD for what is not UTF-8 in it; no title for standard input).
        `metadata["source"]` is `path` as given, `metadata["page_starts"]` (PDF) the offset at which each page starts.

    Raises:
        DocumentError: Missing, a directory, unreadable, empty, binary, badly encoded, or a PDF without text.
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
    if suffix == ".pdf" and data and not _is_pdf(data):
        raise DocumentError(f"{name!r} is named .pdf but is not a PDF file.")
    mime_type = "text/html" if suffix in _HTML_SUFFIXES else None
    return _document(data, repr(name), join_surrogates(file.name), {"source": name}, mime_type)


def document_from_bytes(data: bytes, mime_type: str | None = None, title: str | None = None) -> Document:
    """A document from the bytes of a file and its MIME type.

    The content decides where it can: bytes that start as a PDF are one whatever the type says, and text declared as PDF
    is read as text. A `charset` parameter of the type is honoured, as browsers do: latin-1 is read as windows-1252.

    Args:
        data: The bytes of the file.
        mime_type: MIME type, e.g. "text/plain; charset=iso-8859-1", "text/html" or "application/pdf".
        title: Title of the document.

    Raises:
        DocumentError: Empty, binary, badly encoded, of an unsupported type, or a PDF without text.
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
        start, end: Character span of the passage. The separator behind a page counts as its end.
    """
    first = max(1, bisect.bisect_right(page_starts, start))
    return first, max(first, bisect.bisect_left(page_starts, end))


def _document(
    data: bytes, name: str, title: str | None, metadata: dict[str, Any], mime_type: str | None = None
) -> Document:
    kind, charset = _parse_type(mime_type)
    if not data:
        raise DocumentError(f"{_sentence(name)} is empty.")
    if kind.startswith(_MEDIA_TYPES):
        raise DocumentError(f"{_sentence(name)} has type {kind}; only text, HTML and PDF can be read.")
    if _is_pdf(data):
        text, starts = _pdf_text(data, name)
        metadata = {**metadata, "page_starts": starts}
    elif kind in _HTML_TYPES:
        text = html_to_text(_decode(data, name, charset or _declared_charset(data)).removeprefix("\ufeff"))
        if not text.strip():
            raise DocumentError(f"{_sentence(name)} has no visible text.")
    else:
        text = _decode(data, name, charset)
    if is_blank(text):
        raise DocumentError(f"{_sentence(name)} holds nothing but white space.")
    return Document(text, title, metadata)


def _parse_type(mime_type: str | None) -> tuple[str, str | None]:
    if not mime_type:
        return "", None
    message = Message()
    message["Content-Type"] = mime_type.replace("\n", " ").replace("\r", " ")
    return message.get_content_type() if "/" in mime_type else mime_type.lower(), message.get_content_charset()


def _declared_charset(data: bytes) -> str | None:
    found = _META_CHARSET.search(data[:2048])
    if not found:
        return None
    charset = found.group(1).decode("ascii")
    # whoever could read the tag does not read UTF-16
    return "utf-8" if charset.lower().startswith(("utf-16", "utf-32")) else charset


def _decode(data: bytes, name: str, charset: str | None = None) -> str:
    encoding = next((encoding for mark, encoding in _BYTE_ORDER_MARKS if data.startswith(mark)), None)
    if encoding is None:
        marked = data.startswith(codecs.BOM_UTF8)
        encoding = "utf-8" if charset is None or marked else _codec(charset, name)
    if encoding == "utf-8":
        _refuse_binary(data, name)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{_sentence(name)} is not valid {encoding.upper()}: byte 0x{data[error.start]:02x} at offset "
            f"{error.start} ({error.reason}); convert it, e.g. `iconv -f latin1 -t utf-8`."
        ) from None
    except (UnicodeError, ValueError) as error:  # codecs that raise without a position
        raise DocumentError(
            f"{_sentence(name)} cannot be decoded as {encoding}: {error}; convert it to UTF-8."
        ) from None
    if "\0" in text or len(_CONTROL.findall(text[:65536])) * 20 > min(len(text), 65536):
        raise DocumentError(f"{_sentence(name)} is binary, not text.")
    return text


def _codec(charset: str, name: str) -> str:
    """The codec of Python that reads what is declared as `charset`."""
    try:
        codec = codecs.lookup(charset.lower().removeprefix("x-")).name
        if codec in _NO_CHARSETS:
            raise LookupError
        "".encode(codec)  # a LookupError where it makes no text of bytes, as hex
    except (LookupError, ValueError):
        raise DocumentError(
            f"{_sentence(name)} declares the unknown encoding {charset!r}; convert it to UTF-8."
        ) from None
    return _WIDER.get(codec, codec)


def _refuse_binary(data: bytes, name: str) -> None:
    if data.startswith(b"PK\x03\x04"):
        raise DocumentError(
            f"{_sentence(name)} is a zip archive (Word, EPUB, ...); export it as text, HTML or PDF first."
        )
    nul = data.find(b"\0")
    if nul >= 0:
        raise DocumentError(
            f"{_sentence(name)} is binary, or UTF-16 without a byte-order mark (zero byte at offset {nul}); "
            "convert it to UTF-8."
        )


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
            raise DocumentError(f"{_sentence(name)} is protected by a password; save it without one.")
        pages = [join_surrogates(page.extract_text()) for page in reader.pages]
    except DocumentError:
        raise
    except Exception as error:  # a damaged file makes pypdf raise nearly anything
        raise DocumentError(
            f"{_sentence(name)} is a damaged PDF: {' '.join(str(error).split()) or type(error).__name__}."
        ) from error
    if not any(page.strip() for page in pages):
        raise DocumentError(f"{_sentence(name)} is a PDF without a text layer (scanned pages); run OCR on it first.")
    starts, position = [], 0
    for page in pages:
        starts.append(position)
        position += len(page) + 2
    return "\n\n".join(pages), tuple(starts)


def join_surrogates(text: str) -> str:
    """Characters outside the basic plane that are spelled as two halves, as one; lone halves as U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _sentence(name: str) -> str:
    return name[0].upper() + name[1:]
