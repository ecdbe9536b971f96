"""Pages exchanged one by one, and indexes in storage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document, StorageContext, SummaryIndex, VectorStoreIndex, load_index_from_storage
from llama_index.core.data_structs.data_structs import IndexList
from llama_index.core.embeddings import MockEmbedding

from qllm_integrations.llama_index import QLLM, WholeDocumentIndex
from qllm_runtime.errors import DocumentError, InvalidRequestError
from tests.integrations.llama_index.fake_engine import FakeEngine

QUESTION = "What is the secret number?"


def page(number: int, text: str, id_: str | None = None, **metadata: Any) -> Document:
    meta = {"file_path": "/d/a.pdf", "file_name": "a.pdf", "page_label": str(number), **metadata}
    return Document(text=text, id_=id_ or f"p{number}", metadata=meta)


def texts(index: WholeDocumentIndex) -> list[str]:
    return [node.get_content() for node in index.whole_nodes()]


@pytest.fixture
def index(llm: QLLM) -> WholeDocumentIndex:
    parts = [page(1, "one"), page(2, "two"), page(3, "three"), Document(text="other", id_="o")]
    return WholeDocumentIndex.from_documents(parts, llm=llm)


def without_part_ids(index: WholeDocumentIndex) -> None:
    """As older versions wrote it."""
    for node in index.whole_nodes():
        node.metadata = {**node.metadata, "page_offsets": [entry[:2] for entry in node.metadata["page_offsets"]]}
        index.docstore.add_documents([node])


@pytest.mark.parametrize(
    ("number", "whole"), [(1, "ONE!\n\ntwo\n\nthree"), (2, "one\n\nTWO!\n\nthree"), (3, "one\n\ntwo\n\nTHREE!")]
)
async def test_a_page_takes_its_own_place(index: WholeDocumentIndex, number: int, whole: str) -> None:
    new = page(number, ["ONE!", "TWO!", "THREE!"][number - 1])
    index.update_ref_doc(new)
    assert texts(index) == [whole, "other"]
    assert set(index.ref_doc_info) == {"p1", "o"}
    assert index.refresh_ref_docs([new]) == [False]
    await index.aupdate_ref_doc(Document(text="again", id_=f"p{number}"))
    assert texts(index) == [whole.replace(new.text, "again"), "other"]
    assert index.whole_nodes()[0].metadata["file_path"] == "/d/a.pdf"
    assert index.refresh_ref_docs([new]) == [True]
    assert texts(index) == [whole, "other"]
    offsets = index.whole_nodes()[0].metadata["page_offsets"]
    assert [(label, id_) for label, _, id_ in offsets] == [("1", "p1"), ("2", "p2"), ("3", "p3")]
    assert whole[offsets[2][1] :] == whole.split("\n\n")[2]


def test_passages_of_an_exchanged_page_have_its_label(index: WholeDocumentIndex, engine: FakeEngine) -> None:
    index.update_ref_doc(page(2, "It rained. The secret number is 4711. It rained."))
    found = index.as_query_engine().query(QUESTION).source_nodes[0].node
    assert found.metadata["page_label"] == "2"
    assert texts(index)[0][found.start_char_idx : found.end_char_idx] == found.text


async def test_a_page_is_deleted(index: WholeDocumentIndex) -> None:
    index.delete_ref_doc("p2", delete_from_docstore=True)
    assert texts(index) == ["one\n\nthree", "other"]
    await index.adelete_ref_doc("p3")
    assert texts(index) == ["one", "other"]
    index.delete_ref_doc("p1", delete_from_docstore=True)
    assert texts(index) == ["other"]


def test_the_last_page_with_text_stays(llm: QLLM) -> None:
    index = WholeDocumentIndex.from_documents([page(1, ""), page(2, "two")], llm=llm)
    with pytest.raises(DocumentError, match=r"a\.pdf"):
        index.delete_ref_doc("p2")
    assert texts(index) == ["\n\ntwo"]
    index.update_ref_doc(page(1, "one"))
    index.update_ref_doc(page(2, " "))
    assert texts(index) == ["one\n\n "]


def test_all_pages_are_the_file(index: WholeDocumentIndex) -> None:
    assert index.refresh_ref_docs([page(1, "one"), page(2, "2"), page(3, "3"), page(4, "4")]) == [True] * 4
    assert texts(index)[0] == "one\n\n2\n\n3\n\n4"
    assert index.refresh_ref_docs([page(1, "one", "x"), page(2, "two", "y")]) == [True] * 2  # read anew, and shorter
    assert texts(index)[0] == "one\n\ntwo"
    index.update_ref_doc(page(2, "TWO", "y"))
    assert texts(index)[0] == "one\n\nTWO"
    assert set(index.ref_doc_info) == {"p1", "o"}


def test_pages_that_cannot_be_told_are_refused(index: WholeDocumentIndex) -> None:
    before = texts(index)
    for attempt in (
        lambda: index.update_ref_doc(page(2, "TWO", "unknown")),
        lambda: index.update_ref_doc(page(1, "ONE", "unknown")),
        lambda: index.refresh_ref_docs([page(2, "TWO", "unknown")]),
        lambda: index.refresh_ref_docs([page(1, "ONE"), page(2, "TWO", "unknown")]),
    ):
        with pytest.raises(InvalidRequestError, match=r"a\.pdf.*3 parts.*refresh_ref_docs"):
            attempt()
    with pytest.raises(InvalidRequestError, match="update_ref_doc"):
        index.insert(page(2, "TWO"))
    assert texts(index) == before


def test_older_indexes_without_part_ids(llm: QLLM) -> None:
    index = WholeDocumentIndex.from_documents([page(1, "one"), page(2, "two")], llm=llm)
    without_part_ids(index)
    for attempt in (
        lambda: index.update_ref_doc(page(1, "ONE")),
        lambda: index.update_ref_doc(page(2, "TWO")),
        lambda: index.refresh_ref_docs([page(1, "ONE")]),
        lambda: index.refresh_ref_docs([page(2, "TWO")]),
    ):
        with pytest.raises(InvalidRequestError, match="2 parts"):
            attempt()
    assert index.refresh_ref_docs([page(1, "one"), page(2, "two")]) == [False, False]
    assert index.refresh_ref_docs([page(1, "one"), page(2, "TWO")]) == [True, True]
    assert texts(index) == ["one\n\nTWO"]
    index.update_ref_doc(page(2, "two"))
    assert texts(index) == ["one\n\ntwo"]


def test_only_what_all_pages_say_is_said_of_the_file(llm: QLLM) -> None:
    parts = [page(1, "one", author="A", year=1), page(2, "two", author="B", year=1)]
    index = WholeDocumentIndex.from_documents(parts, llm=llm)
    assert index.whole_nodes()[0].metadata.keys() == {"file_path", "file_name", "year", "page_offsets"}
    index.update_ref_doc(page(2, "TWO", year=2))
    assert index.whole_nodes()[0].metadata.keys() == {"file_path", "file_name", "page_offsets"}


def test_an_id_tells_more_than_a_path(llm: QLLM) -> None:
    parts = [Document(text=name, id_=name, metadata={"file_path": f"/d/{name}"}) for name in ("a", "b")]
    index = WholeDocumentIndex.from_documents(parts, llm=llm)
    assert index.refresh_ref_docs([Document(text="moved", id_="b", metadata={"file_path": "/d/a"})]) == [True]
    assert texts(index) == ["a", "moved"]


def test_a_file_that_was_read_is_not_changed(llm: QLLM) -> None:
    index = WholeDocumentIndex.from_documents([page(1, "one", last_accessed_date="2025-01-01")], llm=llm)
    assert index.refresh_ref_docs([page(1, "one", last_accessed_date="2025-01-02")]) == [False]
    assert index.refresh_ref_docs([page(1, "one", last_modified_date="2025-01-02")]) == [True]


def test_what_is_updated_but_unknown_goes_last(index: WholeDocumentIndex) -> None:
    index.update_ref_doc(Document(text="new", id_="n"))
    assert texts(index) == ["one\n\ntwo\n\nthree", "other", "new"]


def test_callers_keep_their_ids(llm: QLLM) -> None:
    index = WholeDocumentIndex.from_documents([Document(text="x", id_="a", metadata={"file_path": "/d/f"})], llm=llm)
    given = Document(text="y", id_="b", metadata={"file_path": "/d/f"})
    assert index.refresh_ref_docs([given]) == [True]
    assert given.id_ == "b"
    assert set(index.ref_doc_info) == {"a"}


# storage


def test_load_index_from_storage(index: WholeDocumentIndex, llm: QLLM, tmp_path: Path) -> None:
    index.storage_context.persist(tmp_path)
    loaded = load_index_from_storage(StorageContext.from_defaults(persist_dir=str(tmp_path)), llm=llm)
    assert type(loaded) is WholeDocumentIndex
    assert texts(loaded) == texts(index)
    assert str(loaded.as_query_engine().query(QUESTION)) == "It is 4711."


def test_the_order_is_stored(llm: QLLM, tmp_path: Path) -> None:
    index = WholeDocumentIndex.from_documents([Document(text=name, id_=name) for name in "abc"], llm=llm)
    index.update_ref_doc(Document(text="B", id_="b"))
    index.storage_context.persist(tmp_path)
    assert texts(WholeDocumentIndex.load(tmp_path, llm=llm)) == texts(index) == ["a", "B", "c"]


def test_stores_of_older_versions_load(index: WholeDocumentIndex, llm: QLLM, tmp_path: Path) -> None:
    old = IndexList(index_id=index.index_id, nodes=index.index_struct.nodes)
    index.storage_context.index_store.add_index_struct(old)
    index.storage_context.persist(tmp_path)
    assert '"list"' in json.dumps(json.loads((tmp_path / "index_store.json").read_text()))
    loaded = WholeDocumentIndex.load(tmp_path, llm=llm)
    assert (texts(loaded), loaded.index_id) == (texts(index), index.index_id)
    loaded.storage_context.persist(tmp_path / "new")
    again = load_index_from_storage(StorageContext.from_defaults(persist_dir=str(tmp_path / "new")), llm=llm)
    assert type(again) is WholeDocumentIndex


@pytest.mark.parametrize("kind", [SummaryIndex, VectorStoreIndex])
def test_indexes_of_other_classes_are_refused(kind: Any, llm: QLLM, tmp_path: Path) -> None:
    storage = StorageContext.from_defaults()
    documents = [Document(text="word " * 3000)]
    extra = {"embed_model": MockEmbedding(2)} if kind is VectorStoreIndex else {}
    other = kind.from_documents(documents, storage_context=storage, **extra)
    storage.persist(tmp_path)
    with pytest.raises(InvalidRequestError, match=f"what {kind.__name__} wrote"):
        WholeDocumentIndex.load(tmp_path, llm=llm)
    whole = WholeDocumentIndex.from_documents(documents, llm=llm, storage_context=storage)
    storage.persist(tmp_path)
    assert WholeDocumentIndex.load(tmp_path, llm=llm).index_id == whole.index_id
    with pytest.raises(InvalidRequestError, match=f"{other.index_id}.*{kind.__name__}"):
        WholeDocumentIndex.load(tmp_path, llm=llm, index_id=other.index_id)
