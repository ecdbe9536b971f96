"""The text of Word files: in order, whole, and nothing that the page does not show."""

from __future__ import annotations

import io
import itertools
import re
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from word_markup import control, field, instruction, p, r, read, row, table, tc

from qllm_runtime.documents import document_from_bytes
from tests.office import packed, unpacked, word

docx = pytest.importorskip("docx")

INLINE = st.recursive(
    st.sampled_from([r("WORD"), "<w:r><w:tab/></w:r>", "<w:bookmarkStart/>", f"<w:del>{r('WORD')}</w:del>"]),
    lambda inside: st.builds(
        lambda wrapper, parts: wrapper.format("".join(parts)),
        st.sampled_from(
            [
                "<w:ins>{}</w:ins>",
                "<w:hyperlink>{}</w:hyperlink>",
                "<w:smartTag>{}</w:smartTag>",
                control("{}"),
                "<w:fldSimple>{}</w:fldSimple>",
                "<w:moveTo>{}</w:moveTo>",
                "<w:customXml>{}</w:customXml>",
                field("begin") + instruction("REF") + field("separate") + "{}" + field("end"),
                "<mc:AlternateContent><mc:Choice>{}</mc:Choice></mc:AlternateContent>",
                "<w:unknown>{}</w:unknown>",
            ]
        ),
        st.lists(inside, max_size=3),
    ),
    max_leaves=6,
)
MARKS = st.sampled_from(["", "<w:rPr><w:del/></w:rPr>", "<w:rPr><w:ins/></w:rPr>", "<w:pStyle w:val='ListNumber'/>"])
PARAGRAPHS = st.builds(lambda parts, mark: p("".join(parts), mark), st.lists(INLINE, max_size=3), MARKS)
TABLES = st.recursive(
    st.builds(lambda cells: table(row(*map(tc, cells))), st.lists(PARAGRAPHS, min_size=1, max_size=3)),
    lambda inside: st.builds(
        lambda one, other, wrapper: wrapper.format(table(row(tc(one), control(tc(other))), control(row(tc(one))))),
        inside,
        st.one_of(inside, PARAGRAPHS),
        st.sampled_from(["{}", "<w:ins>{}</w:ins>", control("{}"), control(control("{}"))]),
    ),
    max_leaves=3,
)


class TestOrder:
    def test_what_python_docx_writes(self) -> None:
        document = docx.Document()
        document.add_heading("Lease", 0)
        document.add_heading("Parties", 1)
        document.add_paragraph("The landlord", "List Number")
        document.add_paragraph("The tenant", "List Number")
        document.add_paragraph("a flat", "List Bullet")
        cells = document.add_table(2, 3)._cells
        for number, cell in enumerate(cells):
            cell.text = f"c{number}"
        document.add_paragraph("Signed\tin\nLeeds.").add_run(" Bold.").bold = True
        document.sections[0].header.paragraphs[0].text = "no"
        document.sections[0].footer.paragraphs[0].text = "no"
        data = io.BytesIO()
        document.save(data)
        assert document_from_bytes(data.getvalue()).text == (
            "Lease\n\nParties\n\n1. The landlord\n2. The tenant\na flat\n\nc0\tc1\tc2\nc3\tc4\tc5\n\n"
            "Signed\tin\nLeeds. Bold."
        )

    def test_comments_are_left_out(self) -> None:
        marks = (
            '<w:commentRangeStart w:id="0"/>',
            '<w:commentRangeEnd w:id="0"/><w:r><w:commentReference w:id="0"/></w:r>',
        )
        comment = f'<w:comment w:id="0" w:author="a">{p(r("no"))}</w:comment>'
        assert read(p(r("900").join(marks) + r(" a month")), comments=comment) == "900 a month"

    @given(st.lists(st.one_of(PARAGRAPHS, TABLES), min_size=1, max_size=4))
    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def test_every_word_comes_once_whatever_it_is_wrapped_in(self, blocks: list[str]) -> None:
        count = itertools.count()
        markup = re.sub("WORD", lambda _: f"word{next(count)};", "".join(blocks))
        gone = re.findall(r"<w:del>.*?</w:del>|<w:moveFrom>.*?</w:moveFrom>", markup)
        lost = set(re.findall(r"word\d+;", "".join(gone)))
        kept = [word for word in re.findall(r"word\d+;", markup) if word not in lost]
        assert re.findall(r"word\d+;", read("Ahead", markup)) == kept

    def test_a_paragraph_whose_end_was_deleted_does_not_run_on_behind_a_table(self) -> None:
        assert read(p(r("a"), "<w:rPr><w:del/></w:rPr>"), table(row(tc(p(r("b"))))), "c") == "a\n\nb\n\nc"

    def test_spaces_and_empty_paragraphs(self) -> None:
        text = read("A", "", " ", p(r("  in") + r(" ") + r("dented ") + "<w:r><w:t>a\nb</w:t></w:r>"), "")
        assert text == "A\n\n  in dented a b"

    def test_breaks_and_signs(self) -> None:
        run = (
            "<w:r><w:br w:type='page'/><w:t>a</w:t><w:tab/><w:t>b</w:t><w:br/><w:t>c</w:t><w:cr/><w:t>d</w:t>"
            "<w:noBreakHyphen/><w:t>e</w:t><w:softHyphen/><w:t>f</w:t><w:ptab/><w:lastRenderedPageBreak/><w:t>g</w:t></w:r>"
        )
        tabs = "<w:tabs><w:tab w:val='left' w:pos='720'/></w:tabs>"
        assert read(p(run, tabs)) == "a\tb\nc\nd-ef\tg"

    def test_what_wraps_text(self) -> None:
        link = f'<w:hyperlink w:anchor="x">{r("here")}</w:hyperlink>'
        tags = f"<w:smartTag w:element='x'>{r(' is')}</w:smartTag><w:customXml w:element='x'>{r(' all')}</w:customXml>"
        simple = f"<w:fldSimple w:instr='PAGE'>{r(' 7')}</w:fldSimple><w:bdo w:val='ltr'>{r(' of it')}</w:bdo>"
        assert read(p(r("See ") + link + tags + simple + "<!-- no -->")) == "See here is all 7 of it"

    def test_hidden_text_is_left_out(self) -> None:
        shown = r("The rent", '<w:vanish w:val="0"/>') + r(" no", "<w:vanish/>") + r(" is 5.", "<w:webHidden/>")
        assert read(p(shown)) == "The rent is 5."

    def test_a_heading_that_runs_on_into_its_paragraph(self) -> None:
        separator = "<w:rPr><w:vanish/><w:specVanish/></w:rPr>"
        assert read(p(r("Term. "), separator), p(r("Two years.")), "Next") == "Term. Two years.\n\nNext"

    def test_readings_follow_what_they_belong_to(self) -> None:
        ruby = f"<w:ruby><w:rubyPr/><w:rt>{r('kan')}</w:rt><w:rubyBase>{r('漢')}</w:rubyBase></w:ruby>"
        assert read(p(f"<w:r>{ruby}</w:r>{r('字')}")) == "漢(kan)字"


class TestChanges:
    def test_insertions_stay_and_deletions_go(self) -> None:
        inserted = f'<w:ins w:id="1" w:author="a">{r("three")}</w:ins>'
        deleted = '<w:del w:id="2" w:author="a"><w:r><w:delText>two</w:delText></w:r></w:del>'
        assert read(p(r("Within ") + inserted + deleted + r(" days"))) == "Within three days"

    def test_moved_text_stands_where_it_went(self) -> None:
        gone, come = f"<w:moveFrom>{r('moved')}</w:moveFrom>", f"<w:moveTo>{r('moved')}</w:moveTo>"
        assert read(p(r("a ") + gone), p(r("b ") + come)) == "a\n\nb moved"

    def test_paragraphs_whose_end_is_deleted_run_on(self) -> None:
        deleted, kept = "<w:rPr><w:del/></w:rPr>", "<w:rPr><w:ins/></w:rPr>"
        assert read(p(r("One "), deleted), p(r("sentence."), kept), "Next") == "One sentence.\n\nNext"
        assert read(p(r("Last"), deleted)) == "Last"
        assert read(p(r("Here "), "<w:rPr><w:moveFrom/></w:rPr>"), p(r("and on."))) == "Here and on."
        assert read(table(row(tc(p(r("a "), deleted) + p(r("b"))), tc("c")))) == "a b\tc"

    def test_rows_and_cells(self) -> None:
        rows = table(
            row(tc("no"), properties="<w:del/>"),
            row(tc("a"), tc("no", "<w:cellDel/>"), tc("b", "<w:cellIns/>"), properties="<w:ins/>"),
        )
        assert read(rows) == "a\tb"

    def test_inserted_blocks(self) -> None:
        assert read("<w:ins>" + p(r("a")) + "</w:ins>", "<w:moveFrom>" + p(r("no")) + "</w:moveFrom>", "b") == "a\n\nb"


class TestControls:
    def test_content_controls_everywhere(self) -> None:
        rows = table(row(tc("a"), control(tc(control(p(r("b")))))), control(row(tc("c"))))
        paragraph = p(r("Name: ") + control(r("Ada ") + control(r("Byron"))))
        assert read(control(paragraph + control(p(r("nested")))), rows) == "Name: Ada Byron\n\nnested\n\na\tb\nc"

    def test_boxes_to_tick(self) -> None:
        boxes = [
            ("<w:default w:val='1'/>", "☒"),
            ("<w:default w:val='0'/>", "☐"),
            ("<w:default w:val='0'/><w:checked/>", "☒"),
            ("<w:default w:val='1'/><w:checked w:val='0'/>", "☐"),
        ]
        for box, sign in boxes:
            data = f"<w:ffData><w:checkBox><w:sizeAuto/>{box}</w:checkBox></w:ffData>"
            start = f'<w:r><w:fldChar w:fldCharType="begin">{data}</w:fldChar></w:r>'
            assert read(p(start + instruction("FORMCHECKBOX") + field("end") + r(" Yes"))) == f"{sign} Yes"

    def test_lists_to_choose_from(self) -> None:
        entries = "<w:listEntry w:val='red'/><w:listEntry w:val='green'/>"
        for chosen, shown in (("", "red"), ("<w:result w:val='1'/>", "green"), ("<w:default w:val='1'/>", "green")):
            data = f"<w:ffData><w:ddList>{chosen}{entries}</w:ddList></w:ffData>"
            start = f'<w:r><w:fldChar w:fldCharType="begin">{data}</w:fldChar></w:r>'
            assert read(p(r("It is ") + start + instruction("FORMDROPDOWN") + field("end"))) == f"It is {shown}"


class TestFields:
    def test_results_are_text_and_codes_are_not(self) -> None:
        nested = field("begin") + instruction("MERGEFIELD g") + field("separate") + r("f") + field("end")
        code = field("begin") + instruction("IF ") + nested + instruction(' = "m" "he" "she"') + field("separate")
        assert read(p(r("So ") + code + r("she") + field("end") + r(" signed"))) == "So she signed"
        assert read(p(field("begin") + instruction("XE x") + r("no") + field("end") + r("Index"))) == "Index"

    def test_results_of_several_paragraphs(self) -> None:
        start = field("begin") + instruction("TOC") + field("separate")
        contents = p(start + r("1 Term\t2")) + p(r("2 Rent\t3")) + p(field("end"))
        assert read(contents, "Body") == "1 Term\t2\n\n2 Rent\t3\n\nBody"

    @pytest.mark.parametrize("marks", [field("begin"), field("separate"), field("end"), field("begin") * 2])
    def test_fields_without_an_end_hide_nothing(self, marks: str) -> None:
        nested = field("begin") + r("no") + field("separate") + r("kept") + field("end")
        assert read(p(marks + r("kept, ") + nested), "Next") == "kept, kept\n\nNext"

    def test_many_fields(self) -> None:
        members = unpacked(word("MARK"))
        runs = (field("begin") * 20_000 + r("x") * 20_000).encode()
        members["word/document.xml"] = members["word/document.xml"].replace(b"<w:r><w:t>MARK</w:t></w:r>", runs)
        begun = time.monotonic()
        assert document_from_bytes(packed(members)).text == "x" * 20_000
        assert time.monotonic() - begun < 20


class TestTables:
    def test_empty_cells_keep_their_place(self) -> None:
        rows = row(tc(""), tc("1901"), tc("")) + row(tc(""), tc("")) + row(tc("salt"), tc(""), tc("7"))
        assert read(table(rows)) == "\t1901\nsalt\t\t7"

    def test_merged_cells_come_once_and_later_ones_keep_their_column(self) -> None:
        rows = table(
            row(tc("wide", '<w:gridSpan w:val="2"/>'), tc("c"), tc("tall", '<w:vMerge w:val="restart"/>')),
            row(tc("a"), properties='<w:gridBefore w:val="2"/>'),
            row(tc("d"), tc("e"), tc("f"), tc("", "<w:vMerge/>")),
        )
        assert read(rows) == "wide\t\tc\ttall\n\t\ta\nd\te\tf"

    def test_cells_with_lines_of_their_own(self) -> None:
        rows = table(row(tc("a"), tc("b")), row(tc(p(r("c")) + p(r("d"))), tc("e")), row(tc("f"), tc("g")))
        assert read("Ahead", rows, "Behind") == "Ahead\n\na\tb\n\nc\nd\ne\n\nf\tg\n\nBehind"

    def test_a_line_break_does_not_end_a_row(self) -> None:
        assert read(table(row(tc(p("<w:r><w:t>30</w:t><w:br/><w:t>days</w:t></w:r>")), tc("b")))) == "30 days\tb"

    def test_tables_in_cells(self) -> None:
        inner = table(row(tc("b"), tc("c")), row(tc("d"), tc("e")))
        assert read(table(row(tc("a"), tc(inner + p(""))))) == "a\nb\tc\nd\te"

    @pytest.mark.parametrize("count", ["1000000000", "-1", "x"])
    def test_columns_that_cannot_be(self, count: str) -> None:
        span = f'<w:gridSpan w:val="{count}"/>'
        assert read(table(row(tc("a", span), properties=f'<w:gridBefore w:val="{count}"/>'))).strip("\t") == "a"


class TestBoxes:
    BOX = p(r("In the box")) + p(r("to its end"))

    def test_text_boxes_come_once_behind_their_paragraph(self) -> None:
        new = f"<w:drawing><wps:txbx><w:txbxContent>{self.BOX}</w:txbxContent></wps:txbx></w:drawing>"
        old = f"<w:pict><v:textbox><w:txbxContent>{self.BOX}</w:txbxContent></v:textbox></w:pict>"
        both = (
            f"<mc:AlternateContent><mc:Choice Requires='wps'>{new}</mc:Choice><mc:Fallback>{old}</mc:Fallback>"
            "</mc:AlternateContent>"
        )
        for box in (new, old, both):
            text = read(p(r("Ahead ") + f"<w:r>{box}</w:r>" + r("and on")), "Behind")
            assert text == "Ahead and on\n\nIn the box\n\nto its end\n\nBehind"
        assert read(table(row(tc(p(f"<w:r>{both}</w:r>")), tc("c")))) == "In the box\nto its end\nc"

    def test_the_version_that_has_text(self) -> None:
        versions = [
            ("<w:drawing/>", "<w:t>☺</w:t>"),
            ("<w:sym w:font='Symbol' w:char='F061'/>", "<w:t>no</w:t>"),
            ("<w:drawing/>", "<w:pict/>"),
        ]
        parts = "".join(
            f"<mc:AlternateContent><mc:Choice>{new}</mc:Choice><mc:Fallback>{old}</mc:Fallback></mc:AlternateContent>"
            for new, old in versions
        )
        assert read(p(f"<w:r><w:t>a</w:t>{parts}<w:t>b</w:t></w:r>")) == "a☺αb"


class TestNotes:
    FOOTNOTES = (
        '<w:footnote w:id="0" w:type="separator"><w:p><w:r><w:separator/></w:r></w:p></w:footnote>'
        + f'<w:footnote w:id="7">{p("<w:r><w:footnoteRef/></w:r>" + r(" Net of tax."))}{p(r("Monthly."))}</w:footnote>'
        + f'<w:footnote w:id="8">{p(r("Second."))}</w:footnote>'
        + f'<w:footnote w:id="9">{p(r("* Third."))}</w:footnote>'
    )
    ENDNOTES = f'<w:endnote w:id="7">{p(r("At the end."))}</w:endnote>'

    @staticmethod
    def ref(number: int, kind: str = "footnote", more: str = "") -> str:
        return f'<w:r><w:{kind}Reference w:id="{number}" {more}/></w:r>'

    def test_notes_follow_what_refers_to_them(self) -> None:
        first = p(r("Rent") + self.ref(7) + r(" is due") + self.ref(7, "endnote") + r("."))
        rows = table(row(tc(p(r("a") + self.ref(8))), tc("b")))
        text = read(first, rows, "Next", footnotes=self.FOOTNOTES, endnotes=self.ENDNOTES)
        assert text == (
            "Rent[1] is due[e1].\n\n[1]  Net of tax.\n\nMonthly.\n\n[e1] At the end.\n\na[2]\tb\n\n[2] Second.\n\nNext"
        )

    def test_marks_of_their_own(self) -> None:
        marked = p(r("Rent") + self.ref(9, more='w:customMarkFollows="1"') + r("*") + r(" and") + self.ref(8))
        assert read(marked, footnotes=self.FOOTNOTES) == "Rent* and[1]\n\n* Third.\n\n[1] Second."

    def test_deleted_and_missing_notes(self) -> None:
        assert read(p(r("Rent") + f"<w:del>{self.ref(7)}</w:del>"), footnotes=self.FOOTNOTES) == "Rent"
        assert read(p(r("Rent") + self.ref(99)), footnotes=self.FOOTNOTES) == "Rent[1]"
        assert read(p(r("Rent") + self.ref(1))) == "Rent[1]"
