"""One call of the model: LlamaIndex messages and arguments in, engine request, LlamaIndex responses out."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.span import active_span_id

from qllm_integrations.bar import reading_bar
from qllm_integrations.common import warn_unknown
from qllm_integrations.llama_index import options
from qllm_integrations.llama_index.events import DocumentsReadEvent, LookupEvent, ReadingProgressEvent
from qllm_integrations.llama_index.handle import Reading
from qllm_integrations.llama_index.messages import split_kept, to_request
from qllm_integrations.llama_index.responses import ResponseContext, StreamAssembler, chat_response, cut_off
from qllm_runtime.constraints import ask_for_json, grammar, tool_choice
from qllm_runtime.guidance import guiding
from qllm_runtime.types import Answer, Progress, Turn

if TYPE_CHECKING:
    from qllm_integrations.llama_index.llm import QLLM
    from qllm_runtime.engine import QLLM as Engine  # noqa: N811

dispatcher = get_dispatcher(__name__)


@dataclass(frozen=True)
class Call:
    """A request ready for the engine.

    Attributes:
        engine: The loaded engine.
        turns: The conversation.
        arguments: Keyword arguments of `engine.chat`.
        context: What the responses say beside the answer.
        is_json: The answer is held to a JSON schema.
        span_id: The span that events of this call belong to; a stream outlives its context.
    """

    engine: Engine
    turns: tuple[Turn, ...]
    arguments: Mapping[str, Any]
    context: ResponseContext
    is_json: bool = False
    span_id: str | None = field(default_factory=active_span_id.get)

    def respond(self, cancel: threading.Event | None = None) -> ChatResponse:
        """The whole answer."""
        answer = self.engine.chat(self.turns, **self.arguments, cancel=cancel)
        _report(answer, self.span_id)
        if self.is_json and answer.finish_reason == "length" and not _is_json(answer.text):
            raise cut_off(answer.usage.completion_tokens, "JSON")
        return chat_response(answer, self.context)

    def stream(self, cancel: threading.Event | None = None) -> Iterator[ChatResponse]:
        """The answer as it is written; closing the iterator stops the engine."""
        assembler = StreamAssembler(self.context)
        with closing(self.engine.chat_stream(self.turns, **self.arguments, cancel=cancel)) as pieces:  # type: ignore[type-var]
            for piece in pieces:
                response = assembler.add(piece)
                if piece.answer is not None:
                    _report(piece.answer, self.span_id)
                if response is not None:
                    yield response


def prepare(
    llm: QLLM, messages: Sequence[ChatMessage], given: Mapping[str, Any], cancel: threading.Event | None = None
) -> Call:
    """Translate messages and arguments; loads the engine and reads documents ahead of a cache point if need be.

    Raises:
        InvalidRequestError: A block, argument, tool or schema that cannot be honoured.
    """
    warn_unknown("QLLM", given, (*options.SAMPLING_FIELDS, *options.REQUEST_FIELDS))
    options.check_schema(given.get("response_schema"))
    reading = options.reading(given.get("memory"))
    request = to_request(messages, given.get("query"), with_memory=reading is not None)
    sampling = options.sampling(llm.sampling_defaults, given)
    engine = llm.engine
    progress = reading_progress(len(request.documents), bool(given.get("show_progress") or llm.show_progress))
    variables = {**llm.template_kwargs, **(given.get("template_kwargs") or {})}
    held = reading.memory.documents if reading is not None else ()
    if request.keep and reading is None and given.get("mode") != "query_aware":
        request, system, held = split_kept(request)  # not the memory's own: what the model never sees may differ
        reading = llm.shelf.get(
            engine, held, system, template_kwargs=variables, ttl=request.ttl, progress=progress, cancel=cancel
        )
        report_reading(reading)
    memory = reading.memory if reading is not None else None
    unguided = bool(held or request.documents) and given.get("query") is None  # else the caller wants it so
    query, source = guiding(engine, request.query, request.query_source, warn=unguided)
    tools = options.tool_specs(given.get("tools") or ())
    names = [tool["function"]["name"] for tool in tools]
    choice = tool_choice(given.get("tool_choice"), names)
    shown = tools if choice != "none" else []
    given_schema = given.get("response_schema")
    turns = request.turns if given_schema is None else ask_for_json(request.turns, given_schema)
    schema = given_schema or request.schema
    parallel = bool(given.get("parallel_tool_calls"))
    arguments: dict[str, Any] = {
        "query": query,
        "query_source": source,
        "memory": memory,
        "mode": given.get("mode") or (llm.mode if memory is None else None),
        "reread": llm.reread if given.get("reread") is None else given["reread"],
        "sampling": sampling,
        "tools": shown or None,
        "logits_processors": grammar(engine, shown, choice, parallel=parallel, schema=schema),
        "template_kwargs": variables or None,
        "progress": progress if memory is None else None,
    }
    return Call(
        engine,
        turns,
        arguments,
        ResponseContext(
            llm.model,
            (*held, *request.documents),
            names if shown else None,
            reading,
            call_forced=choice not in ("auto", "none"),
        ),
        schema is not None,
    )


def reading_progress(documents: int, show: bool) -> Progress:
    """Emits an event for every chunk that is read of `documents` documents, and shows a bar on standard error."""
    bar = reading_bar() if show else None
    span_id = active_span_id.get()

    def update(done: int, total: int) -> None:
        if documents:
            told = {"documents": documents, "tokens_read": done, "tokens_total": total}
            dispatcher.event(ReadingProgressEvent(**told, span_id=span_id))
        if bar is not None:
            bar(done, total)

    return update


def report_reading(reading: Reading) -> None:
    """Emit the event of a finished reading, if anything was read."""
    memory = reading.memory
    if reading.tokens:
        told = {"documents": len(memory.documents), "tokens": memory.n_tokens, "seconds": reading.seconds}
        dispatcher.event(DocumentsReadEvent(**told))


def _report(answer: Answer, span_id: str | None) -> None:
    passages = [(source.document, source.start, source.end, source.score) for source in answer.sources]
    dispatcher.event(
        LookupEvent(
            query=answer.query,
            query_source=answer.query_source,
            mode=answer.mode,
            reread=answer.reread,
            passages=passages,
            span_id=span_id,
        )
    )


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
