"""Documents that are read one after the other are read as if they were read together."""

from __future__ import annotations

import random

import pytest
import tiny
import torch

from qllm_runtime.config import MemoryConfig
from qllm_runtime.document_memory import DocumentMemory
from qllm_runtime.engine import QLLM
from qllm_runtime.memory.pieces import Pieces
from qllm_runtime.tokenization import SegmentTokenizer

POLICIES = {
    "qllm": tiny.MEMORY,
    "published": tiny.MEMORY.replace(summary="published"),
    "host": tiny.MEMORY.replace(device_blocks=8),
    "streaming": tiny.MEMORY.replace(policy="streaming"),
}


def engine(config: MemoryConfig = tiny.MEMORY) -> QLLM:
    return QLLM(tiny.model(), tiny.tokenizer(), config)


def documents(*sizes: int) -> list[str]:
    """Texts that no two blocks of are alike, so that rounding does not decide between them."""
    draw = random.Random(5)
    return ["".join(chr(draw.randrange(33, 127)) for _ in range(size)) for size in sizes]


def next_logits(llm: QLLM, memory: DocumentMemory) -> torch.Tensor:
    inference = llm._inference
    _, cache = memory.contents(inference)
    with inference.request():
        return inference.step(cache.fork(), [70])


@pytest.mark.parametrize("config", POLICIES.values(), ids=POLICIES)
def test_read_after_another(config: MemoryConfig) -> None:
    llm, texts = engine(config), documents(290, 113, 7, 1, 60)
    together = next_logits(llm, llm.read(texts))
    for cuts in ([1], [2, 4], [1, 2, 3, 4]):
        memory = llm.read(texts[: cuts[0]])
        for start, end in zip(cuts, [*cuts[1:], len(texts)], strict=True):
            memory = llm.read(texts[start:end], after=memory)
        torch.testing.assert_close(next_logits(llm, memory), together, atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk_size", [16, 48, 4096])
def test_chunks_do_not_matter(chunk_size: int) -> None:
    texts = documents(290, 113, 7, 60)
    read = [engine(config) for config in (tiny.MEMORY, tiny.MEMORY.replace(chunk_size=chunk_size))]
    one, other = (next_logits(llm, llm.read(texts)) for llm in read)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_documents_given_with_the_question() -> None:
    llm, texts = engine(), documents(290, 113)
    memory = llm.read(texts[1:], after=llm.read(texts[:1]))
    answers = [
        llm.ask("What is said?", documents=given, max_tokens=6, logprobs=3, mode="read_once", reread=False)
        for given in (texts, memory)
    ]
    one, other = (torch.tensor([token.logprob for token in answer.logprobs or ()]) for answer in answers)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert answers[0].text == answers[1].text


def test_progress_counts_every_token_once() -> None:
    llm, texts = engine(), documents(290, 113, 7)
    told: list[tuple[int, int]] = []
    first = llm.read(texts[:1])
    memory = llm.read(texts[1:], after=first, progress=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[0][0] > first.n_tokens
    assert told[-1] == (memory.n_tokens, memory.n_tokens)


def test_what_was_read_is_not_tokenised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, texts = engine(), documents(290, 113)
    first = llm.read(texts[:1])
    tokenised: list[str] = []
    original = SegmentTokenizer.text

    def noting(self: SegmentTokenizer, text: str, **options: object) -> object:
        tokenised.append(text)
        return original(self, text, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(SegmentTokenizer, "text", noting)
    llm.read(texts[1:], after=first)
    assert texts[0] not in tokenised
    assert texts[1] in tokenised


def test_pieces() -> None:
    pieces = Pieces(16).anew([20, 40])
    assert [pieces.end(start) for start in (0, 15, 16, 19, 20, 36, 40, 60)] == [16, 16, 20, 20, 36, 40, 56, 72]
    assert [pieces.last_end(limit) for limit in (15, 16, 20, 35, 36, 41, 60)] == [0, 16, 20, 20, 36, 40, 56]
    assert pieces.taken_up(25).begins == (25, 40)
    assert pieces.taken_up(40).begins == (40,)
