"""The scripted engine with fixed answers, measured steps and chosen failures.

It lays prompts out with the real `build_prompt`, so that tests can look at token spans, slow readings, cancellation and
errors without waiting for a model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import ishmael

from qllm_runtime.errors import CancelledError
from qllm_runtime.prompt import build_prompt
from qllm_runtime.types import Document, Piece, Sampling, Turn, Usage
from tests.integrations.scripted_engine import FakeMemory, ScriptedEngine, documents_of, source

__all__ = ["FakeEngine", "FakeMemory"]


class FakeEngine(ScriptedEngine):
    """Says `reply`, reading in `n_chunks` steps of `step` seconds; raises `error` after so many tokens.

    It cites characters 3 to 12 of every document.
    """

    restarts = True

    def __init__(
        self,
        reply: str = ishmael.REPLY,
        *,
        n_chunks: int = 1,
        error: BaseException | None = None,
        error_after: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(ishmael.tokenizer(), **settings)
        self.reply = reply
        self.n_chunks = n_chunks
        self.error = error
        self.error_after = error_after
        self.running = 0
        self.n_read = 0

    def read(
        self,
        documents: Sequence[Document],
        *,
        system: str | None = None,
        template_kwargs: Any = None,
        progress: Any = None,
        cancel: Any = None,
    ) -> FakeMemory:
        if isinstance(documents, str | Document):
            documents = [documents]
        self._read(progress, cancel or threading.Event())
        return FakeMemory(tuple(Document(item) if isinstance(item, str) else item for item in documents), system)

    def chat_stream(
        self,
        turns: Sequence[Turn],
        *,
        query: str | None = None,
        query_source: Any = "explicit",
        memory: FakeMemory | None = None,
        mode: Any = None,
        reread: bool = True,
        sampling: Sampling | None = None,
        tools: Any = None,
        logits_processors: Any = (),
        template_kwargs: Any = None,
        progress: Any = None,
        cancel: threading.Event | None = None,
    ) -> Iterator[Piece]:
        self.check_open()
        sampling, cancel = sampling or Sampling(), cancel or threading.Event()
        prompt = build_prompt(
            self.tokenizer,
            turns,
            query=query or None,
            mode=mode or "read_once",
            tools=tools,
            template_kwargs=template_kwargs,
        )
        request = {
            "query": query,
            "prompt": prompt,
            "memory": memory,
            "sampling": sampling,
            "tools": tools,
            "mode": mode,
        }
        self.requests.append({"turns": tuple(turns), **request})
        documents = documents_of(memory, turns)
        cached = memory.n_tokens if memory else 0
        answer = {
            "sources": tuple(
                source(i, document, min(3, len(document.text)), min(12, len(document.text)), 0.5)
                for i, document in enumerate(documents)
            ),
            "query": query or "",
            "query_source": query_source if query else "none",
            "mode": mode or "read_once",
        }
        with self._lock:
            self.running += 1
            try:
                self._read(progress, cancel)
                yield from self.write(
                    self.reply,
                    sampling=sampling,
                    processors=list(logits_processors),
                    cancel=cancel,
                    answer=answer,
                    usage=Usage(len(prompt.ids) + cached, 0, cache_read_tokens=cached),
                )
            finally:
                self.running -= 1

    def tick(self, n_written: int) -> None:
        if self.error and self.error_after == n_written:
            raise self.error
        super().tick(n_written)

    def _read(self, progress: Any, cancel: threading.Event) -> None:
        for chunk in range(self.n_chunks):
            if cancel.is_set():
                raise CancelledError("cancelled")
            if self.error and self.error_after is None:
                raise self.error
            time.sleep(self.step)
            self.n_read += 1
            if progress:
                progress(chunk + 1, self.n_chunks)

    def count_prompt_tokens(
        self, turns: Sequence[Turn], *, tools: Any = None, template_kwargs: Any = None, memory: Any = None
    ) -> int:
        prompt = build_prompt(
            self.tokenizer, turns, query=None, mode="read_once", tools=tools, template_kwargs=template_kwargs
        )
        return len(prompt.ids) + (memory.n_tokens if memory else 0)
