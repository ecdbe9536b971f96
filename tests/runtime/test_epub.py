"""The text of EPUB books: every chapter once, in the order of reading."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path

import pytest

from qllm_runtime.documents import document_from_bytes, load_document
from qllm_runtime.errors import DocumentError
from tests.office import CONTAINER, epub, packed, unpacked

PAGE = "application/xhtml+xml"
FONTS = "http://www.idpf.org/2008/embedding"


def read(data: bytes) -> str:
    return document_from_bytes(data).text


def item(name: str, href: str, kind: str = PAGE, more: str = "") -> str:
    return f'<item id="{name}" href="{href}" media-type="{kind}" {more}/>'


def order(*names: str) -> list[str]:
    return [f'<itemref idref="{name}"/>' for name in names]


def encryption(*paths: str, algorithm: str = "http://www.w3.org/2001/04/xmlenc#aes256-cbc") -> str:
    data = "".join(
        f'<e:EncryptedData xmlns:e="http://www.w3.org/2001/04/xmlenc#"><e:EncryptionMethod Algorithm="{algorithm}"/>'
        f'<e:CipherData><e:CipherReference URI="{path}"/></e:CipherData></e:EncryptedData>'
        for path in paths
    )
    return f'<encryption xmlns="urn:oasis:names:tc:opendocument:xmlns:container">{data}</encryption>'


class TestOrder:
    def test_chapters_with_an_empty_line_between_them(self, tmp_path: Path) -> None:
        second = "<html><head><title>no</title></head><body><h1>II</h1>\n<p>The <i>whale</i>.</p>\n</body></html>"
        path = tmp_path / "Moby Dick.epub"
        path.write_bytes(epub("Call me Ishmael.", second, "The end."))
        document = load_document(path)
        assert document.text == "Call me Ishmael.\n\nII\n\nThe whale.\n\nThe end."
        assert (document.title, document.metadata) == ("Moby Dick.epub", {"source": str(path)})

    def test_the_spine_decides(self) -> None:
        assert read(epub("one", "two", "three", spine=order("c3", "c1"))) == "three\n\none"
        assert read(epub("one", "two", spine=order("c2", "c1", "c2"))) == "two\n\none"

    def test_what_stands_apart_comes_last(self) -> None:
        spine = ['<itemref idref="c1" linear="no"/>', '<itemref idref="c2"/>', '<itemref idref="c3" linear="yes"/>']
        assert read(epub("answers", "one", "two", spine=spine)) == "one\n\ntwo\n\nanswers"
        assert read(epub("answers", spine=spine[:1])) == "answers"

    def test_navigation_is_left_out(self) -> None:
        nav = item("nav", "nav.xhtml", more='properties="scripted nav"')
        members = {"OEBPS/nav.xhtml": "<nav><ol><li>no</li></ol></nav>"}
        assert read(epub("one", items=[nav], spine=order("nav", "c1"), members=members)) == "one"
        old = item("ncx", "toc.ncx", "application/x-dtbncx+xml")
        assert (
            read(epub("one", items=[old], spine=order("ncx", "c1"), members={"OEBPS/toc.ncx": "<ncx>no</ncx>"}))
            == "one"
        )
        kept = item("navy", "nav.xhtml", more='properties="navy"')
        assert read(epub("one", items=[kept], spine=order("navy", "c1"), members=members)) == "no\n\none"

    def test_chapters_without_text(self) -> None:
        cover = "<html><body><svg><text>no</text></svg><img src='a.png' alt='no'/></body></html>"
        assert read(epub(cover, "one", b"", "&#160;", "two")) == "one\n\ntwo"


class TestPaths:
    @pytest.mark.parametrize(
        ("href", "path"),
        [
            ("text/a%20b.xhtml", "OEBPS/text/a b.xhtml"),
            ("text/a%20b.xhtml", "OEBPS/text/a%20b.xhtml"),
            ("a.xhtml#start", "OEBPS/a.xhtml"),
            ("../text/./a.xhtml", "text/a.xhtml"),
            ("/OEBPS/a.xhtml", "OEBPS/a.xhtml"),
            ("Text/A.XHTML", "OEBPS/text/a.xhtml"),
            ("caf%C3%A9.xhtml", "OEBPS/caf\u00e9.xhtml"),
            ("caf\u00e9.xhtml", "OEBPS/cafe\u0301.xhtml"),
            ("a.xhtml", "OEBPS\\a.xhtml"),
        ],
    )
    def test_references(self, href: str, path: str) -> None:
        data = epub(items=[item("x", href)], spine=order("x"), members={path: "<p>here</p>"})
        assert read(data) == "here"

    def test_names_in_utf8_that_do_not_say_so(self) -> None:
        data = epub(
            items=[item("x", "caf\u00e9.xhtml")], spine=order("x"), members={"OEBPS/cafXX.xhtml": "<p>here</p>"}
        )
        assert read(data.replace(b"cafXX", "caf\u00e9".encode())) == "here"

    @pytest.mark.parametrize("package", ["content.opf", "EPUB/inner/package.opf"])
    def test_packages_anywhere(self, package: str) -> None:
        up = "../../" * ("/" in package)
        data = epub("one", items=[item("x", f"{up}OEBPS/c1.xhtml")], spine=order("x"), package=package)
        assert read(data) == "one"

    def test_the_package_among_other_renditions(self) -> None:
        other = '<container><rootfiles><rootfile full-path="a.pdf" media-type="application/pdf"/>'
        own = '<rootfile full-path="OEBPS/content.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
        assert read(epub("one", members={"META-INF/container.xml": other + own})) == "one"


class TestKinds:
    def test_encodings(self) -> None:
        page = "<?xml version='1.0' encoding='{}'?><html><body><p>Grüße</p></body></html>"
        stale = "<?xml version='1.0' encoding='utf-8'?><meta charset='iso-8859-1'/><p>Grüße</p>".encode()
        chapters = [
            page.format("ISO-8859-1").encode("latin-1"), page.format("utf-16").encode("utf-16"),
            page.format("utf-16").encode("utf-16-le"), page.format("utf-16").encode("utf-16-be"),
            page.format("utf-8").encode("utf-8-sig"), stale, "<p>Grüße</p>".encode(),
        ]  # fmt: skip
        assert read(epub(*chapters)) == "\n\n".join(["Grüße"] * len(chapters))
        with pytest.raises(DocumentError, match=r"Chapter 'OEBPS/c2\.xhtml' of the document is not valid UTF-8"):
            read(epub("one", page.format("utf-8").encode("latin-1")))

    def test_what_xhtml_may_hold(self) -> None:
        page = "<html><head><style><![CDATA[a > b {}]]></style></head><body><p><![CDATA[a<b & c>d]]>&nbsp;&copy;</p></body>"
        assert read(epub(page)) == "a<b & c>d \u00a9"

    def test_types_of_chapters(self) -> None:
        kinds = ["text/html", "application/x-dtbook+xml", "text/x-oeb1-document", "", "TEXT/HTML"]
        items = [item(f"k{n}", f"k{n}.html", kind) for n, kind in enumerate(kinds)]
        members = {f"OEBPS/k{n}.html": f"<p>{n}</p>" for n in range(len(kinds))}
        spine = order(*(f"k{n}" for n in range(len(kinds))))
        assert read(epub(items=items, spine=spine, members=members)) == "0\n\n1\n\n2\n\n3\n\n4"

    def test_what_stands_in_for_other_types(self) -> None:
        items = [
            item("p", "a.pdf", "application/pdf", 'fallback="q"'),
            item("q", "a.svg", "image/svg+xml", 'fallback="c2"'),
        ]
        assert read(epub("one", "two", items=items, spine=order("p", "c1"))) == "two\n\none"
        round_in_circles = [item("p", "a.svg", "image/svg+xml", 'fallback="p"')]
        assert read(epub("one", items=round_in_circles, spine=order("p", "c1"))) == "one"
        with pytest.raises(DocumentError, match=r"chapter 'a\.pdf' is of type 'application/pdf'"):
            read(epub("one", items=[item("p", "a.pdf", "application/pdf")], spine=order("c1", "p")))

    def test_the_doctype_of_old_packages(self) -> None:
        members = unpacked(epub("one"))
        doctype = (
            b'<!DOCTYPE package PUBLIC "+//ISBN 0-9673008-1-9//DTD OEB 1.2 Package//EN" "http://x/oeb.dtd"><package'
        )
        members["OEBPS/content.opf"] = members["OEBPS/content.opf"].replace(b"<package", doctype)
        assert read(packed(members)) == "one"


class TestProtection:
    @pytest.mark.parametrize("path", ["OEBPS/c2.xhtml", "OEBPS/c%32.xhtml", "OEBPS/content.opf"])
    @pytest.mark.parametrize("algorithm", ["http://www.w3.org/2001/04/xmlenc#aes256-cbc", FONTS])
    def test_books_with_encrypted_text(self, path: str, algorithm: str) -> None:
        members = {"META-INF/encryption.xml": encryption("OEBPS/f.otf", path, algorithm=algorithm), "OEBPS/f.otf": "x"}
        with pytest.raises(DocumentError, match=r"DRM.*get a copy without"):
            read(epub("one", b"\x8f\x00\x12", members=members))

    def test_books_with_everything_encrypted(self) -> None:
        names = {"META-INF/encryption.xml": encryption("OEBPS/content.opf", "OEBPS/c1.xhtml")}
        with pytest.raises(DocumentError, match="DRM"):
            read(epub("one", members={**names, "OEBPS/content.opf": b"\x8f\x00\x12"}))

    def test_books_with_encrypted_fonts(self) -> None:
        members = {
            "META-INF/encryption.xml": encryption("OEBPS/f.otf", "gone.otf", algorithm=FONTS),
            "OEBPS/f.otf": "x",
        }
        assert read(epub("one", members=members)) == "one"
        with pytest.raises(DocumentError, match=r"'OEBPS/c2\.xhtml' is missing"):
            read(epub("one", items=[item("c2", "c2.xhtml")], spine=order("c1", "c2"), members=members))

    def test_archives_with_a_password(self) -> None:
        data = bytearray(epub("one"))
        at = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)  # the second member's entry: the container
        data[at + 8] |= 1
        with pytest.raises(DocumentError, match="protected by a password; save it without one"):
            read(bytes(data))


class TestRefusals:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "is empty"),
            (b"just text", r"named \.epub but is not an EPUB file"),
            (epub("one")[:-100], "damaged zip archive"),
            (epub(), "without chapters"),
            (epub("one", spine=[]), "without chapters"),
            (epub("<svg/>", " "), "book without text"),
            (epub("one", spine=order("c1", "c9")), "chapter 'c9' is not in its list"),
            (epub("one", items=[item("x", "x.xhtml")], spine=order("x")), r"'OEBPS/x\.xhtml' is missing"),
            (epub("one", items=[item("x", "")], spine=order("x")), "'OEBPS/' is missing"),
            (epub("one", members={"META-INF/container.xml": CONTAINER.format("x.opf")}), r"'x\.opf' is missing"),
            (epub("one", members={"META-INF/container.xml": "<container/>"}), "names no package"),
            (epub("one", members={"META-INF/container.xml": "<container"}), "container.xml' in it is not valid XML"),
            (epub("one", members={"OEBPS/content.opf": b"\xff\x00<x/>"}), "content.opf' in it is not valid XML"),
            (
                epub("one", members={"OEBPS/content.opf": "<?xml version='1.0' encoding='klingon'?><x/>"}),
                "not valid XML",
            ),
            (
                epub(
                    "one",
                    members={"OEBPS/content.opf": "<!DOCTYPE x [<!ENTITY a 'aa'><!ENTITY b '&a;&a;'>]><x>&b;</x>"},
                ),
                "declares entities",
            ),
            (epub("one", members={"META-INF/encryption.xml": "<x"}), "encryption.xml' in it is not valid XML"),
        ],
    )
    def test_books(self, tmp_path: Path, data: bytes, message: str) -> None:
        path = tmp_path / "b.epub"
        path.write_bytes(data)
        with pytest.raises(DocumentError, match=message) as caught:
            load_document(path)
        assert "b.epub" in str(caught.value) and "\n" not in str(caught.value)

    def test_damaged_members(self) -> None:
        members = unpacked(epub("one", "A sentence of the second chapter."))
        data = packed(members, zipfile.ZIP_STORED)
        with pytest.raises(DocumentError, match=r"'OEBPS/c2\.xhtml' cannot be unpacked \(Bad CRC"):
            read(data.replace(b"second chapter", b"Second chapter"))
        with pytest.raises(DocumentError, match="packed in an unusual way"):
            read(packed(members, zipfile.ZIP_BZIP2))

    def test_more_than_may_be_unpacked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("qllm_runtime.archives.MAX_UNPACKED", 2**20)
        pictures = {"OEBPS/a.png": bytes(2**22)}
        chapters = ["x" * 400_000] * 2
        assert len(read(epub(*chapters, members=pictures))) == 800_002
        with pytest.raises(DocumentError, match="more than 1 MiB of text; split it"):
            read(epub(*chapters, "x" * 400_000))

    def test_sizes_that_lie(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("qllm_runtime.archives.MAX_UNPACKED", 2**20)
        members = unpacked(epub("x" * 2**26))
        size = len(members["OEBPS/c1.xhtml"]).to_bytes(4, "little")
        data = packed(members)
        assert data.count(size) == 2
        data = data.replace(size, (1000).to_bytes(4, "little"))
        tracemalloc.start()
        with pytest.raises(DocumentError, match="cannot be unpacked"):
            read(data)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**24


def test_a_book_inside_of_its_zip_is_not_the_book() -> None:
    with pytest.raises(DocumentError, match="neither a Word nor an EPUB file"):
        read(packed({"b.epub": epub("one")}))
