"""Messages, templates and arguments on their way to the engine."""

from __future__ import annotations

import base64
import copy
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.base.llms.types import (
    AudioBlock,
    CacheControl,
    CachePoint,
    ChatMessage,
    CitableBlock,
    CitationBlock,
    DocumentBlock,
    ImageBlock,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.output_parsers import PydanticOutputParser
from llama_index.core.prompts import ChatPromptTemplate, PromptTemplate, RichPromptTemplate
from llama_index.core.prompts.default_prompt_selectors import (
    DEFAULT_REFINE_PROMPT_SEL,
    DEFAULT_TEXT_QA_PROMPT_SEL,
    DEFAULT_TREE_SUMMARIZE_PROMPT_SEL,
)
from pydantic import BaseModel, Field

from qllm_integrations.llama_index import QLLM
from qllm_integrations.llama_index.messages import to_request
from qllm_runtime.errors import ClosedError, DocumentError, InvalidConfigError, InvalidRequestError
from qllm_runtime.prompt import build_prompt
from qllm_runtime.types import Document
from tests.integrations.byte_llama import byte_tokenizer
from tests.integrations.llama_index.fake_engine import FakeEngine
from tests.integrations.llama_index.tiny_model import SPECIALS, TEMPLATE
from tests.integrations.scripted_engine import thoughtful
from tests.office import EPUB, WORD, epub, word

BOOK = "The lamp was lit at dusk. The secret number of the harbour is 4711. Nobody spoke."
QUESTION = "What is the secret number?"


def citable(text: str = BOOK, title: str = "log.txt") -> CitableBlock:
    return CitableBlock(title=title, source=f"/data/{title}", content=text)


# which text is the query


def test_query_is_the_text_beside_the_document() -> None:
    request = to_request(
        [ChatMessage("Be brief.", role="system"), ChatMessage(blocks=[citable(), TextBlock(text=QUESTION)])]
    )
    assert (request.query, request.query_source) == (QUESTION, "message")
    assert request.turns[1].content == (Document(BOOK, "log.txt"), QUESTION)


def test_query_of_a_later_turn_and_of_no_document() -> None:
    first = ChatMessage(blocks=[citable(), TextBlock(text="First?")])
    talk = [first, ChatMessage("Yes.", role="assistant"), ChatMessage("Second?")]
    assert (to_request(talk).query, to_request(talk).query_source) == ("Second?", "message")
    assert to_request([ChatMessage("Hi")]).query_source == "fallback"
    assert to_request([ChatMessage("Hi")], with_memory=True).query_source == "message"
    apart = to_request([ChatMessage(QUESTION), ChatMessage(blocks=[citable()])])
    assert (apart.query, apart.query_source) == (QUESTION, "fallback")
    assert to_request([ChatMessage(blocks=[citable()])]).query_source == "none"


def test_tool_results_do_not_become_the_query() -> None:
    call = ToolCallBlock(tool_call_id="c", tool_name="look", tool_kwargs={"at": "map"})
    result = ChatMessage("A map.", role="tool", additional_kwargs={"tool_call_id": "c", "name": "look"})
    request = to_request([ChatMessage(QUESTION), ChatMessage(role="assistant", blocks=[call]), result])
    assert request.query == QUESTION
    assert request.turns[1].extras["tool_calls"][0]["function"] == {"name": "look", "arguments": {"at": "map"}}
    assert request.turns[2].role == "tool"
    assert request.turns[2].extras == {"tool_call_id": "c", "name": "look"}


def test_explicit_query_and_named_query(llm: QLLM) -> None:
    message = ChatMessage(blocks=[citable(), TextBlock(text=f"Please! {QUESTION} In English.")])
    raw = llm.chat([message], query=QUESTION).raw
    assert (raw["query"], raw["query_source"]) == (QUESTION, "explicit")
    message.additional_kwargs["query_str"] = QUESTION
    assert llm.chat([message]).raw["query"] == QUESTION


def test_foreign_tool_calls_in_additional_kwargs() -> None:
    openai = {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"at": "map"}'}}
    turn = to_request(
        [ChatMessage("Go"), ChatMessage("", role="assistant", additional_kwargs={"tool_calls": [openai]})]
    ).turns[1]
    assert turn.extras["tool_calls"][0]["function"] == {"name": "look", "arguments": {"at": "map"}}


# blocks


def test_document_blocks(tmp_path: Path) -> None:
    file = tmp_path / "log.txt"
    file.write_text(BOOK)
    for block in (DocumentBlock(path=file), DocumentBlock(data=BOOK.encode(), title="log.txt")):
        (document,) = to_request([ChatMessage(blocks=[block, TextBlock(text=QUESTION)])]).documents
        assert document == Document(BOOK, "log.txt")
    html = DocumentBlock(data=b"<html><body><p>Hello &amp; bye</p></body></html>", document_mimetype="text/html")
    assert to_request([ChatMessage(blocks=[html])]).documents[0].text.strip() == "Hello & bye"
    assert to_request([ChatMessage(blocks=[html])]).documents[0].title is None


@pytest.mark.parametrize(("name", "kind", "data"), [("a.docx", WORD, word(BOOK)), ("a.epub", EPUB, epub(BOOK))])
def test_word_files_and_books_as_blocks(tmp_path: Path, name: str, kind: str, data: bytes) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    for block in (
        DocumentBlock(path=file),
        DocumentBlock(data=data, title=name),
        DocumentBlock(data=base64.b64encode(data), document_mimetype=kind, title=name),
        DocumentBlock(url=f"data:{kind};base64,{base64.b64encode(data).decode()}", title=name),
        CitableBlock(title=name, source="s", content=[DocumentBlock(data=data)]),
    ):
        (document,) = to_request([ChatMessage(blocks=[block, TextBlock(text=QUESTION)])]).documents
        assert document == Document(BOOK, name)


@pytest.mark.parametrize("block", [DocumentBlock(path="/no/such/file.txt"), DocumentBlock(data=b"\x89PNG\x00\x00\x01")])
def test_unreadable_document_blocks(block: DocumentBlock) -> None:
    with pytest.raises(DocumentError):
        to_request([ChatMessage(blocks=[block, TextBlock(text=QUESTION)])])


def test_unsupported_and_misplaced_blocks_are_named() -> None:
    sound = AudioBlock(audio=base64.b64encode(b"RIFF"), format="wav")
    nested = CitableBlock(title="t", source="s", content=[ImageBlock(image=b"\x89PNG")])
    for block in (ImageBlock(image=b"\x89PNG"), sound, nested):
        with pytest.raises(InvalidRequestError, match=r"(Image|Audio)Block"):
            to_request([ChatMessage(blocks=[block])])
    with pytest.raises(InvalidRequestError, match="system"):
        to_request([ChatMessage(role="system", blocks=[citable()])])
    with pytest.raises(InvalidRequestError, match="no messages"):
        to_request([])


def test_citations_and_thoughts_of_earlier_answers_are_left_out() -> None:
    cited = CitationBlock(cited_content=TextBlock(text="x"), source="s", title="t", additional_location_info={})
    answer = ChatMessage(role="assistant", blocks=[ThinkingBlock(content="hm"), TextBlock(text="Yes."), cited])
    assert to_request([ChatMessage("A"), answer, ChatMessage("B")]).turns[1].content == ("Yes.",)


def test_citations_come_out_and_slice_the_document(llm: QLLM) -> None:
    response = llm.chat([ChatMessage(blocks=[citable(title="a"), citable(title="b"), TextBlock(text=QUESTION)])])
    citations = [block for block in response.message.blocks if isinstance(block, CitationBlock)]
    assert response.message.content == "It is 4711."
    assert {block.title for block in citations} == {"a", "b"}
    for block in citations:
        place = block.additional_location_info
        assert BOOK[place["start_char_index"] : place["end_char_index"]] == block.cited_content.text
        assert block.source == f"/data/{block.title}"
    assert response.raw["sources"][0]["score"] > 0


def test_cache_point_reads_once(llm: QLLM, engine: FakeEngine) -> None:
    point = CachePoint(cache_control=CacheControl(type="ephemeral"))

    def ask(question: str, *blocks: Any) -> dict[str, Any]:
        system = ChatMessage("Be brief.", role="system")
        return dict(llm.chat([system, ChatMessage(blocks=[*blocks, point, TextBlock(text=question)])]).raw)

    first = ask(QUESTION, citable())
    second = ask("And who spoke of the secret?", citable())
    assert len(engine.readings) == 1
    assert engine.readings[0].system == "Be brief."
    assert (first["mode"], first["usage"]["cache_read_tokens"]) == ("read_once", 0)
    assert first["usage"]["cache_creation_tokens"] == second["usage"]["cache_read_tokens"] == len(BOOK)
    assert second["sources"][0]["text"] in BOOK
    assert not any(turn.documents for turn in engine.requests[-1]["turns"])
    ask(QUESTION, citable(), citable("Another secret text."))
    assert engine.read_texts == [BOOK, "Another secret text."]
    bad = CachePoint(cache_control=CacheControl(type="ephemeral", ttl="soon"))
    with pytest.raises(InvalidRequestError, match="ttl"):
        llm.chat([ChatMessage(blocks=[citable(), bad, TextBlock(text=QUESTION)])])


def test_read_and_memory_argument(llm: QLLM, engine: FakeEngine) -> None:
    memory = llm.read(BOOK, system_prompt="Be brief.")
    response = llm.chat([ChatMessage(QUESTION)], memory=memory)
    assert engine.requests[-1]["memory"] is memory
    assert response.raw["query_source"] == "message"
    assert any(isinstance(block, CitationBlock) for block in response.message.blocks)
    assert llm.complete(QUESTION, memory=memory).raw["usage"]["cache_read_tokens"] == len(BOOK)


# templates


@pytest.mark.parametrize(
    "prompt",
    [
        DEFAULT_TEXT_QA_PROMPT_SEL,
        DEFAULT_TEXT_QA_PROMPT_SEL.partial_format(query_str=QUESTION),
        DEFAULT_TREE_SUMMARIZE_PROMPT_SEL,
        PromptTemplate("{context_str}\nQ: {query_str}"),
        RichPromptTemplate("Read {{ context_str }} and answer {{ query_str }}"),
        ChatPromptTemplate([ChatMessage("Read: {context_str}", role="system"), ChatMessage("{query_str}")]),
        pytest.param(
            ChatPromptTemplate([ChatMessage(blocks=[citable("{context_str}"), TextBlock(text="{query_str}")])]),
            marks=pytest.mark.skipif(
                not hasattr(CitableBlock, "format_vars"), reason="this core formats no nested blocks"
            ),
        ),
    ],
)
def test_templates_route_by_name(llm: QLLM, engine: FakeEngine, prompt: Any) -> None:
    text = BOOK + " {braces} stay."
    assert llm.predict(prompt, context_str=text, query_str=QUESTION) == "It is 4711."
    request = engine.requests[-1]
    assert (request["query"], request["query_source"]) == (QUESTION, "explicit")
    assert [document.text for turn in request["turns"] for document in turn.documents] == [text]
    assert not any("lamp" in turn.text for turn in request["turns"])
    assert QUESTION in request["turns"][-1].text


async def test_templates_route_in_all_forms(llm: QLLM, engine: FakeEngine) -> None:
    prompt, values = DEFAULT_TEXT_QA_PROMPT_SEL, {"context_str": [BOOK, "More."], "query_str": QUESTION}
    llm.predict(prompt, **values)
    list(llm.stream(prompt, **values))
    await llm.apredict(prompt, **values)
    [token async for token in await llm.astream(prompt, **values)]
    for request in engine.requests:
        assert request["query"] == QUESTION
        assert [document.text for document in request["turns"][-1].documents] == [BOOK, "More."]


def test_refine_template(llm: QLLM, engine: FakeEngine) -> None:
    llm.predict(DEFAULT_REFINE_PROMPT_SEL, context_msg=BOOK, existing_answer="42", query_str=QUESTION)
    turns = engine.requests[-1]["turns"]
    assert [document.text for turn in turns for document in turn.documents] == [BOOK]
    assert engine.requests[-1]["query"] == QUESTION


def test_schema_instruction_stays_out_of_the_query(llm: QLLM, engine: FakeEngine) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
    llm.chat([ChatMessage(blocks=[citable(), TextBlock(text=QUESTION)])], response_schema=schema)
    assert engine.requests[-1]["query"] == QUESTION
    assert "JSON schema" in engine.requests[-1]["turns"][-1].text


# arguments and life


def test_call_arguments_reach_the_engine(llm: QLLM, engine: FakeEngine) -> None:
    llm.complete(
        "Hi",
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stop="x",
        logprobs=1,
        mode="read_once",
        template_kwargs={"think": False},
    )
    request = engine.requests[-1]
    sampling = request["sampling"]
    assert (sampling.temperature, sampling.top_p, sampling.seed, sampling.stop) == (0.5, 0.9, 3, ("x",))
    assert (sampling.logprobs, sampling.max_tokens) == (1, 256)
    assert (request["mode"], request["template_kwargs"]) == ("read_once", {"think": False})
    llm.complete("Hi")
    assert engine.requests[-1]["sampling"].temperature == 0.0


def test_typos_are_named() -> None:
    with pytest.warns(UserWarning, match="did you mean 'temperature'"):
        QLLM(temprature=0.5)
    with pytest.raises(ValueError, match="temperature"):
        QLLM(temperature=-1)
    with pytest.raises(ValueError, match="n_lokal"):
        QLLM(memory={"n_lokal": 3})
    with pytest.raises(ValueError, match="chat template"):
        QLLM(messages_to_prompt=lambda messages: "")


def test_closing_a_copy_leaves_the_others_open(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qllm_runtime.engine.QLLM.from_pretrained", lambda **settings: engine)
    llm = QLLM()
    llm.complete("Hi")
    for copied in (copy.deepcopy(llm), copy.copy(llm), llm.model_copy(update={"reread": False})):
        copied.close()
        with pytest.raises(ClosedError):
            copied.complete("Hi")
        assert llm.complete("Hi").text
    copied = copy.copy(llm)
    llm.close()
    assert copied.complete("Hi").text
    copied.close()
    assert engine.closed


async def test_closed_model(llm: QLLM, engine: FakeEngine) -> None:
    with llm:
        llm.complete("Hi")
    assert not engine.closed  # it was given to from_engine
    with pytest.raises(ClosedError):
        llm.complete("Hi")
    with pytest.raises(ClosedError):
        await llm.acomplete("Hi")
    with pytest.raises(ClosedError):
        list(llm.stream_complete("Hi"))
    with pytest.raises(ClosedError):
        [chunk async for chunk in await llm.astream_complete("Hi")]


def test_secrets_and_documents_stay_out_of_sight(llm: QLLM) -> None:
    secret = QLLM(token="hf_secret")
    assert "hf_secret" not in repr(secret) + str(secret.to_dict()) + str(secret.to_payload())
    memory = llm.read(BOOK)
    assert "lamp" not in repr(llm) + str(llm.to_payload())
    assert memory.n_tokens


def test_tools_without_choice_and_with_none(llm: QLLM, engine: FakeEngine) -> None:
    tools = [{"type": "function", "function": {"name": "look", "description": "", "parameters": {"type": "object"}}}]
    llm.chat([ChatMessage("Hi")], tools=tools)
    assert engine.requests[-1]["tools"] == tools
    llm.chat([ChatMessage("Hi")], tools=tools, tool_choice="none")
    assert engine.requests[-1]["tools"] is None
    with pytest.raises(InvalidRequestError, match="no tools"):
        llm.chat([ChatMessage("Hi")], tool_choice="required")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory": "x"}, "memory takes what QLLM.read returns, got a str"),
        ({"memory": {"n_local": 64}}, "a MemoryConfig goes to QLLM"),
        ({"tools": "x"}, "tools takes a sequence of tools, got a str"),
        ({"tools": 5}, "tools takes a sequence of tools, got a int"),
        ({"tools": ["x"]}, "tools holds a str that is not a tool"),
        ({"tools": [{"name": "look"}]}, "OpenAI's form"),
        ({"response_schema": 5}, "response_schema takes a JSON schema as a dict, got a int"),
        ({"response_schema": BaseModel}, "got the class BaseModel"),
    ],
)
def test_arguments_of_another_type_are_refused(llm: QLLM, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        llm.chat([ChatMessage("Hi")], **arguments)


@pytest.mark.parametrize("name", ["memory", "stop", "template_kwargs"])
def test_settings_of_another_type_are_refused(name: str) -> None:
    with pytest.raises(InvalidConfigError, match=name):
        QLLM(**{name: 5})


def test_unforced_call_is_parsed(engine: FakeEngine, llm: QLLM) -> None:
    engine.script = lambda query, documents: (
        'Let me see. <tool_call>\n{"name": "look", "arguments": {"at": "map"}}\n</tool_call>'
    )
    tools = [{"type": "function", "function": {"name": "look", "description": "", "parameters": {"type": "object"}}}]
    chunks = list(llm.stream_chat([ChatMessage("Hi")], tools=tools))
    assert "".join(chunk.delta or "" for chunk in chunks) == "Let me see."
    (selected,) = llm.get_tool_calls_from_response(chunks[-1])
    assert (selected.tool_name, selected.tool_kwargs) == ("look", {"at": "map"})
    assert chunks[-1].raw["finish_reason"] == "tool_calls"


def test_long_messages_ask_unguided(llm: QLLM, engine: FakeEngine) -> None:
    long = "word " * 1000
    assert llm.complete(long).raw["query_source"] == "none"
    with pytest.warns(UserWarning, match="n_local"):
        llm.chat([ChatMessage(blocks=[citable(), TextBlock(text=long)])])
    assert llm.complete(long, query=QUESTION).raw["query"] == QUESTION


def test_cache_point_behind_two_system_messages(llm: QLLM, engine: FakeEngine) -> None:
    point = CachePoint(cache_control=CacheControl(type="ephemeral"))
    systems = [ChatMessage("One.", role="system"), ChatMessage("Two.", role="system")]
    llm.chat([*systems, ChatMessage(blocks=[citable(), point, TextBlock(text=QUESTION)])])
    assert engine.readings[0].system == engine.requests[-1]["turns"][0].text == "One.\n\nTwo."
    assert len(engine.requests[-1]["turns"]) == 2


@pytest.mark.parametrize("mode", ["query_aware", "read_once"])
@pytest.mark.parametrize(
    "messages",
    [
        [ChatMessage(blocks=[citable(), TextBlock(text=QUESTION)])],
        [ChatMessage(blocks=[TextBlock(text=QUESTION), citable()])],
        [ChatMessage(QUESTION), ChatMessage(blocks=[citable()])],
        [ChatMessage(blocks=[citable(f"{BOOK} {QUESTION} {BOOK}"), TextBlock(text=QUESTION)])],
        [
            ChatMessage("Sys", role="system"),
            ChatMessage(blocks=[citable(), citable("More."), TextBlock(text=QUESTION)]),
        ],
        [
            ChatMessage(blocks=[citable(), TextBlock(text="A?")]),
            ChatMessage("B.", role="assistant"),
            ChatMessage(QUESTION),
        ],
        [
            ChatMessage(
                blocks=[TextBlock(text="Please."), TextBlock(text=QUESTION), citable()],
                additional_kwargs={"query_str": QUESTION},
            )
        ],
        [
            ChatMessage(blocks=[citable(), TextBlock(text=QUESTION)]),
            ChatMessage(role="assistant", blocks=[ToolCallBlock(tool_call_id="c", tool_name="look", tool_kwargs={})]),
            ChatMessage("A map.", role="tool", additional_kwargs={"tool_call_id": "c", "name": "look"}),
        ],
    ],
)
def test_routed_span_is_exactly_the_question(messages: list[ChatMessage], mode: Any) -> None:
    tokenizer = byte_tokenizer(SPECIALS, TEMPLATE)
    request = to_request(messages)
    prompt = build_prompt(tokenizer, request.turns, query=request.query, mode=mode)
    assert prompt.query_spans
    for start, end in prompt.query_spans:
        assert tokenizer.decode(prompt.ids[start:end]) == QUESTION
    for span, document in zip(prompt.document_spans, request.documents, strict=True):
        assert tokenizer.decode(prompt.ids[span.start : span.end]) == document.text


async def test_bad_schema_in_all_forms(llm: QLLM) -> None:
    arguments: dict[str, Any] = {"response_schema": {"type": "object", "properties": {"a": {"type": "nonsense"}}}}
    messages = [ChatMessage("Hi")]
    with pytest.raises(InvalidRequestError, match="schema"):
        llm.chat(messages, **arguments)
    with pytest.raises(InvalidRequestError, match="schema"):
        llm.stream_chat(messages, **arguments)
    with pytest.raises(InvalidRequestError, match="schema"):
        await llm.achat(messages, **arguments)
    with pytest.raises(InvalidRequestError, match="schema"):
        await llm.astream_chat(messages, **arguments)


def test_output_parser_of_the_model_constrains(engine: FakeEngine) -> None:
    class Number(BaseModel):
        value: int = Field(ge=0, le=9)

    llm = QLLM.from_engine(engine, output_parser=PydanticOutputParser(Number))
    assert "value" in llm.predict(PromptTemplate("{query_str}"), query_str=QUESTION)
    assert engine.requests[-1]["logits_processors"]
    assert engine.requests[-1]["query"] == QUESTION


def test_cache_point_behind_a_greeting_is_only_a_hint(llm: QLLM, engine: FakeEngine) -> None:
    point = CachePoint(cache_control=CacheControl(type="ephemeral"))
    greeting = ChatMessage("How can I help?", role="assistant")
    llm.chat([greeting, ChatMessage(blocks=[citable(), point, TextBlock(text=QUESTION)])])
    assert not engine.readings
    assert engine.requests[-1]["turns"][1].documents


def test_memory_and_the_same_document_again(llm: QLLM) -> None:
    memory = llm.read(citable().content[0].text)
    response = llm.chat([ChatMessage(blocks=[citable(title=""), TextBlock(text=QUESTION)])], memory=memory)
    sources = [block.source for block in response.message.blocks if isinstance(block, CitationBlock)]
    assert sorted(sources) == ["", "/data/"]


async def test_aread(llm: QLLM, engine: FakeEngine) -> None:
    memory = await llm.aread([BOOK, "More."], system_prompt="Be brief.")
    assert (len(memory.documents), memory.system) == (2, "Be brief.")
    with pytest.raises(InvalidRequestError, match="int"):
        llm.read([3])


def test_kept_documents_expire(llm: QLLM, engine: FakeEngine) -> None:
    point = CachePoint(cache_control=CacheControl(type="ephemeral", ttl="0s"))
    for _ in range(2):
        llm.chat([ChatMessage(blocks=[citable(), point, TextBlock(text=QUESTION)])])
    assert len(engine.readings) == 2


def test_few_documents_are_kept(llm: QLLM, engine: FakeEngine) -> None:
    point = CachePoint(cache_control=CacheControl(type="ephemeral"))
    for text in ("One.", "Two.", "Three.", "One."):
        llm.chat([ChatMessage(blocks=[citable(text), point, TextBlock(text=QUESTION)])])
    assert engine.read_texts == ["One.", "Two.", "Three.", "One."]
    assert len(llm.shelf) == 2


def test_thoughts_are_thinking_blocks_and_no_part_of_the_answer() -> None:
    llm = QLLM.from_engine(thoughtful(FakeEngine("It is 4711."), "Look it up.", 5))
    question = [ChatMessage(QUESTION)]
    whole, streamed = llm.chat(question), list(llm.stream_chat(question))
    for message in (whole.message, streamed[-1].message):
        assert message.content == "It is 4711."
        assert [block.content for block in message.blocks if isinstance(block, ThinkingBlock)] == ["Look it up."]
    assert whole.raw["usage"]["reasoning_tokens"] == 5
    assert "".join(response.delta for response in streamed) == "It is 4711."
    thought = [response.additional_kwargs.get("thinking_delta", "") for response in streamed]
    assert "".join(thought) == "Look it up."
    assert [response.text for response in llm.stream_complete(QUESTION)][-1] == "It is 4711."
