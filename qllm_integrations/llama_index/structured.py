"""Structured prediction of `QLLM`: answers that follow a pydantic class, by constrained decoding."""
# mypy: disallow-subclassing-any=False, disallow-untyped-decorators=False

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from typing import TYPE_CHECKING, Any, TypeVar, cast

import llama_index.core.instrumentation as instrument
from llama_index.core.base.llms.types import ChatResponse
from llama_index.core.bridge.pydantic import BaseModel, ValidationError
from llama_index.core.instrumentation.events.llm import LLMStructuredPredictEndEvent, LLMStructuredPredictStartEvent
from llama_index.core.program.streaming_utils import process_streaming_content_incremental
from llama_index.core.prompts import PromptTemplate
from llama_index.core.types import PydanticProgramMode

from qllm_integrations.llama_index.responses import cut_off
from qllm_runtime.errors import InvalidRequestError

if TYPE_CHECKING:
    from qllm_integrations.llama_index.llm import QLLM

dispatcher = instrument.get_dispatcher(__name__)

M = TypeVar("M", bound=BaseModel)


class StructuredMixin:
    """The structured methods of `LLM`, without a detour over tools or text parsing.

    A `pydantic_program_mode` other than the default is honoured as in every LLM.
    """

    @dispatcher.span
    def structured_predict(
        self, output_cls: type[M], prompt: PromptTemplate, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> M:
        """Answer a prompt template with an instance of `output_cls`.

        Raises:
            InvalidRequestError: The schema cannot be compiled, or `max_tokens` ended the answer inside the object.
        """
        llm = cast("QLLM", self)
        if llm.pydantic_program_mode is not PydanticProgramMode.DEFAULT:
            return cast(M, super().structured_predict(output_cls, prompt, llm_kwargs, **prompt_args))  # type: ignore[misc]
        dispatcher.event(
            LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=prompt_args)
        )
        response = llm.chat(llm._get_messages(prompt, **prompt_args), **_with_schema(output_cls, llm_kwargs))
        result = parse(response, output_cls)
        dispatcher.event(LLMStructuredPredictEndEvent(output=result))
        return result

    @dispatcher.span
    async def astructured_predict(
        self, output_cls: type[M], prompt: PromptTemplate, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> M:
        """As `structured_predict`, without blocking the event loop."""
        llm = cast("QLLM", self)
        if llm.pydantic_program_mode is not PydanticProgramMode.DEFAULT:
            return cast(M, await super().astructured_predict(output_cls, prompt, llm_kwargs, **prompt_args))  # type: ignore[misc]
        dispatcher.event(
            LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=prompt_args)
        )
        response = await llm.achat(llm._get_messages(prompt, **prompt_args), **_with_schema(output_cls, llm_kwargs))
        result = parse(response, output_cls)
        dispatcher.event(LLMStructuredPredictEndEvent(output=result))
        return result

    # `stream_structured_predict` and `astream_structured_predict` emit the events and iterate these

    def _structured_stream_call(
        self, output_cls: type[M], prompt: PromptTemplate, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> Generator[Any, None, None]:
        llm = cast("QLLM", self)
        if llm.pydantic_program_mode is not PydanticProgramMode.DEFAULT:
            yield from super()._structured_stream_call(output_cls, prompt, llm_kwargs, **prompt_args)  # type: ignore[misc]
            return
        partial = response = None
        for response in llm.stream_chat(
            llm._get_messages(prompt, **prompt_args), **_with_schema(output_cls, llm_kwargs)
        ):
            if response.raw is None and response.delta:
                partial = process_streaming_content_incremental(response, output_cls, partial)
                yield partial
        yield parse(response, output_cls)

    async def _structured_astream_call(
        self, output_cls: type[M], prompt: PromptTemplate, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> AsyncGenerator[Any, None]:
        llm = cast("QLLM", self)
        if llm.pydantic_program_mode is not PydanticProgramMode.DEFAULT:
            stream = await super()._structured_astream_call(output_cls, prompt, llm_kwargs, **prompt_args)  # type: ignore[misc]
            return cast(AsyncGenerator[Any, None], stream)
        responses = await llm.astream_chat(
            llm._get_messages(prompt, **prompt_args), **_with_schema(output_cls, llm_kwargs)
        )

        async def objects() -> AsyncGenerator[Any, None]:
            partial = response = None
            async for response in responses:
                if response.raw is None and response.delta:
                    partial = process_streaming_content_incremental(response, output_cls, partial)
                    yield partial
            yield parse(response, output_cls)

        return objects()


def parse(response: ChatResponse | None, output_cls: type[M]) -> M:
    """The object in a constrained answer.

    Raises:
        InvalidRequestError: `max_tokens` ended the answer inside the object, or a validator of the class refuses it.
    """
    text = (response.message.content if response is not None else None) or ""
    try:
        return cast(M, output_cls.model_validate_json(text))
    except ValidationError as error:
        if response is not None and response.raw and response.raw["finish_reason"] == "length":
            raise cut_off(response.raw["usage"]["completion_tokens"], f"{output_cls.__name__} object") from None
        raise InvalidRequestError(
            f"The answer follows the JSON schema of {output_cls.__name__}, but its validators refuse it: {error}"
        ) from error


def _with_schema(output_cls: type[BaseModel], llm_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    # what programs for hosted models pass along says how to force a tool; the grammar does that here
    forcing = ("tool_required", "tool_choice", "allow_parallel_tool_calls")
    rest = {key: value for key, value in (llm_kwargs or {}).items() if key not in forcing}
    return {"response_schema": output_cls.model_json_schema(), **rest}
