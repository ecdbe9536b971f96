"""Questions to documents that were read before: whatever the template writes ahead of them, they are not read again."""

from __future__ import annotations

from typing import Any

import pytest
import tiny

from qllm_runtime.document_memory import DocumentMemory
from qllm_runtime.engine import QLLM
from qllm_runtime.errors import InvalidRequestError
from qllm_runtime.request import lay_out, settle
from qllm_runtime.types import Answer, Turn

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
WHO = Turn("user", ("Who?",))


def engine(template: str) -> QLLM:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return QLLM(tiny.model(), tokenizer, tiny.MEMORY)


def prompt(llm: QLLM, turns: list[Turn], memory: DocumentMemory, **options: Any) -> str:
    request, _ = llm._request(turns, None, "none", memory, options)  # type: ignore[arg-type]
    laid_out = lay_out(settle(request))
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
