"""An engine that answers from a script, one byte per token, with the real interface: for tests that are about "
"translation."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from qllm_runtime.config import MemoryConfig
from qllm_runtime.errors import CancelledError, ClosedError
from qllm_runtime.types import Answer, Document, Piece, Sampling, Source, Turn, Usage
from tests.integrations.byte_llama import byte_tokenizer

Script = Callable[[str, Sequence[Document]], str]


class FakeMemory:
    def __init__(
        self, documents: Sequence[Document], system: str | None, template_kwargs: dict[str, Any] | None = None
    ) -> None:
        self.template_kwargs = template_kwargs or {}
        self.id = f"memory-{id(self):x}"
        self.documents = tuple(documents)
        self.system = system
        self.n_tokens = sum(len(document.text) for document in documents)
        self.nbytes = 0
        self.closed = False

    def close(self) -> None:
        self.closed = True


class FakeEngine:
    """Records every request. Looks up the sentences that hold a word of the query of at least five letters."""

    name = "fake"
    context_window = 4 * 1_048_576

    def __init__(self, script: Script | str = "Hello there.", delay: float = 0.0) -> None:
        self.script: Script = script if callable(script) else lambda query, documents: str(script)
        self.delay = delay
        self.memory = MemoryConfig()
        self.tokenizer = byte_tokenizer(("<s>", "<|end|>"))
        weight = torch.zeros(len(self.tokenizer), 1)
        self.model = SimpleNamespace(
            generation_config=SimpleNamespace(eos_token_id=self.tokenizer.eos_token_id),
            config=SimpleNamespace(get_text_config=SimpleNamespace),
            get_output_embeddings=lambda: SimpleNamespace(weight=weight),
        )
        self.requests: list[dict[str, Any]] = []
        self.readings: list[FakeMemory] = []
        self.read_texts: list[str] = []
        self.tokens_written = 0
        self.closed = False
        self._lock = threading.Lock()

    def count_tokens(self, text: str) -> int:
        return len(text.encode())

    def close(self) -> None:
        self.closed = True

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
        memory = FakeMemory([*(after.documents if after else ()), *new], system, template_kwargs)
        self.readings.append(memory)
        if progress:
            progress(memory.n_tokens, memory.n_tokens)
        return memory

    def chat(self, turns: Sequence[Turn], **arguments: Any) -> Answer:
        return list(self.chat_stream(turns, **arguments))[-1].answer

    def chat_stream(
        self, turns: Sequence[Turn], *, cancel: threading.Event | None = None, **arguments: Any
    ) -> Iterator[Piece]:
        if self.closed:
            raise ClosedError("closed")
        self.requests.append({"turns": tuple(turns), **arguments})
        with self._lock:
            yield from self._write(turns, cancel or threading.Event(), **arguments)

    def _write(
        self,
        turns: Sequence[Turn],
        cancel: threading.Event,
        *,
        query: str | None = None,
        query_source: str = "explicit",
        memory: FakeMemory | None = None,
        mode: str | None = None,
        reread: bool = True,
        sampling: Sampling | None = None,
        logits_processors: Sequence[Any] = (),
        **_: Any,
    ) -> Iterator[Piece]:
        sampling = sampling or Sampling()
        documents = [*(memory.documents if memory else ()), *(d for turn in turns for d in turn.documents)]
        script = [*self.tokenizer.encode(self.script(query or "", documents)), self.tokenizer.eos_token_id]
        ids: list[int] = []
        text, reason = "", "length"
        while len(ids) < sampling.max_tokens:
            if cancel.is_set():
                raise CancelledError("cancelled")
            time.sleep(self.delay)
            scores = torch.zeros(1, len(self.tokenizer))
            scores[0, script[len(ids)] if len(ids) < len(script) else self.tokenizer.eos_token_id] = 10.0
            for processor in logits_processors:
                scores = processor(torch.tensor([ids], dtype=torch.long).reshape(1, -1), scores)
            token = int(scores.argmax())
            if token == self.tokenizer.eos_token_id:
                reason = "stop"
                break
            ids.append(token)
            self.tokens_written += 1
            whole = self.tokenizer.decode(ids)
            cut = [whole.index(stop) for stop in sampling.stop if stop in whole]
            if cut:
                whole, reason = whole[: min(cut)], "stop"
            if (
                not any(whole.endswith(stop[:n]) for stop in sampling.stop for n in range(1, len(stop)))
                and "�" not in whole[-1:]
            ):
                if len(whole) > len(text):
                    yield Piece(whole[len(text) :])
                text = whole
            if cut:
                break
        whole = self.tokenizer.decode(ids)
        cut = [whole.index(stop) for stop in sampling.stop if stop in whole]
        whole = whole[: min(cut)] if cut else whole
        held = memory.n_tokens if memory else 0
        prompt = sum(len(turn.text) for turn in turns) + sum(len(d.text) for d in documents)
        yield Piece(
            whole[len(text) :],
            Answer(
                text=whole,
                sources=tuple(_look_up(query or "", documents)),
                usage=Usage(prompt, len(ids), cache_read_tokens=held),
                finish_reason=reason,
                query=query or "",
                query_source=query_source,
                mode="read_once" if memory else mode or "read_once",
                token_ids=tuple(ids),
            ),
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
        document = documents[number]
        yield Source(number, document.title, start, end, hits / total, document.text[start:end])
