"""The scripted engine with answers that depend on the question, one byte per token: for tests that are about translation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from qllm_runtime.types import Document, Piece, Sampling, Source, Turn, Usage
from tests.integrations.byte_llama import byte_tokenizer
from tests.integrations.scripted_engine import FakeMemory, ScriptedEngine, documents_of, source

Script = Callable[[str, Sequence[Document]], str]


class FakeEngine(ScriptedEngine):
    """Looks up the sentences that hold a word of the query of at least five letters."""

    def __init__(self, script: Script | str = "Hello there.", **settings: Any) -> None:
        super().__init__(byte_tokenizer(("<s>", "<|end|>")), **settings)
        self.script: Script = script if callable(script) else lambda query, documents: str(script)
        self.readings: list[FakeMemory] = []
        self.read_texts: list[str] = []

    def read(
        self,
        documents: Any,
        *,
        system: str | None = None,
        template_kwargs: Any = None,
        after: Any = None,
        progress: Any = None,
        cancel: Any = None,
    ) -> FakeMemory:
        new = [d if isinstance(d, Document) else Document(d) for d in documents]
        self.read_texts += [document.text for document in new]
        memory = FakeMemory((*(after.documents if after else ()), *new), system, dict(template_kwargs or {}))
        self.readings.append(memory)
        if progress:
            progress(memory.n_tokens, memory.n_tokens)
        return memory

    def chat_stream(
        self, turns: Sequence[Turn], *, cancel: threading.Event | None = None, **arguments: Any
    ) -> Iterator[Piece]:
        self.check_open()
        self.requests.append({"turns": tuple(turns), **arguments})
        memory, query = arguments.get("memory"), arguments.get("query") or ""
        documents = documents_of(memory, turns)
        prompt = sum(len(turn.text) for turn in turns) + sum(len(document.text) for document in documents)
        with self._lock:
            yield from self.write(
                self.script(query, documents),
                sampling=arguments.get("sampling") or Sampling(),
                processors=arguments.get("logits_processors", ()),
                cancel=cancel or threading.Event(),
                answer={
                    "sources": tuple(_look_up(query, documents)),
                    "query": query,
                    "query_source": arguments.get("query_source", "explicit"),
                    "mode": "read_once" if memory else arguments.get("mode") or "read_once",
                },
                usage=Usage(prompt, 0, cache_read_tokens=memory.n_tokens if memory else 0),
            )


def _look_up(query: str, documents: Sequence[Document]) -> Iterator[Source]:
    words = {word.strip("?.,").lower() for word in query.split() if len(word) > 5}
    found = []
    for number, document in enumerate(documents if words else ()):
        position = 0
        for sentence in document.text.split(". "):
            hits = len(words & {word.strip("?.,").lower() for word in sentence.split()})
            if hits:
                found.append((hits, number, position, position + len(sentence)))
            position += len(sentence) + 2
    total = sum(hit[0] for hit in found)
    for hits, number, start, end in sorted(found, key=lambda hit: -hit[0])[:3]:
        yield source(number, documents[number], start, end, hits / total)
