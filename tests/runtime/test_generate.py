"""Token ids in, token ids out: batches, chunks, sampling, bad input. No tokenizer anywhere."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qllm_runtime.engine import QLLM
from qllm_runtime.errors import CancelledError, ContextOverflowError, InvalidConfigError, InvalidRequestError
from qllm_runtime.types import Sampling

ROWS = [(150, (60, 70)), (90, (5, 9)), (33, None), (13, (0, 3)), (1, None), (64, (40, 64))]


@pytest.fixture(scope="module")
def bare() -> QLLM:
    return QLLM(tiny.model(ends=True), memory=tiny.MEMORY)


def ids_of(n: int, seed: int = 0) -> list[int]:
    return torch.randint(6, 260, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def padded(rows: list[list[int]], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@pytest.mark.parametrize(("policy", "repr_topk"), [("qllm", 2), ("qllm", 8), ("streaming", 2), ("full", 2)])
def test_rows_of_a_batch_equal_single_runs(policy: str, repr_topk: int) -> None:
    model = tiny.model(ends=True)
    model.generation_config.eos_token_id = list(range(20))  # rows end at different times
    llm = QLLM(model, memory=tiny.MEMORY.replace(policy=policy, repr_topk=repr_topk))
    rows = [ids_of(n, seed) for seed, (n, _) in enumerate(ROWS)]
    spans = [span for _, span in ROWS]
    alone = [llm.generate(row, span, max_tokens=24)[0] for row, span in zip(rows, spans, strict=True)]
    assert len({len(row) for row in alone}) > 2
    assert llm.generate(rows, spans, max_tokens=24) == alone
    width = 155
    ids, mask = padded(rows, width)
    moved = [
        span and (span[0] + width - len(row), span[1] + width - len(row)) for row, span in zip(rows, spans, strict=True)
    ]
    assert llm.generate(ids, moved, mask, max_tokens=24) == alone
    assert llm.generate(ids, moved, mask.bool().tolist(), max_tokens=24) == alone


def test_each_row_has_its_own_question(bare: QLLM) -> None:
    """A row's answer depends on its own span, and on it alone."""
    row = ids_of(200)
    spans = [(100, 110), (30, 40), (160, 180), None]
    alone = [bare.generate(row, span, max_tokens=16)[0] for span in spans]
    assert len({tuple(each) for each in alone}) > 1
    assert bare.generate([row] * 4, spans, max_tokens=16) == alone
    assert bare.generate([row] * 2, (30, 40), max_tokens=16) == [alone[1]] * 2


@pytest.mark.parametrize("policy", ["qllm", "infllm", "streaming", "lm-infinite", "full"])
def test_chunks_do_not_matter(bare: QLLM, policy: str) -> None:
    results = set()
    for chunk_size in (1, 16, 50, 4096):
        config = tiny.MEMORY.replace(policy=policy, chunk_size=chunk_size)
        tokens = QLLM(bare.model, memory=config).generate(ids_of(300), (100, 110), max_tokens=12)
        results.add(tuple(tokens[0]))
    assert len(results) == 1


def test_forms_of_input(bare: QLLM) -> None:
    row = ids_of(40)
    expected = bare.generate(row, (3, 7), max_tokens=4)
    span = np.array([3, 7])
    for ids in (torch.tensor(row), torch.tensor([row]), [row], np.array(row), np.array([row]), tuple(row)):
        assert bare.generate(ids, (3, 7), max_tokens=4) == expected
    assert bare.generate(torch.tensor(row, dtype=torch.int32), [(3, 7)], max_tokens=4) == expected
    assert bare.generate(row, (span[0], span[1]), max_tokens=4) == expected
    assert bare.generate(row, span, max_tokens=4) == expected
    assert bare.generate(row, (3, 7), torch.ones(40), max_tokens=4) == expected


def test_progress_counts_tokens(bare: QLLM) -> None:
    seen: list[tuple[int, int]] = []
    bare.generate([ids_of(150), ids_of(70)], progress=lambda *p: seen.append(p), max_tokens=1)
    assert seen == sorted(seen)
    assert seen[-1] == (220, 220)


def test_max_tokens_and_end(bare: QLLM) -> None:
    row = ids_of(30)
    (tokens,) = bare.generate(row, max_tokens=9)
    assert len(tokens) == 9
    bare.model.generation_config.eos_token_id = tokens[4]
    try:
        assert bare.generate(row, max_tokens=9) == [tokens[: tokens.index(tokens[4])]]
    finally:
        bare.model.generation_config.eos_token_id = 1


# ---------------------------------------------------------------------- sampling


def test_seeds(bare: QLLM) -> None:
    row = ids_of(40)
    draws = [tuple(bare.generate(row, temperature=1.0, seed=seed, max_tokens=12)[0]) for seed in (1, 1, 2, 3)]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3
    free = [tuple(bare.generate(row, temperature=1.5, max_tokens=12)[0]) for _ in range(3)]
    assert len(set(free)) == 3


def test_a_seed_draws_the_same_in_a_batch(bare: QLLM) -> None:
    rows = [ids_of(40), ids_of(25, 1)]
    alone = [bare.generate(row, temperature=1.0, seed=5, max_tokens=8)[0] for row in rows]
    assert bare.generate(rows, temperature=1.0, seed=5, max_tokens=8) == alone


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}], ids=str)
def test_what_leaves_one_choice_is_greedy(bare: QLLM, narrow: dict[str, float]) -> None:
    row = ids_of(40)
    assert bare.generate(row, **{"temperature": 1.0, "seed": 0, **narrow}, max_tokens=8) == bare.generate(
        row, max_tokens=8
    )


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_processors_are_those_of_transformers(bare: QLLM, temperature: float) -> None:
    """The same draws as a loop over transformers' own processors, in its own order."""
    row = ids_of(30)
    settings = Sampling(
        max_tokens=12, temperature=temperature, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.4, seed=11
    )
    chain = [RepetitionPenaltyLogitsProcessor(1.4)]
    if temperature:
        chain += [TemperatureLogitsWarper(0.7), TopKLogitsWarper(40), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)]
    processors, generator = LogitsProcessorList(chain), torch.Generator().manual_seed(11)
    expected: list[int] = []
    while len(expected) < 12:
        with torch.inference_mode():
            logits = bare.model(torch.tensor([row + expected])).logits[:, -1]
        scores = processors(torch.tensor([expected], dtype=torch.long), logits)
        if temperature:
            expected.append(int(torch.multinomial(scores.softmax(-1), 1, generator=generator)))
        else:
            expected.append(int(scores.argmax()))
    assert bare.generate(row, sampling=settings) == [expected]


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "arguments",
    [
        ([],),
        ([[]],),
        ([[5, 6], []],),
        (torch.zeros(0, dtype=torch.long),),
        (torch.zeros(1, 2, 3, dtype=torch.long),),
        (torch.tensor(5),),
        (torch.tensor([0.5, 1.5]),),
        ([0.5, 1.5],),
        ("some text",),
        (None,),
        ([5, 6, 4000],),
        ([5, -1],),
        ([5, 6, 7], (1, 1)),
        ([5, 6, 7], (2, 1)),
        ([5, 6, 7], (-1, 2)),
        ([5, 6, 7], (1, 4)),
        ([5, 6, 7], ()),
        ([5, 6, 7], (1,)),
        ([5, 6, 7], 2),
        ([5, 6, 7], (0.5, 2)),
        ([[5, 6], [7, 8]], [(0, 1), (0, 1), (0, 1)]),
        ([5, 6, 7], None, torch.tensor([1, 1])),
        ([5, 6, 7], None, torch.tensor([1, 1, 0])),
        ([5, 6, 7], None, torch.tensor([0, 0, 0])),
        ([5, 6, 7], None, "mask"),
        ([5, 6, 7], (0, 2), torch.tensor([0, 1, 1])),
    ],
    ids=repr,
)
def test_bad_requests(bare: QLLM, arguments: tuple[object, ...]) -> None:
    with pytest.raises(InvalidRequestError):
        bare.generate(*arguments, max_tokens=1)
    assert len(bare.generate([5, 6], max_tokens=1)[0]) <= 1


@pytest.mark.parametrize(
    "field",
    [
        {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 2.5}, {"temperature": -0.1}, {"temperature": float("nan")},
        {"temperature": "hot"}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": 0}, {"top_k": 1.5}, {"min_p": -1.0},
        {"min_p": 2.0}, {"repetition_penalty": 0.0}, {"seed": -1}, {"seed": "one"}, {"seed": 2**70}, {"logprobs": -1},
        {"logprobs": 51}, {"beams": 2}, {"stop": [""]}, {"stop": [3]},
    ],
    ids=str,
)  # fmt: skip
def test_bad_sampling(bare: QLLM, field: dict[str, object]) -> None:
    with pytest.raises(InvalidConfigError, match=next(iter(field))):
        bare.generate([5, 6], **field)
    assert len(bare.generate([5, 6], max_tokens=1, top_p=1.0, min_p=1.0)[0]) <= 1


def test_a_string_is_no_list_of_stop_strings(bare: QLLM) -> None:
    with pytest.raises(InvalidConfigError, match="stop"):
        bare.generate([5, 6], sampling=Sampling(stop="end"))  # type: ignore[arg-type]


def test_stop_strings_need_a_tokenizer(bare: QLLM) -> None:
    with pytest.raises(InvalidConfigError, match="tokenizer"):
        bare.generate([5, 6], stop=["end"])


def test_log_probabilities_have_no_place(bare: QLLM) -> None:
    with pytest.raises(InvalidConfigError, match="leave logprobs out"):
        bare.generate([5, 6], logprobs=0)


def test_the_end_token_of_the_tokenizer_ends(bare: QLLM) -> None:
    (tokens,) = bare.generate([5, 6], max_tokens=8)
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokens[3])
    end = tokens.index(tokens[3])
    assert QLLM(bare.model, tokenizer, tiny.MEMORY).generate([5, 6], max_tokens=8) == [tokens[:end]]


def test_stop_strings(llm: QLLM) -> None:
    row = ids_of(60)
    (tokens,) = llm.generate(row, max_tokens=20)
    text = llm.tokenizer.decode(tokens)
    stop = next(text[i : i + 2] for i in range(5, 15) if "\ufffd" not in text[i : i + 2])
    (kept,) = llm.generate([row], max_tokens=20, stop=[stop, "never"])
    assert kept == tokens[: len(kept)]
    assert llm.tokenizer.decode(kept) == text[: text.index(stop)]


def test_a_question_longer_than_the_window(bare: QLLM) -> None:
    with pytest.raises(ContextOverflowError, match="n_local"):
        bare.generate(ids_of(100), (10, 10 + tiny.MEMORY.n_local + 1), max_tokens=1)
    bare.generate(ids_of(100), (10, 10 + tiny.MEMORY.n_local), max_tokens=1)


def test_cancel(bare: QLLM) -> None:
    import threading

    cancel = threading.Event()
    chunks: list[int] = []

    def progress(done: int, total: int) -> None:
        chunks.append(done)
        cancel.set()

    with pytest.raises(CancelledError):
        bare.generate(ids_of(400), max_tokens=5, progress=progress, cancel=cancel)
    assert chunks == [tiny.MEMORY.chunk_size]
    cancel.clear()
    with pytest.raises(CancelledError, match="while writing"):
        bare.generate(ids_of(30), max_tokens=5, progress=progress, cancel=cancel)
    assert len(bare.generate([5, 6], max_tokens=1)[0]) <= 1
