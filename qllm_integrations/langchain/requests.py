"""From messages and options to a prepared request: engines on demand, tools, grammar, memories, what they are read from."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.runnables import RunnableConfig

from qllm_integrations.bar import reading_bar
from qllm_integrations.common import warn_unknown
from qllm_integrations.langchain import tools as tool_forms
from qllm_integrations.langchain.call import Call, guided
from qllm_integrations.langchain.memory import DocumentHandle, Documents, find_handle, to_documents
from qllm_integrations.langchain.messages import translate
from qllm_integrations.langchain.progress import (
    Reporter,
    async_run_reporter,
    progress_of,
    reporting,
    run_reporter,
)
from qllm_integrations.langchain.settings import CALL_OPTIONS, ChatSettings, check_options
from qllm_integrations.langchain.structured import response_schema
from qllm_runtime.constraints import grammar
from qllm_runtime.types import Mode, Progress

if TYPE_CHECKING:
    from qllm_runtime.document_memory import DocumentMemory
    from qllm_runtime.engine import QLLM


class ChatRequests(ChatSettings):
    """The part of `QLLMChat` that prepares requests and reads documents."""

    # the four entrances of a run: its callback handlers are told how far the reading is, which `_stream` alone could not

    def invoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        """Answer messages, a prompt or a question."""
        config, reporter = run_reporter(self, config)
        with reporting(reporter):
            return super().invoke(input, config, stop=stop, **kwargs)

    async def ainvoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        """As `invoke`, without blocking the event loop."""
        config, reporter = async_run_reporter(self, config)
        with reporting(reporter):
            return await super().ainvoke(input, config, stop=stop, **kwargs)

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        """Answer piece by piece; leaving the loop stops the model."""
        config, reporter = run_reporter(self, config)
        with closing(super().stream(input, config, stop=stop, **kwargs)) as chunks:  # type: ignore[type-var]
            with reporting(reporter):
                first = next(chunks, None)
            if first is not None:
                yield first
                yield from chunks

    async def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        """As `stream`, without blocking the event loop."""
        config, reporter = async_run_reporter(self, config)
        async with aclosing(super().astream(input, config, stop=stop, **kwargs)) as chunks:  # type: ignore[type-var]
            with reporting(reporter):
                first = await anext(chunks, None)
            if first is not None:
                yield first
                async for chunk in chunks:
                    yield chunk

    def _prepare(
        self,
        messages: Sequence[BaseMessage],
        stop: list[str] | None,
        options: Mapping[str, Any],
        reporter: Reporter,
        cancel: threading.Event | None = None,
    ) -> Call:
        """Everything of a request but the answer. Blocks while a model loads."""
        warn_unknown("A call of QLLMChat", sorted(options), CALL_OPTIONS)
        options = {name: value for name, value in options.items() if value is not None}
        check_options(options)
        self.shared.check_open()
        response_format = options.get("response_format")
        if response_format and response_format.get("type") == "text":
            response_format = None
        schema, strict, shown = response_schema(response_format) if response_format else (None, False, False)
        request = translate(
            messages,
            query=options.get("query"),
            memory_id=options.get("file_id", self.file_id),
            schema=schema if shown else None,
        )
        tools = tool_forms.to_openai(options.get("tools", ()))
        tool_forms.check_names(tools)
        choice = tool_forms.chosen(options.get("tool_choice"), tools)
        model = options.get("model", self.model)
        engine = self._engine(model)
        call = Call(
            engine=engine,
            tokenizer=engine.tokenizer,
            model=model,
            request=guided(request, engine),
            sampling=self._sampling(stop, options),
            mode=options.get("mode", self.mode),
            reread=options.get("reread", self.reread),
            template_kwargs={**self.template_kwargs, **options.get("template_kwargs", {})},
            progress=progress_of(
                len(request.documents), reporter=reporter, bar=options.get("show_progress", self.show_progress)
            ),
            reporter=reporter,
            timeout=options.get("timeout", self.timeout),
            cancel=cancel or threading.Event(),
            attach=partial(self._attach_memory, mode=options.get("mode")),
        )
        call.processors = grammar(
            engine,
            tools,
            choice,
            parallel=options.get("parallel_tool_calls", False),
            schema=schema,
            open_objects=not strict,
        )
        call.tools = tools if tools and choice != "none" else None
        call.needs_call = tool_forms.needs_whole_call(options.get("tool_choice"), tools)
        return call

    def _attach_memory(self, call: Call, mode: Mode | None) -> None:
        """Ask the request of the memory it names, or of one that is kept for it. `mode` is the one given to the call."""
        key = self._engine_key(call.model)
        if call.request.memory_id is not None:
            handle = find_handle(call.request.memory_id, key)
            call.engine, call.memory = handle.engine, handle.memory
            call.mode = mode  # the model's own is for documents in messages
        elif call.request.cache and mode != "query_aware":
            call.mode = None
            documents, system = call.request.documents, call.request.system

            def read() -> DocumentMemory:
                return call.engine.read(
                    documents,
                    system=system,
                    template_kwargs=call.template_kwargs,
                    progress=call.progress,
                    cancel=call.cancel,
                )

            read_as = repr((key, sorted((call.template_kwargs or {}).items())))
            call.memory, call.creates_memory = self.shared.kept(read_as, documents, system, read, call.cancel)
            call.progress = None
            call.request = call.request.without_documents()
        if call.memory is not None:
            call.request = call.request.opened_by_user()

    def _read(
        self,
        documents: Documents | Iterable[Documents],
        system: str | None,
        show_progress: bool | None,
        progress: Progress | None,
        reporter: Reporter,
        cancel: threading.Event,
    ) -> DocumentHandle:
        shown = self.show_progress if show_progress is None else show_progress
        engine, whole = self._engine(self.model), to_documents(documents)
        told = progress_of(len(whole), reporter=reporter, bar=shown, own=progress)
        with reporter.telling(cancel):
            memory = engine.read(
                whole, system=system, template_kwargs=self.template_kwargs, progress=told, cancel=cancel
            )
        return self.shared.add(DocumentHandle(engine, self._engine_key(self.model), memory))

    def _load(self, path: str | Path, show_progress: bool | None, cancel: threading.Event) -> DocumentHandle:
        shown = self.show_progress if show_progress is None else show_progress
        progress = reading_bar("Loading", "layers") if shown else None
        engine = self._engine(self.model)
        memory = engine.load_memory(path, progress=progress, cancel=cancel)
        return self.shared.add(DocumentHandle(engine, self._engine_key(self.model), memory))

    def _engine_key(self, model: str) -> str:
        memory = self.memory.model_dump_json() if self.memory else None
        return repr((model, self.revision, self.device, self.dtype, self.trust_remote_code, memory, self.shared.token))

    def _engine(self, model: str) -> QLLM:
        def load() -> QLLM:
            from qllm_runtime.engine import QLLM

            return QLLM.from_pretrained(
                model,
                revision=self.revision,
                memory=self.memory,
                device=self.device,
                dtype=self.dtype,
                token=self.hf_token.get_secret_value() if self.hf_token else None,
                trust_remote_code=self.trust_remote_code,
            )

        return self.shared.engine(self._engine_key(model), load)
