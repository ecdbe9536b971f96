"""An engine without a model: fixed answers, measured steps, chosen failures, and a record of what it was asked.

It keeps the contract of `qllm_runtime.engine.QLLM` and lays prompts out with the real `build_prompt`, so that tests of
the framework layers can look at token spans, slow readings, cancellation and errors without waiting for a model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import ishmael
import torch

from qllm_runtime.config import MemoryConfig
from qllm_runtime.errors import CancelledError, ClosedError
from qllm_runtime.prompt import build_prompt
from qllm_runtime.types import Answer, Document, Piece, Sampling, Source, Timings, TokenLogprob, Turn, Usage


@dataclass
class FakeMemory:
    id: str
    documents: tuple[Document, ...]
    system: str | None
    n_tokens: int
    nbytes: int = 0
    closed: bool = False

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeEngine:
    """Says `reply`, reading in `n_chunks` steps of `step` seconds; raises `error` after so many tokens."""

    reply: str = ishmael.REPLY
    n_chunks: int = 1
    step: float = 0.0
    error: BaseException | None = None
    error_after: int | None = None
    name: str = "fake"
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    context_window: int = 4 * 1_048_576

    def __post_init__(self) -> None:
        self.tokenizer = ishmael.tokenizer()
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=len(self.tokenizer)))
        self.model = SimpleNamespace(
            config=config,
            generation_config=SimpleNamespace(eos_token_id=self.tokenizer.eos_token_id),
            get_output_embeddings=lambda: None,
        )
        self.calls: list[dict[str, Any]] = []
        self.running = 0
        self.n_generated = 0
        self.n_read = 0
        self.closed = False
        self._lock = threading.Lock()

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
        kept = tuple(Document(item) if isinstance(item, str) else item for item in documents)
        self._read(progress, cancel or threading.Event())
        return FakeMemory(f"mem-{id(kept):x}", kept, system, sum(len(document.text) for document in kept))

    def chat(self, turns: Sequence[Turn], **options: Any) -> Answer:
        answer = None
        for piece in self.chat_stream(turns, **options):
            answer = piece.answer or answer
        assert answer is not None
        return answer

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
        if self.closed:
            raise ClosedError("closed")
        sampling, cancel = sampling or Sampling(), cancel or threading.Event()
        prompt = build_prompt(
            self.tokenizer,
            turns,
            query=query or None,
            mode=mode or "read_once",
            tools=tools,
            template_kwargs=template_kwargs,
        )
        self.calls.append(
            {
                "turns": tuple(turns),
                "query": query,
                "prompt": prompt,
                "memory": memory,
                "sampling": sampling,
                "tools": tools,
                "mode": mode,
            }
        )
        with self._lock:
            self.running += 1
            try:
                self._read(progress, cancel)
                text, ids, logprobs = "", [], []
                for token in self._tokens(list(logits_processors), sampling.max_tokens):
                    if cancel.is_set():
                        raise CancelledError("cancelled")
                    if self.error and self.error_after == len(ids):
                        raise self.error
                    time.sleep(self.step)
                    self.n_generated += 1
                    ids.append(token)
                    whole = self.tokenizer.decode(ids)
                    whole = whole.rstrip("\ufffd")
                    stop = min((whole.find(s) for s in sampling.stop if s in whole), default=-1)
                    end = (
                        stop
                        if stop >= 0
                        else len(whole)
                        - max((n for s in sampling.stop for n in range(1, len(s)) if whole.endswith(s[:n])), default=0)
                    )
                    logprob = TokenLogprob(
                        self.tokenizer.decode([token]),
                        token,
                        -0.5,
                        ((self.tokenizer.decode([token]), token, -0.5),) * (sampling.logprobs or 0),
                    )
                    new = (logprob,) if sampling.logprobs is not None else ()
                    logprobs += new
                    if end > len(text) or new:
                        piece, text = whole[len(text) : end], whole[: max(end, len(text))]
                        yield Piece(piece, logprobs=new)
                    if stop >= 0:
                        break
                else:
                    rest, text = self.tokenizer.decode(ids)[len(text) :], self.tokenizer.decode(ids)
                    if rest:
                        yield Piece(rest)
                yield Piece(
                    "",
                    answer=self._answer(
                        turns, query, query_source, memory, mode, prompt, text, ids, sampling, logprobs
                    ),
                )
            finally:
                self.running -= 1

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

    def _tokens(self, processors: list[Any], max_tokens: int) -> Iterator[int]:
        reply = [*self.tokenizer.encode(self.reply, add_special_tokens=False), self.tokenizer.eos_token_id]
        ids: list[int] = []
        position = 0
        for _ in range(max_tokens):
            scores = torch.zeros(1, len(self.tokenizer))
            scores[0, reply[min(position, len(reply) - 1)]] = 10.0
            for processor in processors:
                scores = processor(torch.tensor([ids], dtype=torch.long), scores)
            token = int(scores.argmax())
            position = position + 1 if token == reply[min(position, len(reply) - 1)] else 0
            if token == self.tokenizer.eos_token_id:
                return
            ids.append(token)
            yield token

    def _answer(
        self,
        turns: Any,
        query: Any,
        query_source: Any,
        memory: Any,
        mode: Any,
        prompt: Any,
        text: str,
        ids: Any,
        sampling: Sampling,
        logprobs: Any,
    ) -> Answer:
        documents = (
            *(memory.documents if memory else ()),
            *(document for turn in turns for document in turn.documents),
        )
        sources = tuple(
            Source(i, document.title, min(3, len(document.text)), min(12, len(document.text)), 0.5, document.text[3:12])
            for i, document in enumerate(documents)
        )
        cached = memory.n_tokens if memory else 0
        return Answer(
            text,
            sources,
            Usage(len(prompt.ids) + cached, len(ids), cached),
            Timings(total_s=0.1),
            "length" if len(ids) >= sampling.max_tokens else "stop",
            query or "",
            query_source if query else "none",
            mode or "read_once",
            tuple(ids),
            tuple(logprobs) if sampling.logprobs is not None else None,
        )

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def count_prompt_tokens(
        self, turns: Sequence[Turn], *, tools: Any = None, template_kwargs: Any = None, memory: Any = None
    ) -> int:
        prompt = build_prompt(
            self.tokenizer, turns, query=None, mode="read_once", tools=tools, template_kwargs=template_kwargs
        )
        return len(prompt.ids) + (memory.n_tokens if memory else 0)

    def close(self) -> None:
        self.closed = True
