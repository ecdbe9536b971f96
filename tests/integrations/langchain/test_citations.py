"""What a citation says of its document: page, origin, title; and which document it is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fake_engine_lc import FakeEngine
from langchain_core.documents import Document as LoadedDocument
from langchain_core.messages import HumanMessage
from pdf_by_hand import pdf_bytes

from qllm_integrations.langchain import DocumentQA, QLLMChat
from qllm_integrations.langchain.memory import to_documents
from qllm_integrations.langchain.outputs import citations
from qllm_runtime.types import Document, Source

PAGES = Document("One.\n\nTwo.\n\nThree.", "whale.pdf", {"page_starts": (0, 6, 12)})
QUESTION = {"type": "text", "text": "Who speaks?"}


def cite(document: Document, start: int = 0, end: int = 3) -> dict[str, Any]:
    (citation,) = citations([Source(0, document.title, start, end, 0.5, document.text[start:end])], [document])
    return dict(citation)


def ask(*blocks: dict[str, Any]) -> list[dict[str, Any]]:
    message = HumanMessage([*blocks, QUESTION])
    return list(QLLMChat.from_engine(FakeEngine()).invoke([message]).content_blocks[0]["annotations"])


@pytest.mark.parametrize(
    ("start", "end", "pages"),
    [
        (0, 4, {"page": 1}),
        (0, 6, {"page": 1}),  # up to the first character of the next one
        (6, 10, {"page": 2}),
        (7, 10, {"page": 2}),
        (12, 18, {"page": 3}),
        (2, 7, {"page": 1, "page_end": 2}),
        (6, 18, {"page": 2, "page_end": 3}),
        (0, 18, {"page": 1, "page_end": 3}),
    ],
)
def test_the_pages_of_a_passage(start: int, end: int, pages: dict[str, int]) -> None:
    extras = cite(PAGES, start, end)["extras"]
    assert {key: value for key, value in extras.items() if key.startswith("page")} == pages


def test_pages_come_back_from_a_pdf(tmp_path: Path) -> None:
    (tmp_path / "short.pdf").write_bytes(pdf_bytes("C", "Me", "Ishmael."))  # the engine cites characters 3 to 12
    (tmp_path / "long.pdf").write_bytes(pdf_bytes("Call me Ishmael.", "The whale was white."))
    llm = QLLMChat.from_engine(FakeEngine())
    with DocumentQA.from_documents([tmp_path / "short.pdf", tmp_path / "long.pdf"], llm=llm) as qa:
        short, long = (source.metadata for source in qa.invoke("Who?")["context"])
    assert (short["page"], short["page_end"]) == (2, 3)
    assert long["page"] == 1
    assert "page_end" not in long


def test_pages_are_those_of_the_file_when_only_some_are_read() -> None:
    loaded = [
        LoadedDocument("Me" if page == 5 else "Call me Ishmael.", metadata={"source": "a.pdf", "page": page, **label})
        for page, label in ((5, {"page_label": "iv"}), (6, {"page_label": "v"}))
    ]
    llm = QLLMChat.from_engine(FakeEngine())  # cites characters 3 to 12
    with DocumentQA.from_documents(loaded, llm=llm) as qa:
        (source,) = qa.invoke("Who?")["context"]
    assert source.page_content == "\nCall me "
    pages = {key: value for key, value in source.metadata.items() if key.startswith("page")}
    assert pages == {"page": 6, "page_end": 7, "page_label": "iv-v"}


@pytest.mark.parametrize(
    ("pages", "start", "end", "expected"),
    [
        ([{"page": 4, "page_label": "iii"}, {"page": 5, "page_label": "iv"}], 6, 9, {"page": 6, "page_label": "iv"}),
        (
            [{"page": 4, "page_label": "iii"}, {"page": 5, "page_label": "iv"}],
            0,
            9,
            {"page": 5, "page_end": 6, "page_label": "iii-iv"},
        ),
        ([{"page": 8}, {"page": 2}], 6, 9, {"page": 3}),  # not in their order
        ([{"page": 3}, {"page": 3}], 0, 9, {"page": 4}),  # chunks of one page
        ([{"page": "a"}, {"page": "b"}], 6, 9, {"page": 2}),  # by position: no numbers
    ],
)
def test_pages_of_a_loader(pages: list[dict[str, Any]], start: int, end: int, expected: dict[str, Any]) -> None:
    (document,) = to_documents([LoadedDocument("One.", metadata={"source": "a.pdf", **page}) for page in pages])
    extras = cite(document, start, end)["extras"]
    assert {key: value for key, value in extras.items() if key.startswith("page")} == expected


def test_where_a_document_comes_from() -> None:
    for address in ("https://example.org/whale", "http://example.org/whale"):
        citation = cite(Document("Call me Ishmael.", None, {"source": address}))
        assert citation["url"] == address
        assert "source" not in citation["extras"]
    citation = cite(Document("Call me Ishmael.", None, {"source": Path("a/whale.txt")}))
    assert citation["extras"]["source"] == str(Path("a/whale.txt"))
    assert "url" not in citation


def test_a_citation_carries_the_bare_title() -> None:
    whale = {"type": "text-plain", "text": "Call me Ishmael.", "title": "whale.txt"}
    plain, described = ask(whale, {**whale, "context": "A novel of 1851."})
    assert plain["title"] == described["title"] == "whale.txt"


def test_documents_of_a_memory_come_ahead_of_those_in_messages() -> None:
    llm = QLLMChat.from_engine(FakeEngine())
    inline = {
        "type": "text-plain",
        "text": "The harbour was empty.",
        "title": "harbour.txt",
        "extras": {"metadata": {"source": "b"}},
    }
    with llm.add_documents(Document("Call me Ishmael.", "whale.txt", {"source": "a"})) as handle:
        ai = llm.invoke([HumanMessage([inline, handle.block(), QUESTION])])
    cited = [
        (citation["extras"]["document_index"], citation["title"], citation["extras"]["source"], citation["cited_text"])
        for citation in ai.content_blocks[0]["annotations"]
    ]
    assert cited == [(0, "whale.txt", "a", "l me Ishm"), (1, "harbour.txt", "b", " harbour ")]
    assert ai.response_metadata["qllm"]["documents"] == 2
