"""`QLLMChat`: LangChain's chat model over whole documents."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool

from qllm_integrations.aio import run_in_thread, stream_in_thread
from qllm_integrations.langchain import tools as tool_forms
from qllm_integrations.langchain.memory import DocumentHandle, Documents, find_handle
from qllm_integrations.langchain.messages import translate
from qllm_integrations.langchain.progress import (
    async_surrounding_reporter,
    current_async_reporter,
    current_reporter,
    surrounding_reporter,
)
from qllm_integrations.langchain.requests import ChatRequests
from qllm_integrations.langchain.structured import Method, Schema, structured
from qllm_runtime.types import Progress

if TYPE_CHECKING:
    from qllm_runtime.engine import QLLM


class QLLMChat(ChatRequests):
    """Chat model that answers from whole documents: the model itself reads them, nothing is split or embedded.

    Setup:
        ```bash
        pip install "qllm-integrations[langchain]"
        ```

        `model` is a hub id, a path, or "reader" (default), a small model that ships with the package. Set `HF_TOKEN`
        for gated models. Constructing loads nothing; the first request does. Weights are shared within a process.

    Key init args — completion params:
        model: Hub id, path or "reader".
        temperature: 0 is greedy (default).
        max_tokens: Upper bound of generated tokens (256).
        stop: Strings that end the answer; never part of it.
        top_p, top_k, min_p, repetition_penalty, seed: The usual sampling options.
        logprobs, top_logprobs: Report log-probabilities in `response_metadata["logprobs"]`.
        mode: "read_once" (default) or "query_aware": whether documents are read for the question.
        reread: Whether the passages behind a draft of the answer are read again before it is written (True).

    Key init args — client params:
        memory: `MemoryConfig`, the layout of the block memory.
        device, dtype: Where and in which precision the model runs ("auto").
        timeout: Seconds after which a request is given up.
        show_progress: Show a bar in tokens while documents are read.

    All of the completion params can be given per call, too; so can `model`, `query` and `timeout`.

    Instantiate:
        ```python
        from qllm_integrations.langchain import QLLMChat

        llm = QLLMChat(model="reader", max_tokens=64)
        ```

    Invoke:
        A document is a content block of its own; the text of the message is the question.

        ```python
        from langchain_core.messages import HumanMessage

        book = "The harbour was quiet. The captain of the Marigold is Edda Thorne. The wind rose."
        document = {"type": "text-plain", "mime_type": "text/plain", "text": book, "title": "harbour.txt"}
        question = {"type": "text", "text": "Who is the captain of the Marigold?"}
        ai = llm.invoke([HumanMessage([document, question])])
        ai.text
        [c for block in ai.content_blocks for c in block.get("annotations", [])]  # the passages it was read from
        ```

    Stream:
        ```python
        for chunk in llm.stream([HumanMessage([document, question])]):
            print(chunk.text, end="")
        ```

    Async:
        ```python
        await llm.ainvoke([HumanMessage([document, question])])
        async for chunk in llm.astream([HumanMessage([document, question])]):
            print(chunk.text, end="")
        ```

        The event loop never waits; cancelling the task, `break` and `aclose` stop the model within one chunk or token.

    Read once, ask many:
        ```python
        with llm.add_documents(book) as handle:
            qa = llm.with_memory(handle)
            qa.invoke("Who is the captain of the Marigold?").usage_metadata  # input_token_details: cache_read
            qa.invoke("What rose?")
        ```

    Tool calling:
        ```python
        def get_weather(city: str) -> str:
            '''Look up the weather of a city.'''
            return "windy"

        llm.bind_tools([get_weather], tool_choice="any").invoke("How is the weather in Oslo?").tool_calls
        ```

    Structured output:
        ```python
        from pydantic import BaseModel, Field

        class Captain(BaseModel):
            '''The captain of a ship.'''

            name: str = Field(max_length=40)

        llm.with_structured_output(Captain).invoke([HumanMessage([document, question])])
        ```

    JSON mode:
        ```python
        llm.with_structured_output(Captain, method="json_mode").invoke(
            [HumanMessage([document, {"type": "text", "text": "Who is captain? Answer as JSON with the key name."}])]
        )
        ```

    Token usage:
        ```python
        ai.usage_metadata  # input_tokens, output_tokens, input_token_details: cache_read, cache_creation
        llm.get_num_tokens_from_messages([HumanMessage([document, question])])
        ```

    Response metadata:
        ```python
        ai.response_metadata  # model_name, finish_reason, and under "qllm": query_source, query, mode, timings
        ```
    """

    @classmethod
    def from_engine(cls, engine: QLLM, **settings: Any) -> Self:
        """A chat model over an engine that is already there (`qllm_runtime.QLLM(model, tokenizer)`).

        The engine stays yours: `close()` of the chat model leaves it open. Pickling keeps the configuration only, so a
        copy in another process loads the model by its name.
        """
        llm = cls(**{"model": engine.name, "memory": engine.memory, **settings})
        llm.shared.adopt(engine, lambda: llm._engine_key(llm.model))
        return llm

    # --- requests ---

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return _result(self._prepare(messages, stop, kwargs, current_reporter(run_manager)).answer())

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for message in self._prepare(messages, stop, kwargs, current_reporter(run_manager)).chunks():
            chunk = ChatGenerationChunk(message=message)
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        reporter = current_async_reporter(run_manager)
        return await run_in_thread(
            lambda cancel: _result(self._prepare(messages, stop, kwargs, reporter, cancel).answer())
        )

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        reporter = current_async_reporter(run_manager)
        stream = stream_in_thread(lambda cancel: self._prepare(messages, stop, kwargs, reporter, cancel).chunks())
        try:
            async for message in stream:
                chunk = ChatGenerationChunk(message=message)
                if run_manager:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk
        finally:
            await stream.aclose()

    # --- documents ---

    def add_documents(
        self,
        documents: Documents | Iterable[Documents],
        *,
        system: str | None = None,
        show_progress: bool | None = None,
        progress: Progress | None = None,
    ) -> DocumentHandle:
        """Read documents once, to ask many questions of them.

        Args:
            documents: Text, `pathlib.Path`s (files of text, HTML, PDF, Word or EPUB, or folders of them), LangChain
                documents, blobs, loaders, or several of them. Pages of one PDF become one document again; citations carry
                the page.
            system: System prompt that the questions will be asked with; it stands ahead of the documents.
            show_progress: Show a bar in tokens on stderr.
            progress: Called with (tokens read, tokens in all). Inside a tool or chain, the callback handlers of its run
                get the custom event "qllm_reading", too.

        Returns:
            A handle: put `handle.block()` into messages, or use `with_memory(handle)`; `handle.close()` frees the
            memory.

        Raises:
            DocumentError: A document is empty, unreadable or of an unsupported kind.
        """
        return self._read(documents, system, show_progress, progress, surrounding_reporter(), threading.Event())

    async def aadd_documents(
        self,
        documents: Documents | Iterable[Documents],
        *,
        system: str | None = None,
        show_progress: bool | None = None,
        progress: Progress | None = None,
    ) -> DocumentHandle:
        """Like `add_documents`, in a worker thread; cancelling the task stops the reading within one chunk."""
        reporter = async_surrounding_reporter()
        return await run_in_thread(
            lambda cancel: self._read(documents, system, show_progress, progress, reporter, cancel)
        )

    def load_documents(self, path: str | Path, *, show_progress: bool | None = None) -> DocumentHandle:
        """Take up documents that `DocumentHandle.save` wrote, in any process with the same model; nothing is read again.

        Raises:
            SavedReadingError: No reading is there, it is damaged, or another model read it.
        """
        return self._load(path, show_progress, threading.Event())

    async def aload_documents(self, path: str | Path, *, show_progress: bool | None = None) -> DocumentHandle:
        """Like `load_documents`, in a worker thread."""
        return await run_in_thread(lambda cancel: self._load(path, show_progress, cancel))

    def with_memory(self, handle: DocumentHandle) -> Self:
        """This chat model with every request asked of the documents behind `handle`.

        The result is a chat model like any other (`bind_tools`, `with_structured_output`, ...); it carries the id of
        the memory, never the text. Closing it leaves this chat model and the handle open.
        """
        self.shared.borrow(find_handle(handle.id, self._engine_key(self.model)))
        return self.model_copy(update={"file_id": handle.id, "shared": self.shared.view()})

    # --- tools and structured output ---

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        strict: bool | None = None,
        parallel_tool_calls: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Bind tools; `tool_choice` forces calls by constrained decoding.

        Args:
            tools: Functions, pydantic classes, `BaseTool`s, or dictionaries of OpenAI or Anthropic.
            tool_choice: None or "auto" (the model decides), "none", "any", "required" or True (some tool), a tool's
                name, or a dictionary of OpenAI or Anthropic.
            strict: As for OpenAI: all parameters are required.
            parallel_tool_calls: Let a forced answer hold several calls (default: exactly one). One that is cut off after a
                whole one is among the `invalid_tool_calls`.
            **kwargs: Further options of the call, e.g. `response_format`.

        Raises:
            InvalidRequestError: `tool_choice` names no bound tool, or something is not a tool.
            OutputParserException: When called: a forced call was cut off by `max_tokens` or a stop string.
        """
        converted = tool_forms.to_openai(tools, strict)
        tool_forms.chosen(tool_choice, converted)
        options = {"tool_choice": tool_choice, "parallel_tool_calls": parallel_tool_calls, **kwargs}
        return self.bind(tools=converted, **{key: value for key, value in options.items() if value is not None})

    def with_structured_output(  # type: ignore[override]
        self,
        schema: Schema | None = None,
        *,
        method: Method = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
    ) -> Runnable[LanguageModelInput, Any]:
        """Answers of a schema, enforced while decoding.

        Args:
            schema: Pydantic class (1 or 2; gives instances), TypedDict, JSON schema, OpenAI function or `response_format`
                (give dictionaries).
            method: "json_schema" shows the schema to the model and enforces it; "json_mode" enforces it without showing
                it (the prompt says what is wanted; no schema: any JSON object); "function_calling" forces a tool call.
            include_raw: Give a dictionary with `raw`, `parsed` and `parsing_error` instead of raising parsing errors.
            strict: False leaves objects open to properties the schema does not name.

        Raises:
            InvalidRequestError: Not a schema. A schema that cannot be compiled raises it when called.
            OutputParserException: When called: the answer was cut off by `max_tokens` or fails a check of the class.
        """
        return structured(self, schema, method=method, include_raw=include_raw, strict=strict)

    # --- tokens and life cycle ---

    def get_token_ids(self, text: str) -> list[int]:
        """Token ids of a text by the model's own tokenizer, without special tokens (loads the model)."""
        return list(self._engine(self.model).tokenizer.encode(text, add_special_tokens=False))

    def get_num_tokens(self, text: str) -> int:
        """Number of tokens of a text."""
        return int(self._engine(self.model).count_tokens(text))

    def get_num_tokens_from_messages(
        self,
        messages: Sequence[BaseMessage],
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool] | None = None,
    ) -> int:
        """Number of tokens of the prompt: chat template, documents, memories and tools included; 0 without messages."""
        if not messages:
            return 0  # `trim_messages` asks this
        request = translate(messages, memory_id=self.file_id, to_answer=False)
        engine, memory = self._engine(self.model), None
        if request.memory_id is not None:
            handle = find_handle(request.memory_id, self._engine_key(self.model))
            engine, memory, request = handle.engine, handle.memory, request.opened_by_user()
        return engine.count_prompt_tokens(
            request.turns,
            tools=tool_forms.to_openai(tools or ()) or None,
            template_kwargs=self.template_kwargs,
            memory=memory,
        )

    def close(self) -> None:
        """Close the document memories and release the models loaded here; later calls raise `ClosedError`.

        Copies of this chat model and what `with_memory` made of it are closed with it. Weights are shared by all chat models
        of the process and are freed when the last one lets go.
        """
        self.shared.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _result(message: AIMessage) -> ChatResult:
    return ChatResult(generations=[ChatGeneration(message=message)])


ChatQLLM = QLLMChat
