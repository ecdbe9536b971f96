"""Blocks kept by the host give what blocks on the device give."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from rope import Rope
from test_block_memory import BASE, DIM, SCORING, cut, feed, tokens
from test_histories import sizes
from test_store import blocks

from qllm_kernels.pages import copy_pages
from qllm_runtime.config import MemoryConfig
from qllm_runtime.engine import QLLM
from qllm_runtime.errors import InvalidConfigError
from qllm_runtime.memory import block, offload, question_scores, slabs
from qllm_runtime.memory.block import BlockMemory
from qllm_runtime.memory.offload import OffloadedStore
from qllm_runtime.memory.store import BlockStore
from qllm_runtime.types import Document


def choice(n: int, pieces: int, scopes: int, k: int, draw: random.Random) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ascending ids [pieces, scopes, k], some rows ending in places without a choice."""
    ids = torch.tensor([[sorted(draw.sample(range(n), k)) for _ in range(scopes)] for _ in range(pieces)])
    if draw.random() < 0.5:
        return ids, None
    valid = torch.arange(k) < torch.tensor([draw.randint(1, k) for _ in range(pieces)])[:, None, None]
    valid = valid.expand(-1, scopes, -1)
    return torch.where(valid, ids, n - 1), valid


def as_fp8(pages: torch.Tensor) -> torch.Tensor:
    """Pages [kv_heads, m, block_size, dim] as they come back from float8_e4m3fn with a scale each."""
    scale = pages.abs().amax((2, 3), keepdim=True) / 448
    return (pages / scale).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_store(seed: int, quantised: bool) -> None:
    """Any history of appending, forking and fetching; slots are few, slabs fill up."""
    draw = random.Random(seed)
    scopes, topk, r = draw.choice([1, 2]), draw.choice([1, 2, 5]), draw.choice([1, 3, None])
    slots = draw.choice([2 * topk, 3 * topk + 1, 40])
    close = partial(torch.testing.assert_close, atol=1e-6 if quantised else 0, rtol=1e-6 if quantised else 0)
    pairs = [(BlockStore(), OffloadedStore(slots, reserve=draw.choice([0, 3, 60]), quantised=quantised))]
    for turn in range(40):
        plain, offloaded = draw.choice(pairs)
        event = draw.choice(["append", "append", "fork", "look", "look", "look"])
        if event == "append" or not len(plain):
            key, value, summaries = blocks(draw.choice([1, 1, 2, 7]), 100 * seed + turn, r)
            offloaded.append(key, value, summaries)
            if quantised:  # what comes back, is read where it lies and compared with is this
                key, value = as_fp8(key), as_fp8(value)
            plain.append(key, value, summaries)
        elif event == "fork":
            pairs.append((plain.fork(), offloaded.fork()))
        n = len(plain)
        assert (len(offloaded), offloaded.kv_heads) == (n, plain.kv_heads)
        some = draw.randint(1, n)
        for first in (0, draw.randrange(some)):
            close(torch.cat(offloaded.summaries(some, first), 2), torch.cat(plain.summaries(some), 2)[:, :, first:])
        assert not plain.summaries(some, some) and not offloaded.summaries(some, some)
        k = min(topk, n)
        ids, valid = choice(n, draw.randint(1, 6), scopes, k, draw)
        wanted, found = plain.gather(ids, valid), offloaded.gather(ids, valid)
        paged = offloaded.in_place(ids, valid)
        assert (paged is None) == (ids.shape[0] * k > slots)
        shown = torch.ones(ids.shape, dtype=torch.bool) if valid is None else valid
        shown = shown.repeat_interleave(plain.kv_heads // scopes, 1).transpose(0, 1)
        for index, (x, y) in enumerate(zip(found, wanted, strict=True)):
            close(x[shown], y[shown])
            assert x[~shown].isfinite().all()
            if paged is not None:
                table = paged.table.repeat_interleave(plain.kv_heads // scopes, 1).transpose(0, 1)
                heads = torch.arange(plain.kv_heads)[:, None, None]
                close(paged[index][heads, table][shown], y[shown])


class Stream:
    """A stream that does nothing but know what its next operation comes behind."""

    current: Stream

    def __init__(self) -> None:
        self.behind: frozenset[str] = frozenset()

    def do(self, name: str) -> frozenset[str]:
        """Give it an operation; returns those that are surely over when it begins."""
        before = self.behind
        self.behind |= {name}
        return before

    def record_event(self) -> frozenset[str]:
        return self.behind

    def wait_event(self, event: frozenset[str] | None) -> None:
        self.behind |= event or frozenset()

    def wait_stream(self, other: Stream) -> None:
        self.behind |= other.behind


@pytest.mark.parametrize("seed", range(6))
def test_fetches_beside_the_attention(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Pieces in turn: nothing is read before it was fetched, or replaced while it may be read; fetches run beside attention."""
    draw = random.Random(seed)
    main, fetching, copying = Stream(), Stream(), Stream()
    for name, stream in {"_fetching": fetching, "copying": copying}.items():
        monkeypatch.setattr(offload, name, lambda device, stream=stream: stream)
    monkeypatch.setattr(Stream, "current", main, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream.current)

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        Stream.current = stream
        yield
        Stream.current = main

    monkeypatch.setattr(torch.cuda, "stream", on)
    readers: dict[tuple[int, int], set[str]] = {}  # operations that read a slot of a row
    filled: dict[tuple[int, int], str] = {}  # the fetch it was filled by
    overlapped = 0

    def copy(source: torch.Tensor, target: torch.Tensor, moves: torch.Tensor, counts: torch.Tensor) -> None:
        nonlocal overlapped
        name = f"fetch {len(filled)}.{draw.random()}"
        before = Stream.current.do(name)
        assert Stream.current is fetching
        assert "evict" in before
        overlapped += any(step.startswith("attend") and step not in before for step in main.behind)
        for row in range(len(counts)):
            for slot in moves[row, : int(counts[row]), 1].tolist():
                assert readers.pop((row, slot), set()) <= before
                filled[row, slot] = name
        copy_pages(source, target, moves, counts)

    monkeypatch.setattr(slabs, "copy_pages", copy)
    scopes, k, slots = draw.choice([1, 2]), draw.choice([1, 3]), draw.choice([6, 7, 13])
    plain, store = BlockStore(), OffloadedStore(slots)
    for turn in range(3):
        new = blocks(20, turn, 1)
        plain.append(*new)
        store.append(*new)
        copying.do("evict")
        for layer_call in range(3):
            pieces = slots // k + draw.randint(1, 9)
            ids, _ = choice(len(plain), pieces, scopes, k, draw)
            ids = torch.stack([ids[0] if draw.random() < 0.3 else row for row in ids])
            wanted = plain.gather(ids)[0]
            done = 0
            for rows, paged in store.in_turn(ids, None):
                assert paged is not None and rows.start == done
                done = rows.stop
                name = f"attend {turn}.{layer_call}.{done}"
                before = main.do(name)
                for row in range(scopes):
                    for slot in paged.table[:, row].flatten().tolist():
                        assert filled[row, slot] in before
                        readers.setdefault((row, slot), set()).add(name)
                heads = torch.arange(plain.kv_heads)[:, None, None]
                table = paged.table.repeat_interleave(plain.kv_heads // scopes, 1).transpose(0, 1)
                assert torch.equal(paged.key[heads, table], wanted[:, rows])
            assert done == pieces
    assert overlapped > 3


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    """Products of keys that lie elsewhere may be rounded differently."""
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(16))
def test_history(seed: int) -> None:
    """A memory that offloads and one that does not, through the same random history."""
    draw = random.Random(seed)
    config = sizes(draw).replace(policy=draw.choice(["qllm", "infllm"]), block_size=4, repr_topk=draw.choice([1, 3, 4]))
    least = (4 if config.every_key else 2) * config.topk
    offload = config.replace(device_blocks=least + draw.choice([0, 1, 20]))
    pair = [BlockMemory(each, Rope(DIM)) for each in (config, offload)]
    whole, stray = tokens(110, seed=seed), tokens(20, seed=seed + 1)
    at, asked = 0, 0
    while at < 110:
        n = min(110 - at, draw.choice([1, 1, 2, 3, draw.randint(1, 40)]))
        event = draw.choice(["question", "fork", "fork goes on", "parent goes on", None, None])
        if event == "question" and asked <= at:
            span = (at + draw.randrange(n), at + n + 3)
            asked = span[1]
            for memory in pair:
                memory.set_query(*span)
        elif event == "fork":
            pair = [memory.fork() for memory in pair]
        elif event == "fork goes on":
            outs = [feed(memory.fork(), stray) for memory in pair]
            same(*outs)
        elif event == "parent goes on":
            parents, pair = pair, [memory.fork() for memory in pair]
            same(*(feed(memory, stray) for memory in parents))
        part = tuple(x[:, at : at + n] for x in whole)
        same(*(feed(memory, part) for memory in pair))
        at += n
    assert all(len(memory._far_context.store) for memory in pair)


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_a_question_reads_the_keys_of_a_block_once(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Once it is answered, tokens read no more than the blocks that have left the window since the token before."""
    read: list[int] = []
    for kind in (slabs.Slab, slabs.QuantisedSlab):

        def keys(slab: slabs.Slab, first: int, end: int, _keys: Any = kind.keys) -> torch.Tensor:
            read.extend(range(first, end))
            return _keys(slab, first, end)

        monkeypatch.setattr(kind, "keys", keys)
    config = MemoryConfig(**{**BASE, "repr_topk": 4, "device_blocks": 8, "offload_dtype": dtype})
    text, answer = cut(tokens(220), [200, 20])
    memory = BlockMemory(config, Rope(DIM), reserve=220)
    memory.set_query(0, 3)
    feed(memory, text)
    for step in cut(answer, [1] * 20):
        feed(memory, step)
        assert read == list(range(memory._n_blocks))
    memory.question_scores()
    assert read == list(range((220 - 1 - 16 - 4) // 4))


@pytest.mark.parametrize("dtype", ["auto", "fp8"])
def test_scores_of_a_question_are_made_on_the_device_of_its_layer(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """What asks for them stands on another one where a model has its layers on several."""
    current: list[torch.device] = []

    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def watched(*args: Any, _work: Any, **kwargs: Any) -> Any:
        assert current == [torch.device("cpu")]
        launches.add(_work.__name__)
        return _work(*args, **kwargs)

    launches: set[str] = set()
    config = MemoryConfig(**{**BASE, "repr_topk": 4, "device_blocks": 8, "offload_dtype": dtype})
    memory = BlockMemory(config, Rope(DIM))
    assert memory.question_scores() is None
    memory.set_query(190, 199)
    feed(memory, tokens(199))
    monkeypatch.setattr(block, "on_device", on)
    for module, name in ((question_scores, "block_scores"), (slabs, "dequantise_pages")):
        monkeypatch.setattr(module, name, partial(watched, _work=getattr(module, name)))
    scores = memory.question_scores()
    assert scores is not None and len(scores) == memory._n_blocks
    assert launches == {"block_scores"} | ({"dequantise_pages"} if dtype == "fp8" else set())
    assert not current


@pytest.mark.parametrize("known", [1, 5, 16, 47])
def test_rows_of_a_questions_scores_stay_aligned(known: int) -> None:
    """Else kernels would be compiled anew while a text grows."""
    scores = question_scores.QuestionScores(torch.randn(4, 3, DIM), 2)
    for n in (known, 3 * known):
        fresh = torch.randn(2, 1, n - scores.known, DIM)
        assert scores.scores([fresh], n + 1).stride(0) % 16 == 0
        assert scores.known == n


def test_the_device_holds_as_much_for_any_length() -> None:
    """All that grows with the text are summaries and an entry per block of the table."""
    config = MemoryConfig(**{**BASE, "repr_topk": 1, "device_blocks": 6})
    held = []
    for n in (208, 800):
        memory = BlockMemory(config, Rope(DIM), reserve=n)
        feed(memory, tokens(n), SCORING)
        store = memory._far_context.store
        assert isinstance(store, OffloadedStore)
        (slab,) = store._slabs
        pages = len(slab)
        assert pages == n // config.block_size
        assert slab.data.nbytes == pages * 2 * (2 * config.block_size * DIM * 4)
        held.append(memory.nbytes() - pages * (2 * DIM * 4 + 4))
        assert store.nbytes() < 6 * slab.data[0].nbytes + pages * (2 * DIM * 4 + 4) + 100
    assert held[0] == held[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device_blocks": 3}, "at least twice topk"),
        ({"device_blocks": 7, "repr_topk": 4}, "at least 4 times topk .2."),
        ({"device_blocks": 4, "policy": "streaming"}, "needs policy"),
        ({"device_blocks": 4, "faithful": True}, "needs policy"),
        ({"device_blocks": 4000}, "less than or equal to 1024"),
        ({"device_blocks": 0}, "greater than or equal to 1"),
        ({"offload_dtype": "fp8"}, "set device_blocks as well"),
        ({"device_blocks": 8, "offload_dtype": "int4"}, "Input should be 'auto' or 'fp8'"),
    ],
    ids=str,
)
def test_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        MemoryConfig(**{**BASE, **settings})
    MemoryConfig(**{**BASE, "repr_topk": 4, "summary": "mean", "device_blocks": 4})
    MemoryConfig(**{**BASE, "repr_topk": 4, "device_blocks": 8})


def test_engine() -> None:
    """Answers and sources are those without offload, at a fraction of the bytes."""
    book = Document("The cat sat on the mat and the dog looked at the moon. " * 40, "cats")
    found, held = [], []
    for memory in (tiny.MEMORY, tiny.MEMORY.replace(device_blocks=6)):
        with QLLM(tiny.model(), tiny.tokenizer(), memory) as llm, llm.read(book) as reading:
            answers = [llm.ask(question, reading, max_tokens=20) for question in ("Who sat?", "Where?")]
            found.append([(answer.token_ids, [(x.start, x.end) for x in answer.sources]) for answer in answers])
            held.append(reading.nbytes)
    assert found[0] == found[1]
    assert all(sources for _, sources in found[0])
    assert held[1] < held[0] / 2
