"""Requests to one model: one at a time, in the order they came, given up when cancelled, refused in a fork amid one."""

from __future__ import annotations

import itertools
import os
import threading
import time

import pytest

from qllm_runtime import rereading, worker
from qllm_runtime.engine import QLLM
from qllm_runtime.errors import CancelledError, ClosedError, QLLMError
from qllm_runtime.tokenization import CHUNK, SegmentTokenizer
from qllm_runtime.types import Document, Turn
from qllm_runtime.waiting import FifoLock

BOOK = "The cat sat there. " * 30
QUESTION = "Who sat?"


def test_whoever_came_first_goes_first() -> None:
    lock, went = FifoLock(), []  # type: ignore[var-annotated]
    lock.acquire(lambda: False)

    def wait(number: int) -> None:
        lock.acquire(lambda: False)
        went.append(number)
        lock.release()

    threads = []
    for number in range(8):
        threads.append(threading.Thread(target=wait, args=(number,)))
        threads[-1].start()
        while len(lock._tickets) < number + 2:
            time.sleep(0.001)
    with pytest.raises(CancelledError, match="waiting"):
        lock.acquire(lambda: True)
    lock.release()
    for thread in threads:
        thread.join(20)
    assert went == list(range(8))
    assert not lock.locked


def test_a_request_keeps_others_waiting_until_all_of_it_is_done(llm: QLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    under_way: list[str] = []
    plain = rereading.answering.read_ahead

    def read_ahead(*args: object) -> object:
        read = plain(*args)  # type: ignore[arg-type]
        time.sleep(0.2)  # the model is idle here, and others are waiting for it
        return read

    def told(done: int, total: int) -> None:
        under_way.append(threading.current_thread().name)

    def ask() -> None:
        assert llm.ask(QUESTION, BOOK, max_tokens=2, progress=told).reread

    monkeypatch.setattr(rereading.answering, "read_ahead", read_ahead)
    threads = [threading.Thread(target=ask, name=str(n)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len([name for name, _ in itertools.groupby(under_way)]) == 3


def test_a_long_text_can_be_cancelled_before_it_is_read(llm: QLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    text, cancel = "word " * (CHUNK // 2), threading.Event()
    encoded: list[int] = []
    of = SegmentTokenizer
    plain = of._encode

    def encode(self: object, part: str) -> object:
        if len(part) > 1000:
            encoded.append(len(part))
            cancel.set()
        return plain(self, part)

    monkeypatch.setattr(of, "_encode", encode)
    with pytest.raises(CancelledError):
        llm.ask(QUESTION, text, cancel=cancel)
    cancel.clear()
    with pytest.raises(CancelledError):
        llm.read(text, cancel=cancel)
    assert len(encoded) == 2
    assert not llm._inference.busy


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_forked_in_the_middle_of_a_request_says_so(llm: QLLM) -> None:
    children: list[int] = []

    def fork(done: int, total: int) -> None:
        if children:
            return
        child = os.fork()
        if child:
            children.append(child)
            return
        said = 1
        try:
            llm.chat([Turn("user", (Document(BOOK), QUESTION))], max_tokens=1)
        except ClosedError as error:
            said = 0 if "load models after the fork" in str(error) else 2
        except QLLMError:
            said = 3
        finally:
            os._exit(said)

    assert llm.ask(QUESTION, BOOK, max_tokens=1, progress=fork).text
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0
    assert llm.ask(QUESTION, BOOK, max_tokens=1).text


def test_a_thread_that_cannot_be_started_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", full)
        with pytest.raises(RuntimeError, match="start new thread"):
            list(worker.stream(lambda *_: None, None))
    assert not worker._running
