"""Memories on the real engine: what the layers above promise must begin as it was read."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document, StorageContext
from llama_index.core.base.llms.types import (
    CacheControl,
    CachePoint,
    ChatMessage,
    CitableBlock,
    TextBlock,
    ToolCallBlock,
)
from llama_index.core.prompts import ChatPromptTemplate
from llama_index.core.selectors import PydanticMultiSelector, PydanticSingleSelector
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel, Field

from qllm_integrations.llama_index import (
    QLLM,
    DocumentsReadEvent,
    LookupEvent,
    ReadingProgressEvent,
    WholeDocumentIndex,
)
from qllm_runtime.config import MemoryConfig
from qllm_runtime.errors import InvalidConfigError, InvalidRequestError
from tests.integrations.llama_index.compliance import Recorder, add, recording
from tests.integrations.llama_index.tiny_model import save_tiny

TEXTS = [f"Volume {n}. The lamp was lit at dusk. The secret number of the harbour is {n}711. " * 8 for n in range(3)]
QUESTION = "What is the secret number?"


class Number(BaseModel):
    """A number."""

    value: int = Field(ge=0, le=9)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> QLLM:
    memory = {"n_local": 128, "exec_block_size": 32, "block_size": 16, "n_init": 8, "topk": 4}
    return QLLM(model=save_tiny(tmp_path_factory.mktemp("tiny")), max_tokens=6, memory=memory)


@pytest.fixture
def index(llm: QLLM) -> WholeDocumentIndex:
    documents = [Document(text=text, id_=str(n), metadata={"file_name": f"{n}.txt"}) for n, text in enumerate(TEXTS)]
    return WholeDocumentIndex.from_documents(documents, llm=llm, mode="read_once", system_prompt="Be brief.")


def cached(response: Any) -> int:
    return int(response.metadata["qllm"]["usage"]["cache_read_tokens"])


def check_offsets(index: WholeDocumentIndex, response: Any) -> None:
    wholes = {node.ref_doc_id: node.get_content() for node in index.whole_nodes()}
    assert response.source_nodes
    for found in response.source_nodes:
        node = found.node
        assert wholes[node.ref_doc_id][node.start_char_idx : node.end_char_idx] == node.get_content()


async def test_index_asks_one_memory_many_times(index: WholeDocumentIndex) -> None:
    engine = index.as_query_engine()
    first = engine.query(QUESTION)
    assert cached(first) > sum(map(len, TEXTS))
    assert cached(engine.query("And the lamp?")) == cached(first)
    assert str(await engine.aquery(QUESTION)) == str(first)
    assert str(index.as_query_engine(streaming=True).query(QUESTION)) == str(first)
    check_offsets(index, first)


def told(response: Any) -> tuple[int, int, float]:
    """Tokens that were there, tokens read into the memory, seconds of reading that the request took."""
    usage, timings = response.metadata["qllm"]["usage"], response.metadata["qllm"]["timings"]
    assert timings["total_s"] >= timings["read_s"] > 0
    n_read = timings["read_s"] * timings["read_tokens_per_s"]
    assert n_read == pytest.approx(usage["prompt_tokens"] - usage["cache_read_tokens"])
    return usage["cache_read_tokens"], usage["cache_creation_tokens"], timings["read_s"]


async def test_the_question_that_reads_tells_of_it(llm: QLLM) -> None:
    documents = [Document(text=text, id_=str(n)) for n, text in enumerate(TEXTS)]
    index = WholeDocumentIndex.from_documents(documents[:2], llm=llm)
    engine, streaming = index.as_query_engine(reread=False), index.as_query_engine(reread=False, streaming=True)
    with recording() as recorder, llm.read(TEXTS[:2]) as two, llm.read(TEXTS) as three:
        recorder.events.clear()
        first = told(engine.query(QUESTION))
        (event,) = (event for event in recorder.events if type(event) is DocumentsReadEvent)
        assert first[:2] == (0, two.n_tokens)
        assert first[2] > event.seconds
        assert told(await engine.aquery(QUESTION))[:2] == (two.n_tokens, 0)
        index.insert(documents[2])
        assert told(streaming.query(QUESTION))[:2] == (two.n_tokens, three.n_tokens - two.n_tokens)
        assert told(streaming.query(QUESTION))[:2] == (three.n_tokens, 0)
        index.close()
        answer = index.as_chat_engine(reread=False).chat(QUESTION)
        assert told(answer)[:2] == (0, three.n_tokens)


def test_changes_are_read_on_top(index: WholeDocumentIndex) -> None:
    engine = index.as_query_engine()
    engine.query(QUESTION)
    index.refresh_ref_docs([Document(text="Volume 1, rewritten. " * 10, id_="1", metadata={"file_name": "1.txt"})])
    index.insert(Document(text="Volume 3, a new one. " * 10, id_="3"))
    response = engine.query(QUESTION)
    check_offsets(index, response)
    fresh = WholeDocumentIndex(nodes=index.whole_nodes(), llm=index._llm, mode="read_once", system_prompt="Be brief.")
    assert str(fresh.as_query_engine().query(QUESTION)) == str(response)
    there, new, _ = told(response)
    assert min(there, new) > 0
    assert there + new == cached(fresh.as_query_engine().query(QUESTION)) == cached(engine.query(QUESTION))


class TestReadingsOnDisk:
    """`index.persist` and `WholeDocumentIndex.load`."""

    def test_nothing_is_read_again(self, llm: QLLM, index: WholeDocumentIndex, tmp_path: Path) -> None:
        expected = index.as_query_engine().query(QUESTION)
        index.persist(tmp_path)
        loaded = WholeDocumentIndex.load(tmp_path, llm=llm, system_prompt="Be brief.")
        response = loaded.as_query_engine().query(QUESTION)
        assert response.response == expected.response
        assert cached(response) == cached(expected) > 0
        loaded.insert(Document(text="Volume 9. The end.", id_="9"))
        assert cached(loaded.as_query_engine().query(QUESTION)) == cached(response)  # what was added is read
        assert cached(loaded.as_query_engine().query(QUESTION)) > cached(response)

    def test_it_is_read_to_be_kept(self, llm: QLLM, tmp_path: Path) -> None:
        index = WholeDocumentIndex.from_documents([Document(text=TEXTS[0])], llm=llm)
        index.persist(tmp_path)
        loaded = WholeDocumentIndex.load(tmp_path, llm=llm)
        with recording() as recorder:
            loaded.as_query_engine().query(QUESTION)
        assert not [event for event in recorder.events if isinstance(event, ReadingProgressEvent)]

    def test_a_changed_document_is_read_again(self, llm: QLLM, index: WholeDocumentIndex, tmp_path: Path) -> None:
        index.persist(tmp_path)
        loaded = WholeDocumentIndex.load(tmp_path, llm=llm, system_prompt="Be brief.")
        loaded.update_ref_doc(Document(text="Volume 0. " + TEXTS[1], id_="0", metadata={"file_name": "0.txt"}))
        response = loaded.as_query_engine().query(QUESTION)
        check_offsets(loaded, response)

    def test_of_another_model_it_is_read_again(self, index: WholeDocumentIndex, tmp_path: Path) -> None:
        index.persist(tmp_path / "store")
        loaded = WholeDocumentIndex.load(tmp_path / "store", llm=QLLM(model="reader", dtype="float32", max_tokens=6))
        with pytest.warns(UserWarning, match="other weights .* read again now"):
            loaded.as_query_engine().query(QUESTION)

    def test_each_question_reads_for_itself(self, llm: QLLM, tmp_path: Path) -> None:
        index = WholeDocumentIndex.from_documents([Document(text=TEXTS[0])], llm=llm, mode="query_aware")
        index.persist(tmp_path)
        assert not [path for path in tmp_path.iterdir() if path.is_dir()]

    def test_several_indexes_in_one_place(self, llm: QLLM, tmp_path: Path) -> None:
        storage = StorageContext.from_defaults()
        for name in ("a", "../b"):
            index = WholeDocumentIndex.from_documents([Document(text=f"{name} {TEXTS[0]}")], storage, llm=llm)
            index.set_index_id(name)
            index.persist(tmp_path / "store")
        assert len([path for path in (tmp_path / "store").iterdir() if path.is_dir()]) == 2
        assert [path.name for path in tmp_path.iterdir()] == ["store"]
        loaded = WholeDocumentIndex.load(tmp_path / "store", llm=llm, index_id="../b")
        assert cached(loaded.as_query_engine().query(QUESTION)) > 0


def test_accumulate_reads_each_alone(index: WholeDocumentIndex) -> None:
    response = index.as_query_engine(response_mode="accumulate").query(QUESTION)
    assert [told["usage"]["cache_creation_tokens"] > 0 for told in response.metadata["qllm"]] == [False, True, True]
    again = index.as_query_engine(response_mode="accumulate").query(QUESTION).metadata["qllm"]
    assert [told["usage"]["cache_read_tokens"] > 0 for told in again] == [True] * 3


def test_structured_answers_from_a_memory(index: WholeDocumentIndex) -> None:
    assert isinstance(index.as_query_engine(output_cls=Number, max_tokens=40).query(QUESTION).response, Number)


def test_templates_with_system_text(index: WholeDocumentIndex) -> None:
    template = ChatPromptTemplate(
        [ChatMessage("Read closely.", role="system"), ChatMessage("{context_str} {query_str}")]
    )
    for mode in ("read_once", "query_aware"):
        response = index.as_query_engine(text_qa_template=template, mode=mode).query(QUESTION)
        check_offsets(index, response)


@pytest.mark.parametrize("mode", ["read_once", "query_aware"])
async def test_conversations(index: WholeDocumentIndex, mode: Any) -> None:
    greeting = [ChatMessage("How can I help?", role="assistant")]
    chat = index.as_chat_engine(mode=mode, chat_history=greeting)
    check_offsets(index, chat.chat(QUESTION))
    check_offsets(index, await chat.achat("And the lamp?"))
    answer = chat.stream_chat("And now?")
    assert "".join(answer.response_gen)
    check_offsets(index, answer)
    assert len(chat.chat_history) == 7


def test_passages_are_read_again_unless_told_otherwise(llm: QLLM, index: WholeDocumentIndex) -> None:
    message = ChatMessage(blocks=[CitableBlock(title="t", source="s", content=TEXTS[0]), TextBlock(text=QUESTION)])
    assert llm.chat([message]).raw["reread"]
    assert not llm.chat([message], reread=False).raw["reread"]
    assert not llm.model_copy(update={"reread": False}).chat([message]).raw["reread"]
    assert index.as_query_engine().query(QUESTION).metadata["qllm"]["reread"]
    assert not index.as_query_engine(reread=False).query(QUESTION).metadata["qllm"]["reread"]


def test_tools_beside_a_memory(llm: QLLM) -> None:
    memory = llm.read(TEXTS[0], system_prompt="Be brief.")
    tool = FunctionTool.from_defaults(add)
    messages = [ChatMessage("Be brief.", role="system"), ChatMessage(QUESTION)]
    response = llm.chat_with_tools([tool], chat_history=messages, tool_required=True, memory=memory, max_tokens=120)
    assert [block.tool_name for block in response.message.blocks if isinstance(block, ToolCallBlock)] == ["add"]
    assert response.raw["usage"]["cache_read_tokens"] == memory.n_tokens


def test_cache_point(llm: QLLM) -> None:
    point = CachePoint(cache_control=CacheControl(type="ephemeral"))
    systems = [ChatMessage("One.", role="system"), ChatMessage("Two.", role="system")]
    document = CitableBlock(title="t", source="s", content=TEXTS[0])
    usage = []
    for question in (QUESTION, "And the lamp?"):
        message = ChatMessage(blocks=[document, point, TextBlock(text=question)])
        usage.append(llm.chat([*systems, message]).raw["usage"])
    assert usage[0]["cache_creation_tokens"] == usage[1]["cache_read_tokens"] > len(TEXTS[0])
    more = ChatMessage(blocks=[document, document, point, TextBlock(text=QUESTION)])
    usage.append(llm.chat([*systems, more]).raw["usage"])
    assert usage[2]["cache_read_tokens"] == usage[1]["cache_read_tokens"]
    assert len(TEXTS[0]) < usage[2]["cache_creation_tokens"] < usage[2]["prompt_tokens"] - usage[2]["cache_read_tokens"]
    response = llm.chat([*systems, message], mode="query_aware")  # what a call says outweighs the hint
    assert (response.raw["mode"], response.raw["usage"]["cache_read_tokens"]) == ("query_aware", 0)
    with llm.read(TEXTS[0]) as memory, pytest.raises(InvalidRequestError, match="leave mode out"):
        llm.complete(QUESTION, memory=memory, mode="query_aware")


def test_models_share_weights_and_threads_agree(llm: QLLM) -> None:
    other = QLLM(model=llm.model, max_tokens=6, memory=llm.memory)
    assert other.engine.model is llm.engine.model
    expected = llm.complete(QUESTION).text
    answers: list[str] = []
    threads = [threading.Thread(target=lambda m=m: answers.append(m.complete(QUESTION).text)) for m in (llm, other) * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [expected] * 6
    other.close()
    assert llm.complete(QUESTION).text == expected


def test_forgotten_memories_are_freed(llm: QLLM) -> None:
    index = WholeDocumentIndex.from_documents([Document(text=TEXTS[0])], llm=llm, mode="read_once")
    memory = index._shelf._kept[0].memory
    assert memory.nbytes > 0
    index.close()
    assert memory.closed


@pytest.mark.parametrize("selector", [PydanticSingleSelector, PydanticMultiSelector])
def test_selections_count_from_one(llm: QLLM, selector: Any) -> None:
    patient = QLLM(model=llm.model, memory=llm.memory, max_tokens=300)
    chosen = selector.from_defaults(llm=patient).select(["the harbour", "the town"], QUESTION)
    assert chosen.selections
    assert all(selection.index >= 0 for selection in chosen.selections)


async def test_empty_questions_are_refused(llm: QLLM, index: WholeDocumentIndex) -> None:
    engine, chat = index.as_query_engine(), index.as_chat_engine()
    for ask in (llm.complete, engine.query, chat.chat, chat.stream_chat, index.as_retriever().retrieve):
        with pytest.raises(InvalidRequestError, match="empty"):
            ask("")
    for aask in (llm.acomplete, engine.aquery, chat.achat, chat.astream_chat, index.as_retriever().aretrieve):
        with pytest.raises(InvalidRequestError, match="empty"):
            await aask("")
    assert chat.chat_history == []


@pytest.mark.parametrize(
    "setting", [{"temperature": -1}, {"max_tokens": 0}, {"mode": "none"}, {"memory": {"n_local": -3}}]
)
def test_settings_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfigError, match=next(iter(setting))):
        QLLM(**setting)


def steps(recorder: Recorder) -> list[tuple[int, int, int]]:
    """(documents, tokens read, tokens in all) of each report since the last call."""
    told = [event for event in recorder.events if type(event) is ReadingProgressEvent]
    assert len({event.span_id for event in recorder.events} - {None}) <= 1  # all belong to the call
    assert all(event.span_id for event in recorder.events if type(event) in (ReadingProgressEvent, LookupEvent))
    recorder.events.clear()
    assert [event.tokens_read for event in told] == sorted(event.tokens_read for event in told)
    return [(event.documents, event.tokens_read, event.tokens_total) for event in told]


async def test_reading_is_reported(llm: QLLM) -> None:
    message = ChatMessage(blocks=[CitableBlock(title="t", source="s", content=TEXTS[0]), TextBlock(text=QUESTION)])
    with recording() as recorder:
        n = llm.chat([message]).raw["usage"]["prompt_tokens"]
        whole = steps(recorder)
        assert len(whole) > 1
        assert whole[-1] == (1, n, n)
        list(llm.stream_chat([message]))
        assert steps(recorder) == whole
        await llm.achat([message])
        assert steps(recorder) == whole
        async for _ in await llm.astream_chat([message]):
            pass
        assert steps(recorder) == whole
        llm.complete(QUESTION)
        assert steps(recorder) == []


def test_reading_ahead_of_a_cache_point_is_reported_once(llm: QLLM) -> None:
    point = CachePoint(cache_control=CacheControl(type="ephemeral"))
    document = CitableBlock(title="once", source="s", content=TEXTS[1])
    message = ChatMessage(blocks=[document, point, TextBlock(text=QUESTION)])
    with recording() as recorder:
        n = llm.chat([message]).raw["usage"]["cache_creation_tokens"]
        assert [step for step in steps(recorder) if step[1] == step[2]] == [(1, n, n)]
        llm.chat([message])
        assert steps(recorder) == []


def test_reading_an_index_is_reported_as_one(llm: QLLM) -> None:
    with recording() as recorder, llm.read(TEXTS) as memory:
        assert [event.tokens for event in recorder.events if type(event) is DocumentsReadEvent] == [memory.n_tokens]
        recorder.events.clear()
        documents = [Document(text=text, id_=str(n)) for n, text in enumerate(TEXTS)]
        WholeDocumentIndex.from_documents(documents, llm=llm, mode="read_once")
        told = [event for event in recorder.events if type(event) is ReadingProgressEvent]
    assert {event.documents for event in told} == {3}
    assert [event.tokens_read for event in told] == sorted(event.tokens_read for event in told)
    assert (told[-1].tokens_read, told[-1].tokens_total) == (memory.n_tokens, memory.n_tokens)
    assert all(event.tokens_total == pytest.approx(memory.n_tokens, rel=0.05) for event in told)
    assert all(event.tokens_read < event.tokens_total for event in told[:-1])


def test_the_published_codes_memory_reads_for_the_question(tmp_path: Path) -> None:
    faithful = MemoryConfig(
        faithful=True, n_init=8, n_local=64, block_size=16, topk=2, exec_block_size=16, repr_topk=4, summary="published"
    )
    document = CitableBlock(title="log", source="log.txt", content=TEXTS[0])
    message = ChatMessage(blocks=[document, TextBlock(text=QUESTION)])
    with QLLM(model=save_tiny(tmp_path), memory=faithful, max_tokens=2) as llm:
        assert llm.chat([message]).raw["mode"] == "query_aware"
        index = WholeDocumentIndex.from_documents([Document(text=TEXTS[0])], llm=llm)
        for engine in (index.as_query_engine(), index.as_chat_engine()):
            ask = getattr(engine, "query", None) or engine.chat
            assert ask(QUESTION).metadata["qllm"]["mode"] == "query_aware"
        assert llm.chat([message], mode="read_once").raw["mode"] == "read_once"
        with pytest.raises(InvalidRequestError, match="faithful=True"):
            llm.complete(QUESTION, memory=llm.read(TEXTS[0]))
