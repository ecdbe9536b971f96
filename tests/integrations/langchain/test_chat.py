"""Answers: whole and streamed alike, stop strings, usage, metadata, overrides, batches, errors."""

from __future__ import annotations

import threading
import warnings
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import pytest
from fake_engine_lc import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from ishmael import REPLY, save
from langchain_core.callbacks import BaseCallbackHandler, UsageMetadataCallbackHandler
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough

from qllm_integrations.langchain import QLLMChat
from qllm_runtime.errors import ClosedError, ContextOverflowError, InvalidConfigError, InvalidRequestError
from tests.integrations.scripted_engine import thoughtful

BOOK = "It was a quiet night. Call me Ishmael. Some years ago I went to sea. " * 20
MESSAGES = [
    HumanMessage(
        [
            {"type": "text-plain", "mime_type": "text/plain", "text": BOOK, "title": "whale.txt"},
            {"type": "text", "text": "Who speaks?"},
        ]
    )
]


@pytest.fixture(scope="module")
def tiny(tiny_path: str) -> QLLMChat:
    return QLLMChat(model=tiny_path)


def merged(llm: Any, messages: Any = MESSAGES, **options: Any) -> Any:
    return reduce(add, llm.stream(messages, **options))


def scores(message: AIMessage) -> list[float]:
    return [entry["logprob"] for entry in message.response_metadata["logprobs"]["content"]]


def stable(message: AIMessage) -> dict[str, Any]:
    """What has to be equal between two answers: everything but ids and times."""
    metadata = dict(message.response_metadata)
    metadata["qllm"] = {key: value for key, value in metadata["qllm"].items() if key != "timings"}
    blocks = [{key: value for key, value in block.items() if key != "index"} for block in message.content_blocks]
    return {"text": message.text, "blocks": blocks, "usage": message.usage_metadata, "metadata": metadata}


@pytest.mark.parametrize("version", [None, "v1"])
@pytest.mark.parametrize("options", [{}, {"stop": ["mae"]}, {"max_tokens": 3}, {"logprobs": True, "top_logprobs": 2}])
def test_streamed_and_whole_answers_are_equal(tiny_path: str, version: str | None, options: dict[str, Any]) -> None:
    llm = QLLMChat(model=tiny_path, output_version=version)
    assert stable(merged(llm, **options)) == stable(llm.invoke(MESSAGES, **options))


async def test_async_answers_are_equal(tiny: QLLMChat) -> None:
    whole = stable(tiny.invoke(MESSAGES))
    assert stable(await tiny.ainvoke(MESSAGES)) == whole
    assert stable(reduce(add, [chunk async for chunk in tiny.astream(MESSAGES)])) == whole


def test_streaming_true_streams_invoke(tiny_path: str, tiny: QLLMChat) -> None:
    assert stable(QLLMChat(model=tiny_path, streaming=True).invoke(MESSAGES)) == stable(tiny.invoke(MESSAGES))


def test_citations_quote_the_document(tiny: QLLMChat) -> None:
    ai = tiny.invoke(MESSAGES)
    block = ai.content_blocks[0]
    assert ai.content == block["text"] == REPLY
    assert block["annotations"]
    for citation in block["annotations"]:
        extras = citation["extras"]
        assert citation["type"] == "citation"
        assert citation["title"] == "whale.txt"
        assert citation["cited_text"] == BOOK[extras["start_char_index"] : extras["end_char_index"]]
        assert extras["document_index"] == 0
        assert 0 <= extras["score"] <= 1


def test_no_citations_without_documents(tiny: QLLMChat) -> None:
    assert tiny.invoke("hi").content_blocks == [{"type": "text", "text": REPLY}]


def test_usage_stands_on_exactly_one_chunk(tiny: QLLMChat) -> None:
    chunks = list(tiny.stream(MESSAGES))
    assert [chunk.usage_metadata is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].chunk_position == "last"
    assert chunks[-1].response_metadata["finish_reason"] == "stop"
    assert chunks[-1].usage_metadata["output_tokens"] == len(REPLY)


def test_usage_callback_counts_by_model(tiny: QLLMChat, tiny_path: str) -> None:
    handler = UsageMetadataCallbackHandler()
    tiny.invoke("hi", config={"callbacks": [handler]})
    list(tiny.stream("hi", config={"callbacks": [handler]}))
    assert handler.usage_metadata[tiny_path]["output_tokens"] == 2 * len(REPLY)


def test_one_beginning_of_sequence(tiny: QLLMChat) -> None:
    engine = FakeEngine()
    QLLMChat.from_engine(engine).invoke(MESSAGES)
    assert list(engine.requests[0]["prompt"].ids).count(engine.tokenizer.bos_token_id) == 1


def test_finish_reason_length(tiny: QLLMChat) -> None:
    ai = tiny.invoke("hi", max_tokens=3)
    assert (ai.text, ai.response_metadata["finish_reason"]) == (REPLY[:3], "length")


@settings(max_examples=25, deadline=None)
@given(stops=st.lists(st.text(alphabet="Ishmael ", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_cut_at_the_first_occurrence(tiny_path: str, stops: list[str]) -> None:
    expected = min((REPLY[: REPLY.find(stop)] for stop in stops if stop in REPLY), key=len, default=REPLY)
    assert QLLMChat(model=tiny_path, stop=stops[:1]).invoke("hi", stop=stops[1:] or None).text == expected
    streamed = list(QLLMChat(model=tiny_path, stop=stops).stream("hi"))
    assert "".join(chunk.text for chunk in streamed) == expected
    assert not any(stop in chunk.text for chunk in streamed for stop in stops)


def test_characters_are_never_split(tmp_path: Path) -> None:
    reply = "🌊 naïf"  # one token per byte
    pieces = [chunk.text for chunk in QLLMChat(model=save(tmp_path, reply=reply)).stream("hi")]
    assert "".join(pieces) == reply
    assert [piece for piece in pieces if piece and ord(piece[0]) > 127] == ["🌊", "ï"]


def test_logprobs_cover_every_token(tiny: QLLMChat) -> None:
    for ai in (tiny.invoke("hi", logprobs=True, top_logprobs=2), merged(tiny, "hi", logprobs=True, top_logprobs=2)):
        content = ai.response_metadata["logprobs"]["content"]
        assert "".join(entry["token"] for entry in content) == REPLY
        assert all(entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2 for entry in content)
    assert "logprobs" not in tiny.invoke("hi").response_metadata


def test_call_options_win_over_the_constructor() -> None:
    engine = FakeEngine()
    llm = QLLMChat.from_engine(engine, temperature=0.5, max_tokens=50, stop=["x"])
    llm.invoke(
        "hi",
        temperature=0.1,
        max_tokens=4,
        top_p=0.9,
        top_k=3,
        min_p=0.1,
        seed=1,
        repetition_penalty=1.1,
        mode="read_once",
        stop=["y"],
    )
    sampling = engine.requests[0]["sampling"]
    assert (sampling.temperature, sampling.max_tokens, sampling.top_p, sampling.top_k) == (0.1, 4, 0.9, 3)
    assert (sampling.min_p, sampling.seed, sampling.repetition_penalty, sampling.stop) == (0.1, 1, 1.1, ("x", "y"))
    assert engine.requests[0]["mode"] == "read_once"
    llm.invoke("hi")
    assert engine.requests[1]["sampling"].max_tokens == 50
    llm.bind(query="Which?").invoke(MESSAGES)
    assert engine.requests[2]["query"] == "Which?"


def test_a_model_can_be_named_per_call(tiny: QLLMChat, other_path: str) -> None:
    assert tiny.invoke("hi", model=other_path).response_metadata["model_name"] == other_path


def test_sampling_is_reproducible(tiny: QLLMChat) -> None:
    def draw() -> str:
        return tiny.invoke("hi", temperature=20.0, seed=7, max_tokens=12).text

    assert draw() == draw()


def test_batches_equal_single_requests(tiny: QLLMChat) -> None:
    inputs = [f"Question {i} of many? {'x' * i}" for i in range(8)]
    single = [scores(tiny.invoke(text, logprobs=True)) for text in inputs]
    assert [scores(ai) for ai in tiny.batch(inputs, logprobs=True)] == single
    assert len({tuple(row) for row in single}) == len(inputs)  # the numbers tell the requests apart


async def test_async_batches_and_two_chat_models(tiny_path: str) -> None:
    inputs = [f"Question {i}?" for i in range(4)]
    first, second = QLLMChat(model=tiny_path, max_tokens=4), QLLMChat(model=tiny_path)
    assert [ai.text for ai in await first.abatch(inputs)] == [REPLY[:4]] * 4
    assert [ai.text for ai in await second.abatch(inputs)] == [REPLY] * 4


def test_chat_models_share_the_weights(tiny_path: str) -> None:
    first, second = QLLMChat(model=tiny_path), QLLMChat(model=tiny_path, max_tokens=5)
    first.invoke("hi")
    second.invoke("hi")
    engines = [llm._engine(tiny_path) for llm in (first, second)]
    assert engines[0].model is engines[1].model


def test_a_plain_chain(tiny: QLLMChat) -> None:
    prompt = ChatPromptTemplate.from_messages(
        [
            ("system", "Be brief."),
            (
                "human",
                [{"type": "text-plain", "mime_type": "text/plain", "text": "{book}"}, {"type": "text", "text": "{q}"}],
            ),
        ]
    )
    chain = {"q": RunnablePassthrough(), "book": lambda _: "Braces {survive} here."} | prompt | tiny | StrOutputParser()
    assert chain.invoke("Who?") == REPLY
    assert "".join(chain.stream("Who?")) == REPLY


def test_tokens_are_reported_to_callbacks_once() -> None:
    class Tokens(BaseCallbackHandler):
        def __init__(self) -> None:
            self.tokens: list[str] = []

        def on_llm_new_token(self, token: Any, **_: Any) -> None:
            self.tokens.append(token)

    handler = Tokens()
    list(QLLMChat.from_engine(FakeEngine()).stream("hi", config={"callbacks": [handler]}))
    assert "".join(handler.tokens) == REPLY


def test_leaving_a_stream_stops_the_engine() -> None:
    engine = FakeEngine(reply="x" * 500, step=0.002)
    stream = QLLMChat.from_engine(engine).stream("hi")
    next(stream)
    stream.close()
    assert engine.running == 0
    assert engine.tokens_written < 10


def test_leaving_a_real_stream_leaves_the_model_free(tiny: QLLMChat) -> None:
    for chunk in tiny.stream(MESSAGES):
        assert chunk.text
        break
    assert tiny.invoke("hi").text == REPLY


def test_a_suspended_stream_does_not_block_others(tiny: QLLMChat) -> None:
    stream = tiny.stream("hi")
    next(stream)
    done = threading.Thread(target=lambda: tiny.invoke("hi"))
    done.start()
    done.join(30)
    assert not done.is_alive()
    assert "".join(chunk.text for chunk in stream) == REPLY[1:]


@pytest.mark.parametrize("after", [None, 3])
def test_errors_keep_their_type(after: int | None) -> None:
    class Odd(Exception):
        pass

    llm = QLLMChat.from_engine(FakeEngine(error=Odd("odd"), error_after=after))
    with pytest.raises(Odd):
        llm.invoke("hi")
    with pytest.raises(Odd):
        list(llm.stream("hi"))


def test_timeout() -> None:
    llm = QLLMChat.from_engine(FakeEngine(n_chunks=100, step=0.02), timeout=0.1)
    with pytest.raises(TimeoutError, match=r"timeout=0\.1"):
        llm.invoke("hi")
    with pytest.raises(TimeoutError):
        list(llm.stream("hi"))
    for enough in (60, float("inf")):
        assert QLLMChat.from_engine(FakeEngine(), timeout=enough).invoke("hi").text == REPLY
    kept = {**MESSAGES[0].content[0], "cache_control": {"type": "ephemeral"}}
    for run in (llm.invoke, lambda messages: list(llm.stream(messages))):
        with pytest.raises(TimeoutError):
            run([HumanMessage([kept, *MESSAGES[0].content[1:]])])


def test_closing() -> None:
    engine = FakeEngine()
    with QLLMChat.from_engine(engine) as llm:
        assert llm.invoke("hi").text == REPLY
    for call in (
        lambda: llm.invoke("hi"),
        lambda: list(llm.stream("hi")),
        lambda: llm.add_documents("x"),
        lambda: llm.get_num_tokens("x"),
    ):
        with pytest.raises(ClosedError, match="closed"):
            call()
    assert not engine.closed  # it was made by the caller


def test_closing_one_chat_model_leaves_others_alone(tiny_path: str) -> None:
    first, second = QLLMChat(model=tiny_path), QLLMChat(model=tiny_path)
    first.invoke("hi")
    second.invoke("hi")
    first.close()
    assert second.invoke("hi").text == REPLY
    with pytest.raises(ClosedError):
        first.invoke("hi")


def test_bad_settings_are_refused_with_typed_errors(tiny: QLLMChat) -> None:
    for bad in (
        {"max_tokens": 0},
        {"temperature": -1},
        {"top_p": 2},
        {"stop": [""]},
        {"timeout": 0},
        {"mode": "fast"},
        {"memory": {"topk": -1}},
    ):
        with pytest.raises(InvalidConfigError, match=next(iter(bad))):
            QLLMChat(**bad)
    for bad in ({"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 2.0}):
        with pytest.raises(InvalidConfigError):
            tiny.invoke("hi", **bad)
        with pytest.raises(InvalidConfigError):
            list(tiny.stream("hi", **bad))


@pytest.mark.parametrize("name", ["model", "query", "file_id", "tools", "response_format", "template_kwargs"])
def test_call_options_of_a_wrong_type_are_refused_by_name(name: str) -> None:
    llm = QLLMChat.from_engine(FakeEngine())
    for run in (llm.invoke, lambda text, **options: list(llm.stream(text, **options))):
        with pytest.raises(InvalidRequestError, match=f"{name}= is of type int"):
            run("hi", **{name: 5})
    with pytest.raises(InvalidRequestError, match="response_format= is of type str"):
        llm.invoke("hi", response_format="json")


@pytest.mark.parametrize("timeout", ["x", 0, -1, True, float("nan")])
def test_a_timeout_is_a_number_of_seconds(timeout: Any) -> None:
    with pytest.raises(InvalidConfigError, match="timeout="):
        QLLMChat.from_engine(FakeEngine()).invoke("hi", timeout=timeout)


def test_a_string_is_one_stop_string() -> None:
    llm = QLLMChat.from_engine(FakeEngine())
    for answer in (
        llm.invoke("hi", stop="mae"),
        llm.bind(stop="mae").invoke("hi"),
        merged(llm, "hi", stop="mae"),
        QLLMChat.from_engine(FakeEngine(), stop="mae").invoke("hi"),
    ):
        assert answer.text == REPLY[: REPLY.index("mae")]
    assert llm._get_ls_params(stop="mae")["ls_stop"] == ["mae"]
    for bad in (5, [5], [""], ""):
        with pytest.raises(InvalidConfigError, match="stop="):
            llm.invoke("hi", stop=bad)


def test_unknown_arguments_warn_by_name() -> None:
    with pytest.warns(UserWarning, match="'temprature'; did you mean 'temperature'"):
        QLLMChat(temprature=1)
    llm = QLLMChat.from_engine(FakeEngine())
    with pytest.warns(UserWarning, match="'max_token'; did you mean 'max_tokens'"):
        llm.invoke("hi", max_token=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QLLMChat(model="reader", api_key="x", timeout=60, max_retries=2, stop=[], max_tokens=100, temperature=0)
        llm.invoke("hi", stop=None, stream=False)


def test_tokens_are_counted_with_the_models_own_tokenizer(tiny: QLLMChat) -> None:
    def look(at: str) -> str:
        """Look at something."""
        return at

    assert tiny.get_num_tokens("Ishmael 🌊") == len("Ishmael 🌊".encode())
    assert len(tiny.get_token_ids("Ishmael")) == 7
    short, whole = (
        tiny.get_num_tokens_from_messages([HumanMessage("Who speaks?")]),
        tiny.get_num_tokens_from_messages(MESSAGES),
    )
    assert whole > short + len(BOOK)
    assert tiny.get_num_tokens_from_messages(MESSAGES, tools=[look]) > whole + 50
    read_once = tiny.invoke(MESSAGES, mode="read_once").usage_metadata
    assert read_once["input_tokens"] == whole


async def test_a_long_message_is_read_but_guides_nothing(tiny: QLLMChat) -> None:
    long = "The sea was calm. " * 100
    assert tiny.invoke(long).response_metadata["qllm"]["query_source"] == "none"
    with pytest.warns(UserWarning, match="too many for a question"):
        assert tiny.invoke([HumanMessage([MESSAGES[0].content[0], {"type": "text", "text": long}])]).text == REPLY
    assert tiny.invoke(long, query="Who?").response_metadata["qllm"]["query_source"] == "explicit"
    with pytest.raises(ContextOverflowError, match="n_local"):
        tiny.invoke(MESSAGES, query=long)
    with pytest.raises(ContextOverflowError, match="n_local"):
        list(tiny.stream(MESSAGES, query=long))
    with pytest.raises(ContextOverflowError, match="n_local"):
        await tiny.ainvoke(MESSAGES, query=long)


def test_a_question_is_needed_where_it_matters(tiny: QLLMChat) -> None:
    with pytest.raises(InvalidRequestError, match="no messages"):
        tiny.invoke([])
    with pytest.warns(UserWarning, match="no question"):
        tiny.invoke([HumanMessage(MESSAGES[0].content[:1])])


@pytest.mark.parametrize("version", [None, "v1"])
def test_thoughts_are_reasoning_blocks_and_no_part_of_the_text(version: str | None) -> None:
    engine = thoughtful(FakeEngine(), "Ishmael spoke.", 7)
    llm = QLLMChat.from_engine(engine, output_version=version)
    whole, streamed = llm.invoke(MESSAGES), merged(llm)
    for message in (whole, streamed):
        first, second = message.content_blocks[:2]
        assert (first["type"], first["reasoning"]) == ("reasoning", "Ishmael spoke.")
        assert (second["type"], second["text"]) == ("text", REPLY)
        assert message.text == REPLY
        assert message.usage_metadata["output_token_details"] == {"reasoning": 7}
    assert (llm | StrOutputParser()).invoke(MESSAGES) == REPLY
    # an earlier answer's thought is not read again
    again = llm.invoke([*MESSAGES, whole, HumanMessage("And then?")])
    assert again.text == REPLY
    assert not any("spoke" in turn.text for turn in engine.requests[-1]["turns"])
