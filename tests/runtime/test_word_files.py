"""Kinds of Word files, and files that are refused."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from word_markup import p

from qllm_runtime.documents import document_from_bytes, load_document
from qllm_runtime.errors import DocumentError
from tests.office import elements, packed, unpacked, word

docx = pytest.importorskip("docx")


class TestKinds:
    TEXT = "The rent is 900."

    def test_templates_and_files_with_macros(self) -> None:
        members = unpacked(word(self.TEXT))
        types = members["[Content_Types].xml"]
        main = b"application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
        for kind in (
            b"application/vnd.openxmlformats-officedocument.wordprocessingml.template.main+xml",
            b"application/vnd.ms-word.document.macroEnabled.main+xml",
            b"application/vnd.ms-word.template.macroEnabledTemplate.main+xml",
        ):
            assert main in types
            data = packed({**members, "[Content_Types].xml": types.replace(main, kind)})
            assert document_from_bytes(data).text == self.TEXT

    def test_the_strict_format(self) -> None:
        half = "<m:f><m:num><m:r><m:t>1</m:t></m:r></m:num><m:den><m:r><m:t>2</m:t></m:r></m:den></m:f>"
        members = unpacked(word(self.TEXT, p(f"<m:oMath>{half}</m:oMath>")))
        for path, content in members.items():
            for kind in (b"wordprocessingml", b"officeDocument"):
                usual = b"http://schemas.openxmlformats.org/" + kind + b"/2006/"
                content = content.replace(usual, b"http://purl.oclc.org/ooxml/" + kind + b"/")
            members[path] = content
        assert b"2006/main" not in members["word/document.xml"]
        assert document_from_bytes(packed(members)).text == f"{self.TEXT}\n\n1/2"

    def test_relations_that_lead_nowhere_or_differ_in_case(self) -> None:
        members = unpacked(word(self.TEXT))
        relations = members["word/_rels/document.xml.rels"]
        dead = b'<Relationship Id="x1" Type="http://x/image" Target="../NULL"/>'
        relations = relations.replace(b"</Relationships>", dead + b"</Relationships>").replace(
            b"styles.xml", b"STYLES.xml"
        )
        assert b"NULL" in relations and b"STYLES" in relations
        assert document_from_bytes(packed({**members, "word/_rels/document.xml.rels": relations})).text == self.TEXT

    def test_names_with_backslashes(self) -> None:
        members = {path.replace("/", "\\"): content for path, content in unpacked(word(self.TEXT)).items()}
        assert document_from_bytes(packed(members)).text == self.TEXT

    def test_members_without_a_name(self) -> None:
        assert document_from_bytes(packed({"\\": b"x", **unpacked(word(self.TEXT))})).text == self.TEXT

    def test_pictures_stay_packed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("qllm_runtime.archives.MAX_UNPACKED", 10**6)
        picture = b'<Relationship Id="x1" Type="http://x/image" Target="media/a.png"/></Relationships>'
        members = unpacked(word(self.TEXT))
        members["word/_rels/document.xml.rels"] = members["word/_rels/document.xml.rels"].replace(
            b"</Relationships>", picture
        )
        members["[Content_Types].xml"] = members["[Content_Types].xml"].replace(
            b"</Types>", b'<Default Extension="png" ContentType="image/png"/></Types>'
        )
        members["word/media/a.png"] = bytes(2 * 10**6)
        assert document_from_bytes(packed(members)).text == self.TEXT

    @pytest.mark.parametrize(
        ("kind", "name", "data", "text"),
        [
            ("text/html", "a.html", b"<p>Clause <b>2</b></p>", "Clause 2"),
            ("text/html", "a.htm", b"<meta charset=iso-8859-1><p>Caf\xe9</p>", "Café"),
            ("text/plain", "a.txt", "Clause é".encode(), "Clause é"),
        ],
    )
    def test_files_that_word_takes_in(self, kind: str, name: str, data: bytes, text: str) -> None:
        assert document_from_bytes(self.with_chunk(kind, name, data)).text == f"Ahead\n\n{text}\n\nBehind"

    def test_files_that_only_word_takes_in(self) -> None:
        for name in ("a.rtf", "a.html"):
            with pytest.raises(DocumentError, match=r"holds another file \(application/rtf\).*open it in Word"):
                document_from_bytes(self.with_chunk("application/rtf", name, b"{\\rtf1 x}"))
        with pytest.raises(DocumentError, match=r"holds another file \(text/html\)"):
            document_from_bytes(self.with_chunk("text/html", "a.bin", b"<p>x</p>"))
        with pytest.raises(DocumentError, match=r"master document"):
            document_from_bytes(word("Ahead", '<w:subDoc r:id="rId1"/>'))

    @staticmethod
    def with_chunk(kind: str, name: str, data: bytes) -> bytes:
        from docx.opc.packuri import PackURI
        from docx.opc.part import Part

        document = docx.Document()
        document.add_paragraph("Ahead")
        part = Part(PackURI(f"/word/{name}"), kind, data, document.part.package)
        relation = document.part.relate_to(part, "http://x/aFChunk")
        (chunk,) = elements(f'<w:altChunk r:id="{relation}"/>')
        document.element.body.insert(1, chunk)
        document.add_paragraph("Behind")
        out = io.BytesIO()
        document.save(out)
        return out.getvalue()


class TestRefusals:
    def test_without_the_library(self, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
        monkeypatch.setitem(sys.modules, "docx.package", None)
        (tmp_path / "a.docx").write_bytes(word("x"))
        with pytest.raises(DocumentError, match=r"a\.docx.*pip install 'qllm-integrations\[docx\]'"):
            load_document(tmp_path / "a.docx")

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "'.*a.docx' is empty"),
            (b"just text", "named .docx but is not a Word file"),
            (b"PK\x03\x04\x14\x00", "damaged zip archive"),
            (b"PK\x05\x06" + bytes(18), "neither a Word nor an EPUB file; unpack"),
            (packed({"a.txt": "x"}), "neither a Word nor an EPUB file; unpack"),
            (packed({"mimetype": "application/vnd.oasis.opendocument.text", "content.xml": "<x/>"}), "OpenDocument"),
            (packed({"[Content_Types].xml": "<x ContentType='a.spreadsheetml.sheet.main+xml'/>"}), "Excel.*csv"),
            (packed({"[Content_Types].xml": "<x ContentType='a.presentationml.x.main+xml'/>"}), "presentation.*PDF"),
            (b"{\\rtf1\\ansi Hello}", r"rich text \(.rtf\); save it as .docx"),
            (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), r"old binary format .*save it as .docx"),
            (
                b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(60) + "EncryptedPackage".encode("utf-16-le"),
                "protected by a password",
            ),
            (word(), "without text"),
            (word("", " \n"), "without text"),
            (word("Some text.")[:-200], "damaged"),
        ],
    )
    def test_files(self, tmp_path, data: bytes, message: str) -> None:
        for name in ("a.docx", "a.bin"):
            path = tmp_path / name
            path.write_bytes(data)
            if data == b"just text" and name == "a.bin":
                continue
            with pytest.raises(DocumentError, match=message.replace("a.docx", name)) as caught:
                load_document(path)
            assert name in str(caught.value) and "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("path", "content", "message"),
        [
            ("word/document.xml", b"<w:document", "damaged Word file: .*open it in Word"),
            ("word/document.xml", None, "damaged Word file: .*open it in Word"),
            ("word/document.xml", b"<x/>", "damaged Word file"),
            ("word/document.xml", b"<!DOCTYPE x [<!ENTITY a 'b'>]><x>&a;</x>", "declares entities"),
            ("word/_rels/document.xml.rels", b"<x", "rels' in it is not valid XML"),
            ("word/_rels/document.xml.rels", b"<!DOCTYPE x [<!ENTITY a 'b'>]><x>&a;</x>", "declares entities"),
        ],
    )
    def test_damaged_parts(self, path: str, content: bytes | None, message: str) -> None:
        members = unpacked(word("Some text."))
        assert members.pop(path)
        if content is not None:
            members[path] = content
        with pytest.raises(DocumentError, match=message):
            document_from_bytes(packed(members))

    def test_more_than_may_be_unpacked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        data = word("Some text.", "x" * 10**6)
        assert len(data) < 10**5
        monkeypatch.setattr("qllm_runtime.archives.MAX_UNPACKED", 2**20)
        with pytest.raises(DocumentError, match="more than 1 MiB of text; split it"):
            document_from_bytes(data)


def test_importing_does_not_load_the_libraries() -> None:
    code = "import sys, qllm_runtime.documents; print({'docx', 'lxml', 'torch', 'pypdf'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
