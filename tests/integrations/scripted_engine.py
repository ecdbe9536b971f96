"""An engine without a model, with the interface of `qllm_runtime.engine.QLLM`: it writes what a script says.

What both integrations' tests share: writing token by token under grammars, stop strings and cancellation, and answers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch

from qllm_runtime.config import MemoryConfig
from qllm_runtime.decoding import TextStream
from qllm_runtime.errors import CancelledError, ClosedError
from qllm_runtime.types import Answer, Document, Piece, Sampling, Source, Timings, TokenLogprob, Turn, Usage


@dataclass(eq=False)
class FakeMemory:
    """What was read."""

    documents: tuple[Document, ...]
    system: str | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    nbytes: int = 0
    closed: bool = False

    @property
    def id(self) -> str:
        return f"memory-{id(self):x}"

    @property
    def n_tokens(self) -> int:
        return sum(len(document.text) for document in self.documents)

    def close(self) -> None:
        self.closed = True


class ScriptedEngine:
    """Records every request in `requests`; one answer at a time.

    Attributes:
        restarts: Whether the script begins anew wherever a grammar wanted another token; else it goes on.
    """

    restarts = False
    context_window = 4 * 1_048_576

    def __init__(self, tokenizer: Any, *, step: float = 0.0, name: str = "fake", memory: MemoryConfig | None = None):
        self.tokenizer = tokenizer
        self.step = step
        self.name = name
        self.memory = memory or MemoryConfig()
        self.model = SimpleNamespace(
            config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=len(tokenizer))),
            generation_config=SimpleNamespace(eos_token_id=tokenizer.eos_token_id),
            get_output_embeddings=lambda: None,
        )
        self.requests: list[dict[str, Any]] = []
        self.tokens_written = 0
        self.closed = False
        self._lock = threading.Lock()

    def close(self) -> None:
        self.closed = True

    def check_open(self) -> None:
        if self.closed:
            raise ClosedError("closed")

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def chat(self, turns: Sequence[Turn], **options: Any) -> Answer:
        *_, last = self.chat_stream(turns, **options)
        assert last.answer is not None
        return last.answer

    def chat_stream(self, turns: Sequence[Turn], **options: Any) -> Iterator[Piece]:
        raise NotImplementedError

    def tick(self, n_written: int) -> None:
        """Called ahead of every token."""
        time.sleep(self.step)

    def write(
        self,
        script: str,
        *,
        sampling: Sampling,
        processors: Iterable[Any],
        cancel: threading.Event,
        answer: dict[str, Any],
        usage: Usage,
    ) -> Iterator[Piece]:
        """Write `script` as far as everybody lets it; `answer` and `usage` are what else the answer says."""
        wanted = [*self.tokenizer.encode(script, add_special_tokens=False), self.tokenizer.eos_token_id]
        stream, ids, position = TextStream(self.tokenizer, sampling.stop), list[int](), 0
        text, reason = "", "length"
        logprobs: list[TokenLogprob] = []
        while len(ids) < sampling.max_tokens:
            if cancel.is_set():
                raise CancelledError("cancelled")
            self.tick(len(ids))
            scores = torch.zeros(1, len(self.tokenizer))
            scores[0, wanted[min(position, len(wanted) - 1)]] = 10.0
            for processor in processors:
                scores = processor(torch.tensor([ids], dtype=torch.long), scores)
            token = int(scores.argmax())
            follows = not self.restarts or token == wanted[min(position, len(wanted) - 1)]
            position = position + 1 if follows else 0
            if token == self.tokenizer.eos_token_id:
                reason = "stop"
                break
            ids.append(token)
            self.tokens_written += 1
            new: tuple[TokenLogprob, ...] = ()
            if sampling.logprobs is not None:
                one = self.tokenizer.decode([token])
                new = (TokenLogprob(one, token, -0.5, ((one, token, -0.5),) * sampling.logprobs),)
                logprobs += new
            if (piece := stream.push(token)) or new:
                text += piece
                yield Piece(piece, logprobs=new)
            if stream.stopped:
                reason = "stop"
                break
        if rest := stream.finish():
            text += rest
            yield Piece(rest)
        yield Piece(
            "",
            Answer(
                text=text,
                usage=replace(usage, completion_tokens=len(ids)),
                timings=Timings(total_s=0.1),
                finish_reason=reason,
                token_ids=tuple(ids),
                logprobs=tuple(logprobs) if sampling.logprobs is not None else None,
                **answer,
            ),
        )


def documents_of(memory: FakeMemory | None, turns: Sequence[Turn]) -> list[Document]:
    """All documents of a request: those of the memory first."""
    return [*(memory.documents if memory else ()), *(document for turn in turns for document in turn.documents)]


def source(number: int, document: Document, start: int, end: int, score: float) -> Source:
    """A passage of a document."""
    return Source(number, document.title, start, end, score, document.text[start:end])


def thoughtful(engine: Any, thought: str, tokens: int) -> Any:
    """The engine with a thought ahead of every answer, in two pieces."""
    answer = engine.chat_stream

    def think(turns: Any, **options: Any) -> Iterator[Piece]:
        half = thought.index(" ")
        yield from (Piece("", reasoning=thought[:half]), Piece("", reasoning=thought[half:]))
        for piece in answer(turns, **options):
            if piece.answer is not None:
                usage = replace(piece.answer.usage, reasoning_tokens=tokens)
                piece = replace(piece, answer=replace(piece.answer, reasoning=thought, usage=usage))
            yield piece

    engine.chat_stream = think
    return engine
