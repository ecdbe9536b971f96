"""Encoded documents: bytes, base64 and data URLs, and the type that each names."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from langchain_core.messages import HumanMessage

from qllm_integrations.langchain.messages import translate
from qllm_runtime.errors import DocumentError
from qllm_runtime.types import Document

PAGE = "<title>Whale</title><script>sail()</script><p>Call me Ishmael.</p>"


def url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def read(block: dict[str, Any]) -> Document:
    (document,) = translate([HumanMessage([block, {"type": "text", "text": "Who speaks?"}])]).documents
    return document


def shapes(data: str, kind: str | None = None) -> list[dict[str, Any]]:
    """A data URL in every block that takes one."""
    return [
        {"type": "file", "file": {"filename": "whale", "file_data": data}, "mime_type": kind},
        {"type": "file", "base64": data, "mime_type": kind},
        {"type": "document", "source": {"type": "base64", "data": data, "media_type": kind}},
        {"document": {"name": "whale", "source": {"bytes": data}}},
    ]


@pytest.mark.parametrize("kind", ["text/html", "text/html;charset=utf-8", "application/xhtml+xml"])
def test_a_data_url_says_what_its_data_are(kind: str) -> None:
    for block in (*shapes(url(kind, PAGE.encode())), *shapes(url(kind, PAGE.encode()), "text/plain")):
        text = read(block).text
        assert "Call me Ishmael." in text
        assert "<p>" not in text
        assert "sail()" not in text


def test_a_data_url_names_the_encoding() -> None:
    for kind in ("text/plain;charset=iso-8859-1", ";charset=iso-8859-1"):
        for block in shapes(url(kind, "Café".encode("latin-1"))):
            assert read(block).text == "Café"


def test_where_the_data_url_names_no_type_the_block_does() -> None:
    for data in (url("", PAGE.encode()), base64.b64encode(PAGE.encode()).decode()):
        for block in shapes(data, "text/html")[:3]:
            assert "<p>" not in read(block).text
    assert read({"type": "file", "base64": url("text/plain", PAGE.encode())}).text == PAGE
    with pytest.raises(DocumentError, match="image/png"):
        read({"type": "file", "file": {"filename": "a.png", "file_data": url("image/png", b"\x89PNG")}})
