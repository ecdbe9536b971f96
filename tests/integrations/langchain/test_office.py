"""Word files and books in messages, as paths, and as blobs."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from fake_engine_lc import FakeEngine
from langchain_core.documents.base import Blob
from langchain_core.messages import HumanMessage
from langchain_core.messages.content import create_file_block

from qllm_integrations.langchain import DocumentQA, QLLMChat
from qllm_integrations.langchain.memory import to_documents
from qllm_integrations.langchain.messages import translate
from qllm_runtime.errors import DocumentError
from tests.office import EPUB, WORD, epub, word

pytest.importorskip("docx")
FILES = [
    (WORD, word("Call me Ishmael.", "The whale."), "Call me Ishmael.\n\nThe whale."),
    (EPUB, epub("Call me Ishmael.", "The whale."), "Call me Ishmael.\n\nThe whale."),
]


@pytest.mark.parametrize(("kind", "data", "text"), FILES)
def test_blocks(kind: str, data: bytes, text: str) -> None:
    encoded = base64.b64encode(data).decode()
    url = f"data:{kind};base64,{encoded}"
    blocks: list[Any] = [
        {"type": "file", "mime_type": kind, "base64": encoded, "filename": "whale"},
        {"type": "file", "mime_type": "text/html", "base64": url, "filename": "whale"},
        dict(create_file_block(base64=encoded, mime_type=kind, filename="whale")),
        {"type": "file", "file": {"filename": "whale", "file_data": url}},
        {"type": "document", "source": {"type": "base64", "data": encoded, "media_type": kind}, "title": "whale"},
        {"document": {"name": "whale", "format": "docx", "source": {"bytes": data}}},
    ]
    for block in blocks:
        (document,) = translate([HumanMessage([block, {"type": "text", "text": "Who speaks?"}])]).documents
        assert (document.text, document.title) == (text, "whale")


@pytest.mark.parametrize(("kind", "data", "text"), FILES)
def test_paths_and_blobs(tmp_path: Path, kind: str, data: bytes, text: str) -> None:
    path = tmp_path / ("whale.docx" if kind == WORD else "whale.epub")
    path.write_bytes(data)
    sources = [path, tmp_path, Blob(data=data, mimetype=kind), Blob.from_path(path)]
    assert [document.text for document in to_documents(sources)] == [text] * len(sources)
    llm = QLLMChat.from_engine(FakeEngine())
    with DocumentQA.from_documents(path, llm=llm) as qa:
        (source,) = qa.invoke("Who speaks?")["context"]
    span = slice(source.metadata["start_char_index"], source.metadata["end_char_index"])
    assert source.page_content == text[span]
    assert (source.metadata["source"], "page" in source.metadata) == (str(path), False)


def test_the_block_with_a_damaged_file_is_named() -> None:
    cut = base64.b64encode(word("x")[:500]).decode()
    block = {"type": "file", "mime_type": WORD, "base64": cut, "filename": "a.docx"}
    with pytest.raises(DocumentError, match=r"message 1 \(human\), block 1: Document 'a\.docx' is a damaged"):
        translate([HumanMessage([block, {"type": "text", "text": "Who?"}])])
