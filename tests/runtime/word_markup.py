"""Markup of Word files, and what is read of it."""

from __future__ import annotations

from qllm_runtime.documents import document_from_bytes
from tests.office import word


def read(*blocks: str, **parts: str) -> str:
    return document_from_bytes(word(*blocks, **parts)).text


def p(content: str, properties: str = "") -> str:
    return f"<w:p><w:pPr>{properties}</w:pPr>{content}</w:p>"


def r(text: str, properties: str = "") -> str:
    return f'<w:r><w:rPr>{properties}</w:rPr><w:t xml:space="preserve">{text}</w:t></w:r>'


def table(*rows: str) -> str:
    return f"<w:tbl><w:tblPr/><w:tblGrid/>{''.join(rows)}</w:tbl>"


def row(*cells: str, properties: str = "") -> str:
    return f"<w:tr><w:trPr>{properties}</w:trPr>{''.join(cells)}</w:tr>"


def tc(content: str, properties: str = "") -> str:
    inside = content if content.startswith("<") else p(r(content))
    return f"<w:tc><w:tcPr>{properties}</w:tcPr>{inside}</w:tc>"


def field(kind: str) -> str:
    return f'<w:r><w:fldChar w:fldCharType="{kind}"/></w:r>'


def instruction(text: str) -> str:
    return f"<w:r><w:instrText>{text}</w:instrText></w:r>"


def control(content: str) -> str:
    return f'<w:sdt><w:sdtPr><w:alias w:val="no"/></w:sdtPr><w:sdtContent>{content}</w:sdtContent></w:sdt>'
