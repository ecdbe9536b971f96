"""Inside LlamaIndex's own routers, programs, agents, parsers and chat engines: what those assume of a model and an answer."""

from __future__ import annotations

import copy
import json
import time
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
from llama_index.core import Document
from llama_index.core.agent.workflow import FunctionAgent, ReActAgent
from llama_index.core.base.llms.types import CitableBlock, MessageRole, TextBlock, ToolCallBlock
from llama_index.core.chat_engine.types import BaseChatEngine
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.node_parser import JSONNodeParser, SentenceSplitter, SentenceWindowNodeParser
from llama_index.core.postprocessor import MetadataReplacementPostProcessor
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import RouterQueryEngine
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.tools import FunctionTool, QueryEngineTool
from llama_index.core.types import PydanticProgramMode
from pydantic import BaseModel

from qllm_integrations.llama_index import QLLM, QLLMSynthesizer, WholeDocumentIndex
from qllm_integrations.llama_index.messages import to_request
from qllm_runtime.errors import InvalidRequestError
from tests.integrations.llama_index.fake_engine import FakeEngine

BOOK = "The lamp was lit at dusk. The secret number of the harbour is 4711. Nobody spoke."
QUESTION = "What is the secret number?"
CALL = '<tool_call>\n{"name": "Person", "arguments": {"name": "Bob"}}\n</tool_call>'


class Person(BaseModel):
    """Somebody."""

    name: str


@pytest.fixture
def index(llm: QLLM) -> WholeDocumentIndex:
    return WholeDocumentIndex.from_documents([Document(text=BOOK, id_="book")], llm=llm)


def clock() -> str:
    """The time."""
    return "noon"


# streaming responses


@pytest.fixture
def router(index: WholeDocumentIndex, llm: QLLM, engine: FakeEngine) -> RouterQueryEngine:
    engine.script = lambda query, documents: "It is 4711." if documents else '[{"choice": 1, "reason": "fits"}]'
    streaming = index.as_query_engine(streaming=True)
    tools = [QueryEngineTool.from_defaults(streaming, name=name, description=name) for name in "ab"]
    return RouterQueryEngine.from_defaults(tools, llm=llm, selector=LLMSingleSelector.from_defaults(llm=llm))


def test_streaming_behind_a_router(router: RouterQueryEngine, engine: FakeEngine) -> None:
    written = len('[{"choice": 1, "reason": "fits"}]')
    response = router.query(QUESTION)
    assert engine.tokens_written == written  # nothing waited for the answer
    assert "".join(response.response_gen) == "It is 4711."
    assert response.metadata["qllm"]["query"] == QUESTION
    assert response.metadata["selector_result"].selections[0].index == 0
    assert response.source_nodes[0].node.ref_doc_id == "book"


async def test_async_streaming_behind_a_router(router: RouterQueryEngine) -> None:
    response = await router.aquery(QUESTION)
    assert "".join([text async for text in response.async_response_gen()]) == "It is 4711."
    assert response.metadata["qllm"]["query"] == QUESTION
    assert response.metadata["selector_result"].selections[0].index == 0
    assert response.source_nodes[0].node.ref_doc_id == "book"


@pytest.mark.parametrize("own", [{}, {"mine": 1}, None])
async def test_what_is_assigned_meets_what_the_answer_adds(index: WholeDocumentIndex, own: Any) -> None:
    mine = NodeWithScore(node=TextNode(text="mine"), score=1.0)
    expected = {*(own or ()), "qllm", "book:26-66", mine.node.node_id}
    response = index.as_query_engine(streaming=True).query(QUESTION)
    response.metadata, response.source_nodes = copy.copy(own), [mine]
    assert str(response) == "It is 4711."
    assert set(response.metadata) == expected
    assert [found.node.text[:10] for found in response.source_nodes] == ["mine", "The secret"]
    later = await index.as_query_engine(streaming=True).aquery(QUESTION)
    later.metadata, later.source_nodes = copy.copy(own), [mine]
    assert "".join([text async for text in later.async_response_gen()]) == "It is 4711."
    assert set(later.metadata) == expected
    assert [found.node.text[:10] for found in later.source_nodes] == ["mine", "The secret"]


@pytest.mark.parametrize(
    "read",
    [
        lambda metadata: metadata["qllm"]["query"] == QUESTION,
        lambda metadata: set(metadata) == {"qllm", "book:26-66"},
        lambda metadata: len(metadata) == 2,
        lambda metadata: "qllm" in metadata,
        lambda metadata: metadata.get("qllm") is not None,
        lambda metadata: len(dict(metadata)) == len({**metadata}) == len(metadata.copy()) == 2,
        lambda metadata: json.loads(json.dumps(metadata)).keys() == {"qllm", "book:26-66"},
        lambda metadata: copy.deepcopy(metadata) == metadata and type(copy.deepcopy(metadata)) is dict,
        lambda metadata: "qllm" in repr(metadata) and metadata != {},
    ],
)
def test_reading_metadata_early_waits(index: WholeDocumentIndex, read: Any) -> None:
    response = index.as_query_engine(streaming=True).query(QUESTION)
    assert read(response.metadata)
    assert "".join(response.response_gen) == "It is 4711."


# programs


async def test_streamed_programs_that_call_functions(llm: QLLM, engine: FakeEngine) -> None:
    engine.script = lambda query, documents: CALL
    program = FunctionCallingProgram.from_defaults(output_cls=Person, prompt_template_str="Who is {x}?", llm=llm)
    assert [str(found) for found in program.stream_call(x="a")][-1] == "name='Bob'"
    streamed = [found async for found in await program.astream_call(x="a")]
    assert streamed[-1] == Person(name="Bob")
    llm.pydantic_program_mode = PydanticProgramMode.FUNCTION
    assert list(llm.stream_structured_predict(Person, PromptTemplate("Who?")))[-1] == Person(name="Bob")


def test_tool_calls_in_openai_shape_are_the_blocks_again(llm: QLLM, engine: FakeEngine) -> None:
    engine.script = lambda query, documents: f"{CALL}\n{CALL}"
    tool = FunctionTool.from_defaults(clock, name="Person")
    message = llm.chat([ChatMessage("Who?")], tools=[tool]).message
    (first, second) = message.additional_kwargs["tool_calls"]
    blocks = [block for block in message.blocks if isinstance(block, ToolCallBlock)]
    assert [first["id"], second["id"]] == [block.tool_call_id for block in blocks]
    assert first["function"] == {"name": "Person", "arguments": '{"name": "Bob"}'}
    request = to_request([ChatMessage("Who?"), message])
    assert [call["id"] for call in request.turns[1].extras["tool_calls"]] == [first["id"], second["id"]]
    one = llm.chat_with_tools([tool], user_msg="Who?").message
    assert len(one.additional_kwargs["tool_calls"]) == 1
    engine.script = lambda query, documents: "Nobody."
    assert llm.chat([ChatMessage("Who?")], tools=[tool]).message.additional_kwargs == {}


# retrieved nodes


@pytest.mark.parametrize("streaming", [False, True])
async def test_blank_nodes_are_left_out(llm: QLLM, engine: FakeEngine, streaming: bool) -> None:
    synthesizer = QLLMSynthesizer(llm, streaming=streaming)
    solid, blank = (NodeWithScore(node=TextNode(text=text), score=1.0) for text in (BOOK, " \n"))
    for nodes, answer in (([blank, solid], "It is 4711."), ([blank], "Empty Response")):
        assert str(synthesizer.synthesize(QUESTION, nodes)) == answer
        response = await synthesizer.asynthesize(QUESTION, nodes)
        if streaming:
            assert "".join([text async for text in response.async_response_gen()]) == answer
        else:
            assert str(response) == answer
    assert [[d.text for d in r["turns"][-1].documents] for r in engine.requests] == [[BOOK]] * 2
    untouched = synthesizer.synthesize("Hm?", [blank, solid])
    assert str(untouched) == "It is 4711."
    assert untouched.source_nodes == [solid]


def test_passages_of_slices_count_in_the_document(llm: QLLM) -> None:
    document = Document(text=f"{BOOK} " * 4, id_="d")
    nodes = SentenceSplitter(chunk_size=25, chunk_overlap=0).get_nodes_from_documents([document])
    response = QLLMSynthesizer(llm).synthesize(QUESTION, [NodeWithScore(node=node, score=1.0) for node in nodes])
    assert len(nodes) > 1
    for found in response.source_nodes:
        assert found.node.node_id == f"d:{found.node.start_char_idx}-{found.node.end_char_idx}"
        assert document.text[found.node.start_char_idx : found.node.end_char_idx] == found.node.text


def test_passages_of_other_nodes_count_in_the_node(llm: QLLM) -> None:
    rows = Document(text=json.dumps([{"a": "secret number 4711"}, {"a": "secret number 4712"}]), id_="j")
    given = JSONNodeParser().get_nodes_from_documents([rows])
    prose = Document(text="Alpha. The lamp was lit. The secret number is 4711. Nobody spoke. Omega.", id_="d")
    window = SentenceWindowNodeParser.from_defaults(window_size=1).get_nodes_from_documents([prose])[2]
    given += [
        found.node
        for found in MetadataReplacementPostProcessor("window").postprocess_nodes([NodeWithScore(node=window)])
    ]
    response = QLLMSynthesizer(llm).synthesize(QUESTION, [NodeWithScore(node=node, score=1.0) for node in given])
    whole = {node.node_id: node.get_content() for node in given}
    assert {found.node.parent_node.node_id for found in response.source_nodes} == set(whole)
    assert len({found.node.node_id for found in response.source_nodes}) == 3
    for found in response.source_nodes:
        node, parent = found.node, found.node.parent_node.node_id
        assert node.node_id.startswith(parent)
        assert whole[parent][node.start_char_idx : node.end_char_idx] == node.text
        assert node.node_id in response.metadata


# agents


async def test_react_agents_look_up_what_the_human_asked(llm: QLLM, engine: FakeEngine) -> None:
    steps = iter(
        [
            "Thought: I need a tool.\nAction: clock\nAction Input: {}",
            "No form at all.\nAction:",
            "Thought: I can answer.\nAnswer: 4711",
        ]
    )
    engine.script = lambda query, documents: next(steps)
    result = await ReActAgent(tools=[FunctionTool.from_defaults(clock)], llm=llm).run(QUESTION)
    assert str(result) == "4711"
    assert [request["query"] for request in engine.requests] == [QUESTION] * 3
    assert any(turn.text.startswith("Observation: noon") for turn in engine.requests[-1]["turns"])
    document = CitableBlock(title="b", source="b", content=BOOK)
    asked = ChatMessage(blocks=[document, TextBlock(text=QUESTION)])
    step = ChatMessage("Thought: look.\nAction: clock\nAction Input: {}", role="assistant")
    request = to_request([asked, step, ChatMessage("Observation: noon")])
    assert (request.query, request.query_source) == (QUESTION, "message")


async def test_agents_with_an_output_class_look_up_what_the_human_asked(llm: QLLM, engine: FakeEngine) -> None:
    call = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    steps = iter([call, "It is Bob.", '{"name": "Bob"}'])
    engine.script = lambda query, documents: next(steps)
    agent = FunctionAgent(tools=[FunctionTool.from_defaults(clock)], llm=llm, output_cls=Person, system_prompt="Hm.")
    assert (await agent.run(QUESTION)).structured_response == {"name": "Bob"}
    assert [request["query"] for request in engine.requests] == [QUESTION] * 3
    assert "current_conversation" in engine.requests[-1]["turns"][-1].text


def test_people_may_speak_of_observations() -> None:
    def query(*messages: tuple[str, str]) -> str:
        return to_request([ChatMessage(text, role=role) for role, text in messages]).query

    assert query(("user", "Observation: it rains.")) == "Observation: it rains."
    spoken = (("user", "Hi"), ("assistant", "Ho"), ("user", "Observation: it rains."))
    assert query(*spoken) == "Observation: it rains."
    step = ("assistant", "Thought: look.\nAction: x\nAction Input: {}")
    assert query(("user", "Hi"), step, ("user", "Observation: a"), ("user", "Observation: b")) == "Hi"
    assert query(("user", "Hi"), step, ("user", "Go on")) == "Go on"


# LlamaIndex's chat engines

CONDENSING = ("condense_question", "condense_plus_context")


def history() -> dict[str, Any]:
    return {"memory": ChatMemoryBuffer.from_defaults(token_limit=1000, tokenizer_fn=str.split)}


@pytest.mark.parametrize("streaming", [{}, {"streaming": True}])
async def test_condense_question_streams(index: WholeDocumentIndex, engine: FakeEngine, streaming: Any) -> None:
    engine.script, engine.step = (lambda query, documents: "word " * 10), 0.005
    chat = index.as_chat_engine("condense_question", **streaming, **history())
    started = time.perf_counter()
    answer = chat.stream_chat(QUESTION)
    assert time.perf_counter() - started < 0.2
    assert engine.tokens_written < 50
    assert "".join(answer.response_gen) == "word " * 10
    assert answer.source_nodes[0].node.ref_doc_id == "book"
    assert answer.sources[0].raw_output.source_nodes == answer.source_nodes
    answer = await chat.astream_chat("And then?")
    assert "".join([text async for text in answer.async_response_gen()]) == "word " * 10
    assert str(chat.chat(QUESTION)) == "word " * 10
    assert [message.role for message in chat.chat_history] == [MessageRole.USER, MessageRole.ASSISTANT] * 3
    assert chat.chat_history[0].content == QUESTION


async def test_condense_question_tells_of_errors(index: WholeDocumentIndex, engine: FakeEngine) -> None:
    def fail(query: str, documents: Sequence[Any]) -> str:
        raise MemoryError("full")

    engine.script = fail
    chat = index.as_chat_engine("condense_question", **history())
    with pytest.raises(MemoryError):
        list(chat.stream_chat(QUESTION).response_gen)
    assert chat.chat_history == []


@pytest.mark.parametrize("mode", [*CONDENSING, "simple"])
def test_arguments_of_chat_engines_go_where_they_belong(index: WholeDocumentIndex, mode: str) -> None:
    common = {"chat_history": [ChatMessage("Hi")], "system_prompt": "Be kind.", "verbose": True}
    own = {
        "condense_question": {"similarity_top_k": 1, "max_tokens": 50},
        "condense_plus_context": {"similarity_top_k": 1, "skip_condense": True},
        "simple": {},
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        index.as_chat_engine(mode, **common)
        index.as_chat_engine(mode, **history(), **own[mode])
    with pytest.warns(UserWarning, match=r"as_chat_engine.*'colour'"):
        index.as_chat_engine(mode, colour="red")


def system_prompts_heard(chat: BaseChatEngine, engine: FakeEngine) -> str:
    engine.requests.clear()
    assert str(chat.chat(QUESTION)) == "It is 4711."
    return "\n".join(turn.text for turn in engine.requests[-1]["turns"])


@pytest.mark.parametrize("mode", ["best", *CONDENSING, "simple"])
def test_system_prompts_reach_the_answer(llm: QLLM, engine: FakeEngine, mode: str) -> None:
    index = WholeDocumentIndex.from_documents([Document(text=BOOK)], llm=llm, system_prompt="Be brief.")
    assert "Be brief." in system_prompts_heard(index.as_chat_engine(mode), engine)
    heard = system_prompts_heard(index.as_chat_engine(mode, system_prompt="Be kind."), engine)
    assert "Be kind." in heard
    assert "Be brief." not in heard


def test_own_prefix_of_a_simple_chat(llm: QLLM, engine: FakeEngine) -> None:
    index = WholeDocumentIndex.from_documents([Document(text=BOOK)], llm=llm, system_prompt="Be brief.")
    prefix = [ChatMessage("Be loud.", role="system")]
    assert "Be loud." in system_prompts_heard(index.as_chat_engine("simple", prefix_messages=prefix), engine)


@pytest.mark.parametrize("mode", ["react", "shout"])
def test_modes_that_are_not_there(index: WholeDocumentIndex, mode: Any) -> None:
    with pytest.raises(InvalidRequestError, match=mode):
        index.as_chat_engine(mode)
