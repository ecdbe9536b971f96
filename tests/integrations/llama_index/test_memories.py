"""How long memories and engines are kept, and what they were read and loaded with."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import BaseMemoryBlock, ChatSummaryMemoryBuffer, Memory
from llama_index.core.prompts import ChatPromptTemplate

from qllm_integrations.llama_index import QLLM, WholeDocumentIndex
from qllm_runtime.config import MemoryConfig
from qllm_runtime.engine import QLLM as Engine
from qllm_runtime.errors import InvalidConfigError
from qllm_runtime.types import Document as EngineDocument
from tests.integrations.llama_index.fake_engine import FakeEngine
from tests.integrations.llama_index.tiny_model import save_tiny

TEXT = "The lamp was lit at dusk. The secret number of the harbour is 4711. Nobody spoke. "
QUESTION = "What is the secret number?"


def forking(test: Any) -> Any:
    """Marks a test that forks this process while it has threads."""
    test = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")(test)
    return pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")(test)


class Facts(BaseMemoryBlock[str]):
    """Recalls something else with every turn."""

    turns: int = 0

    async def _aget(self, messages: Any = None, **_: Any) -> str:
        self.turns += 1
        return f"fact {self.turns}"

    async def _aput(self, messages: Any) -> None:
        pass


@pytest.fixture
def index(llm: QLLM) -> WholeDocumentIndex:
    return WholeDocumentIndex.from_documents([Document(text=TEXT)], llm=llm)


def test_memories_of_few_system_prompts_are_kept(index: WholeDocumentIndex, engine: FakeEngine) -> None:
    for day in range(6):
        index.as_query_engine(system_prompt=f"Day {day}.").query(QUESTION)
        index.as_query_engine(system_prompt="Day 0.").query(QUESTION)
    assert len(engine.readings) == 6
    assert [memory.closed for memory in engine.readings] == [False] * 6  # a request may use one that went
    index.as_query_engine(system_prompt="Day 5.").query(QUESTION)
    assert len(engine.readings) == 6
    index.as_query_engine(system_prompt="Day 1.").query(QUESTION)
    assert len(engine.readings) == 7


def test_a_family_keeps_all_its_documents(llm: QLLM, engine: FakeEngine) -> None:
    documents = [Document(text=f"{n} {TEXT}") for n in range(9)]
    query_engine = WholeDocumentIndex.from_documents(documents, llm=llm).as_query_engine(response_mode="accumulate")
    query_engine.query(QUESTION)
    query_engine.query(QUESTION)
    assert len(engine.readings) == 9


async def test_what_a_history_recalls_follows_the_documents(llm: QLLM, engine: FakeEngine) -> None:
    index = WholeDocumentIndex.from_documents([Document(text=TEXT)], llm=llm, system_prompt="Be brief.")
    chat = index.as_chat_engine(memory=Memory.from_defaults(memory_blocks=[Facts(name="f")]))
    for _ in range(3):
        await chat.achat(QUESTION)
    assert [memory.system for memory in engine.readings] == ["Be brief."]
    system = [turn.text for turn in engine.requests[-1]["turns"] if turn.role == "system"]
    assert system[0] == "Be brief."
    assert "fact 3" in system[1]


def test_a_growing_summary_reads_nothing_again(index: WholeDocumentIndex, llm: QLLM, engine: FakeEngine) -> None:
    told: list[str] = []

    def script(query: str, documents: Any) -> str:
        told.append(query)
        return f"It is summary number {len(told)} of what was said here."

    engine.script = script
    memory = ChatSummaryMemoryBuffer.from_defaults(llm=llm, token_limit=30, tokenizer_fn=str.split)
    chat = index.as_chat_engine(memory=memory)
    for number in range(5):
        chat.chat(f"{QUESTION} {number} and tell me more please")
    assert any("summary number" in turn.text for turn in engine.requests[-1]["turns"] if turn.role == "system")
    assert [memory.system for memory in engine.readings] == [None]


def test_a_template_reads_under_its_system_message(index: WholeDocumentIndex, engine: FakeEngine) -> None:
    messages = [ChatMessage("Read closely.", role="system"), ChatMessage("{context_str} {query_str}")]
    index.as_query_engine(text_qa_template=ChatPromptTemplate(messages)).query(QUESTION)
    assert engine.readings[-1].system == "Read closely."


def test_another_engine_reads_for_itself(index: WholeDocumentIndex, engine: FakeEngine) -> None:
    other = FakeEngine("It is 4712.")
    for _ in range(2):
        assert str(index.as_query_engine().query(QUESTION)) == "It is 4711."
        assert str(index.as_query_engine(llm=QLLM.from_engine(other)).query(QUESTION)) == "It is 4712."
    assert (len(engine.readings), len(other.readings)) == (1, 1)


def test_what_was_closed_is_read_again(index: WholeDocumentIndex, engine: FakeEngine) -> None:
    for _ in range(2):
        index.as_query_engine().query(QUESTION)
    assert len(engine.readings) == 1
    engine.readings[0].close()
    index.as_query_engine().query(QUESTION)
    assert engine.requests[-1]["memory"] is engine.readings[1]


@pytest.mark.parametrize("again", [copy.deepcopy, lambda index: pickle.loads(pickle.dumps(index))])
def test_an_index_is_copied_without_its_memories(
    index: WholeDocumentIndex, llm: QLLM, engine: FakeEngine, again: Callable[[Any], WholeDocumentIndex]
) -> None:
    index.as_query_engine().query(QUESTION)
    copied = again(index)
    assert [node.get_content() for node in copied.whole_nodes()] == [TEXT]
    assert (len(index._shelf), len(copied._shelf)) == (1, 0)
    for day in range(6):
        assert copied.as_query_engine(llm=llm, system_prompt=f"Day {day}.").query(QUESTION).source_nodes
    assert len(copied._shelf) == 4
    assert len(engine.readings) == 7


def in_a_fork(call: Callable[[], Any]) -> int:
    """0 when `call` returns something true in a forked process within ten seconds."""
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        os._exit(0 if call() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@forking
def test_a_fork_does_not_wait_for_a_reading_in_the_other_process(
    index: WholeDocumentIndex, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.as_query_engine().query(QUESTION)
    reads, go_on, read = threading.Event(), threading.Event(), engine.read

    def slow(*documents: Any, **arguments: Any) -> Any:
        reads.set()
        go_on.wait()
        return read(*documents, **arguments)

    monkeypatch.setattr(engine, "read", slow)
    query = index.as_query_engine(system_prompt="Be brief.").query
    reader = threading.Thread(target=query, args=(QUESTION,), daemon=True)
    reader.start()
    reads.wait()
    with index._shelf._lock:
        assert in_a_fork(lambda: str(index.as_query_engine().query(QUESTION)) == "It is 4711.") == 0
    go_on.set()
    reader.join()
    assert len(engine.readings) == 2


def test_with_the_real_engine(tmp_path: Path) -> None:
    layout = MemoryConfig(n_local=128, exec_block_size=32, block_size=16, n_init=8, topk=4)
    with QLLM(model=save_tiny(tmp_path), max_tokens=3, memory=layout) as llm:
        index = WholeDocumentIndex.from_documents([Document(text=TEXT * 6)], llm=llm, system_prompt="Be brief.")
        for system_prompt in (None, "Be kind."):
            history = [ChatMessage("A summary.", role="system"), ChatMessage("Hi"), ChatMessage("Ho", role="assistant")]
            chat = index.as_chat_engine(chat_history=history, system_prompt=system_prompt)
            assert str(chat.chat(QUESTION))
            assert str(chat.chat(QUESTION))


# settings of the engine


@forking
def test_a_fork_does_not_wait_for_a_model_that_loads_in_the_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    loading, go_on, parent = threading.Event(), threading.Event(), os.getpid()

    def load(**settings: Any) -> FakeEngine:
        if os.getpid() == parent:
            loading.set()
            go_on.wait()
        return FakeEngine("Hello.")

    monkeypatch.setattr(Engine, "from_pretrained", load)
    llm = QLLM()
    loader = threading.Thread(target=llm.complete, args=("Hi",), daemon=True)
    loader.start()
    loading.wait()
    assert in_a_fork(lambda: llm.complete("Hi").text == "Hello.") == 0
    go_on.set()
    loader.join()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []

    def load(**settings: Any) -> FakeEngine:
        made.append(settings)
        engine = FakeEngine("Hello.")
        engine.name = settings["model"]
        engine.memory = settings["memory"] or engine.memory
        return engine

    monkeypatch.setattr(Engine, "from_pretrained", load)
    return made


def test_a_changed_model_is_loaded(loads: list[dict[str, Any]]) -> None:
    llm = QLLM(model="one", token="secret")
    assert llm.complete("Hi").raw["model"] == "one"
    old = llm.engine
    llm.model = "two"
    assert llm.complete("Hi").raw["model"] == llm.engine.name == "two"
    third = llm.model_copy(update={"model": "three"})
    assert third.complete("Hi").raw["model"] == third.engine.name == "three"
    assert llm.complete("Hi").raw["model"] == llm.engine.name == "two"
    assert [made["model"] for made in loads] == ["one", "two", "three"]
    assert loads[0]["token"] == "secret"
    assert not old.closed  # a request may still use it
    llm.shelf.get(llm.engine, [EngineDocument(TEXT)], None)
    llm.model = "four"
    assert llm.engine.name == "four"
    assert len(llm.shelf) == 0
    third.close()
    assert not llm.engine.closed


@pytest.mark.parametrize(
    "change",
    [{"device": "cpu"}, {"dtype": "float32"}, {"revision": "v2"}, {"memory": MemoryConfig(n_local=256)}],
)
def test_other_changed_settings_load_again(loads: list[dict[str, Any]], change: dict[str, Any]) -> None:
    llm = QLLM(model="one")
    llm.complete("Hi")
    llm.temperature = 0.5
    llm.complete("Hi")
    assert len(loads) == 1
    for name, value in change.items():
        setattr(llm, name, value)
        llm.complete("Hi")
        assert len(loads) == 2
        assert loads[-1][name] == value


def test_an_engine_of_the_callers_cannot_change(llm: QLLM) -> None:
    llm.complete("Hi")
    llm.temperature = 0.5
    llm.complete("Hi")
    for changed in (llm.model_copy(update={"model": "other"}), llm.model_copy(update={"device": "cuda:3"})):
        with pytest.raises(InvalidConfigError, match="from_engine"):
            changed.complete("Hi")
    llm.complete("Hi")


def test_template_variables_belong_to_what_was_read(tmp_path: Path) -> None:
    loaded = Engine.from_pretrained(str(save_tiny(tmp_path)))
    loaded.tokenizer.chat_template = "{{ bos_token }}{{ effort | default('low') }}\n" + loaded.tokenizer.chat_template
    with QLLM.from_engine(loaded, template_kwargs={"effort": "high"}, max_tokens=4) as llm:
        index = WholeDocumentIndex.from_documents([Document(text=TEXT)], llm=llm)
        kept = []
        for variables in ({"effort": "high"}, {"effort": "high"}, {}):
            llm.template_kwargs = variables
            assert str(index.as_query_engine().query(QUESTION))
            kept.append(len(index._shelf))
        assert kept == [1, 1, 2]
