"""Processes forked while a chat model loads or answers: no copy waits for threads that are not there."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ishmael
import pytest
import torch
from ishmael import REPLY
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import HumanMessage

from qllm_integrations.langchain import QLLMChat
from qllm_runtime import loading
from qllm_runtime.errors import ClosedError

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
SECONDS = 60
ASKED = [
    HumanMessage(
        [
            {"type": "text-plain", "text": "Call me Ishmael.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "Who speaks?"},
        ]
    )
]


def holds_in_a_fork(check: Callable[[], bool]) -> bool:
    """Whether `check` is true in a forked process, within some seconds."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    code = 1
    try:
        signal.alarm(SECONDS)
        torch.set_num_threads(1)  # those of the other process are not here
        code = 0 if check() else 2
    finally:
        os._exit(code)


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A checkpoint that nobody else has loaded."""
    return ishmael.save(tmp_path, seed=2)


def test_a_process_forked_while_a_model_answers_loads_its_own(path: str) -> None:
    llm = QLLMChat(model=path)
    held: list[bool] = []

    def refused_but_loaded_anew() -> bool:
        for closed in (lambda: llm.invoke("hi"), lambda: list(llm.stream("hi"))):
            with pytest.raises(ClosedError, match="load models after the fork"):
                closed()
        return QLLMChat(model=path).invoke(ASKED).text == REPLY

    class Forks(BaseCallbackHandler):
        def on_custom_event(self, *_: Any, **__: Any) -> None:
            held.append(holds_in_a_fork(refused_but_loaded_anew))

    assert llm.invoke(ASKED, {"callbacks": [Forks()]}).text == REPLY
    assert held
    assert all(held)
    assert holds_in_a_fork(lambda: llm.invoke(ASKED).text == REPLY)  # nothing was under way


def test_a_process_forked_while_a_model_loads_does_not_wait_for_it(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, here, load = threading.Event(), threading.Event(), os.getpid(), loading._load

    def slow(*arguments: Any) -> Any:
        begun.set()
        if os.getpid() == here:
            go_on.wait()
        return load(*arguments)

    monkeypatch.setattr(loading, "_load", slow)
    llm = QLLMChat(model=path)
    asking = threading.Thread(target=llm.invoke, args=["hi"])
    asking.start()
    begun.wait()
    held = holds_in_a_fork(lambda: llm.invoke("hi").text == REPLY)
    go_on.set()
    asking.join()
    assert held


def test_a_process_forked_while_a_document_is_read_does_not_wait_for_that(path: str) -> None:
    llm = QLLMChat(model=path)
    llm.invoke("hi")
    begun, go_on, engine = threading.Event(), threading.Event(), llm._engine(path)
    here, read = os.getpid(), engine.read

    def slow(*arguments: Any, **options: Any) -> Any:
        begun.set()
        if os.getpid() == here:
            go_on.wait()
        return read(*arguments, **options)

    engine.read = slow
    asking = threading.Thread(target=llm.invoke, args=[ASKED])
    asking.start()
    begun.wait()
    held = holds_in_a_fork(lambda: llm.invoke(ASKED).text == REPLY)
    go_on.set()
    asking.join()
    assert held
