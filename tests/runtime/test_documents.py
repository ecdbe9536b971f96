"""Files, bytes and standard input: what is read, exactly, and what is refused, how."""

import codecs
import io
import os
import re
import sys
import time
import types
from pathlib import Path

import pytest

from qllm_runtime.documents import document_from_bytes, load_document, page_span
from qllm_runtime.errors import DocumentError
from qllm_runtime.html_text import html_to_text

SUM = "<mi>a</mi><mo>+</mo><mi>b</mi>"
TRICKY = "First line \r\n\tnaïve 👩‍🚀 ‮mixed\u00a0\x0c\rlast line  \n\n"


def make_pdf(*pages: str | None) -> bytes:
    """A PDF with one line of text per page; None is a page without a text layer."""
    count = len(pages)
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(count))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {count} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for index, text in enumerate(pages):
        page = f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * index} 0 R"
        objects.append(f"{page} /Resources << /Font << /F1 3 0 R >> >> >>".encode())
        stream = b"" if text is None else f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET".encode("latin-1")
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
    out, offsets = io.BytesIO(b""), []
    out.write(b"%PDF-1.4\n")
    for number, body in enumerate(objects, 1):
        offsets.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, body))
    start = out.tell()
    out.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1))
    for offset in offsets:
        out.write(b"%010d 00000 n \n" % offset)
    out.write(b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start))
    return out.getvalue()


@pytest.fixture
def file(tmp_path):
    def write(data: bytes, name: str = "a.txt"):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize("name", ["a.txt", "b.md", "c.csv", "d.py", "README", "e.TXT"])
def test_text_is_kept_exactly(file, name):
    path = file(TRICKY.encode(), name)
    document = load_document(path)
    assert document.text == TRICKY
    assert document.title == name
    assert document.metadata["source"] == str(path)


def test_encodings(file):
    assert load_document(file(codecs.BOM_UTF8 + TRICKY.encode())).text == "\ufeff" + TRICKY
    for encoding in ("utf-16", "utf-32"):
        assert load_document(file(TRICKY.encode(encoding))).text == TRICKY
    assert load_document(file(codecs.BOM_UTF16_BE + TRICKY.encode("utf-16-be"))).text == TRICKY


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(TRICKY.encode())))
    document = load_document("-")
    assert (document.text, document.title, document.metadata["source"]) == (TRICKY, None, "-")
    with pytest.raises(DocumentError, match="Standard input is empty"):
        load_document("-")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b" \r\n\t\n", "nothing but white space"),
        (codecs.BOM_UTF8 + b"\n", "nothing but white space"),
        (b"caf\xe9 au lait", "not valid UTF-8: byte 0xe9 at offset 3"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00", "binary"),
        ("text".encode("utf-16-le"), "UTF-16 without a byte-order mark"),
        (bytes(range(1, 32)) * 4, "binary"),
        (b"PK\x03\x04\x14\x00", "zip archive"),
        (codecs.BOM_UTF16_LE + b"a", "UTF-16"),
        (codecs.BOM_UTF16_LE + b"\x00\xd8a\x00", "UTF-16"),
    ],
)
def test_bad_content(file, data, message):
    with pytest.raises(DocumentError, match=message) as caught:
        load_document(file(data))
    assert "\n" not in str(caught.value)
    assert "a.txt" in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names")
def test_a_name_that_is_not_utf8_makes_a_printable_title(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/n\xff\xfe.txt")
    Path(path).write_text("Call me Ishmael.")
    document = load_document(path)
    assert (document.title, document.metadata["source"]) == ("n\ufffd\ufffd.txt", path)


def test_closed_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(DocumentError, match="nothing to read"):
        load_document("-")


def test_bad_paths(tmp_path, monkeypatch):
    for path, message in [
        (tmp_path / "none.txt", "no file"),
        (tmp_path, "directory"),
        ("a\0b", "NUL"),
        ("x" * 5000, "Cannot read"),
    ]:
        with pytest.raises(DocumentError, match=message):
            load_document(path)
    locked = tmp_path / "locked.txt"
    locked.write_text("x")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(locked), "read_bytes", refuse)
    with pytest.raises(DocumentError, match="Permission denied"):
        load_document(locked)


class TestHtml:
    def test_visible_text(self):
        page = (
            "<!doctype html><html><head><title>T</title><style>a{}</style><script>'<p>no</p>'</script></head><body>"
            "<h1>Head</h1><p>One <b>bold</b>,\n two &amp; three<br>four</p><div hidden>no<div>no</div></div>"
            "<ul><li>a<li>b</ul><table><tr><td>1</td><td> 2</td></tr><tr><td>3</td></tr></table>"
            "<pre> x\n  y</pre>end<p style='display: none'>no</p><!-- no --></body></html>"
        )
        assert html_to_text(page) == "Head\n\nOne bold, two & three\nfour\n\na\nb\n\n1\t2\n3\n\n x\n  y\n\nend"

    def test_words_are_neither_joined_nor_split(self):
        assert html_to_text("a<b>b</b>c <i> d</i> e<p>f</p>g<script/>h") == "abc d e\n\nf\n\ngh"

    def test_empty_cells_keep_their_place(self) -> None:
        page = "<table><tr><th><th>1901<th>1902<tr><td>salt<td><td>7<tr><td><td>8</table>"
        assert html_to_text(page) == "\t1901\t1902\nsalt\t\t7\n\t8"

    def test_formulas_are_text(self) -> None:
        formula = (
            "<math><semantics><mi>E</mi><mo>=</mo><mi>m</mi><mspace/><annotation>E = m</annotation></semantics></math>"
        )
        assert html_to_text(f"<p>Here {formula} holds.") == "Here E=m holds."

    @pytest.mark.parametrize(
        ("page", "text"),
        [
            ("<math><mfrac><mn>1</mn> <mn>2</mn></mfrac><mi>x</mi></math>", "1/2x"),
            ("<math><msubsup><mi>x</mi><mn>1</mn><mn>2</mn></msubsup></math>", "x_1^2"),
            ("<math><mfrac><mrow>a+b</mrow><mrow>c+d</mrow></mfrac></math>", "(a+b)/(c+d)"),
            (f"<math><mfrac><mrow>{SUM}</mrow><mrow><mi>c</mi></mrow></mfrac><mi>x</mi></math>", "(a+b)/cx"),
            (f"<math><mfrac>\n<mrow>\n{SUM}\n</mrow>\n<mrow>\n{SUM}\n</mrow>\n</mfrac></math>", "(a+b)/(a+b)"),
            (f"<math><msup><mi>x</mi><mrow>{SUM}</mrow></msup></math>", "x^(a+b)"),
            (f"<math><msub><mi>x</mi><mstyle><mrow>{SUM}</mrow></mstyle></msub></math>", "x_(a+b)"),
            (f"<math><msup><mrow><mo>(</mo>{SUM}<mo>)</mo></mrow><mn>2</mn></msup></math>", "(a+b)^2"),
            (
                f"<math><msup><mrow><mo>(</mo>{SUM}<mo>)</mo><mo>(</mo><mo>)</mo></mrow><mn>2</mn></msup></math>",
                "((a+b)())^2",
            ),
            ("<math><msup><mrow>(a+b)</mrow><mn>2</mn></msup></math>", "(a+b)^2"),
            (f"<math><munderover><mo>&sum;</mo><mrow>{SUM}</mrow><mi>n</mi></munderover></math>", "\u2211_(a+b)^n"),
            ("<math><mfrac><mfrac><mn>1</mn><mn>2</mn></mfrac><mn>3</mn></mfrac></math>", "(1/2)/3"),
            (f"<p>Half <math><mfrac><mrow>{SUM}</mrow><mn>2</mn></mfrac></math> of it", "Half (a+b)/2 of it"),
            ("<math><mfrac><mrow><mspace/><mn>1.5</mn></mrow><mtext>a b</mtext></mfrac></math>", "1.5/a b"),
            ("<p>4.2 &times; 10<sup>5</sup> cells, 10<sup>&minus;3</sup> g", "4.2 \u00d7 10^5 cells, 10^\u22123 g"),
            ("<p>the 1<sup>st</sup> of May <sup>2</sup>", "the 1st of May 2"),
        ],
    )
    def test_numbers_above_and_below_do_not_run_together(self, page: str, text: str) -> None:
        assert html_to_text(page) == text

    def test_what_xhtml_ends_at_once_hides_nothing(self) -> None:
        page = "<html xmlns='http://www.w3.org/1999/xhtml'><head><title/><script src='a.js'/></head><p>seen</p></html>"
        assert html_to_text(page) == "seen"

    @pytest.mark.parametrize("name", ["textarea", "xmp", "noembed", "noframes", "title", "iframe", "TextArea"])
    def test_what_xhtml_ends_at_once_holds_nothing(self, name: str) -> None:
        assert html_to_text(f"<div>seen<{name} class='a'/><b>as well</b></div><p>after</p>") == "seenas well\n\nafter"

    @pytest.mark.parametrize(
        ("page", "text"),
        [
            ("<script>w('<script/>'); no()</script>seen", "seen"),
            ("<SCRIPT type='a'>w('<Script/><script />'); no()</script >seen<script/>too", "seentoo"),
            ("<style>/* <style/> */ no {}</style>seen", "seen"),
            ("<script>'<script/>' no", ""),
            ("<script>'<title/>'</scripts>no</script>seen<title/>too", "seentoo"),
            ("<xmp><script/></xmp>seen", "<script/>seen"),
            ("<!-- <script> -->seen<script/>too<!--> <script/> too", "seentoo too"),
            ("<p>seen<!-- <style>", "seen"),
        ],
    )
    def test_what_is_no_markup_stays_as_it_is(self, page: str, text: str) -> None:
        assert html_to_text(page) == text

    @pytest.mark.parametrize(
        "part", ["<script ", "<script>", "<script/>", "<!--", "<title", "<textarea/ ", "<!-- <xmp>"]
    )
    def test_pages_that_end_nothing(self, part: str) -> None:
        begun = time.monotonic()
        html_to_text(part * 50_000)
        assert time.monotonic() - begun < 20

    def test_deep_pages(self) -> None:
        assert html_to_text("<div>" * 20_000 + "deep") == "deep"
        assert html_to_text("<math>" + "<msup>" * 2_000 + "deep") == "deep"
        assert html_to_text("<math>" + "<mfrac><mrow><mi>x</mi>" * 300).startswith("(x(x")

    @pytest.mark.parametrize(
        ("page", "text"),
        [
            ("<p>Intro.<p hidden>no<p>The key is 42.<p>More.", "Intro.\n\nThe key is 42.\n\nMore."),
            ("<p hidden>no<div>seen</div>", "seen"),
            ("<div><p hidden>no</div>seen", "seen"),
            ("<section><div hidden>no</section>seen", "seen"),
            ("<p>a<span hidden>no</b></i></p>b", "a\n\nb"),
            ("<ul><li style='display:none'>no<li>seen</ul><p>after</p>", "seen\n\nafter"),
            ("<ul><li hidden>no<ul><li>no</ul>no<li>seen</ul>", "seen"),
            ("<dl><dt hidden>no<dd>b<dt>c</dl>", "b\nc"),
            ("<table><tr hidden><td>no<tr><td>seen</table><p>after", "seen\n\nafter"),
            ("<table><thead hidden><tr><th>no<tbody><tr><td hidden>no<td>b<td>c</table>", "b\tc"),
            ("<table><tr><td hidden>no<table><tr><td>no</table>no<td>seen</table>", "seen"),
            ("<table><caption hidden>no<tr><td>seen</table>", "seen"),
            ("<select><optgroup><option>no<option>no<optgroup><option>no</select>seen", "seen"),
            ("<ruby>k<rp hidden>(<rt>r<rp hidden>)</ruby>t", "krt"),
            ("<div hidden><p>no<p>no<ul><li>no</ul>no<br/></div>seen", "seen"),
            ("<div hidden><div>no</div>no</div>seen", "seen"),
            ("<b hidden><p>no</b>seen", "seen"),
            ("<b><div hidden>no</b>no</div>seen", "seen"),
            ("<p><svg><path d='m0'><g/><title>no</title></svg>seen", "seen"),
            ("<h1 hidden>no</h2>seen", "seen"),
            ("<p hidden>no</body></html>no", ""),
            ("<div><pre>a\n b</div>c\n  d", "a\n b\n\nc d"),
        ],
    )
    def test_a_hidden_element_hides_itself_only(self, page: str, text: str) -> None:
        assert html_to_text(page) == text

    def test_files(self, file):
        page = b"<p>Gr\xfc\xdfe</p>"
        declared = b'<meta charset="iso-8859-1">' + page
        assert load_document(file(declared, "a.html")).text == "Grüße"
        assert load_document(file(codecs.BOM_UTF8 + "<p>Grüße</p>".encode(), "a.htm")).text == "Grüße"
        stale = b'<?xml version="1.0" encoding="iso-8859-1"?><meta charset="utf-8">' + page
        assert load_document(file(stale, "a.xhtml")).text == "Grüße"
        with pytest.raises(DocumentError, match="not valid UTF-8"):
            load_document(file(page, "a.html"))
        with pytest.raises(DocumentError, match="no visible text"):
            load_document(file(b"<script>1</script>", "a.html"))
        with pytest.raises(DocumentError, match="unknown encoding 'klingon'"):
            load_document(file(b"<meta charset=klingon>x", "a.html"))

    @pytest.mark.parametrize(
        "charset", ["hex", "rot13", "zlib", "base64", "unicode_escape", "idna", "undefined", "..", "x-"]
    )
    def test_encodings_that_are_none(self, file, charset):
        with pytest.raises(DocumentError, match=rf"a\.html. declares the unknown encoding '{re.escape(charset)}'"):
            load_document(file(f"<meta charset={charset}>x".encode(), "a.html"))
        with pytest.raises(DocumentError, match="unknown encoding"):
            document_from_bytes(b"x", f"text/plain; charset={charset}")

    @pytest.mark.parametrize(
        ("declared", "encoding", "text"),
        [
            ("iso-8859-1", "cp1252", "it\u2019s 5 \u20ac"),
            ("latin1", "cp1252", "\u201cs\u201d"),
            ("us-ascii", "cp1252", "caf\u00e9 \u2013"),
            ("iso-8859-9", "cp1254", "\u201c\u0131\u201d"),
            ("gb2312", "gb18030", "\u6731\u9555\u57fa \u20ac"),
            ("GBK", "gb18030", "\u3400"),
            ("shift_jis", "cp932", "\u2460 \u9ad9"),
            ("x-sjis", "cp932", "\u65e5\u672c"),
            ("euc-kr", "cp949", "\ub625\ubc29\uac01\ud558"),
            ("koi8-r", "koi8-r", "\u043c\u0438\u0440"),
        ],
    )
    def test_names_of_encodings_mean_what_browsers_read(self, file, declared, encoding, text):
        page = f"<meta charset={declared}>{text}"
        assert load_document(file(page.encode(encoding), "a.html")).text == text
        assert document_from_bytes(text.encode(encoding), f"text/html; charset={declared}").text == text
        assert document_from_bytes(text.encode(encoding), f"text/plain; charset={declared}").text == text
        assert load_document(file(codecs.BOM_UTF8 + page.encode(), "a.html")).text == text

    def test_utf_16_in_a_tag_is_utf_8(self, file):
        for charset in ("utf-16", "UTF-16LE", "utf-16be"):
            assert (
                load_document(file(f"<meta charset='{charset}'>Gr\u00fc\u00dfe".encode(), "a.html")).text
                == "Gr\u00fc\u00dfe"
            )
        assert (
            document_from_bytes("Gr\u00fc\u00dfe".encode("utf-16-le"), "text/html; charset=utf-16").text
            == "Gr\u00fc\u00dfe"
        )

    def test_bytes_that_an_encoding_lacks(self, file):
        with pytest.raises(DocumentError, match="not valid CP1252: byte 0x81 at offset 26"):
            load_document(file(b"<meta charset=iso-8859-1>a\x81", "a.html"))


class TestPdf:
    def test_pages(self, file):
        document = load_document(file(make_pdf("First page.", None, "Third page."), "a.pdf"))
        assert document.text == "First page.\n\n\n\nThird page."
        starts = document.metadata["page_starts"]
        assert [document.text[start : start + 5] for start in (starts[0], starts[2])] == ["First", "Third"]

    @pytest.mark.parametrize(
        ("passage", "pages"),
        [
            ("First", (1, 1)),
            ("page.\n\nSec", (1, 2)),
            ("Second page.", (2, 2)),
            ("\n\n\n\nFourth", (2, 4)),
            ("rth", (4, 4)),
        ],
    )
    def test_page_of_a_passage(self, file, passage, pages):
        document = load_document(file(make_pdf("First page.", "Second page.", None, "Fourth page."), "a.pdf"))
        start = document.text.index(passage)
        assert page_span(document.metadata["page_starts"], start, start + len(passage)) == pages

    def test_refusals(self, file, monkeypatch):
        with pytest.raises(DocumentError, match="without a text layer"):
            load_document(file(make_pdf(None), "a.pdf"))
        with pytest.raises(DocumentError, match="not a PDF"):
            load_document(file(b"just text", "a.pdf"))
        with pytest.raises(DocumentError, match="empty"):
            load_document(file(b"", "a.pdf"))
        with pytest.raises(DocumentError, match="damaged"):
            load_document(file(b"%PDF-1.4\ngarbage", "a.pdf"))
        monkeypatch.setitem(sys.modules, "pypdf", None)
        with pytest.raises(DocumentError, match=r"pip install 'qllm-integrations\[pdf\]'"):
            load_document(file(make_pdf("x"), "a.pdf"))

    def test_protected(self, file):
        pypdf = pytest.importorskip("pypdf")
        writer = pypdf.PdfWriter(clone_from=io.BytesIO(make_pdf("Secret.")))
        writer.encrypt("password", algorithm="RC4-128")
        out = io.BytesIO()
        writer.write(out)
        with pytest.raises(DocumentError, match="password"):
            load_document(file(out.getvalue(), "a.pdf"))


class TestBytes:
    def test_content_decides(self):
        assert document_from_bytes(make_pdf("Hello."), "text/plain").text == "Hello."
        assert document_from_bytes(b"Hello.", "application/pdf", "t").text == "Hello."
        assert document_from_bytes(b"<p>Hi</p>", "text/html; charset=utf-8").text == "Hi"
        assert document_from_bytes(b"<p>Hi</p>", "text/plain").text == "<p>Hi</p>"
        assert document_from_bytes("é".encode("latin-1"), "text/plain; charset=iso-8859-1").text == "é"
        assert document_from_bytes(b"{}", "application/json", "t").title == "t"
        assert document_from_bytes(b"x").text == "x"

    def test_refusals(self):
        with pytest.raises(DocumentError, match="image/png"):
            document_from_bytes(b"x", "image/png")
        with pytest.raises(DocumentError, match="Document 't' is empty"):
            document_from_bytes(b"", None, "t")
        with pytest.raises(DocumentError, match="unknown encoding"):
            document_from_bytes(b"x", "text/plain; charset=klingon")
