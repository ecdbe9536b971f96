"""One request: everything the engine is asked for, prepared from messages and options."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from langchain_core.messages import AIMessage, AIMessageChunk

from qllm_integrations.langchain import outputs
from qllm_integrations.langchain.messages import Request
from qllm_integrations.langchain.progress import Reporter
from qllm_integrations.langchain.structured import unreadable
from qllm_runtime import toolcalls
from qllm_runtime.errors import CancelledError
from qllm_runtime.guidance import guiding
from qllm_runtime.types import Answer, Document, Mode, Piece, Progress, Sampling, TokenLogprob

if TYPE_CHECKING:
    from transformers import LogitsProcessor

    from qllm_runtime.document_memory import DocumentMemory
    from qllm_runtime.engine import QLLM

M = TypeVar("M", bound=AIMessage)


@dataclass
class Call:
    """A prepared request.

    Attributes:
        engine: Who answers.
        tokenizer: The engine's; counts the question even if the engine was closed meanwhile.
        model: Its name, as reported in the metadata.
        request: What is asked.
        sampling, mode, reread, template_kwargs, progress: Handed to the engine.
        memory: Document memory the request is asked of.
        creates_memory: Whether it was made for this very request.
        tools: Tools the model is shown, or None.
        needs_call: Whether an answer without a whole call is an error.
        processors: Grammar of the answer, if it has one.
        reporter: Whom `progress` tells besides; waited for ahead of the answer.
        timeout: Seconds until the request is given up.
        cancel: Set to give the request up.
        attach: Finds or reads the document memory that the call is asked of; reading counts towards `timeout`.
    """

    engine: QLLM
    tokenizer: Any
    model: str
    request: Request
    sampling: Sampling
    mode: Mode | None = None
    reread: bool = True
    template_kwargs: Mapping[str, Any] | None = None
    progress: Progress | None = None
    memory: DocumentMemory | None = None
    creates_memory: bool = False
    tools: Sequence[dict[str, Any]] | None = None
    needs_call: bool = False
    processors: Sequence[LogitsProcessor] = ()
    reporter: Reporter = field(default_factory=Reporter)
    timeout: float | None = None
    cancel: threading.Event = field(default_factory=threading.Event)
    attach: Callable[[Call], None] = lambda _: None

    def answer(self) -> AIMessage:
        """The whole answer as a message.

        Raises:
            OutputParserException: A forced tool call was cut off.
        """
        with self._time_limit(), self.reporter.telling(self.cancel):
            self.attach(self)
            answer = self.engine.chat(**self._arguments())
        message = outputs.to_message(answer, self._names(), **self._fields(answer))
        self._check_call(answer, bool(message.tool_calls))
        return message if message.content else _uncited(message)

    def chunks(self) -> Iterator[AIMessageChunk]:
        """The answer piece by piece; the last chunk carries usage, citations and metadata.

        Leaving early stops the engine.

        Raises:
            OutputParserException: A forced tool call was cut off.
        """
        splitter = toolcalls.CallSplitter(names) if (names := self._names()) is not None else None
        n_calls, spoken, called, answer = 0, False, False, None
        unsent: list[TokenLogprob] = []
        with self._time_limit(), self.reporter.telling(self.cancel):
            self.attach(self)
            pieces = self.engine.chat_stream(**self._arguments())
            try:
                for piece in pieces:
                    self.reporter.settle()
                    unsent += piece.logprobs
                    answer = piece.answer or answer
                    if piece.reasoning:
                        yield outputs.to_thought(piece.reasoning)
                    for part in self._parts(piece, splitter):
                        n_calls += isinstance(part, toolcalls.ToolCall)
                        called |= isinstance(part, toolcalls.ToolCall) and part.arguments is not None
                        spoken |= isinstance(part, str) and bool(part)
                        chunk = outputs.to_chunk(part, n_calls)
                        if unsent:
                            chunk.response_metadata["logprobs"] = outputs.logprobs(unsent)
                            unsent = []
                        yield chunk
            finally:
                pieces.close()  # type: ignore[attr-defined]
        if answer is None:
            raise RuntimeError("The engine's stream ended without an answer.")
        self._check_call(answer, called)
        fields = self._fields(answer)
        fields["response_metadata"].pop("logprobs", None)
        if unsent:
            fields["response_metadata"]["logprobs"] = outputs.logprobs(unsent)
        last = AIMessageChunk(content="", chunk_position="last", **fields)
        yield last if spoken else _uncited(last)

    def documents(self) -> tuple[Document, ...]:
        """All documents of the request: those of the memory first."""
        return (*(self.memory.documents if self.memory else ()), *self.request.documents)

    def _parts(self, piece: Piece, splitter: toolcalls.CallSplitter | None) -> Iterator[str | toolcalls.ToolCall]:
        if splitter is None:
            if piece.text:
                yield piece.text
            return
        yield from splitter.feed(piece.text)
        if piece.answer is not None:
            yield from splitter.finish()

    def _check_call(self, answer: Answer, called: bool) -> None:
        if self.needs_call and not called:
            raise unreadable("it holds no complete tool call", answer.text, answer.finish_reason)

    def _arguments(self) -> dict[str, Any]:
        return {
            "turns": self.request.turns,
            "query": self.request.query,  # "" means none
            "query_source": self.request.query_source,
            "memory": self.memory,
            "mode": self.mode,
            "reread": self.reread,
            "sampling": self.sampling,
            "tools": self.tools,
            "logits_processors": self.processors,
            "template_kwargs": dict(self.template_kwargs) if self.template_kwargs else None,
            "progress": self.progress,
            "cancel": self.cancel,
        }

    def _names(self) -> list[str] | None:
        return None if self.tools is None else [tool["function"]["name"] for tool in self.tools]

    def _fields(self, answer: Answer) -> dict[str, Any]:
        documents = self.documents()
        query = self.tokenizer(answer.query, add_special_tokens=False, verbose=False).input_ids
        metadata = outputs.metadata(answer, self.model, query_tokens=len(query), documents=len(documents))
        if answer.logprobs is not None:
            metadata["logprobs"] = outputs.logprobs(answer.logprobs)
        cited = outputs.citations(answer.sources, documents)
        return {
            "response_metadata": metadata,
            "usage_metadata": outputs.usage(answer, creates_memory=self.creates_memory),
            "additional_kwargs": {"citations": cited} if cited else {},
        }

    @contextmanager
    def _time_limit(self) -> Iterator[None]:
        if self.timeout is None:
            yield
            return
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            self.cancel.set()

        timer = threading.Timer(min(self.timeout, threading.TIMEOUT_MAX), expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        except CancelledError:
            if not expired.is_set():
                raise
            raise TimeoutError(
                f"There was no whole answer within timeout={self.timeout} seconds; raise timeout."
            ) from None
        finally:
            timer.cancel()


def _uncited(message: M) -> M:
    """Citations annotate words: an answer without any, a tool call, has none."""
    message.additional_kwargs.pop("citations", None)
    return message


def guided(request: Request, engine: QLLM) -> Request:
    """The request with the question as it can guide the lookups (see `guiding`)."""
    warn = bool(request.documents or request.memory_id)
    query, source = guiding(engine, request.query, request.query_source, warn=warn)
    return replace(request, query=query, query_source=source)
