"""Zip archives that documents come as, unpacked within bounds."""

from __future__ import annotations

import contextlib
import io
import posixpath
import unicodedata
import zipfile
from collections.abc import Iterator
from xml.etree import ElementTree
from xml.parsers import expat

from qllm_runtime.charsets import unreadable

MAX_UNPACKED = 128 * 2**20  # bytes of text that are unpacked of one archive; pictures stay packed
_UTF8_NAME, _ENCRYPTED = 0x800, 0x1  # flags of a member
# the only ways that Word and EPUB files may be packed; what the others unpack to has no bound
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class Archive:
    """A zip archive in memory.

    Args:
        data: Its bytes.
        name: What to call it in errors, e.g. "'a.docx'" or "the document".

    Raises:
        DocumentError: Not a zip archive, or a damaged one.
    """

    def __init__(self, data: bytes, name: str) -> None:
        self.name = name
        self._left = MAX_UNPACKED
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except Exception as error:  # a damaged file makes zipfile raise nearly anything
            raise unreadable(
                name,
                f"is a damaged zip archive, which Word and EPUB files are: {error}; download it or save it again.",
            ) from error
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in self._zip.infolist():
            path = _path(member)
            if path and not member.is_dir():
                self._members.setdefault(path, member)
        self._folded = {_fold(path): path for path in reversed(self._members)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def find(self, path: str) -> str | None:
        """The member at a path; where none is, one whose name differs only in case or in how accents are spelled."""
        path = posixpath.normpath(path).lstrip("/")
        return path if path in self._members else self._folded.get(_fold(path))

    def read(self, path: str) -> bytes:
        """The bytes of a member.

        Raises:
            DocumentError: Missing, protected by a password, damaged, or more than may be unpacked.
        """
        found = self.find(path)
        if found is None:
            raise unreadable(self.name, f"is damaged: {path!r} is missing in it; download it or save it again.")
        member = self._members[found]
        if member.flag_bits & _ENCRYPTED:
            raise unreadable(self.name, "is protected by a password; save it without one.")
        if member.compress_type not in _METHODS:
            raise unreadable(self.name, f"is packed in an unusual way ({found!r}); pack it anew, by deflating.")
        try:
            with self._zip.open(member) as file:
                data = file.read(self._left + 1)
        except Exception as error:  # see above
            raise unreadable(
                self.name, f"is damaged: {found!r} cannot be unpacked ({error}); download it or save it again."
            ) from error
        self._left -= len(data)
        if self._left < 0:
            raise unreadable(
                self.name,
                f"unpacks to more than {MAX_UNPACKED / 2**20:g} MiB of text; split it, or save it as plain text.",
            )
        return data

    def read_xml(self, path: str) -> ElementTree.Element:
        """The root of a member of XML.

        Raises:
            DocumentError: As `read`; not XML, or XML that declares entities.
        """
        data = self.read(path)
        try:
            scan = expat.ParserCreate()
            scan.EntityDeclHandler = _refuse_entity  # they may unfold to any size
            scan.Parse(data, True)
            return ElementTree.fromstring(data)
        except (expat.ExpatError, ElementTree.ParseError, LookupError, ValueError) as error:
            raise unreadable(self.name, f"is damaged: {path!r} in it is not valid XML ({error}).") from None


def is_archive(data: bytes) -> bool:
    """Whether bytes start as a zip archive does."""
    return data.startswith((b"PK\x03\x04", b"PK\x05\x06"))


def _refuse_entity(*_: object) -> None:
    raise ValueError("it declares entities")


def _path(member: zipfile.ZipInfo) -> str:
    name = member.filename.replace("\\", "/")
    if not member.flag_bits & _UTF8_NAME:  # zipfile has taken it for cp437; most writers mean UTF-8 all the same
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.lstrip("/")


def _fold(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()
