"""One call of the model: LlamaIndex messages and arguments in, engine request, LlamaIndex responses out."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.span import active_span_id

from qllm_integrations.bar import reading_bar
from qllm_integrations.llama_index import options
from qllm_integrations.llama_index.events import DocumentsReadEvent, LookupEvent, ReadingProgressEvent
from qllm_integrations.llama_index.handle import Reading
from qllm_integrations.llama_index.messages import Request, split_kept, to_request
from qllm_integrations.llama_index.responses import ResponseContext, StreamAssembler, chat_response, cut_off
from qllm_runtime.errors import InvalidRequestError
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
    options.warn_unknown(given, (*options.SAMPLING_FIELDS, *options.REQUEST_FIELDS), "QLLM")
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
    request = _bounded(engine, request)
    tools, names, processors = _tools(engine, given)
    call_forced = bool(processors)
    schema = given.get("response_schema")
    turns = request.turns
    if schema is not None:
        turns = _ask_for_json(turns, schema)
    schema = schema or request.schema
    if schema is not None and not processors:
        from qllm_runtime.grammar import json_schema_processor

        processors = [json_schema_processor(engine.tokenizer, schema, **_vocabulary(engine))]
    arguments: dict[str, Any] = {
        "query": request.query,
        "query_source": request.query_source,
        "memory": memory,
        "mode": given.get("mode") or (llm.mode if memory is None else None),
        "reread": llm.reread if given.get("reread") is None else given["reread"],
        "sampling": sampling,
        "tools": tools,
        "logits_processors": processors,
        "template_kwargs": variables or None,
        "progress": progress if memory is None else None,
    }
    return Call(
        engine,
        turns,
        arguments,
        ResponseContext(llm.model, (*held, *request.documents), names, reading, call_forced),
        schema is not None,
    )


def _bounded(engine: Engine, request: Request) -> Request:
    """A message that is too long to be a query by itself asks unguided; only a query given by name is refused."""
    limit = engine.memory.n_local
    named = request.query_source not in ("message", "fallback") or engine.memory.policy == "full"
    if named or len(request.query.encode("utf-8", "replace")) <= limit or engine.count_tokens(request.query) <= limit:
        return request
    if request.query_source == "message":
        warnings.warn(
            f"The message has more than n_local={limit} tokens, too many for a query: its documents are read unguided. "
            "Pass the question alone as query=, or raise n_local.",
            UserWarning,
            stacklevel=4,
        )
    return replace(request, query="", query_source="none")


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


def _tools(engine: Engine, given: Mapping[str, Any]) -> tuple[list[Any] | None, list[str] | None, list[Any]]:
    """Tools for the template, their names, and the processors that force a call."""
    tools = options.tool_specs(given.get("tools") or ())
    names = [tool["function"]["name"] for tool in tools]
    choice = options.tool_choice(given.get("tool_choice"), names)
    if not tools or choice == "none":
        if choice == "required":
            raise InvalidRequestError(
                "A tool call is required, but the call has no tools; pass tools or leave tool_choice out."
            )
        return None, None, []
    if choice is None:
        return tools, names, []
    from qllm_runtime.grammar import tool_call_processor
    from qllm_runtime.toolcalls import call_format

    processor = tool_call_processor(
        engine.tokenizer,
        tools,
        names=None if choice == "required" else [choice],
        call_format=call_format(getattr(engine.tokenizer, "chat_template", None)),
        parallel=bool(given.get("parallel_tool_calls")),
        **_vocabulary(engine),
    )
    return tools, names, [processor]


def _vocabulary(engine: Engine) -> dict[str, Any]:
    """Width of the scores and end tokens, as the grammar needs them."""
    ends = engine.model.generation_config.eos_token_id
    width = engine.model.get_output_embeddings().weight.shape[0]
    return {"n_vocab": int(width), "eos_token_ids": [ends] if isinstance(ends, int) else ends}


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _ask_for_json(turns: tuple[Turn, ...], schema: Mapping[str, Any]) -> tuple[Turn, ...]:
    """The instruction stands after the last user turn's text: ahead of it would change what a kept memory has read."""
    last = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=None)
    text = f"Answer with one JSON object that follows this JSON schema:\n{json.dumps(schema, ensure_ascii=False)}"
    if last is None:
        return (*turns, Turn("user", (text,)))
    asked = replace(turns[last], content=(*turns[last].content, text))
    return (*turns[:last], asked, *turns[last + 1 :])
