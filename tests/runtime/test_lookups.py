"""Looking over the memory's shoulder: the records of a request's lookups."""

from __future__ import annotations

import pytest
import tiny
import torch

from qllm_runtime import rereading
from qllm_runtime.engine import QLLM
from qllm_runtime.memory.record import Lookup
from qllm_runtime.prompt import build_prompt
from qllm_runtime.types import Answer, Document, Sampling, Turn

BOOK = "The cat sat there. The fox ran.\n\n" * 12
QUESTION = "Who ran?"
Record = tuple[int, Lookup]


def test_every_lookup_is_reported(llm: QLLM) -> None:
    found: list[Record] = []
    expected = llm.ask(QUESTION, BOOK, max_tokens=6, reread=False)
    answer = llm.ask(QUESTION, BOOK, max_tokens=6, reread=False, on_lookup=lambda *record: found.append(record))
    assert answer.token_ids == expected.token_ids
    n = answer.usage.prompt_tokens
    memory = tiny.MEMORY
    for layer in range(2):
        steps = [record for number, record in found if number == layer]
        assert [s.start for s in steps] == sorted({s.start for s in steps})  # once each, in order
        # the last prompt token and every token of the answer but the last are looked up for one by one
        assert [s.start for s in steps if s.start >= n - 1] == list(range(n - 1, n + 5))
        for step in steps:
            assert step.scores is not None and step.scores.shape == (step.n_blocks,)
            assert step.n_blocks == (step.start - memory.n_local - memory.n_init) // memory.block_size
            best = step.scores.topk(min(memory.topk, step.n_blocks)).values
            torch.testing.assert_close(step.scores[step.ids].sort(descending=True).values, best)
    assert len(found) == 2 * len({record.start for _, record in found})


def test_streams_conversations_and_memories_report_too(llm: QLLM) -> None:
    turns = [Turn("user", (Document(BOOK), QUESTION))]
    with llm.read(BOOK) as memory:
        for ask in (
            lambda hook: llm.ask(QUESTION, memory, max_tokens=3, reread=False, on_lookup=hook),
            lambda hook: list(llm.stream(QUESTION, memory, max_tokens=3, reread=False, on_lookup=hook)),
            lambda hook: llm.chat(
                turns, mode="read_once", sampling=Sampling(max_tokens=3), reread=False, on_lookup=hook
            ),
            lambda hook: list(
                llm.chat_stream(turns, mode="read_once", sampling=Sampling(max_tokens=3), reread=False, on_lookup=hook)
            ),
        ):
            found: list[Record] = []
            ask(lambda *record, found=found: found.append(record))
            prompt = build_prompt(llm.tokenizer, turns, query=QUESTION, mode="read_once")
            written = [(layer, record.start) for layer, record in found if record.start >= len(prompt.ids) - 1]
            assert written == [(layer, len(prompt.ids) - 1 + i) for i in range(3) for layer in range(2)]
        found = []
        llm.ask(QUESTION, memory, max_tokens=3, on_lookup=lambda *record: found.append(record))
        assert min(record.start for _, record in found) >= memory.n_tokens  # what was read before is not read again
        n = len(found)
        llm.ask(QUESTION, memory, max_tokens=3)
        assert len(found) == n  # the hook belongs to its request


def test_passages_by_themselves_report_nothing(llm: QLLM) -> None:
    found: list[Record] = []
    answer = llm.ask(QUESTION, BOOK, max_tokens=3, on_lookup=lambda *record: found.append(record))
    assert answer.reread
    starts = [record.start for layer, record in found if layer == 0]
    assert starts == sorted(set(starts))  # one reading: that of the documents and the draft


def test_a_draft_and_the_passages_read_again_report_too(llm: QLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rereading, "_can_be_alone", lambda request: False)
    found: list[Record] = []
    with llm.read(BOOK) as memory:
        answer = llm.ask(QUESTION, memory, max_tokens=3, on_lookup=lambda *record: found.append(record))
    n = answer.usage.prompt_tokens
    starts = [record.start for layer, record in found if layer == 0]
    again = starts.index(min(starts), starts.index(n + 1))  # behind the draft, where the documents end
    assert starts[:again] == sorted(set(starts[:again]))
    assert starts[again:] == sorted(set(starts[again:]))
    assert starts[-1] > n + 2  # passages stand between the documents and the answer


def test_an_error_of_the_hook_reaches_the_caller(llm: QLLM) -> None:
    def fail(layer: int, record: Lookup) -> None:
        raise KeyError(layer)

    with pytest.raises(KeyError):
        llm.ask(QUESTION, BOOK, max_tokens=3, on_lookup=fail)
    assert llm.ask(QUESTION, BOOK, max_tokens=3).usage.completion_tokens == 3


@pytest.mark.parametrize("policy", ["full", "lm-infinite"])
def test_policies_without_lookups_report_none(llm: QLLM, policy: str) -> None:
    other = QLLM(llm.model, llm.tokenizer, tiny.MEMORY.replace(policy=policy))
    other.ask(QUESTION, BOOK[:200], max_tokens=3, on_lookup=lambda *_: pytest.fail("no blocks, no lookup"))


@pytest.mark.parametrize("read_before", [False, True])
def test_a_query_that_stands_in_no_turn_guides(llm: QLLM, read_before: bool) -> None:
    def ask(text: str, query: str) -> tuple[Answer, dict[tuple[int, int], torch.Tensor]]:
        found: list[Record] = []
        answer = llm.chat(
            [Turn("user", (text,) if read_before else (Document(BOOK), text))],
            query=query,
            memory=llm.read(BOOK) if read_before else None,
            mode="read_once",
            max_tokens=3,
            reread=False,
            on_lookup=lambda *record: found.append(record),
        )
        return answer, {(layer, step.start): step.scores for layer, step in found if step.scores is not None}

    guided, scores = ask("Hello.", QUESTION)
    unguided, others = ask(f"{QUESTION}\n\nHello.", "")  # the same tokens
    assert (guided.query, guided.query_source) == (QUESTION, "explicit")
    assert (unguided.query, unguided.query_source) == ("", "none")
    assert guided.usage.prompt_tokens == unguided.usage.prompt_tokens
    last = max(step for step in scores)
    assert not torch.allclose(scores[last], others[last])
