"""`QLLM`: a language model of LlamaIndex that reads whole documents."""
# mypy: disallow-subclassing-any=False, disallow-untyped-decorators=False

from __future__ import annotations

import copy
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from llama_index.core.base.llms.generic_utils import messages_to_prompt as default_messages_to_prompt
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import Field, PrivateAttr, ValidationError
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.prompts import BasePromptTemplate

from qllm_integrations.aio import run_in_thread, stream_in_thread
from qllm_integrations.common import BLOCK_MEMORY_WINDOW, invalid_settings, warn_unknown
from qllm_integrations.llama_index import options
from qllm_integrations.llama_index.calls import Call, prepare, reading_progress, report_reading
from qllm_integrations.llama_index.documents import engine_documents
from qllm_integrations.llama_index.handle import EngineHandle, MemoryShelf, Reading
from qllm_integrations.llama_index.prompts import routed_messages
from qllm_integrations.llama_index.responses import completion_response
from qllm_integrations.llama_index.structured import StructuredMixin
from qllm_integrations.llama_index.tools import ToolsMixin
from qllm_runtime.config import MemoryConfig
from qllm_runtime.errors import InvalidConfigError
from qllm_runtime.types import Mode

if TYPE_CHECKING:
    from qllm_runtime.document_memory import DocumentMemory
    from qllm_runtime.engine import QLLM as Engine  # noqa: N811


class QLLM(StructuredMixin, ToolsMixin, FunctionCallingLLM):
    """A model that reads whole documents, guided by the question.

    Nothing is loaded until the first answer; models of the same weights are shared within the process. All eight
    methods of LlamaIndex are there; the asynchronous ones run the model in a thread and never block the event loop.
    Cancelling a task, closing a stream or leaving its loop stops the model within one chunk or token.

    Documents are blocks of their own (`CitableBlock`, `DocumentBlock`), so the model knows which text is the
    question; a `CachePoint` after them reads them once and keeps them. In `predict` and its relatives the variables
    `context_str` and `query_str` of the prompt template say so.

    Args:
        model: Name on the Hugging Face hub, a path, or "reader", the small model that comes with this package.
        revision: Revision on the hub.
        memory: Layout of the block memory, a `MemoryConfig` or a dict of its fields (None: what suits the model).
        device: "auto", "cuda", "cpu", ...
        dtype: "auto", "bfloat16", ...
        token: Access token of the hub.
        trust_remote_code: Run modelling code from the hub.
        mode: "read_once" reads documents without the question, "query_aware" anew under each one (None: "read_once", with
            `MemoryConfig(faithful=True)` "query_aware").
        reread: Whether the passages behind a draft of the answer are read again before it is written.
        max_tokens: Upper bound of tokens per answer.
        temperature: 0 is greedy.
        top_p: Smallest set of tokens with this probability.
        top_k: This many best tokens.
        min_p: Tokens with at least this share of the best one's probability.
        repetition_penalty: Applied to tokens of the answer.
        seed: Makes sampling reproducible.
        stop: Strings that end the answer.
        logprobs: Alternatives to report per token (None: no log-probabilities).
        context_window: Overrides the window reported to LlamaIndex.
        show_progress: Show a bar while documents are read.
        template_kwargs: Further variables of the chat template.

    Every sampling field, `mode`, `reread`, `template_kwargs` and `show_progress` can also be given to a single call, as can
    `query` (the text that guides the lookups), `memory` (from :meth:`read`), `tools`, `tool_choice` and `response_schema`
    (a JSON schema).

    Examples:
        Complete and chat:

        ```python
        from llama_index.core.llms import ChatMessage
        from qllm_integrations.llama_index import QLLM

        llm = QLLM(model="reader", max_tokens=32)
        print(llm.complete("What is a letter?").text)
        print(llm.chat([ChatMessage("What is a letter?")]).message.content)
        ```

        Ask a document, and see which passages were looked up:

        ```python
        from llama_index.core.base.llms.types import CitableBlock, CitationBlock, TextBlock

        text = "The lamp was lit at dusk. The secret number of the harbour is 4711. " * 20
        document = CitableBlock(title="log.txt", source="log.txt", content=text)
        response = llm.chat([ChatMessage(blocks=[document, TextBlock(text="What is the secret number?")])])
        print(response.message.content)
        for block in response.message.blocks:
            if isinstance(block, CitationBlock):
                print(block.title, block.additional_location_info)
        print(response.raw["usage"], response.raw["query_source"])
        ```

        Read once, ask often:

        ```python
        memory = llm.read([text])
        print(llm.complete("What is the secret number?", memory=memory).raw["usage"])
        ```

        Stream, asynchronously:

        ```python
        import asyncio

        async def main() -> None:
            async for chunk in await llm.astream_complete("Tell me more."):
                print(chunk.delta, end="")

        asyncio.run(main())
        ```

        Structured output, by constrained decoding:

        ```python
        from llama_index.core.prompts import PromptTemplate
        from pydantic import BaseModel

        class Number(BaseModel):
            value: int

        prompt = PromptTemplate("{context_str} {query_str}")
        print(llm.structured_predict(Number, prompt, context_str=text, query_str="What is the secret number?"))
        ```
    """

    model: str = Field(default="reader", description="Name on the hub, path, or 'reader'.")
    revision: str | None = Field(default=None, description="Revision on the hub.")
    memory: MemoryConfig | None = Field(default=None, description="Layout of the block memory.")
    device: str = Field(default="auto", description="Device of the model.")
    dtype: str = Field(default="auto", description="Data type of the model.")
    token: str | None = Field(default=None, exclude=True, repr=False, description="Access token of the hub.")
    trust_remote_code: bool = Field(default=False, description="Run modelling code from the hub.")
    mode: Mode | None = Field(default=None, description="How documents are read (None: the engine's default).")
    reread: bool = Field(default=True, description="Read the passages behind a draft again before answering.")
    max_tokens: int = Field(default=256, ge=1, description="Upper bound of tokens per answer.")
    temperature: float = Field(default=0.0, ge=0, description="0 is greedy.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Nucleus sampling.")
    top_k: int | None = Field(default=None, ge=1, description="Best tokens to sample from.")
    min_p: float | None = Field(default=None, ge=0, le=1, description="Least share of the best token's probability.")
    repetition_penalty: float | None = Field(default=None, gt=0, description="Penalty on tokens of the answer.")
    seed: int | None = Field(default=None, description="Seed of the sampling.")
    stop: list[str] = Field(default_factory=list, description="Strings that end the answer.")
    logprobs: int | None = Field(default=None, ge=0, description="Alternatives to report per token.")
    context_window: int | None = Field(default=None, ge=1, description="Overrides the reported window.")
    show_progress: bool = Field(default=False, description="Show a bar while documents are read.")
    template_kwargs: dict[str, Any] = Field(default_factory=dict, description="Further variables of the chat template.")

    _handle: EngineHandle = PrivateAttr(default_factory=EngineHandle)

    def __init__(self, model: str = "reader", **data: Any) -> None:
        warn_unknown(type(self).__name__, data, set(type(self).model_fields))
        if data.get("messages_to_prompt") not in (None, default_messages_to_prompt):
            raise InvalidConfigError(
                "QLLM renders messages with the model's own chat template; leave messages_to_prompt out."
            )
        if isinstance(data.get("memory"), dict):
            data["memory"] = MemoryConfig(**data["memory"])
        if isinstance(data.get("stop"), str):
            data["stop"] = [data["stop"]]
        try:
            super().__init__(model=model, **data)
        except ValidationError as error:
            raise invalid_settings(type(self).__name__, error) from None

    @classmethod
    def from_engine(cls, engine: Engine, **fields: Any) -> QLLM:
        """Use an engine that is loaded already, e.g. one around a model object of your own.

        The engine stays yours: `close()` leaves it open.
        """
        llm = cls(model=engine.name, **fields)
        llm._handle = EngineHandle(engine, llm._loading)
        return llm

    @classmethod
    def class_name(cls) -> str:
        """Name of the class in serialised form."""
        return "QLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex plans with. Loads the model only for `policy="full"`, whose window is the model's own."""
        window = self.context_window
        if window is None:
            full = self.memory is not None and self.memory.policy == "full"
            engine = self.engine if full else self._handle.loaded(self._loading)
            window = engine.context_window if engine is not None else BLOCK_MEMORY_WINDOW
        return LLMMetadata(
            context_window=window,
            num_output=self.max_tokens,
            is_chat_model=True,
            is_function_calling_model=True,
            model_name=self.model,
            system_role=MessageRole.SYSTEM,
        )

    def to_payload(self) -> dict[str, Any]:
        """Configuration for traces: no token, no documents, and nothing that would load the model."""
        return {
            "class_name": self.class_name(),
            "model_name": self.model,
            **self.model_dump(include=_PAYLOAD, mode="json"),
        }

    # The engine

    @property
    def engine(self) -> Engine:
        """The engine, loaded on first use; again after `model`, `revision`, `memory`, `device` or `dtype` was changed.

        Raises:
            ClosedError: After :meth:`close`.
            InvalidConfigError: One of them was changed on a model that `from_engine` made.
        """
        return self._handle.get(self._loading, self.token)

    @property
    def _loading(self) -> dict[str, Any]:
        names = ("model", "revision", "memory", "device", "dtype", "trust_remote_code")
        return {name: getattr(self, name) for name in names}

    @property
    def reads_for_the_question(self) -> bool:
        """Whether documents have to be read anew for each question: `MemoryConfig(faithful=True)` knows no other way."""
        engine = self._handle.loaded(self._loading)
        memory = self.memory if engine is None else engine.memory
        return memory is not None and memory.faithful

    @property
    def shelf(self) -> MemoryShelf:
        """Documents kept because of a `CachePoint`."""
        return self._handle.shelf

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """The sampling fields of this model."""
        return {name: getattr(self, name) for name in options.SAMPLING_FIELDS}

    def read(self, documents: Any, *, system_prompt: str | None = None, show_progress: bool = False) -> DocumentMemory:
        """Read documents once; pass the result to any call as `memory=`.

        Args:
            documents: A str, an LlamaIndex document or node, an engine `Document`, or a sequence of them.
            system_prompt: System prompt of the calls to come.
            show_progress: Show a bar.
        """
        return self._read(documents, system_prompt, show_progress or self.show_progress)

    async def aread(
        self, documents: Any, *, system_prompt: str | None = None, show_progress: bool = False
    ) -> DocumentMemory:
        """As :meth:`read`, without blocking the event loop."""
        shown = show_progress or self.show_progress
        return await run_in_thread(lambda cancel: self._read(documents, system_prompt, shown, cancel))

    def _read(
        self, documents: Any, system_prompt: str | None, show_progress: bool, cancel: threading.Event | None = None
    ) -> DocumentMemory:
        started = time.perf_counter()
        whole = engine_documents(documents)
        progress = reading_progress(len(whole), show_progress)
        memory = self.engine.read(
            whole, system=system_prompt, template_kwargs=self.template_kwargs, progress=progress, cancel=cancel
        )
        report_reading(Reading(memory, memory.n_tokens, time.perf_counter() - started))
        return memory

    def count_tokens(self, text: str) -> int:
        """Tokens of a text, by the model's own tokenizer."""
        return self.engine.count_tokens(text)

    @property
    def tokenizer_fn(self) -> Callable[[str], list[int]]:
        """The model's tokenizer as LlamaIndex wants it: `Settings.tokenizer = llm.tokenizer_fn`."""
        return lambda text: list(self.engine.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def close(self) -> None:
        """Free all kept documents and the engine; later calls raise ClosedError.

        Copies stay open; the engine they share is freed with the last of them. One given to `from_engine` stays open.
        """
        self._handle.close()

    def __copy__(self) -> QLLM:
        copied: QLLM = super().__copy__()
        copied._handle = copy.copy(self._handle)
        return copied

    def __enter__(self) -> QLLM:
        return self

    def __exit__(self, *_: object) -> Literal[False]:
        self.close()
        return False

    # Chat and completion

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation."""
        return prepare(self, messages, kwargs).respond()

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """Answer a conversation piece by piece."""
        return _chat_stream(prepare(self, messages, kwargs))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation without blocking the event loop."""
        return await run_in_thread(lambda cancel: prepare(self, messages, kwargs, cancel).respond(cancel))

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """Answer a conversation piece by piece without blocking the event loop."""
        call = await run_in_thread(lambda cancel: prepare(self, messages, kwargs, cancel))
        return stream_in_thread(call.stream)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt, which becomes one user message."""
        return completion_response(prepare(self, self._prompt_messages(prompt, formatted), kwargs).respond())

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """Answer a prompt piece by piece."""
        return _completion_stream(prepare(self, self._prompt_messages(prompt, formatted), kwargs))

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer a prompt without blocking the event loop."""
        messages = self._prompt_messages(prompt, formatted)
        return completion_response(
            await run_in_thread(lambda cancel: prepare(self, messages, kwargs, cancel).respond(cancel))
        )

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """Answer a prompt piece by piece without blocking the event loop."""
        messages = self._prompt_messages(prompt, formatted)
        call = await run_in_thread(lambda cancel: prepare(self, messages, kwargs, cancel))
        return _completion_astream(call)

    def _prompt_messages(self, prompt: str, formatted: bool) -> list[ChatMessage]:
        return [ChatMessage(prompt if formatted else self.completion_to_prompt(prompt))]

    def _get_messages(self, prompt: BasePromptTemplate, **prompt_args: Any) -> list[ChatMessage]:
        # `predict`, `stream`, `apredict` and `astream` format their template here
        messages = routed_messages(prompt, prompt_args, self)
        if self.output_parser is not None:
            messages = self.output_parser.format_messages(messages)
        return list(self._extend_messages(messages))


_PAYLOAD = set(QLLM.model_fields) - set(FunctionCallingLLM.model_fields) - {"token", "model"}


def _chat_stream(call: Call) -> Generator[ChatResponse, None, None]:
    yield from call.stream()


def _completion_stream(call: Call) -> Generator[CompletionResponse, None, None]:
    for response in call.stream():
        yield completion_response(response)


async def _completion_astream(call: Call) -> AsyncGenerator[CompletionResponse, None]:
    stream = stream_in_thread(call.stream)
    try:
        async for response in stream:
            yield completion_response(response)
    finally:
        await stream.aclose()
