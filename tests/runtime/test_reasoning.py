"""Reasoning models: thoughts are kept apart from answers, bounded, free of grammars and stop strings, and can be left out."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny
import torch
from tokenizers import AddedToken
from transformers import LogitsProcessor

from qllm_runtime.arguments import conversation
from qllm_runtime.engine import QLLM
from qllm_runtime.grammar import json_schema_processor
from qllm_runtime.reasoning import AfterThought, marks_of, opening
from qllm_runtime.types import Piece, Turn

BEGIN, END = 264, 265
SWITCH = "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
ASK = {"question": "Who?", "documents": "It was Ann. <think>It was Bob.</think>"}


class Script(LogitsProcessor):  # type: ignore[misc]
    """Lets a model write these tokens, then its last one for ever."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        written = torch.full_like(scores, -torch.inf)
        written[0, self.ids[min(input_ids.shape[1], len(self.ids) - 1)]] = 0.0
        return written


def thinker(template: str = tiny.TEMPLATE + SWITCH) -> QLLM:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    tokenizer.chat_template = template
    return QLLM(tiny.model(vocab_size=266), tokenizer, tiny.MEMORY)


def ids_of(llm: QLLM, text: str) -> list[int]:
    return [*llm.tokenizer(text, add_special_tokens=False).input_ids, llm.tokenizer.eos_token_id]


def pieces(llm: QLLM, text: str, **options: Any) -> list[Piece]:
    turns, _ = conversation(ASK["question"], ASK["documents"], None, ())
    return list(llm.chat_stream(turns, logits_processors=[Script(ids_of(llm, text))], **options))


def test_a_thought_is_no_part_of_the_answer() -> None:
    with thinker() as llm:
        parts = pieces(llm, "<think>\nIt was Ann.\n</think>\n\nAnn.", stop=["was"], logprobs=0)
    answer = parts[-1].answer
    assert answer is not None
    assert (answer.text, answer.reasoning, answer.finish_reason) == ("Ann.", "It was Ann.", "stop")
    assert "".join(part.text for part in parts) == "Ann."
    assert "".join(part.reasoning for part in parts).strip() == "It was Ann."
    assert not any(part.text and part.reasoning for part in parts)
    assert answer.usage.reasoning_tokens == len("\nIt was Ann.\n") + 2
    assert answer.usage.completion_tokens == len(answer.token_ids) == answer.usage.reasoning_tokens + len("\n\nAnn.")
    assert answer.logprobs is not None and "".join(entry.token for entry in answer.logprobs) == "\n\nAnn."


def test_an_answer_without_a_thought_is_as_it_was() -> None:
    with thinker() as llm:
        answer = pieces(llm, "  Ann.")[-1].answer
    assert answer is not None
    assert (answer.text, answer.reasoning, answer.usage.reasoning_tokens) == ("  Ann.", "", 0)


def test_white_space_may_stand_ahead_of_a_thought() -> None:
    with thinker() as llm:
        answer = pieces(llm, "\n <think>It was Ann.</think>Ann.")[-1].answer
    assert answer is not None
    assert (answer.text.strip(), answer.reasoning) == ("Ann.", "It was Ann.")


def test_a_template_may_open_the_thought() -> None:
    with thinker(tiny.TEMPLATE + "<think>\n") as llm:
        answer = pieces(llm, "Hm.</think>Ann.")[-1].answer
        assert answer is not None
        assert (answer.text, answer.reasoning) == ("Ann.", "Hm.")
        for most in (2, 3, 5):
            answer = pieces(llm, "m" * 99, max_tokens=most)[-1].answer
            assert answer is not None
            assert answer.text and len(answer.token_ids) == most


def test_marks_elsewhere_are_text() -> None:
    with thinker() as llm:
        for said in ("Use `<think>` first.", "Use </think>.", "<think>Hm.</think>Use <think>a</think>."):
            answer = pieces(llm, said)[-1].answer
            assert answer is not None
            assert (answer.text, answer.finish_reason) == (said.removeprefix("<think>Hm.</think>"), "stop")
    with thinker(tiny.TEMPLATE) as llm:  # a template that knows no marks
        turns, _ = conversation("What is <think>?", "A mark.", None, ())
        answer = llm.chat(turns, logits_processors=[Script(ids_of(llm, "A mark."))])
    assert (answer.text, answer.reasoning) == ("A mark.", "")


@pytest.mark.parametrize("stop", ["\n", "\n\n", " "])
def test_white_space_behind_a_thought_is_no_stop(stop: str) -> None:
    with thinker() as llm:
        answer = pieces(llm, "<think>\nHm\n</think>\n\nAnn." + stop + "Bob.", stop=[stop])[-1].answer
    assert answer is not None
    assert answer.text == "Ann."


def test_thoughts_are_streamed_without_the_white_space_around_them() -> None:
    with thinker() as llm:
        for thought in ("\n\n", "\n a\n\nb \n"):
            parts = pieces(llm, f"<think>{thought}</think>\n\nAnn.")
            answer = parts[-1].answer
            assert answer is not None
            assert "".join(part.reasoning for part in parts) == answer.reasoning == thought.strip()


@pytest.mark.parametrize("thought", ["m" * 400, "mm</s>"])
def test_a_thought_that_does_not_end_is_closed(thought: str) -> None:
    with thinker() as llm:
        script = ids_of(llm, "<think>" + thought)
        turns, _ = conversation(ASK["question"], ASK["documents"], None, ())
        answer = llm.chat(turns, logits_processors=[Script(script)], max_tokens=100)
    assert END in answer.token_ids
    assert len(answer.token_ids) <= 100
    if "</s>" not in thought:
        assert (answer.reasoning, answer.text, answer.finish_reason) == ("m" * 73, "m" * 25, "length")


def test_with_few_tokens_there_is_no_thought() -> None:
    with thinker() as llm:
        direct, thoughtful = (llm.ask(**ASK, max_tokens=n).usage.prompt_tokens for n in (63, 64))
        forced = llm.chat(
            conversation(ASK["question"], ASK["documents"], None, ())[0],
            template_kwargs={"enable_thinking": True},
            max_tokens=1,
        )
        grammar = json_schema_processor(llm.tokenizer, {"type": "object"}, n_vocab=266)
        turns, _ = conversation(ASK["question"], ASK["documents"], None, ())
        held = llm.chat(turns, logits_processors=[grammar], max_tokens=256).usage.prompt_tokens
    assert direct == held == thoughtful + 2
    assert forced.usage.prompt_tokens == thoughtful


def test_what_was_read_stays_where_a_template_tells_ahead_whether_to_think() -> None:
    ahead = "{{ '[direct]' if enable_thinking is defined and not enable_thinking else '' }}"
    with thinker(ahead + tiny.TEMPLATE + SWITCH) as llm:
        memory = llm.read(ASK["documents"])
        direct, thoughtful = (llm.ask(ASK["question"], memory, max_tokens=n).usage for n in (3, 64))
        assert direct.cache_read_tokens == memory.n_tokens
        assert direct.prompt_tokens == thoughtful.prompt_tokens + 2
        fresh = llm.ask(**ASK, max_tokens=3).usage.prompt_tokens
        assert fresh == llm.ask(**ASK, max_tokens=64).usage.prompt_tokens + len("[direct]") + 2


def test_tools_behind_documents_read_before_bring_no_thought_back() -> None:
    listed = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    tool = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}
    with thinker(listed + tiny.TEMPLATE + SWITCH) as llm:
        memory, asked = llm.read(ASK["documents"]), [Turn("user", (ASK["question"],))]
        direct, thoughtful = (
            llm.chat(asked, memory=memory, tools=[tool], max_tokens=n).usage.prompt_tokens for n in (3, 64)
        )
    assert direct == thoughtful + 2


def test_where_a_prompt_leaves_off() -> None:
    with thinker() as llm:
        marks = marks_of(llm.tokenizer)
    assert marks is not None and (marks.begin, marks.end) == (BEGIN, END)
    assert marks_of(tiny.tokenizer()) is None
    assert opening([5, BEGIN, 7], marks) is True
    assert opening([BEGIN, END, 7], marks) is False
    assert opening([7, 8], marks) is None


@pytest.mark.parametrize("opened", [None, True, False])
def test_a_grammar_holds_the_answer_and_not_the_thought(opened: bool | None) -> None:
    with thinker() as llm:
        schema = {"type": "object", "properties": {"who": {"type": "string"}}, "required": ["who"]}
        grammar = AfterThought(json_schema_processor(llm.tokenizer, schema, n_vocab=266), marks_of(llm.tokenizer))
        grammar.prompted(opened)
        wanted = ids_of(llm, {None: "<think>Ann{", True: "Ann{", False: "<think>"}[opened] + '</think>{"who": "Ann"}')
        ids: list[int] = []
        for step in range(60):
            scores = torch.zeros(1, 266)
            scores[0, wanted[min(step, len(wanted) - 1)]] = 9.0
            token = int(grammar(torch.tensor([ids], dtype=torch.long), scores).argmax())
            if token == llm.tokenizer.eos_token_id:
                break
            ids.append(token)
        text = llm.tokenizer.decode(ids)
    if opened is False:
        assert "<think>" not in text
    else:
        assert text.split("</think>")[0].endswith("Ann{")
        assert json.loads(text.split("</think>")[1]) == {"who": "Ann"}


def test_structured_answers_of_a_thinking_model_are_whole() -> None:
    with thinker() as llm:
        schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
        turns, _ = conversation(ASK["question"], ASK["documents"], None, ())
        script = Script(ids_of(llm, "<think>five"))
        grammar = json_schema_processor(llm.tokenizer, schema, n_vocab=266)
        # the model would end within its thought; that is closed, and what follows is held to the grammar
        answer = llm.chat(turns, logits_processors=[Louder(script), grammar], max_tokens=1024)
    assert answer.reasoning == "five"
    assert json.loads(answer.text).keys() == {"n"}


class Louder(LogitsProcessor):  # type: ignore[misc]
    """Makes what a script says likely, without ruling out the rest."""

    def __init__(self, script: Script) -> None:
        self.script = script

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = self.script(input_ids, scores)
        return torch.where(said == 0.0, 50.0, scores.clamp(-10, 10))
