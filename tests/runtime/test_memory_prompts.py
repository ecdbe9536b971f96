"""Questions to documents that were read before: whatever the template writes ahead of them, they are not read again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny

from qllm_runtime.document_memory import DocumentMemory
from qllm_runtime.engine import QLLM
from qllm_runtime.errors import InvalidRequestError
from qllm_runtime.prompt import Prompt
from qllm_runtime.request import build_request_prompt, resolve
from qllm_runtime.rereading import serve_request
from qllm_runtime.types import Answer, Document, Turn

TURNS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOLS = "<s>{% if tools %}<|system|>{% for t in tools %}{{ t | tojson }}{% endfor %}</s>{% endif %}" + TURNS
LLAMA = TOOLS.replace("<s>", '<s>{# {"name": ..., "parameters": ...} #}', 1)
CLOCK = "<s><|system|>It is {{ strftime_now('%H:%M:%S.%f') }}.</s>" + TURNS
EFFORT = "<s><|system|>Effort: {{ effort | default('low') }}</s>" + TURNS
TOOL = {
    "type": "function",
    "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}},
}
BOOK = "It was Ann who came to the house. " * 9
WHO, HM = Turn("user", ("Who?",)), Turn("assistant", ("Hm.",))


def engine(template: str) -> QLLM:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return QLLM(tiny.model(), tokenizer, tiny.MEMORY)


def prompt(llm: QLLM, turns: list[Turn], memory: DocumentMemory, **options: Any) -> str:
    request, _ = llm._request(turns, None, "none", memory, options)  # type: ignore[arg-type]
    laid_out = build_request_prompt(resolve(request))
    (span,) = laid_out.document_spans
    assert llm.tokenizer.decode(laid_out.ids[span.start : span.end]) == BOOK
    assert [llm.tokenizer.decode(laid_out.ids[a:b]) for a, b in laid_out.query_spans] == ["Who?"]
    return str(llm.tokenizer.decode(laid_out.ids))


def answered(llm: QLLM, turns: list[Turn], memory: DocumentMemory, **options: Any) -> Answer:
    answer = llm.chat(turns, memory=memory, max_tokens=4, **options)
    assert answer.usage.cache_read_tokens == memory.n_tokens
    return answer


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (TOOLS, '<tool_call>{"name": ..., "arguments": {...}}</tool_call>'),
        (LLAMA, '{"name": ..., "parameters": {...}}'),
    ],
)
def test_tools_that_a_template_writes_ahead_follow_documents_read_before(template: str, form: str) -> None:
    with engine(template) as llm:
        memory = llm.read(BOOK)
        text = prompt(llm, [WHO], memory, tools=[TOOL])
        assert text.index(BOOK) < text.index('{"name": "look"') < text.index(f"write {form}") < text.index("Who?")
        answered(llm, [WHO], memory, tools=[TOOL])
        counted = llm.count_prompt_tokens([WHO], memory=memory, tools=[TOOL])
        assert counted == llm.chat([WHO], memory=memory, tools=[TOOL], max_tokens=1).usage.prompt_tokens
        inline = llm.chat([Turn("user", (memory.documents[0], "Who?"))], tools=[TOOL], max_tokens=4)
        assert inline.text  # as the template has it


def test_a_date_ahead_of_the_documents_is_that_of_the_reading() -> None:
    with engine(CLOCK) as llm:
        memory = llm.read(BOOK)
        assert prompt(llm, [WHO], memory).count("It is ") == 1
        first, second = (answered(llm, [WHO], memory, reread=False) for _ in range(2))
        assert first.token_ids == second.token_ids
        assert first.sources == second.sources
        answered(llm, [WHO], memory, tools=[TOOL])
        with pytest.raises(InvalidRequestError, match="does not begin with the documents"):
            llm.chat([Turn("assistant", ("Hm.",)), WHO], memory=memory)


@pytest.mark.parametrize(
    "turns",
    [
        [Turn("user", ("Who?",)), Turn("assistant", ("Hm.",)), Turn("tool", (Document(BOOK),))],
        [Turn("user", ("Hi.",)), Turn("assistant", ("Hm.",)), Turn("user", (Document(BOOK),)), HM, WHO],
    ],
    ids=["tool", "later"],
)
def test_documents_anywhere_in_a_conversation_are_read_again_under_a_clock(turns: list[Turn]) -> None:
    """The reading is this conversation's own: its beginning, tools included, stays, and passages follow it."""
    with engine(CLOCK.replace(TURNS, "") + TOOLS.removeprefix("<s>")) as llm:
        decode = llm.tokenizer.decode
        request, cancelled = llm._request(turns, None, "none", None, {"max_tokens": 2, "tools": [TOOL]})
        seen: list[Prompt] = []
        *_, last = serve_request(replace(request, on_answer=lambda prompt, _: seen.append(prompt)), cancelled)
    assert last.answer is not None and last.answer.reread
    (last_prompt,) = seen
    text = decode(last_prompt.ids)
    assert text.count("It is ") == text.count('{"name": "look"') == text.count(BOOK) == 1
    assert text.index('{"name": "look"') < text.index(BOOK)
    home, *passages = ((span.start, span.end) for span in last_prompt.document_spans)
    assert passages
    for start, end in passages:
        assert decode(last_prompt.ids[start:end]) in BOOK
        assert start > home[1]
    assert last_prompt.read_end == passages[-1][1]
    for source in last.answer.sources:
        assert source.text == BOOK[source.start : source.end]


def test_variables_of_the_template_belong_to_the_reading() -> None:
    with engine(EFFORT) as llm:
        memory = llm.read(BOOK, template_kwargs={"effort": "high"})
        assert "Effort: high" in prompt(llm, [WHO], memory)
        answered(llm, [WHO], memory)
        answered(llm, [WHO], memory, template_kwargs={"effort": "high"})
        with pytest.raises(InvalidRequestError, match=r"read with template_kwargs=\{'effort': 'high'\}"):
            llm.chat([WHO], memory=memory, template_kwargs={"effort": "none"})
        more = llm.read("And Bob.", after=memory)
        assert more.template_kwargs == {"effort": "high"}
        assert answered(llm, [WHO], more).usage.cache_read_tokens > memory.n_tokens
        with pytest.raises(InvalidRequestError, match="template_kwargs"):
            llm.read("And Bob.", after=memory, template_kwargs={"effort": "low"})
        turns = [Turn("user", (memory.documents[0], "Who?"))]
        assert llm.count_prompt_tokens(turns, template_kwargs={"effort": "high"}) == llm.count_prompt_tokens(turns) + 1


def test_a_memory_keeps_its_layout() -> None:
    with engine(tiny.TEMPLATE) as llm:
        memory = llm.read(BOOK, system="Be brief.")
        expected = answered(llm, [WHO], memory)
        llm.memory = llm.memory.replace(block_size=16, topk=1, policy="streaming")
        assert answered(llm, [WHO], memory).token_ids == expected.token_ids
        assert llm.read("And Bob.", after=memory).config == memory.config
        with pytest.raises(InvalidRequestError, match="system text"):
            llm.read("And Bob.", after=memory, system="Be long.")


def test_several_leading_system_turns() -> None:
    one, two = Turn("system", ("Be brief.",)), Turn("system", ("Be kind.",))
    with engine(tiny.TEMPLATE) as llm:
        for system, behind in (
            (None, "Be brief.\n\nBe kind."),
            ("Be brief.", "Be kind."),
            ("Be brief.\n\nBe kind.", ""),
        ):
            memory = llm.read(BOOK, system=system)
            text = prompt(llm, [one, two, WHO], memory)
            assert text[text.index(BOOK) + len(BOOK) :].startswith(f"\n\n{behind}\n\nWho?" if behind else "\n\nWho?")
            answered(llm, [one, two, WHO], memory)
        with pytest.raises(InvalidRequestError, match="another system text"):
            llm.chat([two, one, WHO], memory=memory)


def test_an_empty_part_of_a_turn_is_no_part_of_the_question() -> None:
    assert Turn("user", ("", "Who?")).text == "Who?"
