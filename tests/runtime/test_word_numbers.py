"""The numbers of paragraphs in Word files, as Word counts them."""

from __future__ import annotations

import pytest
from word_markup import p, r, read, row, table, tc

pytest.importorskip("docx")


def level(number: int, text: str, kind: str = "decimal", more: str = "", start: int = 1) -> str:
    return (
        f'<w:lvl w:ilvl="{number}"><w:start w:val="{start}"/><w:numFmt w:val="{kind}"/>{more}'
        f'<w:lvlText w:val="{text}"/></w:lvl>'
    )


def lists(levels: str, *overrides: str) -> str:
    """An abstract list and lists 1, 2, ... of it."""
    numbers = "".join(
        f'<w:num w:numId="{n}"><w:abstractNumId w:val="5"/>{one}</w:num>' for n, one in enumerate(overrides or ("",), 1)
    )
    return f'<w:abstractNum w:abstractNumId="5">{levels}</w:abstractNum>{numbers}'


def numbered(*places: tuple[int, int] | str, numbering: str, styles: str = "") -> list[str]:
    """What stands ahead of the text of paragraphs, given as (list, level) or as a style."""
    paragraphs = [
        f'<w:pStyle w:val="{place}"/>'
        if isinstance(place, str)
        else f'<w:numPr><w:ilvl w:val="{place[1]}"/><w:numId w:val="{place[0]}"/></w:numPr>'
        for place in places
    ]
    text = read(*(p(r("|"), properties) for properties in paragraphs), numbering=numbering, styles=styles)
    return [line.removesuffix("|") for line in text.split("\n") if line]


LISTS = lists(level(0, "%1."))


class TestNumbers:
    CLAUSES = level(0, "%1.") + level(1, "%1.%2") + level(2, "(%3)", "lowerLetter")

    def test_clauses(self) -> None:
        places = [(1, 0), (1, 1), (1, 2), (1, 2), (1, 1), (1, 2), (1, 0), (1, 1)]
        labels = numbered(*places, numbering=lists(self.CLAUSES))
        assert labels == ["1. ", "1.1 ", "(a) ", "(b) ", "1.2 ", "(a) ", "2. ", "2.1 "]

    def test_lists_of_one_kind_count_on_unless_they_start_anew(self) -> None:
        anew = '<w:lvlOverride w:ilvl="0"><w:startOverride w:val="4"/></w:lvlOverride>'
        labels = numbered((1, 0), (2, 0), (3, 0), (3, 0), (1, 0), numbering=lists(self.CLAUSES, "", "", anew))
        assert labels == ["1. ", "2. ", "4. ", "5. ", "6. "]

    def test_levels_of_its_own(self) -> None:
        own = f'<w:lvlOverride w:ilvl="0">{level(0, "§ %1", start=9)}</w:lvlOverride>'
        assert numbered((1, 0), (1, 0), numbering=lists(self.CLAUSES, own)) == ["§ 9 ", "§ 10 "]

    def test_levels_without_one_above(self) -> None:
        assert numbered((1, 1), (1, 1), (1, 0), numbering=lists(self.CLAUSES)) == ["1.1 ", "1.2 ", "1. "]

    @pytest.mark.parametrize(("restart", "last"), [("0", "(c) "), ("1", "(c) "), ("2", "(a) ")])
    def test_levels_that_do_not_start_anew(self, restart: str, last: str) -> None:
        levels = (
            level(0, "%1.") + level(1, "%2.") + level(2, "(%3)", "lowerLetter", f'<w:lvlRestart w:val="{restart}"/>')
        )
        places = [(1, 0), (1, 1), (1, 2), (1, 2), (1, 1), (1, 2)]
        assert numbered(*places, numbering=lists(levels))[-1] == last

    @pytest.mark.parametrize(
        ("kind", "start", "label"),
        [
            ("decimal", 12, "12"), ("decimalZero", 3, "03"), ("decimalZero", 12, "12"), ("lowerLetter", 26, "z"),
            ("upperLetter", 27, "AA"), ("lowerLetter", 53, "aaa"), ("lowerRoman", 1994, "mcmxciv"),
            ("upperRoman", 48, "XLVIII"), ("ordinal", 1, "1st"), ("ordinal", 12, "12th"), ("ordinal", 23, "23rd"),
            ("ordinal", 111, "111th"), ("upperRoman", 0, "0"), ("lowerLetter", 10**9, "1000000000"), ("chicago", 7, "7"),
        ],
    )  # fmt: skip
    def test_spellings(self, kind: str, start: int, label: str) -> None:
        assert numbered((1, 0), numbering=lists(level(0, "%1)", kind, start=start))) == [f"{label}) "]

    def test_legal_numbers(self) -> None:
        levels = (
            level(0, "Article %1", "upperRoman") + level(1, "%1.%2", "upperLetter", "<w:isLgl/>") + level(2, "%1.%2")
        )
        places = [(1, 0), (1, 0), (1, 1), (1, 2)]
        assert numbered(*places, numbering=lists(levels)) == ["Article I ", "Article II ", "2.1 ", "II.A "]

    def test_bullets_and_labels_without_numbers(self) -> None:
        levels = level(0, "\uf0b7", "bullet") + level(1, "", "none") + level(2, "Note:", "none")
        levels += level(3, "%4", more='<w:suff w:val="nothing"/>')
        labels = numbered((1, 0), (1, 1), (1, 2), (1, 3), numbering=lists(levels))
        assert labels == ["", "", "Note: ", "1"]

    def test_styles_number_their_paragraphs(self) -> None:
        def style(name: str, properties: str, based: str = "") -> str:
            base = f'<w:basedOn w:val="{based}"/>' if based else ""
            return f'<w:style w:type="paragraph" w:styleId="{name}">{base}<w:pPr>{properties}</w:pPr></w:style>'

        in_list = '<w:numPr><w:numId w:val="1"/></w:numPr>'
        levels = level(0, "%1.", more='<w:pStyle w:val="Clause"/>') + level(1, "%1.%2", more='<w:pStyle w:val="Sub"/>')
        styles = (
            style("Clause", in_list) + style("Sub", in_list) + style("Child", "<w:keepNext/>", "Sub")
            + style("Out", '<w:numPr><w:numId w:val="0"/></w:numPr>', "Sub") + style("Loop", "", "Loop")
            + style("Deep", '<w:numPr><w:ilvl w:val="1"/></w:numPr>', "Clause")
        )  # fmt: skip
        places = ("Clause", "Sub", "Child", "Out", "Loop", "Deep", "None", "Clause")
        labels = numbered(*places, numbering=lists(levels), styles=styles)
        assert labels == ["1. ", "1.1 ", "1.2 ", "", "", "1.3 ", "", "2. "]

    def test_lists_that_styles_stand_for(self) -> None:
        style = '<w:style w:type="numbering" w:styleId="L"><w:pPr><w:numPr><w:numId w:val="{}"/></w:numPr></w:pPr></w:style>'
        link = (
            '<w:abstractNum w:abstractNumId="6"><w:numStyleLink w:val="L"/></w:abstractNum>'
            '<w:num w:numId="9"><w:abstractNumId w:val="6"/></w:num>'
        )
        assert numbered((1, 0), (9, 0), numbering=LISTS + link, styles=style.format(1)) == ["1. ", "2. "]
        assert numbered((9, 0), numbering=link, styles=style.format(9)) == [""]

    def test_lists_that_are_not_there(self) -> None:
        assert numbered((3, 0), (1, 7), (1, 0), numbering=LISTS) == ["", "", "1. "]
        assert read(p(r("a"), '<w:numPr><w:numId w:val="1"/></w:numPr>'), numbering="") == "a"

    def test_deleted_and_hidden_paragraphs_are_not_counted(self) -> None:
        gone = "<w:del><w:r><w:delText>no</w:delText></w:r></w:del>"
        item = '<w:numPr><w:ilvl w:val="0"/><w:numId w:val="1"/></w:numPr>'
        paragraphs = p(r("A"), item) + p(gone, item + "<w:rPr><w:del/></w:rPr>") + p(r("B"), item)
        assert read(paragraphs, numbering=LISTS) == "1. A\n2. B"
        hidden = p(r("no", "<w:vanish/>"), item + "<w:rPr><w:vanish/></w:rPr>")
        assert read(p(r("A"), item) + hidden + p(r("B"), item), numbering=LISTS) == "1. A\n2. B"

    def test_numbers_without_text_and_of_runs_in(self) -> None:
        item = '<w:numPr><w:ilvl w:val="0"/><w:numId w:val="1"/></w:numPr>'
        rows = table(row(tc(p("", item)), tc("a")), row(tc(p("", item)), tc("b")))
        assert read(rows, numbering=LISTS) == "1.\ta\n2.\tb"
        heading = p(r("Term. "), item + "<w:rPr><w:vanish/></w:rPr>")
        assert read("Ahead", heading + p(r("Two years.")), numbering=LISTS) == "Ahead\n\n1. Term. Two years."
        assert read(heading + p(r("Two years."), item), numbering=LISTS) == "1. Term. 2. Two years."
