"""Bytes as text: encodings that are declared, marked or taken for granted."""

from __future__ import annotations

import codecs
import re

from qllm_runtime.errors import DocumentError

# longest first: the UTF-32 mark begins with the UTF-16 one
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# what browsers read under a declared name (https://encoding.spec.whatwg.org), where Python knows it as something narrower
_WIDER = {
    "ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "iso8859-11": "cp874", "tis-620": "cp874",
    "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949",
}  # fmt: skip
# ways of spelling text in Python's own notation or in names of hosts
_NO_CHARSETS = ("unicode-escape", "raw-unicode-escape", "idna", "punycode", "undefined")
_XML_CHARSET = re.compile(rb"\s*<\?xml[^>]{0,200}?\sencoding\s*=\s*[\"']([\w.:-]+)")
_META_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
# control characters that no text file holds (tab, line feed, form feed, return and escape excepted)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")


def xml_charset(data: bytes) -> str | None:
    """The encoding that the declaration of an XML file names, if it has one."""
    if data.startswith(b"<\0"):
        return "utf-16-le"
    if data.startswith(b"\0<"):
        return "utf-16-be"
    return _readable(_XML_CHARSET.match(data[:512]))


def declared_charset(data: bytes) -> str | None:
    """The encoding that a page names in an XML declaration or a `<meta>` tag, if it does."""
    return xml_charset(data) or _readable(_META_CHARSET.search(data[:2048]))


def _readable(found: re.Match[bytes] | None) -> str | None:
    if not found:
        return None
    charset = found.group(1).decode("ascii")
    # whoever could read the name does not read UTF-16
    return "utf-8" if charset.lower().startswith(("utf-16", "utf-32")) else charset


def decode(data: bytes, name: str, charset: str | None = None) -> str:
    """The text that bytes spell.

    Args:
        data: Bytes, with a byte-order mark or without.
        name: What to call them in errors, e.g. "'a.txt'" or "the document".
        charset: Encoding where no mark says another (None: UTF-8).

    Raises:
        DocumentError: Binary, badly encoded, or in an unknown encoding.
    """
    encoding = next((encoding for mark, encoding in _BYTE_ORDER_MARKS if data.startswith(mark)), None)
    if encoding is None:
        marked = data.startswith(codecs.BOM_UTF8)
        encoding = "utf-8" if charset is None or marked else _codec(charset, name)
    if encoding == "utf-8":
        _refuse_binary(data, name)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise unreadable(
            name,
            f"is not valid {encoding.upper()}: byte 0x{data[error.start]:02x} at offset {error.start} "
            f"({error.reason}); convert it, e.g. `iconv -f latin1 -t utf-8`.",
        ) from None
    except (UnicodeError, ValueError) as error:  # codecs that raise without a position
        raise unreadable(name, f"cannot be decoded as {encoding}: {error}; convert it to UTF-8.") from None
    if "\0" in text or len(_CONTROL.findall(text[:65536])) * 20 > min(len(text), 65536):
        raise unreadable(name, "is binary, not text.")
    return text


def _codec(charset: str, name: str) -> str:
    """The codec of Python that reads what is declared as `charset`."""
    try:
        codec = codecs.lookup(charset.lower().removeprefix("x-")).name
        if codec in _NO_CHARSETS:
            raise LookupError
        "".encode(codec)  # a LookupError where it makes no text of bytes, as hex
    except (LookupError, ValueError):
        raise unreadable(name, f"declares the unknown encoding {charset!r}; convert it to UTF-8.") from None
    return _WIDER.get(codec, codec)


def _refuse_binary(data: bytes, name: str) -> None:
    nul = data.find(b"\0")
    if nul >= 0:
        raise unreadable(
            name,
            f"is binary, or UTF-16 without a byte-order mark (zero byte at offset {nul}); convert it to UTF-8.",
        )


def unreadable(name: str, what: str) -> DocumentError:
    """The error that says of a document what is wrong with it."""
    return DocumentError(f"{name[0].upper()}{name[1:]} {what}")
