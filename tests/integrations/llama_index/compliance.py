"""What LlamaIndex expects of a language model, as tests that any `FunctionCallingLLM` can be run through.

Subclass `LLMCompliance`, give it an `llm` fixture, and adjust the class attributes to what the model can do:

    class TestMyModel(LLMCompliance):
        @pytest.fixture
        def llm(self):
            return MyModel(...)
"""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    CompletionResponse,
    ImageBlock,
    MessageRole,
    TextBlock,
    ToolCallBlock,
)
from llama_index.core.callbacks import CallbackManager, TokenCountingHandler
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events.llm import (
    LLMChatEndEvent,
    LLMChatInProgressEvent,
    LLMChatStartEvent,
    LLMCompletionEndEvent,
    LLMCompletionInProgressEvent,
    LLMCompletionStartEvent,
    LLMPredictEndEvent,
    LLMPredictStartEvent,
    LLMStructuredPredictEndEvent,
    LLMStructuredPredictInProgressEvent,
    LLMStructuredPredictStartEvent,
)
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.prompts import ChatPromptTemplate, PromptTemplate
from llama_index.core.tools import FunctionTool
from pydantic import BaseModel, Field


class Point(BaseModel):
    """A point on a small grid."""

    x: int = Field(ge=0, le=9)
    y: int = Field(ge=0, le=9)


class Box(BaseModel):
    """A box with a colour."""

    colour: str = Field(pattern="^(red|green|blue)$")
    corner: Point


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def greet(name: str) -> str:
    """Greet somebody."""
    return f"Good day, {name}."


class Recorder(BaseEventHandler):
    """Collects events."""

    events: list[Any] = Field(default_factory=list)

    @classmethod
    def class_name(cls) -> str:
        return "Recorder"

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.events.append(event)

    def count(self, kind: type) -> int:
        return sum(type(event) is kind for event in self.events)


@contextmanager
def recording() -> Iterator[Recorder]:
    """Collect the events of a block."""
    dispatcher, handler = get_dispatcher(), Recorder()
    dispatcher.add_event_handler(handler)
    try:
        yield handler
    finally:
        dispatcher.event_handlers.remove(handler)


async def stays_free(call: Callable[[], Awaitable[Any]], limit: float, attempts: int = 4) -> bool:
    """Whether the event loop never stands still for longer than `limit` seconds during a call.

    The machine may be busy: the limit is never below three times the stall beside a thread that merely counts, and the best of
    some attempts decides.
    """
    for _ in range(attempts):
        usual = await _longest_stall(lambda: asyncio.to_thread(lambda: sum(range(3_000_000))))
        if await _longest_stall(call) < max(limit, 3 * usual):
            return True
    return False


async def _longest_stall(call: Callable[[], Awaitable[Any]]) -> float:
    task = asyncio.ensure_future(call())
    longest = 0.0
    while not task.done():
        started = time.perf_counter()
        await asyncio.sleep(0.001)
        longest = max(longest, time.perf_counter() - started - 0.001)
    await task
    return longest


class LLMCompliance:
    """The suite. Override what differs.

    Attributes:
        messages: A conversation any model answers.
        prompt: A prompt any model answers.
        short: Arguments of a call that bound the answer to a few tokens.
        one_token: Arguments of a call that allow a single token.
        structured_kwargs: Arguments that leave room for a small JSON object.
        forces_tools: `tool_required` and `tool_choice` are honoured.
        constrains: Structured prediction always follows the schema.
        max_stall_s: Longest time the event loop may stand still.
    """

    messages = (ChatMessage("You are brief.", role=MessageRole.SYSTEM), ChatMessage("Say hello."))
    prompt = "Say hello."
    short: ClassVar[dict[str, Any]] = {"max_tokens": 8}
    one_token: ClassVar[dict[str, Any]] = {"max_tokens": 1}
    structured_kwargs: ClassVar[dict[str, Any]] = {"max_tokens": 64}
    long_kwargs: ClassVar[dict[str, Any]] = {"max_tokens": 2000}
    forces_tools = True
    constrains = True
    max_stall_s = 0.02

    @pytest.fixture
    def llm(self) -> FunctionCallingLLM:
        """The model under test."""
        raise NotImplementedError

    @pytest.fixture
    def slow_llm(self, llm: FunctionCallingLLM) -> FunctionCallingLLM:
        """A model whose answers with `long_kwargs` take at least a second."""
        return llm

    @pytest.fixture
    def unsupported(self) -> ChatMessage:
        """A message with a block the model cannot take."""
        return ChatMessage(blocks=[TextBlock(text="What is this?"), ImageBlock(image=b"\x89PNG")])

    @pytest.fixture
    def error_type(self) -> type[Exception]:
        """What an unsupported block raises."""
        return ValueError

    @pytest.fixture
    def recorder(self) -> Iterator[Recorder]:
        with recording() as handler:
            yield handler

    @pytest.fixture
    def tools(self) -> list[FunctionTool]:
        return [FunctionTool.from_defaults(add), FunctionTool.from_defaults(greet)]

    # chat and complete, in all four forms

    def test_metadata(self, llm: FunctionCallingLLM) -> None:
        assert llm.metadata.is_chat_model
        assert llm.metadata.is_function_calling_model
        assert llm.metadata.context_window > llm.metadata.num_output > 0
        assert llm.metadata.model_name not in ("", "unknown")

    def test_chat(self, llm: FunctionCallingLLM) -> None:
        response = llm.chat(list(self.messages), **self.short)
        assert isinstance(response, ChatResponse)
        assert response.message.role is MessageRole.ASSISTANT
        assert response.message.content

    def test_stream_chat(self, llm: FunctionCallingLLM) -> None:
        whole = llm.chat(list(self.messages), **self.short)
        self._check_stream(list(llm.stream_chat(list(self.messages), **self.short)), whole)

    async def test_achat(self, llm: FunctionCallingLLM) -> None:
        whole = llm.chat(list(self.messages), **self.short)
        response = await llm.achat(list(self.messages), **self.short)
        assert response.message.content == whole.message.content

    async def test_astream_chat(self, llm: FunctionCallingLLM) -> None:
        whole = llm.chat(list(self.messages), **self.short)
        self._check_stream([r async for r in await llm.astream_chat(list(self.messages), **self.short)], whole)

    def _check_stream(self, responses: list[ChatResponse], whole: ChatResponse) -> None:
        assert len(responses) > 1
        text = ""
        for response in responses:
            text += response.delta or ""
            assert response.message.role is MessageRole.ASSISTANT
            assert (response.message.content or "") == text
        assert text == whole.message.content
        assert self._usage(responses[-1]) == self._usage(whole)
        assert [bool(response.raw and response.raw.get("usage")) for response in responses].count(True) == 1

    def test_complete(self, llm: FunctionCallingLLM) -> None:
        response = llm.complete(self.prompt, **self.short)
        assert isinstance(response, CompletionResponse)
        assert response.text

    def test_complete_formatted(self, llm: FunctionCallingLLM) -> None:
        assert llm.complete(self.prompt, formatted=True, **self.short).text

    def test_completion_to_prompt(self, llm: FunctionCallingLLM, recorder: Recorder) -> None:
        seen: list[str] = []
        llm.completion_to_prompt = lambda prompt: (seen.append(prompt), prompt)[1]
        llm.complete(self.prompt, **self.short)
        llm.complete(self.prompt, formatted=True, **self.short)
        assert seen == [self.prompt]

    def test_stream_complete(self, llm: FunctionCallingLLM) -> None:
        whole = llm.complete(self.prompt, **self.short)
        self._check_completions(list(llm.stream_complete(self.prompt, **self.short)), whole)

    async def test_acomplete(self, llm: FunctionCallingLLM) -> None:
        whole = llm.complete(self.prompt, **self.short)
        assert (await llm.acomplete(self.prompt, **self.short)).text == whole.text

    async def test_astream_complete(self, llm: FunctionCallingLLM) -> None:
        whole = llm.complete(self.prompt, **self.short)
        self._check_completions([r async for r in await llm.astream_complete(self.prompt, **self.short)], whole)

    def _check_completions(self, responses: list[CompletionResponse], whole: CompletionResponse) -> None:
        text = ""
        for response in responses:
            text += response.delta or ""
            assert response.text == text
        assert text == whole.text
        assert self._usage(responses[-1]) == self._usage(whole)

    def _usage(self, response: Any) -> dict[str, int]:
        usage = response.raw["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["prompt_tokens"] > 0
        assert usage["completion_tokens"] > 0
        return dict(usage)

    def test_raw_is_plain_data(self, llm: FunctionCallingLLM) -> None:
        json.dumps(llm.chat(list(self.messages), **self.short).raw)
        json.dumps(llm.complete(self.prompt, **self.short).raw)

    def test_call_arguments_override(self, llm: FunctionCallingLLM) -> None:
        assert llm.chat(list(self.messages), **self.one_token).raw["usage"]["completion_tokens"] == 1
        assert llm.complete(self.prompt, **self.one_token).raw["usage"]["completion_tokens"] == 1

    def test_stop(self, llm: FunctionCallingLLM) -> None:
        text = llm.complete(self.prompt, **self.short).text
        stop = text[2:4]
        cut = text[: text.index(stop)]
        assert llm.complete(self.prompt, stop=[stop], **self.short).text == cut
        streamed = list(llm.stream_complete(self.prompt, stop=[stop], **self.short))
        assert "".join(r.delta or "" for r in streamed) == cut

    def test_unknown_argument_warns(self, llm: FunctionCallingLLM) -> None:
        with pytest.warns(UserWarning, match="temprature"):
            llm.complete(self.prompt, temprature=0.5, **self.short)

    def test_known_arguments_do_not_warn(self, llm: FunctionCallingLLM) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            llm.chat(list(self.messages), temperature=0.0, **self.short)

    def test_histories(self, llm: FunctionCallingLLM) -> None:
        call = ToolCallBlock(tool_call_id="c1", tool_name="add", tool_kwargs={"a": 1, "b": 2})
        doubled = [
            ChatMessage("One.", role="system"),
            ChatMessage("Two.", role="system"),
            ChatMessage("A"),
            ChatMessage("B"),
        ]
        tooled = [
            ChatMessage("What is 1 + 2?"),
            ChatMessage(role="assistant", blocks=[call]),
            ChatMessage("3", role="tool", additional_kwargs={"tool_call_id": "c1", "name": "add"}),
        ]
        talked = [ChatMessage("Hi"), ChatMessage("Hello.", role="assistant"), ChatMessage("Go on")]
        for messages in (doubled, tooled, talked):
            before = copy.deepcopy(messages)
            assert llm.chat(messages, **self.short).message.content
            assert messages == before

    # templates

    async def test_predict_in_all_forms(self, llm: FunctionCallingLLM, recorder: Recorder) -> None:
        prompt = PromptTemplate("Greet {name}.")
        text = llm.predict(prompt, name="Ada")
        assert text
        assert "".join(llm.stream(prompt, name="Ada")) == text
        assert await llm.apredict(prompt, name="Ada") == text
        assert "".join([token async for token in await llm.astream(prompt, name="Ada")]) == text
        chat = ChatPromptTemplate([ChatMessage("Be brief.", role="system"), ChatMessage("Greet {name}.")])
        assert llm.predict(chat, name="Ada")
        assert recorder.count(LLMPredictStartEvent) == 5
        assert recorder.count(LLMPredictEndEvent) == 3

    # events

    def test_chat_events(self, llm: FunctionCallingLLM, recorder: Recorder) -> None:
        llm.chat(list(self.messages), **self.short)
        assert (recorder.count(LLMChatStartEvent), recorder.count(LLMChatEndEvent)) == (1, 1)
        chunks = list(llm.stream_chat(list(self.messages), **self.short))
        assert recorder.count(LLMChatInProgressEvent) == len(chunks)
        assert (recorder.count(LLMChatStartEvent), recorder.count(LLMChatEndEvent)) == (2, 2)

    async def test_async_chat_events(self, llm: FunctionCallingLLM, recorder: Recorder) -> None:
        await llm.achat(list(self.messages), **self.short)
        chunks = [chunk async for chunk in await llm.astream_chat(list(self.messages), **self.short)]
        assert (recorder.count(LLMChatStartEvent), recorder.count(LLMChatEndEvent)) == (2, 2)
        assert recorder.count(LLMChatInProgressEvent) == len(chunks)

    async def test_completion_events(self, llm: FunctionCallingLLM, recorder: Recorder) -> None:
        llm.complete(self.prompt, **self.short)
        await llm.acomplete(self.prompt, **self.short)
        chunks = list(llm.stream_complete(self.prompt, **self.short))
        chunks += [chunk async for chunk in await llm.astream_complete(self.prompt, **self.short)]
        assert (recorder.count(LLMCompletionStartEvent), recorder.count(LLMCompletionEndEvent)) == (4, 4)
        assert recorder.count(LLMCompletionInProgressEvent) == len(chunks)
        assert recorder.count(LLMChatStartEvent) == 0

    def test_payload_names_the_model_and_no_secret(self, llm: FunctionCallingLLM) -> None:
        payload = json.dumps(llm.to_payload())
        assert llm.metadata.model_name in payload
        assert "token" not in llm.to_payload()
        assert "api_key" not in payload

    def test_token_counting_handler(self, llm: FunctionCallingLLM) -> None:
        counter = TokenCountingHandler(tokenizer=lambda text: pytest.fail("the usage of the response was not found"))
        llm.callback_manager = CallbackManager([counter])
        usage = [llm.chat(list(self.messages), **self.short).raw["usage"]]
        usage.append(list(llm.stream_chat(list(self.messages), **self.short))[-1].raw["usage"])
        usage.append(llm.complete(self.prompt, **self.short).raw["usage"])
        assert counter.prompt_llm_token_count == sum(u["prompt_tokens"] for u in usage)
        assert counter.completion_llm_token_count == sum(u["completion_tokens"] for u in usage)

    # tools

    def test_forced_tool(self, llm: FunctionCallingLLM, tools: list[FunctionTool]) -> None:
        if not self.forces_tools:
            pytest.skip("the model cannot be forced to call a tool")
        history = [ChatMessage("What is 1 + 2?")]
        response = llm.chat_with_tools(tools, chat_history=history, tool_required=True, **self.structured_kwargs)
        calls = llm.get_tool_calls_from_response(response)
        assert len(calls) == 1
        assert calls[0].tool_name in ("add", "greet")
        assert calls[0].tool_id
        assert any(isinstance(block, ToolCallBlock) for block in response.message.blocks)
        assert history == [ChatMessage("What is 1 + 2?")]

    def test_tool_choice_by_name(self, llm: FunctionCallingLLM, tools: list[FunctionTool]) -> None:
        if not self.forces_tools:
            pytest.skip("the model cannot be forced to call a tool")
        for name in ("add", "greet"):
            response = llm.chat_with_tools(tools, user_msg="Go.", tool_choice=name, **self.structured_kwargs)
            assert [call.tool_name for call in llm.get_tool_calls_from_response(response)] == [name]

    def test_unknown_tool_choice(self, llm: FunctionCallingLLM, tools: list[FunctionTool]) -> None:
        with pytest.raises(ValueError, match="subtract"):
            llm.chat_with_tools(tools, user_msg="Go.", tool_choice="subtract")

    async def test_forced_tool_in_all_forms(self, llm: FunctionCallingLLM, tools: list[FunctionTool]) -> None:
        if not self.forces_tools:
            pytest.skip("the model cannot be forced to call a tool")
        arguments = {"user_msg": "Go.", "tool_required": True, **self.structured_kwargs}
        whole = llm.get_tool_calls_from_response(llm.chat_with_tools(tools, **arguments))
        answers = [await llm.achat_with_tools(tools, **arguments)]
        answers.append(list(llm.stream_chat_with_tools(tools, **arguments))[-1])
        answers.append([chunk async for chunk in await llm.astream_chat_with_tools(tools, **arguments)][-1])
        for answer in answers:
            calls = llm.get_tool_calls_from_response(answer)
            assert [(c.tool_name, c.tool_kwargs) for c in calls] == [(c.tool_name, c.tool_kwargs) for c in whole]

    def test_calls_do_not_leak_into_streamed_text(self, llm: FunctionCallingLLM, tools: list[FunctionTool]) -> None:
        if not self.forces_tools:
            pytest.skip("the model cannot be forced to call a tool")
        chunks = llm.stream_chat_with_tools(tools, user_msg="Go.", tool_required=True, **self.structured_kwargs)
        assert not "".join(chunk.delta or "" for chunk in chunks).strip()

    async def test_predict_and_call(self, llm: FunctionCallingLLM) -> None:
        if not self.forces_tools:
            pytest.skip("the model cannot be forced to call a tool")
        tool = FunctionTool.from_defaults(
            lambda x, y: f"{x},{y}", name="place", description="Place it.", fn_schema=Point
        )
        answer = llm.predict_and_call([tool], user_msg="Go.", tool_required=True, **self.structured_kwargs)
        assert len(answer.sources) == 1
        assert not answer.sources[0].is_error
        answer = await llm.apredict_and_call([tool], user_msg="Go.", tool_required=True, **self.structured_kwargs)
        assert len(answer.sources) == 1
        assert not answer.sources[0].is_error

    def test_no_call_is_an_error_only_on_demand(self, llm: FunctionCallingLLM) -> None:
        response = llm.chat(list(self.messages), **self.short)
        assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
        with pytest.raises(ValueError, match="tool"):
            llm.get_tool_calls_from_response(response)

    # structured output

    @pytest.mark.parametrize("output_cls", [Point, Box])
    async def test_structured_predict(
        self, llm: FunctionCallingLLM, output_cls: type[BaseModel], recorder: Recorder
    ) -> None:
        if not self.constrains:
            pytest.skip("structured prediction depends on what the model decides")
        arguments: dict[str, Any] = {"llm_kwargs": self.structured_kwargs, "name": "Ada"}
        prompt = PromptTemplate("Where is {name}?")
        whole = llm.structured_predict(output_cls, prompt, **arguments)
        assert isinstance(whole, output_cls)
        assert await llm.astructured_predict(output_cls, prompt, **arguments) == whole
        assert recorder.count(LLMStructuredPredictStartEvent) == recorder.count(LLMStructuredPredictEndEvent) == 2

    async def test_stream_structured_predict(self, llm: FunctionCallingLLM, recorder: Recorder) -> None:
        if not self.constrains:
            pytest.skip("structured prediction depends on what the model decides")
        arguments: dict[str, Any] = {"llm_kwargs": self.structured_kwargs, "name": "Ada"}
        prompt = PromptTemplate("Where is {name}?")
        whole = llm.structured_predict(Box, prompt, **arguments)
        partial = list(llm.stream_structured_predict(Box, prompt, **arguments))
        assert len(partial) > 1
        assert partial[-1] == whole
        partial = [p async for p in await llm.astream_structured_predict(Box, prompt, **arguments)]
        assert len(partial) > 1
        assert partial[-1] == whole
        assert recorder.count(LLMStructuredPredictInProgressEvent) > 2

    async def test_as_structured_llm(self, llm: FunctionCallingLLM) -> None:
        if not self.constrains:
            pytest.skip("structured prediction depends on what the model decides")
        structured = llm.as_structured_llm(Point)
        assert isinstance(structured.complete("Where?", **self.structured_kwargs).raw, Point)
        assert isinstance((await structured.achat([ChatMessage("Where?")], **self.structured_kwargs)).raw, Point)

    # errors

    async def test_unsupported_block_raises_in_all_forms(
        self, llm: FunctionCallingLLM, unsupported: ChatMessage, error_type: type[Exception]
    ) -> None:
        with pytest.raises(error_type):
            llm.chat([unsupported])
        with pytest.raises(error_type):
            list(llm.stream_chat([unsupported]))
        with pytest.raises(error_type):
            await llm.achat([unsupported])
        with pytest.raises(error_type):
            [chunk async for chunk in await llm.astream_chat([unsupported])]

    # asynchrony

    async def test_event_loop_stays_free(self, slow_llm: FunctionCallingLLM) -> None:
        slow_llm.complete(self.prompt, **self.one_token)  # loaded
        for call in (self._achat, self._astream):
            assert await stays_free(lambda call=call: call(slow_llm, self.structured_kwargs), self.max_stall_s)

    async def _achat(self, llm: FunctionCallingLLM, arguments: dict[str, Any]) -> None:
        await llm.achat(list(self.messages), **arguments)

    async def _astream(self, llm: FunctionCallingLLM, arguments: dict[str, Any]) -> None:
        async for _ in await llm.astream_chat(list(self.messages), **arguments):
            pass

    async def test_cancelled_task_frees_the_model(self, slow_llm: FunctionCallingLLM) -> None:
        for call in (self._achat, self._astream):
            task = asyncio.create_task(call(slow_llm, self.long_kwargs))
            await asyncio.sleep(0.2)
            started = time.perf_counter()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert time.perf_counter() - started < 0.2
            await self._check_free(slow_llm)

    async def test_closed_stream_frees_the_model(self, slow_llm: FunctionCallingLLM) -> None:
        stream = await slow_llm.astream_chat(list(self.messages), **self.long_kwargs)
        async for _ in stream:
            break
        await stream.aclose()
        del stream
        await self._check_free(slow_llm)
        for chunks in (
            slow_llm.stream_chat(list(self.messages), **self.long_kwargs),
            slow_llm.stream_complete(self.prompt, **self.long_kwargs),
        ):
            next(chunks)
            chunks.close()
        del chunks
        await self._check_free(slow_llm)

    async def _check_free(self, llm: FunctionCallingLLM) -> None:
        started = time.perf_counter()
        await llm.acomplete(self.prompt, **self.one_token)
        assert time.perf_counter() - started < 0.8

    async def test_concurrent_calls(self, llm: FunctionCallingLLM) -> None:
        prompts = [f"{self.prompt} {n}" for n in range(4)]
        alone = [llm.complete(prompt, **self.short).text for prompt in prompts]
        together = await asyncio.gather(*(llm.acomplete(prompt, **self.short) for prompt in prompts))
        assert [response.text for response in together] == alone

    # configuration

    def test_round_trips(self, llm: FunctionCallingLLM) -> None:
        data = llm.to_dict()
        json.dumps(data)
        assert type(llm).from_dict(data).metadata == llm.metadata
        dumped = pickle.dumps(llm)
        assert len(dumped) < 20_000
        assert pickle.loads(dumped).metadata == llm.metadata
        assert (
            copy.deepcopy(llm).complete(self.prompt, **self.short).text == llm.complete(self.prompt, **self.short).text
        )
