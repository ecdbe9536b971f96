"""Symbols and formulas of Word files."""

from __future__ import annotations

import pytest
from word_markup import p, r, read

pytest.importorskip("docx")


class TestSymbols:
    @pytest.mark.parametrize(
        ("font", "code", "character"),
        [
            ("Symbol", "F061", "α"), ("Symbol", "00A3", "≤"), ("symbol", "F0B0", "°"), ("Symbol", "F0FE", "⎭"),
            ("Symbol", "F044", "Δ"), ("Symbol", "F0D6", "√"), ("Wingdings", "F0FE", "☑"), ("Wingdings", "F0A8", "☐"),
            ("Wingdings 2", "F052", "☑"), ("MS Gothic", "2612", "☒"), ("Webdings", "F061", "\ufffd"),
            ("Wingdings", "F021", "\ufffd"), ("Symbol", "x", "\ufffd"), ("Arial", "D800", "\ufffd"),
        ],
    )  # fmt: skip
    def test_symbols(self, font: str, code: str, character: str) -> None:
        assert read(p(f'<w:r><w:sym w:font="{font}" w:char="{code}"/></w:r>' + r(" 5"))) == f"{character} 5"

    def test_text_in_symbol_fonts(self) -> None:
        font = '<w:rFonts w:ascii="{0}" w:hAnsi="{0}"/>'
        assert read(p(r("\uf062\uf020\uf0b3 b", font.format("Symbol")))) == "β ≥ b"
        assert read(p(r("\uf062", font.format("Corporate")))) == "\uf062"


def m(name: str, *parts: tuple[str, str], properties: str = "") -> str:
    inside = "".join(f"<m:{part}>{content}</m:{part}>" for part, content in parts)
    return f"<m:{name}>{properties}{inside}</m:{name}>"


def t(text: str) -> str:
    return f"<m:r><w:rPr/><m:t>{text}</m:t></m:r>"


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        (m("f", ("num", t("1")), ("den", t("2"))), "1/2"),
        (m("f", ("num", t("a+b")), ("den", m("d", ("e", t("c+d"))))), "(a+b)/(c+d)"),
        (m("sSup", ("e", t("10")), ("sup", t("5"))), "10^5"),
        (m("sSub", ("e", t("x")), ("sub", t("i+1"))), "x_(i+1)"),
        (m("sSubSup", ("e", t("x")), ("sub", t("1")), ("sup", t("2"))), "x_1^2"),
        (m("rad", ("deg", ""), ("e", t("a+b"))), "√(a+b)"),
        (m("rad", ("deg", t("3")), ("e", t("x"))), "3√x"),
        (m("nary", ("sub", t("i=1")), ("sup", t("n")), ("e", t("i")), properties='<m:naryPr><m:chr m:val="∑"/></m:naryPr>'),
         "∑_(i=1)^n i"),
        (m("nary", ("e", t("f+g"))), "∫ f+g"),
        (m("d", ("e", t("a")), ("e", t("b")), properties='<m:dPr><m:begChr m:val="["/><m:endChr m:val=""/></m:dPr>'),
         "[a|b"),
        (m("func", ("fName", t("sin")), ("e", t("x"))), "sin x"),
        (m("limLow", ("e", t("lim")), ("lim", t("n"))), "lim_n"),
        (m("acc", ("e", t("x"))), "x\u0302"),
        (m("m", ("mr", f"<m:e>{t('a')}</m:e><m:e>{t('b')}</m:e>"), ("mr", f"<m:e>{t('c')}</m:e>")), "[a, b; c]"),
        (m("eqArr", ("e", t("a=1")), ("e", t("b=2"))), "a=1; b=2"),
        (m("box", ("e", t("a")), properties="<!-- no -->"), "a"),
    ],
)  # fmt: skip
def test_formulas_stand_on_a_line(markup: str, text: str) -> None:
    assert read(p(r("So ") + f"<m:oMath>{markup}</m:oMath>" + r("."))) == f"So {text}."
    assert read(p(f"<m:oMathPara><m:oMath>{markup}</m:oMath></m:oMathPara>")) == text
