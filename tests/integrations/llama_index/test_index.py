"""Whole documents in the index: pages, offsets, updates, persistence, reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document, Settings, SimpleDirectoryReader, StorageContext
from llama_index.core.llms.mock import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import ImageDocument
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

from qllm_integrations.llama_index import QLLM, DocumentsReadEvent, WholeDocumentIndex
from qllm_integrations.llama_index.documents import page_label
from qllm_runtime.errors import DocumentError, InvalidConfigError, InvalidRequestError
from tests.integrations.llama_index.fake_engine import FakeEngine

BOOK = "The lamp was lit at dusk. The secret number of the harbour is 4711. Nobody spoke."
OTHER = "A second volume. The secret colour of the bridge is green. The end."
QUESTION = "What is the secret number?"


def pages(path: str, *texts: str) -> list[Document]:
    meta = {"file_path": path, "file_name": Path(path).name}
    return [Document(text=text, metadata={**meta, "page_label": str(n)}) for n, text in enumerate(texts, start=1)]


def texts(index: WholeDocumentIndex) -> list[str]:
    return [node.get_content() for node in index.whole_nodes()]


def test_documents_stay_whole(llm: QLLM, engine: FakeEngine) -> None:
    long = "A sentence about nothing. " * 2000
    index = WholeDocumentIndex.from_documents([Document(text=long, metadata={"file_name": "a.txt", "x": 1})], llm=llm)
    index.as_query_engine(mode="query_aware").query(QUESTION)
    (document,) = engine.requests[-1]["turns"][-1].documents
    assert (document.text, document.title) == (long, "a.txt")
    assert set(index.ref_doc_info) == {index.whole_nodes()[0].ref_doc_id}


def test_pages_are_rejoined_and_labels_come_back(llm: QLLM, engine: FakeEngine) -> None:
    documents = pages("/d/a.pdf", "Page one, with the secret.", "", "Page three. Its secret number.")
    index = WholeDocumentIndex.from_documents([*documents, Document(text=OTHER)], llm=llm)
    whole = "Page one, with the secret.\n\n\n\nPage three. Its secret number."
    assert texts(index) == [whole, OTHER]
    response = index.as_query_engine(mode="query_aware").query(QUESTION)
    labels = {found.node.get_content(): found.node.metadata.get("page_label") for found in response.source_nodes}
    assert labels["Its secret number."] == "3"
    for found in response.source_nodes:
        source = next(node for node in index.whole_nodes() if node.ref_doc_id == found.node.ref_doc_id)
        assert source.get_content()[found.node.start_char_idx : found.node.end_char_idx] == found.node.get_content()
        assert "page_offsets" not in found.node.metadata
    assert [document.title for document in engine.requests[-1]["turns"][-1].documents] == ["a.pdf", None]


def test_page_labels() -> None:
    offsets = [["i", 0], ["1", 10], ["2", 20]]
    assert page_label(offsets, 0, 5) == page_label(offsets, 0, 10) == "i"
    assert page_label(offsets, 5, 15) == "i-1"
    assert page_label(offsets, 10, 30) == "1-2"
    assert page_label(offsets, 25, 30) == "2"
    assert page_label(None, 0, 1) is None


def test_pdf_and_text_through_the_directory_reader(tmp_path: Path, llm: QLLM, engine: FakeEngine) -> None:
    written = [
        "Chapter one. It rained.\nNobody spoke; the secret",
        "number is 4711. A lamp was lit.",
        "Café fin. The end.",
    ]
    with PdfPages(tmp_path / "book.pdf") as pdf:
        for text in written:
            page = Figure()
            page.text(0.1, 0.9, text, va="top")
            pdf.savefig(page)
    (tmp_path / "note.txt").write_text(f"A note. {OTHER}")
    documents = SimpleDirectoryReader(str(tmp_path)).load_data()
    assert [document.text for document in documents] == [*written, f"A note. {OTHER}"]  # a document per page
    index = WholeDocumentIndex.from_documents(documents, llm=llm)
    assert texts(index) == ["\n\n".join(written), f"A note. {OTHER}"]
    response = index.as_query_engine(mode="query_aware").query(QUESTION)
    assert [document.title for document in engine.requests[-1]["turns"][-1].documents] == ["book.pdf", "note.txt"]
    found = {source.node.metadata["file_name"]: source.node for source in response.source_nodes}
    assert found["book.pdf"].text == "It rained.\nNobody spoke; the secret\n\nnumber is 4711"
    assert found["book.pdf"].metadata["page_label"] == "1-2"
    for node in found.values():
        whole = index.docstore.get_node(node.parent_node.node_id)
        assert whole.get_content()[node.start_char_idx : node.end_char_idx] == node.text
    assert index.refresh_ref_docs(SimpleDirectoryReader(str(tmp_path)).load_data()) == [False] * 4


def test_bad_documents(llm: QLLM) -> None:
    with pytest.raises(DocumentError, match=r"scan\.pdf"):
        WholeDocumentIndex.from_documents(pages("/d/scan.pdf", "", " "), llm=llm)
    with pytest.raises(DocumentError):
        WholeDocumentIndex.from_documents([ImageDocument(image=b"\x89PNG")], llm=llm)
    with pytest.raises(InvalidRequestError, match="QLLMSynthesizer"):
        WholeDocumentIndex.from_documents([Document(text=BOOK)], llm=llm, transformations=[SentenceSplitter()])
    with pytest.warns(UserWarning, match="did you mean 'mode'"):
        WholeDocumentIndex.from_documents([Document(text=BOOK)], llm=llm, mod="read_once")


def test_needs_a_qllm(monkeypatch: pytest.MonkeyPatch, llm: QLLM) -> None:
    index = WholeDocumentIndex.from_documents([Document(text=BOOK)])
    monkeypatch.setattr(Settings, "_llm", None)
    with pytest.raises(InvalidRequestError, match=r"Settings\.llm"):
        index.as_retriever()
    monkeypatch.setattr(Settings, "_llm", MockLLM())
    with pytest.raises(InvalidRequestError, match="MockLLM"):
        index.as_query_engine()
    monkeypatch.setattr(Settings, "_llm", llm)
    assert str(index.as_query_engine().query(QUESTION)) == "It is 4711."


def test_an_unknown_mode_is_refused_before_anything_is_read(llm: QLLM, engine: FakeEngine) -> None:
    with pytest.raises(InvalidConfigError, match="mode='foo' is unknown; known are: query_aware, read_once"):
        WholeDocumentIndex.from_documents([Document(text="text")], llm=llm, mode="foo")
    index = WholeDocumentIndex.from_documents([Document(text="text")], llm=llm)
    for make in (index.as_query_engine, index.as_chat_engine, index.as_retriever):
        with pytest.raises(InvalidConfigError, match="mode='foo' is unknown"):
            make(mode="foo")  # type: ignore[operator]


def test_insert_delete_update(llm: QLLM) -> None:
    one, two, three = (Document(text=f"{n} {BOOK}", id_=n) for n in ("one", "two", "three"))
    index = WholeDocumentIndex.from_documents([one, two], llm=llm)
    index.insert(three)
    assert list(index.ref_doc_info) == ["one", "two", "three"]
    index.update_ref_doc(Document(text="changed", id_="two"))
    assert texts(index) == [one.text, "changed", three.text]
    index.delete_ref_doc("two", delete_from_docstore=True)
    assert texts(index) == [one.text, three.text]
    assert index.docstore.get_ref_doc_info("two") is None
    index.insert(one)
    assert texts(index) == [one.text, three.text]


async def test_no_document_is_lost_to_another_of_its_id(llm: QLLM) -> None:
    one, other = Document(text=BOOK, id_="b"), Document(text=OTHER, id_="b")
    with pytest.raises(InvalidRequestError, match="Two documents have the id 'b'"):
        WholeDocumentIndex.from_documents([one, other], llm=llm)
    index = WholeDocumentIndex.from_documents([one], llm=llm)
    with pytest.raises(InvalidRequestError, match="update_ref_doc or refresh_ref_docs"):
        index.insert(other)
    with pytest.raises(InvalidRequestError, match="update_ref_doc or refresh_ref_docs"):
        await index.ainsert(other)
    with pytest.raises(InvalidRequestError, match="Two documents have the id 'b'"):
        index.refresh_ref_docs([one, other])
    assert texts(index) == [BOOK]
    await index.aupdate_ref_doc(other)
    assert texts(index) == [OTHER]
    index.update_ref_doc(one)
    assert texts(index) == [BOOK]
    parts = [Document(text=text, id_="a", metadata={"file_path": "/d/a.md"}) for text in ("One.", "Two.")]
    index.insert(parts[0])
    assert index.refresh_ref_docs(parts) == [True, True]
    assert texts(index) == [BOOK, "One.\n\nTwo."]


async def test_refresh_by_id_and_by_path(llm: QLLM) -> None:
    index = WholeDocumentIndex.from_documents([*pages("/d/a.pdf", "P1", "P2"), Document(text=BOOK, id_="b")], llm=llm)
    before = index.whole_nodes()
    again = [*pages("/d/a.pdf", "P1", "P2"), Document(text=BOOK, id_="b")]
    assert index.refresh_ref_docs(again) == [False, False, False]
    changed = [*pages("/d/a.pdf", "P1", "P2 changed"), Document(text=BOOK, id_="b"), Document(text="new", id_="c")]
    assert await index.arefresh_ref_docs(changed) == [True, True, False, True]
    assert texts(index) == ["P1\n\nP2 changed", BOOK, "new"]
    assert index.whole_nodes()[0].ref_doc_id == before[0].ref_doc_id
    moved = Document(text=BOOK, id_="b", metadata={"shelf": 2})
    assert index.refresh_ref_docs([moved]) == [True]
    index.delete_ref_doc("c")
    assert index.refresh_ref_docs([Document(text="new", id_="c")]) == [True]


def test_read_once_reads_when_built_and_only_what_changed(llm: QLLM, engine: FakeEngine, recorder: Any) -> None:
    documents = [Document(text=f"{n} {BOOK}", id_=n) for n in "abc"]
    index = WholeDocumentIndex.from_documents(documents, llm=llm, mode="read_once")
    assert engine.read_texts == [document.text for document in documents]
    query_engine = index.as_query_engine()
    response = query_engine.query(QUESTION)
    assert response.metadata["qllm"]["mode"] == "read_once"
    assert {found.node.ref_doc_id for found in response.source_nodes} == {"a", "b", "c"}
    engine.read_texts.clear()
    index.refresh_ref_docs([Document(text=f"{n} {BOOK}", id_=n) for n in "abc"])
    query_engine.query(QUESTION)
    assert engine.read_texts == []
    index.refresh_ref_docs([Document(text=f"a {BOOK}", id_="a"), Document(text="c changed", id_="c")])
    query_engine.query(QUESTION)
    assert engine.read_texts == ["c changed"]
    index.insert(Document(text="d", id_="d"))
    query_engine.query(QUESTION)
    assert engine.read_texts == ["c changed", "d"]
    index.delete_ref_doc("d")
    query_engine.query(QUESTION)
    assert engine.read_texts == ["c changed", "d"]
    assert [event.documents for event in recorder.events if type(event) is DocumentsReadEvent] == [3, 3, 4]
    index.close()
    assert all(
        memory.closed for memory in engine.readings if len(memory.documents) == 1 and memory.documents[0].text[0] == "a"
    )


def test_many_documents_keep_few_memories(llm: QLLM, engine: FakeEngine) -> None:
    documents = [Document(text=f"{n} {BOOK}", id_=str(n)) for n in range(30)]
    WholeDocumentIndex.from_documents(documents, llm=llm, mode="read_once")
    assert len(engine.readings) <= 8
    assert len(engine.read_texts) == 30


def test_progress_is_shown(llm: QLLM, capsys: pytest.CaptureFixture[str]) -> None:
    WholeDocumentIndex.from_documents([Document(text=BOOK)], llm=llm, mode="read_once", show_progress=True)
    assert "Reading" in capsys.readouterr().err


def test_persist_and_load(tmp_path: Path, llm: QLLM) -> None:
    index = WholeDocumentIndex.from_documents(
        [*pages("/d/a.pdf", "One secret.", "Two."), Document(text=OTHER, id_="o")], llm=llm
    )
    index.storage_context.persist(tmp_path / "store")
    loaded = WholeDocumentIndex.load(tmp_path / "store", llm=llm)
    assert texts(loaded) == texts(index)
    assert loaded.ref_doc_info.keys() == index.ref_doc_info.keys()
    before, after = (i.as_query_engine().query("Where is the secret?") for i in (index, loaded))
    assert [(f.node.node_id, f.score, f.node.metadata) for f in before.source_nodes] == [
        (f.node.node_id, f.score, f.node.metadata) for f in after.source_nodes
    ]
    assert loaded.refresh_ref_docs(pages("/d/a.pdf", "One secret.", "Two.")) == [False, False]
    with pytest.raises(InvalidRequestError, match="no directory"):
        WholeDocumentIndex.load(tmp_path / "elsewhere", llm=llm)
    with pytest.raises(InvalidRequestError, match="holds no index"):
        WholeDocumentIndex.load(tmp_path, llm=llm)
    with pytest.raises(InvalidRequestError, match="index_id"):
        WholeDocumentIndex.load(tmp_path / "store", llm=llm, index_id="other")


def test_shares_a_storage_context(tmp_path: Path, llm: QLLM) -> None:
    storage = StorageContext.from_defaults()
    one = WholeDocumentIndex.from_documents([Document(text=BOOK)], llm=llm, storage_context=storage)
    two = WholeDocumentIndex.from_documents([Document(text=OTHER)], llm=llm, storage_context=storage)
    storage.persist(tmp_path)
    with pytest.raises(InvalidRequestError, match="2 indices"):
        WholeDocumentIndex.load(tmp_path, llm=llm)
    for index in (one, two):
        assert texts(WholeDocumentIndex.load(tmp_path, llm=llm, index_id=index.index_id)) == texts(index)
