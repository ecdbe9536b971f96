"""Document memories: handles, `with_memory`, `cache_control`, document chains."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import pytest
from fake_engine_lc import FakeEngine, FakeMemory
from ishmael import REPLY
from langchain_classic.chains.combine_documents import create_stuff_documents_chain
from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document
from langchain_core.documents.base import Blob
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.runnables import ConfigurableField
from pdf_by_hand import pdf_bytes

from qllm_integrations.langchain import QLLM_STUFF_PROMPT, DocumentQA, QLLMChat
from qllm_integrations.langchain.memory import to_documents
from qllm_runtime import types
from qllm_runtime.config import MemoryConfig
from qllm_runtime.errors import ClosedError, DocumentError, InvalidRequestError, SavedReadingError

# no two blocks alike: between equals a lookup may choose either
BOOK = " ".join(f"It was night {n * n}. Call me Ishmael. Some {n} years ago I went to sea." for n in range(20))
OTHER = "The harbour was empty. Nobody came. The lamp burned until the morning. " * 20


@pytest.fixture(scope="module")
def tiny(tiny_path: str) -> QLLMChat:
    return QLLMChat(model=tiny_path)


def details(message: AIMessage) -> dict[str, int]:
    return dict(message.usage_metadata["input_token_details"])


async def test_what_was_read_comes_back_from_disk(tiny_path: str, other_path: str, tmp_path: Path) -> None:
    first, second = QLLMChat(model=tiny_path), QLLMChat(model=tiny_path)
    documents = [Document(page_content=BOOK, metadata={"source": "a/whale.txt", "page": 3}), OTHER]
    with first.add_documents(documents) as handle:
        handle.save(tmp_path / "reading", show_progress=True)
        expected = first.with_memory(handle).invoke("Who speaks?")
    for loaded in (second.load_documents(tmp_path / "reading"), await second.aload_documents(tmp_path / "reading")):
        ai = second.with_memory(loaded).invoke([HumanMessage("Who speaks?")])
        assert (ai.text, ai.content_blocks) == (expected.text, expected.content_blocks)
        assert details(ai) == {"cache_read": loaded.n_tokens, "cache_creation": 0}
        found = DocumentQA(second, loaded).invoke("Who speaks?")["context"]
        assert {source.metadata.get("source") for source in found} <= {"a/whale.txt", None}
    with pytest.raises(SavedReadingError, match="other weights"):
        QLLMChat(model=other_path).load_documents(tmp_path / "reading")
    second.close()
    assert loaded.closed
    with pytest.raises(ClosedError):
        handle.save(tmp_path / "again")


def test_read_once_ask_many(tiny: QLLMChat) -> None:
    with tiny.add_documents([Document(page_content=BOOK, metadata={"source": "a/whale.txt"}), OTHER]) as handle:
        qa = tiny.with_memory(handle)
        assert isinstance(qa, QLLMChat)
        for question in ("Who speaks?", "Who came?"):
            ai = qa.invoke(question)
            assert ai.text == REPLY
            assert details(ai) == {"cache_read": handle.n_tokens, "cache_creation": 0}
            assert ai.response_metadata["qllm"]["query"] == question
            assert ai.response_metadata["qllm"]["query_source"] == "message"
            for citation in ai.content_blocks[0]["annotations"]:
                index, extras = citation["extras"]["document_index"], citation["extras"]
                assert (
                    citation["cited_text"]
                    == (BOOK, OTHER)[index][extras["start_char_index"] : extras["end_char_index"]]
                )
                assert citation.get("title") == ("whale.txt", None)[index]
        streamed = reduce(add, qa.stream("Who came?"))
        assert streamed.usage_metadata == ai.usage_metadata
        assert streamed.content_blocks == ai.content_blocks
        assert (handle.closed, handle.nbytes > 0, len(handle.documents)) == (False, True, 2)
    assert handle.closed
    assert "closed" in repr(handle)


def test_a_memory_answers_as_inline_documents_read_once_do(tiny: QLLMChat) -> None:
    document = {"type": "text-plain", "mime_type": "text/plain", "text": BOOK, "title": "whale.txt"}
    question = {"type": "text", "text": "Who speaks?"}
    inline = tiny.invoke([HumanMessage([document, question])], mode="read_once", logprobs=True)
    with tiny.add_documents(types.Document(BOOK, "whale.txt")) as handle:
        asked = tiny.invoke([HumanMessage([handle.block(), question])], logprobs=True)
    assert asked.text == inline.text
    cited = [
        [citation["extras"].pop("score") for citation in ai.additional_kwargs["citations"]] for ai in (asked, inline)
    ]
    assert cited[0] == pytest.approx(cited[1], abs=1e-5)
    assert asked.content_blocks == inline.content_blocks
    assert asked.usage_metadata["input_tokens"] == inline.usage_metadata["input_tokens"]
    scores = [[entry["logprob"] for entry in ai.response_metadata["logprobs"]["content"]] for ai in (asked, inline)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_conversations_systems_and_tools_over_a_memory(tiny: QLLMChat) -> None:
    def look(at: str) -> str:
        """Look at something."""
        return at

    with tiny.add_documents(BOOK, system="Be brief.") as handle:
        qa = tiny.with_memory(handle)
        first = qa.invoke([SystemMessage("Be brief."), HumanMessage("Who speaks?")])
        history = [HumanMessage("Who speaks?"), first, HumanMessage("And who listens?")]
        ai = qa.invoke(history)
        assert details(ai)["cache_read"] == handle.n_tokens
        assert ai.response_metadata["qllm"]["query"] == "And who listens?"
        assert qa.bind_tools([look], tool_choice="any").invoke("Look.").tool_calls
        assert qa.with_structured_output(
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        ).invoke("?")
        assert tiny.bind(file_id=handle.id).invoke("Who?").text == REPLY
        with pytest.raises(InvalidRequestError, match="another system text"):
            qa.invoke([SystemMessage("Be wordy."), HumanMessage("Who?")])
        counted = qa.get_num_tokens_from_messages(history)
        assert counted == ai.usage_metadata["input_tokens"]


def test_a_conversation_may_begin_with_a_greeting(tiny: QLLMChat) -> None:
    greeted = [AIMessage("Hello"), HumanMessage("Who speaks?")]
    with tiny.add_documents(BOOK) as handle, tiny.add_documents(BOOK, system="Be brief.") as brief:
        qa = tiny.with_memory(handle)
        ai = qa.invoke(greeted)
        assert (ai.text, details(ai)["cache_read"]) == (REPLY, handle.n_tokens)
        assert ai.response_metadata["qllm"]["query"] == "Who speaks?"
        assert qa.get_num_tokens_from_messages(greeted) == ai.usage_metadata["input_tokens"]
        assert tiny.with_memory(brief).invoke([SystemMessage("Be brief."), *greeted]).text == REPLY
    document, _ = marked(BOOK)[0].content
    for messages in ([AIMessage("Hello"), *marked(BOOK)], [HumanMessage([document]), *greeted]):
        assert tiny.invoke(messages).text == REPLY


def test_memories_that_cannot_be_used_are_refused(tiny: QLLMChat, other_path: str) -> None:
    handle = tiny.add_documents("Call me Ishmael.")
    with pytest.raises(InvalidRequestError, match="another model"):
        QLLMChat(model=other_path).with_memory(handle)
    with pytest.raises(InvalidRequestError, match="another model"):
        QLLMChat(model=tiny.model, memory=MemoryConfig(n_local=256)).bind(file_id=handle.id).invoke("hi")
    assert QLLMChat(model=tiny.model, max_tokens=3).with_memory(handle).invoke("hi").text == REPLY[:3]
    with pytest.raises(InvalidRequestError, match="no document memory 'nowhere'"):
        tiny.invoke([HumanMessage([{"type": "text-plain", "file_id": "nowhere"}, {"type": "text", "text": "hi"}])])
    handle.close()
    for use in (lambda: tiny.with_memory(handle), lambda: tiny.bind(file_id=handle.id).invoke("hi")):
        with pytest.raises(ClosedError, match="was closed"):
            use()
    handle.close()


def test_closing_the_chat_model_closes_its_memories(tiny_path: str) -> None:
    llm = QLLMChat(model=tiny_path)
    handle = llm.add_documents("Call me Ishmael.")
    llm.close()
    assert handle.closed


def marked(text: str) -> list[Any]:
    document = {"type": "text-plain", "mime_type": "text/plain", "text": text, "cache_control": {"type": "ephemeral"}}
    return [HumanMessage([document, {"type": "text", "text": "Who speaks?"}])]


def test_cache_control_keeps_the_reading(tiny_path: str) -> None:
    llm = QLLMChat(model=tiny_path)
    first, second, streamed = llm.invoke(marked(BOOK)), llm.invoke(marked(BOOK)), reduce(add, llm.stream(marked(BOOK)))
    created = details(first)["cache_creation"]
    assert created > len(BOOK)
    assert details(first)["cache_read"] == 0
    assert details(second) == details(streamed) == {"cache_read": created, "cache_creation": 0}
    assert first.content_blocks == second.content_blocks
    assert details(llm.invoke(marked(OTHER)))["cache_creation"] > 0
    assert details(llm.invoke([SystemMessage("Be brief."), *marked(BOOK)]))["cache_creation"] > 0
    elsewhere = marked(BOOK)
    elsewhere[0].content[0]["extras"] = {"metadata": {"source": "elsewhere.txt"}}
    assert details(llm.invoke(elsewhere))["cache_creation"] > 0  # its citations say something else
    llm.close()


def test_a_mode_that_a_memory_cannot_have_is_refused(tiny: QLLMChat, tiny_path: str) -> None:
    with tiny.add_documents(BOOK) as handle, pytest.raises(InvalidRequestError, match="leave mode out"):
        tiny.with_memory(handle).invoke("Who speaks?", mode="query_aware")
    aware = QLLMChat(model=tiny_path, mode="query_aware")  # its own mode is for documents in messages
    with aware.add_documents(BOOK) as handle:
        assert aware.with_memory(handle).invoke("Who speaks?").response_metadata["qllm"]["mode"] == "read_once"
    asked = aware.invoke(marked(BOOK), mode="query_aware")
    assert asked.response_metadata["qllm"]["mode"] == "query_aware"
    assert details(asked) == {"cache_read": 0, "cache_creation": 0}
    aware.close()


def test_passages_are_read_again_unless_told_otherwise(tiny: QLLMChat, tiny_path: str) -> None:
    def reread(ai: AIMessage) -> bool:
        return bool(ai.response_metadata["qllm"]["reread"])

    again = tiny.invoke(marked(BOOK))
    once = tiny.invoke(marked(BOOK), reread=False)
    assert (reread(again), reread(once)) == (True, False)
    assert again.usage_metadata["input_tokens"] == once.usage_metadata["input_tokens"]
    assert not reread(QLLMChat(model=tiny_path, reread=False).invoke(marked(BOOK)))
    assert reread(QLLMChat(model=tiny_path, reread=False).bind(reread=True).invoke(marked(BOOK)))
    assert QLLMChat(reread=False)._get_llm_string() != QLLMChat()._get_llm_string()  # another answer: another cache key


def test_cache_control_keeps_a_few_readings_only() -> None:
    llm = QLLMChat.from_engine(FakeEngine())
    for i in range(6):
        llm.invoke(marked(f"Book {i}."))
    assert details(llm.invoke(marked("Book 5.")))["cache_read"] > 0
    assert details(llm.invoke(marked("Book 0.")))["cache_creation"] > 0


def read_memories(engine: FakeEngine) -> list[weakref.ref[FakeMemory]]:
    """The memories that `engine` reads from now on."""
    memories: list[weakref.ref[FakeMemory]] = []
    read = engine.read

    def record(*args: Any, **options: Any) -> FakeMemory:
        memory = read(*args, **options)
        memories.append(weakref.ref(memory))
        return memory

    engine.read = record
    return memories


def alive(memories: list[weakref.ref[FakeMemory]]) -> int:
    gc.collect()
    return sum(memory() is not None for memory in memories)


def test_requests_at_once_read_a_document_once_and_closing_frees_it() -> None:
    engine = FakeEngine(step=0.02)
    memories, llm = read_memories(engine), QLLMChat.from_engine(engine)
    answers = llm.batch([marked(BOOK)] * 3)
    warm = llm.configurable_fields(temperature=ConfigurableField(id="t")).with_config(configurable={"t": 0.5})
    answers.append(warm.invoke(marked(BOOK)))
    assert len(memories) == 1
    assert sorted(details(ai)["cache_creation"] > 0 for ai in answers) == [False] * 3 + [True]
    engine.requests.clear()
    llm.close()
    assert alive(memories) == 0


def test_a_reading_that_fails_or_is_given_up_fails_nobody_else() -> None:
    engine = FakeEngine(n_chunks=20, step=0.02)
    llm = QLLMChat.from_engine(engine)

    def hurry() -> None:
        with pytest.raises(TimeoutError):
            llm.invoke(marked(BOOK), timeout=0.1)

    hurried = threading.Thread(target=hurry)
    hurried.start()
    time.sleep(0.05)
    assert details(llm.invoke(marked(BOOK)))["cache_creation"] > 0
    hurried.join()
    patient = threading.Thread(target=llm.invoke, args=[marked(OTHER)])
    patient.start()
    time.sleep(0.05)
    with pytest.raises(TimeoutError):
        llm.invoke(marked(OTHER), timeout=0.1)
    patient.join()


def test_closing_during_a_reading_keeps_nothing() -> None:
    engine = FakeEngine(n_chunks=20, step=0.02)
    memories, llm = read_memories(engine), QLLMChat.from_engine(engine)

    def ask() -> None:
        with pytest.raises(ClosedError):
            llm.invoke(marked(BOOK))

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.1)
    llm.close()
    asking.join()
    assert (len(memories), alive(memories), engine.requests) == (1, 0, [])


def test_nothing_is_kept_alive_by_a_chat_model_that_is_gone() -> None:
    engine = FakeEngine()
    memories, llm = read_memories(engine), QLLMChat.from_engine(engine)
    for i in range(6):
        llm.invoke(marked(f"Book {i}."))
    engine.requests.clear()
    assert alive(memories) == 4
    llm.add_documents(BOOK)
    assert alive(memories) == 5
    del llm
    assert alive(memories) == 0


def test_a_memory_lives_with_a_chat_model_that_asks_it(tiny_path: str) -> None:
    qa = QLLMChat(model=tiny_path).with_memory(QLLMChat(model=tiny_path).add_documents(BOOK))
    gc.collect()
    assert qa.invoke("Who speaks?").text == REPLY


def test_closing_what_asks_a_memory_leaves_the_chat_model_open() -> None:
    engine = FakeEngine()
    llm = QLLMChat.from_engine(engine)
    with llm.add_documents(BOOK) as handle:
        with llm.with_memory(handle) as qa:
            assert qa.invoke("Who speaks?").text == REPLY
            added = qa.add_documents(OTHER)
        with pytest.raises(ClosedError):
            qa.invoke("Who speaks?")
        assert llm.with_memory(handle).invoke("Who speaks?").text == REPLY
    assert llm.invoke("hi").text == REPLY
    later = llm.with_memory(added)
    llm.close()
    assert added.closed
    with pytest.raises(ClosedError):
        later.invoke("hi")


class Pages(BaseLoader):
    def lazy_load(self) -> Any:
        for source in ("a.pdf", "b.pdf"):
            for page in range(2):
                yield Document(page_content=f"Page {page} of {source}.", metadata={"source": source, "page": page})


def test_documents_from_everywhere(tmp_path: Path) -> None:
    (tmp_path / "whale.txt").write_text(BOOK, encoding="utf-8")
    (tmp_path / "whale.pdf").write_bytes(pdf_bytes("Call me Ishmael.", "The whale."))
    blob = Blob(data=b"Call me Ishmael.", mimetype="text/plain", metadata={"shelf": 3})
    sources = [
        "Some text.",
        tmp_path / "whale.txt",
        tmp_path / "whale.pdf",
        blob,
        types.Document("x", "y"),
        Document(page_content="z"),
    ]
    documents = to_documents(sources)
    assert [document.title for document in documents] == [None, "whale.txt", "whale.pdf", None, "y", None]
    assert documents[1].text == BOOK
    assert documents[3].metadata["shelf"] == 3
    assert [to_documents(source)[0].text for source in sources] == [document.text for document in documents]
    first, second = to_documents(Pages())
    assert first.text == "Page 0 of a.pdf.\n\nPage 1 of a.pdf."
    assert first.metadata["page_starts"] == [0, 18]
    assert (first.title, second.title) == ("a.pdf", "b.pdf")


def test_sources_that_are_no_documents_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "whale.txt"
    file.write_text(BOOK, encoding="utf-8")
    for source, words in (
        (str(file), "pathlib.Path"),
        (3, "int is not a document"),
        ([], "no documents"),
        ({"text": "x"}, "dict is not a document"),
        ([3], "int"),
    ):
        with pytest.raises(DocumentError, match=words):
            to_documents(source)
    with pytest.raises(DocumentError):
        QLLMChat.from_engine(FakeEngine()).add_documents(tmp_path / "missing.txt")


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "whale.md").write_text("Call me Ishmael.")
    (tmp_path / "code.py").write_text("whale = 'white'")
    llm = QLLMChat.from_engine(FakeEngine())
    with llm.add_documents(tmp_path) as handle:
        assert [document.title for document in handle.documents] == ["code.py", "sub/whale.md"]


def test_a_stuff_documents_chain_works_unmodified(tiny: QLLMChat) -> None:
    books = [Document(page_content=BOOK), Document(page_content="{braces} " + OTHER)]
    chain = create_stuff_documents_chain(tiny, QLLM_STUFF_PROMPT)
    assert chain.invoke({"context": books, "input": "Who speaks?"}) == REPLY
    engine = FakeEngine()
    create_stuff_documents_chain(QLLMChat.from_engine(engine), QLLM_STUFF_PROMPT).invoke(
        {"context": books, "input": "Who speaks?"}
    )
    (turn,) = engine.requests[0]["turns"]
    assert turn.documents == (types.Document(f"{BOOK}\n\n{{braces}} {OTHER}"),)
    assert engine.requests[0]["query"] == "Who speaks?"
    assert create_stuff_documents_chain(QLLMChat.from_engine(engine), QLLM_STUFF_PROMPT).invoke(
        {"context": [], "input": "Who speaks?"}
    )
    assert engine.requests[1]["turns"] == (types.Turn("user", ("Who speaks?",)),)


def test_progress_is_shown(tiny: QLLMChat, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.add_documents(BOOK, show_progress=True).close()
    assert "tokens" in capsys.readouterr().err
    tiny.add_documents(BOOK).close()
    assert capsys.readouterr().err == ""
