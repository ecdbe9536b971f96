"""Questions and answers: streaming, stopping, cancelling, threads, memories, sources."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import LogitsProcessor

from qllm_kernels.dispatch import backend
from qllm_runtime.cache import MemoryCache
from qllm_runtime.config import MemoryConfig
from qllm_runtime.engine import QLLM
from qllm_runtime.errors import (
    CancelledError,
    ClosedError,
    ContextOverflowError,
    DocumentError,
    InvalidConfigError,
    InvalidRequestError,
    ModelNotFoundError,
    OutOfMemoryError,
    UnsupportedModelError,
)
from qllm_runtime.prompt import build_prompt
from qllm_runtime.types import Answer, Document, Piece, Sampling, Turn

BOOK = "The cat sat there.\r\nNaïve 👩‍🚀 said: the fox\ufeff ran.\n\n" * 6
QUESTION = "Who ran?"


class Watch(LogitsProcessor):
    """Sees every token that is about to be chosen."""

    def __init__(self, act: Callable[[int], None] = lambda _: None) -> None:
        self.steps: list[int] = []
        self._act = act

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps.append(input_ids.shape[1])
        self._act(input_ids.shape[1])
        return scores


def turns(question: str = QUESTION, book: str = BOOK) -> list[Turn]:
    return [Turn("user", (Document(book), question))]


def free(llm: QLLM) -> bool:
    """Whether the model becomes free within a moment."""
    until = time.monotonic() + 20
    while llm._inference.busy and time.monotonic() < until:
        time.sleep(0.01)
    return not llm._inference.busy


# ---------------------------------------------------------------------- answers


def test_an_answer(llm: QLLM) -> None:
    read: list[tuple[int, int]] = []
    answer = llm.ask(QUESTION, BOOK, max_tokens=12, progress=lambda *p: read.append(p))
    assert answer.finish_reason == "length"
    assert len(answer.token_ids) == answer.usage.completion_tokens == 12
    assert answer.text == llm.tokenizer.decode(answer.token_ids)
    assert (answer.query, answer.query_source, answer.mode) == (QUESTION, "explicit", "read_once")
    assert answer.usage.prompt_tokens == read[-1][0] == read[-1][1]
    assert [done for done, _ in read] == sorted(done for done, _ in read)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert answer.usage.cache_read_tokens == 0
    times = answer.timings
    assert times.total_s >= times.read_s + times.decode_s > 0
    assert min(times.tokenize_s, times.read_tokens_per_s, times.decode_tokens_per_s, times.peak_memory_bytes) > 0
    assert answer.logprobs is None
    repeated = llm.chat(turns(), query=QUESTION)
    assert repeated.token_ids[:12] == answer.token_ids
    assert llm.count_prompt_tokens(turns()) == answer.usage.prompt_tokens


def test_the_pieces_of_a_stream_are_the_answer(llm: QLLM) -> None:
    expected = llm.ask(QUESTION, BOOK, max_tokens=40)
    *pieces, last = llm.stream(QUESTION, BOOK, max_tokens=40)
    assert "".join(piece.text for piece in pieces) == expected.text
    assert all(piece.answer is None for piece in pieces)
    assert last.text == ""
    assert last.answer is not None
    assert last.answer.text == expected.text
    assert last.answer.sources == expected.sources


def test_paths_are_documents(llm: QLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "sub/b.txt"):
        (tmp_path / name).write_text(f"The text of {name}. " * 4)
    memory = llm.read([tmp_path / "a.txt", "Loose words.", tmp_path / "sub"])
    assert [d.title for d in memory.documents] == ["a.txt", None, "b.txt"]
    assert llm.ask("What is it?", tmp_path, max_tokens=1).sources
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DocumentError, match=r"strings are read as text; pass pathlib.Path\('a.txt'\)"):
        llm.read("a.txt")
    with pytest.raises(DocumentError, match="Document 1 is a bytes"):
        llm.read(b"bytes")  # type: ignore[arg-type]
    with pytest.raises(DocumentError, match="no file"):
        llm.ask("What is it?", tmp_path / "none.txt")


def test_sources_quote_the_documents(llm: QLLM) -> None:
    documents = [
        Document(BOOK, "cats"),
        Document("\ufeffOne line.\r\n\r\nTwo 🏴󠁧󠁢󠁥󠁮󠁧󠁿 lines.\r\n" * 5),
        Document(" e\u0301 "),
    ]
    answer = llm.ask(QUESTION, documents, max_tokens=10)
    assert answer.sources
    for source in answer.sources:
        document = documents[source.document]
        assert source.text == document.text[source.start : source.end]
        assert source.text
        assert source.title == document.title
        assert 0 < source.score <= 1
    assert [s.score for s in answer.sources] == sorted((s.score for s in answer.sources), reverse=True)


@pytest.mark.parametrize("n", [0, 3])
def test_logprobs(llm: QLLM, n: int) -> None:
    answer = llm.ask(QUESTION, BOOK, max_tokens=6, logprobs=n)
    assert answer.logprobs is not None
    assert [each.token_id for each in answer.logprobs] == list(answer.token_ids)
    for each in answer.logprobs:
        assert len(each.top) == n
        assert each.logprob <= 0
        if n:
            assert each.top[0][1:] == (each.token_id, pytest.approx(each.logprob))
            assert [p for *_, p in each.top] == sorted((p for *_, p in each.top), reverse=True)
    pieces = list(llm.stream(QUESTION, BOOK, max_tokens=6, logprobs=n))
    assert tuple(each for piece in pieces for each in piece.logprobs) == answer.logprobs


def test_logprobs_leave_out_what_was_ruled_out(llm: QLLM) -> None:
    answer = llm.ask(QUESTION, BOOK, max_tokens=4, logprobs=5, temperature=1.0, top_k=2, seed=1)
    assert answer.logprobs is not None
    assert all(len(each.top) == 2 for each in answer.logprobs)


def test_processors_see_the_answer_only_and_may_change_it(llm: QLLM) -> None:
    class Only(Watch):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            super().__call__(input_ids, scores)
            forced = torch.full_like(scores, float("-inf"))
            forced[:, 70 + input_ids.shape[1]] = 0
            return forced

    only = Only()
    answer = llm.chat(turns(), logits_processors=[only], sampling=Sampling(max_tokens=5))
    assert only.steps == [0, 1, 2, 3, 4]
    assert answer.token_ids == (70, 71, 72, 73, 74)


def test_the_end_token_ends_and_is_not_shown(llm: QLLM) -> None:
    whole = llm.ask(QUESTION, BOOK, max_tokens=12)
    end = whole.token_ids[6]
    llm.model.generation_config.eos_token_id = [1, end]
    try:
        answer = llm.ask(QUESTION, BOOK, max_tokens=12)
    finally:
        llm.model.generation_config.eos_token_id = 1
    assert answer.finish_reason == "stop"
    assert answer.token_ids == whole.token_ids[: whole.token_ids.index(end)]


def test_stop_strings_cut_at_their_first_occurrence(llm: QLLM) -> None:
    whole = llm.ask(QUESTION, BOOK, max_tokens=40).text
    at = next(i for i in range(8, len(whole) - 3) if "\ufffd" not in whole[i : i + 3])
    stop = whole[at : at + 3]
    for stops in ([stop], [stop + "never", stop], stop):
        answer = llm.ask(QUESTION, BOOK, max_tokens=40, stop=stops)
        assert answer.text == whole[: whole.index(stop)]
        assert answer.finish_reason == "stop"
        pieces = [piece.text for piece in llm.stream(QUESTION, BOOK, max_tokens=40, stop=stops)]
        assert "".join(pieces) == answer.text
    for wrong in (5, [5], [""]):
        with pytest.raises(InvalidConfigError, match="stop="):
            llm.ask(QUESTION, BOOK, stop=wrong)


def test_modes(llm: QLLM) -> None:
    aware, once = (llm.ask(QUESTION, BOOK, mode=mode, max_tokens=4) for mode in ("query_aware", "read_once"))
    assert (aware.mode, once.mode) == ("query_aware", "read_once")
    assert aware.usage.prompt_tokens > once.usage.prompt_tokens
    with llm.read(BOOK) as memory:
        assert llm.ask(QUESTION, memory, mode="read_once", max_tokens=4).text == once.text
        for ask in (llm.ask, llm.stream):
            with pytest.raises(InvalidRequestError, match="read before; leave mode out"):
                ask(QUESTION, memory, mode="query_aware")
        for ask in (llm.ask, lambda *a, **k: list(llm.stream(*a, **k))):
            with pytest.raises(InvalidConfigError, match="'query-aware' is unknown; known are: query_aware, read_once"):
                ask(QUESTION, BOOK, mode="query-aware")


@pytest.mark.parametrize("policy", ["full", "qllm"])
def test_where_nothing_follows_the_documents_their_last_token_is_read_once(policy: str) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    llm = QLLM(tiny.model(), tokenizer, tiny.MEMORY.replace(policy=policy))
    short, long = (Document(text) for text in ("The cat sat there. The fox ran.", BOOK))
    asked = [Turn("user", (short,))]
    prompt = build_prompt(tokenizer, asked, query=None, mode="read_once")
    assert prompt.read_end == len(prompt.ids)
    (expected,) = llm.generate(prompt.ids.tolist(), max_tokens=8)
    assert list(llm.chat(asked, query="", max_tokens=8, reread=False).token_ids) == expected
    answer = llm.chat([Turn("user", ())], memory=llm.read(short), query="", max_tokens=8)
    assert list(answer.token_ids) == expected
    assert answer.sources
    assert llm.chat([Turn("user", (long,))], query="", max_tokens=1).reread is (policy == "qllm")


def test_an_upper_bound_takes_no_memory(llm: QLLM) -> None:
    for most in (10**8, 2**31 - 1):
        pieces = llm.stream(QUESTION, BOOK, max_tokens=most)
        assert next(pieces).text is not None
        pieces.close()
        assert free(llm)
    with pytest.raises(InvalidConfigError, match="max_tokens"):
        llm.ask(QUESTION, BOOK, max_tokens=10**24)


# ---------------------------------------------------------------------- stopping


def test_cancel_while_reading(llm: QLLM) -> None:
    cancel, seen = threading.Event(), []

    def progress(done: int, total: int) -> None:
        seen.append(done)
        cancel.set()

    for ask in (llm.ask, lambda *a, **k: list(llm.stream(*a, **k))):
        cancel.clear()
        seen.clear()
        with pytest.raises(CancelledError):
            ask(QUESTION, BOOK, progress=progress, cancel=cancel)
        assert len(seen) == 1
        assert free(llm)
    with pytest.raises(CancelledError):
        llm.read(BOOK, cancel=cancel)
    llm.ask(QUESTION, "Short.", max_tokens=1)


def test_cancel_while_writing(llm: QLLM) -> None:
    cancel = threading.Event()
    watch = Watch(lambda n: cancel.set() if n == 3 else None)
    with pytest.raises(CancelledError):
        llm.chat(turns(), logits_processors=[watch], cancel=cancel)
    assert watch.steps == [0, 1, 2, 3]
    cancel.clear()
    watch = Watch(lambda n: cancel.set() if n == 3 else None)
    with pytest.raises(CancelledError):
        list(llm.chat_stream(turns(), logits_processors=[watch], cancel=cancel))
    assert watch.steps == [0, 1, 2, 3]
    assert free(llm)


def test_cancel_while_waiting_for_the_model(llm: QLLM) -> None:
    cancel = threading.Event()
    with llm._inference.request(), ThreadPoolExecutor() as pool:
        waiting = pool.submit(llm.ask, QUESTION, BOOK, cancel=cancel)
        time.sleep(0.1)
        cancel.set()
        with pytest.raises(CancelledError, match="waiting"):
            waiting.result(20)


def test_closing_a_stream_stops_the_model(llm: QLLM) -> None:
    for end in (lambda stream: stream.close(), lambda stream: None):
        watch = Watch(lambda _: time.sleep(0.01))
        stream = llm.chat_stream(turns(), logits_processors=[watch])
        next(stream)
        end(stream)
        del stream  # dropping it is closing it
        gc.collect()
        assert free(llm)
        assert len(watch.steps) < 250


def test_an_abandoned_stream_blocks_nobody(llm: QLLM) -> None:
    stream = llm.stream(QUESTION, BOOK, max_tokens=30)
    first = next(stream)
    answer = llm.ask(QUESTION, BOOK, max_tokens=30)
    assert first.text + "".join(piece.text for piece in stream) == answer.text
    assert llm.stream(QUESTION, BOOK) is not None  # never begun


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("by zero"), InvalidRequestError("so"), KeyboardInterrupt()], ids=repr
)
def test_errors_reach_the_consumer_as_they_are(llm: QLLM, error: BaseException) -> None:
    def fail(*_: object) -> None:
        raise error

    for call in (
        lambda: list(llm.chat_stream(turns(), logits_processors=[Watch(fail)])),
        lambda: list(llm.chat_stream(turns(), progress=fail)),
        lambda: llm.chat(turns(), logits_processors=[Watch(fail)]),
    ):
        with pytest.raises(type(error)) as caught:
            call()
        assert caught.value is error
        assert free(llm)


def test_threads_do_not_disturb_each_other(llm: QLLM) -> None:
    memory = llm.read(BOOK)
    questions = [f"Who ran {i} times?" for i in range(8)]

    def work(question: str) -> tuple[str, ...]:
        first = llm.ask(question, BOOK[: 60 + len(question)], max_tokens=4)
        second = "".join(piece.text for piece in llm.stream(question, memory, max_tokens=4))
        return first.text, second, llm.ask(question, memory, max_tokens=3, temperature=1.0, seed=7).text

    expected = [work(question) for question in questions]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, questions)) == expected


def test_two_engines_over_one_model_wait_for_each_other(llm: QLLM) -> None:
    other = QLLM(llm.model, llm.tokenizer, tiny.MEMORY.replace(policy="streaming"))
    expected = [each.ask(QUESTION, BOOK, max_tokens=8).text for each in (llm, other)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(each.ask, QUESTION, BOOK, max_tokens=8) for each in (llm, other) * 3]
        assert [job.result().text for job in jobs] == expected * 3


# ---------------------------------------------------------------------- memories


def same(a: Answer, b: Answer) -> bool:
    places = [[(s.document, s.start, s.end, s.text) for s in x.sources] for x in (a, b)]
    scores = [[s.score for s in x.sources] for x in (a, b)]
    # sums over buffers of another length differ in their last digits
    return (a.text, a.token_ids, places[0]) == (b.text, b.token_ids, places[1]) and scores[0] == pytest.approx(
        scores[1], rel=1e-4
    )


@pytest.mark.parametrize("policy", ["qllm", "infllm", "streaming", "full"])
def test_asking_a_memory_equals_reading_once(llm: QLLM, policy: str) -> None:
    llm = QLLM(llm.model, llm.tokenizer, tiny.MEMORY.replace(policy=policy))
    documents = [Document(BOOK, "cats"), Document("Second. " * 20)]
    with llm.read(documents, system="Be brief.") as memory:
        assert memory.n_tokens > 0
        size = memory.nbytes
        for question in (QUESTION, "What?", QUESTION):
            expected = llm.ask(question, documents, system="Be brief.", mode="read_once", max_tokens=10)
            answer = llm.ask(question, memory, system="Be brief.", max_tokens=10)
            assert same(answer, expected)
            assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
            assert answer.usage.cache_read_tokens == memory.n_tokens
            assert same(llm.ask(question, memory, max_tokens=10), expected)
            assert memory.nbytes == size
    assert memory.closed
    assert memory.nbytes == 0


def test_many_questions_cost_no_memory(llm: QLLM) -> None:
    memory = llm.read(BOOK)

    def living() -> int:
        gc.collect()
        return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())

    llm.ask(QUESTION, memory, max_tokens=3)
    before = living()
    for _ in range(5):
        llm.ask(QUESTION, memory, max_tokens=3)
    assert living() <= before + 2


def test_caches_are_freed_at_once(llm: QLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values do not wait for the garbage collector, which a GPU that runs out of memory does not call."""
    caches: weakref.WeakSet[MemoryCache] = weakref.WeakSet()
    made = MemoryCache.__init__

    def noted(cache: MemoryCache, *args: Any) -> None:
        made(cache, *args)
        caches.add(cache)

    monkeypatch.setattr(MemoryCache, "__init__", noted)
    gc.collect()
    gc.disable()
    try:
        llm.ask(QUESTION, BOOK, max_tokens=3)
        list(llm.stream(QUESTION, BOOK, max_tokens=3))
        stream = llm.stream(QUESTION, BOOK, max_tokens=3)
        next(stream)
        stream.close()
        assert free(llm)
        until = time.monotonic() + 20
        while caches and time.monotonic() < until:  # the thread that was left lets go of the model first
            time.sleep(0.01)
        assert not caches
        memory = llm.read(BOOK)
        llm.ask(QUESTION, memory, max_tokens=3)
        assert len(caches) == 1
        memory.close()
        assert not caches
    finally:
        gc.enable()


def test_reading_on(llm: QLLM) -> None:
    first = llm.read("One. " * 30)
    answer = llm.ask(QUESTION, first, max_tokens=6)
    both = llm.read(["Two. " * 30], after=first)
    assert [d.text[:3] for d in both.documents] == ["One", "Two"]
    assert both.n_tokens > first.n_tokens
    assert llm.ask(QUESTION, both, max_tokens=6).usage.cache_read_tokens == both.n_tokens
    assert same(llm.ask(QUESTION, first, max_tokens=6), answer)
    first.close()
    assert llm.ask(QUESTION, both, max_tokens=6).text


def test_system_texts_and_memories(llm: QLLM) -> None:
    plain, brief = llm.read(BOOK), llm.read(BOOK, system="Be brief.")
    with pytest.raises(InvalidRequestError, match="system"):
        llm.ask(QUESTION, brief, system="Be long.")
    late = llm.ask(QUESTION, plain, system="Be brief.", max_tokens=3)  # behind the documents
    assert late.usage.prompt_tokens > llm.ask(QUESTION, plain, max_tokens=3).usage.prompt_tokens
    with pytest.raises(InvalidRequestError, match="user turn"):
        llm.chat([Turn("system", ("Be brief.",))], memory=plain)
    with pytest.raises(InvalidRequestError, match="as they were read"):
        llm.chat([Turn("assistant", ("Hello.",)), Turn("user", (QUESTION,))], memory=plain)
    with pytest.raises(InvalidRequestError, match="another model"):
        QLLM(tiny.model(1), llm.tokenizer).ask(QUESTION, plain)


def test_conversations(llm: QLLM) -> None:
    history = [Turn("user", ("Who sat?",)), Turn("assistant", ("The cat.",))]
    memory = llm.read(BOOK)
    expected = llm.ask(QUESTION, BOOK, history=history, mode="read_once", max_tokens=6)
    assert same(llm.ask(QUESTION, memory, history=history, max_tokens=6), expected)


# ---------------------------------------------------------------------- life and errors


def test_closing(llm: QLLM) -> None:
    mine = QLLM(llm.model, llm.tokenizer, tiny.MEMORY)
    memory = mine.read(BOOK)
    other = mine.read(BOOK)
    memory.close()
    memory.close()
    with pytest.raises(ClosedError, match=memory.id):
        mine.ask(QUESTION, memory)
    mine.close()
    mine.close()
    for call in (
        lambda: mine.ask(QUESTION, BOOK),
        lambda: list(mine.stream(QUESTION, BOOK)),
        lambda: mine.ask(QUESTION, other),
        lambda: mine.read(BOOK),
        lambda: mine.generate([5, 6]),
        lambda: mine.count_tokens("a"),
        lambda: mine.model,
    ):
        with pytest.raises(ClosedError):
            call()
    assert len(llm.ask(QUESTION, other, max_tokens=2).token_ids) == 2  # the model itself lives on


def test_nothing_keeps_a_closed_model_alive() -> None:
    model = tiny.model()
    gone = weakref.ref(model)
    llm = QLLM(model, tiny.tokenizer(), tiny.MEMORY)
    memory = llm.read(BOOK)
    list(llm.stream(QUESTION, memory, max_tokens=3))
    memory.close()
    llm.close()
    del model
    gc.collect()
    assert gone() is None


def test_a_window_beyond_the_trained_length_is_refused(llm: QLLM) -> None:
    wide = llm.memory.replace(n_local=513)
    with pytest.raises(InvalidConfigError, match="512 tokens"):
        QLLM(llm.model, llm.tokenizer, wide)
    before = llm.memory
    with pytest.raises(InvalidConfigError, match="lower n_local"):
        llm.memory = wide
    with pytest.raises(InvalidConfigError, match=r"n_init=513 exceeds the 512 tokens.*lower n_init"):
        llm.memory = before.replace(n_init=513)
    assert llm.memory is before


def test_sizes_that_were_not_given_fit_the_model(llm: QLLM) -> None:
    fit = MemoryConfig.for_model(512)
    assert QLLM(llm.model, llm.tokenizer).memory == QLLM(llm.model, llm.tokenizer, MemoryConfig()).memory == fit
    assert QLLM(llm.model, llm.tokenizer, MemoryConfig(policy="full")).memory == fit.replace(policy="full")
    wide = MemoryConfig(policy="full", n_local=1024)  # it has no window
    assert QLLM(llm.model, llm.tokenizer, wide).memory.n_local == 1024


def test_bad_requests(llm: QLLM) -> None:
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (InvalidRequestError, "question is empty", lambda: llm.ask(" \n", BOOK)),
        (InvalidRequestError, "No document", lambda: llm.ask(QUESTION)),
        (DocumentError, "No document", lambda: llm.ask(QUESTION, [])),
        (DocumentError, "no text", lambda: llm.ask(QUESTION, "")),
        (
            DocumentError,
            r"Document 2 \(blank\) has no text",
            lambda: llm.ask(QUESTION, [BOOK, Document("\ufeff ", "blank")]),
        ),
        (
            DocumentError,
            "Document 2 .*blank.* is empty",
            lambda: llm.chat([Turn("user", (Document("x"), Document(" ", "blank")))]),
        ),
        (DocumentError, "bytes", lambda: llm.ask(QUESTION, [b"text"])),
        (DocumentError, "no text", lambda: llm.read("  ")),
        (DocumentError, "No document", lambda: llm.read([])),
        (ContextOverflowError, "n_local", lambda: llm.ask("Who? " * 20, BOOK)),
        (InvalidConfigError, "max_tokens", lambda: llm.ask(QUESTION, BOOK, max_tokens=0)),
        (InvalidConfigError, "beams", lambda: llm.ask(QUESTION, BOOK, beams=3)),
        (InvalidConfigError, "tools", lambda: llm.generate([1, 2], tools=[])),
        (InvalidConfigError, "temperature", lambda: llm.stream(QUESTION, BOOK, temperature=-1)),
        (InvalidRequestError, "conversation is empty", lambda: llm.chat([])),
        (InvalidRequestError, "sequence of Turns", lambda: llm.chat("Who?")),  # type: ignore[arg-type]
        (InvalidRequestError, "question is of type NoneType", lambda: llm.ask(None, BOOK)),  # type: ignore[arg-type]
        (InvalidRequestError, "a DocumentMemory", lambda: llm.chat([Turn("user", "?")], memory=tiny.MEMORY)),
        *[
            (InvalidRequestError, f"{name}= is of type", partial(llm.ask, QUESTION, BOOK, **{name: value}))
            for name, value in {"sampling": {"max_tokens": 3}, "reread": 1, "progress": 3, "cancel": True}.items()
        ],
        *[
            (InvalidRequestError, f"{name}= is of type", partial(llm.chat, [Turn("user", "?")], **{name: value}))
            for name, value in {"tools": {"name": "add"}, "logits_processors": 3, "template_kwargs": "x"}.items()
        ],
        (InvalidConfigError, "no tokenizer", lambda: QLLM(llm.model).ask(QUESTION, BOOK)),
        (
            InvalidRequestError,
            "do not match",
            lambda: QLLM(tiny.model(vocab_size=263), llm.tokenizer).ask(QUESTION, BOOK),
        ),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
        assert free(llm)
    assert llm.ask(QUESTION, BOOK, max_tokens=1).token_ids


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
    ids=repr,
)
def test_out_of_memory_names_the_knobs(llm: QLLM, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    expected = llm.ask(QUESTION, BOOK, max_tokens=3).text
    with monkeypatch.context() as patch:
        patch.setattr(llm.model.model.layers[1].mlp, "forward", broken)
        for call in (
            lambda: llm.ask(QUESTION, BOOK),
            lambda: llm.read(BOOK),
            lambda: list(llm.stream(QUESTION, BOOK)),
            lambda: llm.generate([5, 6]),
            lambda: QLLM(tiny_with(broken)).generate([5, 6]),  # on first use, while the model is examined
        ):
            with pytest.raises(OutOfMemoryError, match="chunk_size"):
                call()
    assert llm.ask(QUESTION, BOOK, max_tokens=3).text == expected


def test_out_of_memory_in_a_callback_is_no_cause_of_itself(llm: QLLM) -> None:
    def progress(*_: int) -> None:
        raise OutOfMemoryError("mine")

    with pytest.raises(OutOfMemoryError, match="mine") as caught:
        llm.read(BOOK, progress=progress)
    assert caught.value.__cause__ is None


def test_a_bad_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    backend.cache_clear()
    monkeypatch.setenv("QLLM_KERNELS", "cuda")
    with pytest.raises(InvalidConfigError, match="QLLM_KERNELS='cuda' is unknown"):
        QLLM(tiny.model()).generate([5, 6])
    monkeypatch.delenv("QLLM_KERNELS")
    assert QLLM(tiny.model()).generate([5, 6], max_tokens=1)


def tiny_with(forward: Callable[..., None]) -> Any:
    model = tiny.model()
    model.model.layers[1].mlp.forward = forward
    return model


@pytest.mark.parametrize(
    ("kind", "message", "settings"),
    [
        (ModelNotFoundError, "no/such/folder", {"model": "./no/such/folder"}),
        (InvalidConfigError, "dtype", {"dtype": "float7"}),
        (InvalidConfigError, "device", {"device": "abacus"}),
        (InvalidConfigError, "device", {"device": "cuda:99"}),
        (InvalidConfigError, "device", {"device": "meta"}),
    ],
    ids=str,
)
def test_bad_ways_to_load(kind: type[Exception], message: str, settings: dict[str, str]) -> None:
    with pytest.raises(kind, match=message):
        QLLM.from_pretrained(**settings)


def test_broken_folders(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(UnsupportedModelError, match="unheard_of"):
        QLLM.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelNotFoundError):
        QLLM.from_pretrained(str(tmp_path))
    tiny.tokenizer().save_pretrained(tmp_path)
    tiny.model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(ModelNotFoundError):
        QLLM.from_pretrained(str(tmp_path))


def test_weights_are_shared(tmp_path: Any) -> None:
    tiny.tokenizer().save_pretrained(tmp_path)
    tiny.model().save_pretrained(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        engines = list(pool.map(lambda _: QLLM.from_pretrained(tmp_path, memory=tiny.MEMORY), range(4)))
    assert len({id(each.model) for each in engines}) == 1
    memory = engines[0].read(BOOK)
    assert engines[1].ask(QUESTION, memory, max_tokens=2).token_ids
    gone = weakref.ref(engines[0].model)
    memory.close()
    for engine in engines:
        engine.close()
    gc.collect()
    assert gone() is None


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, qllm_runtime; heavy = {'torch', 'transformers', 'numpy', 'pydantic'}\n"
        "assert not heavy & set(sys.modules); assert set(qllm_runtime.__all__) <= set(dir(qllm_runtime))\n"
        "qllm_runtime.Document, qllm_runtime.QLLMError; assert not heavy & set(sys.modules)\n"
        "from qllm_runtime import *; assert QLLM.ask and MemoryConfig().topk and DocumentMemory"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_stream_is_an_iterator(llm: QLLM) -> None:
    stream: Iterator[Piece] = llm.stream(QUESTION, BOOK, max_tokens=2)
    assert iter(stream) is stream
