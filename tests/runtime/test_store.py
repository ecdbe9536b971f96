"""Pages of blocks shared between generations of forks."""

from __future__ import annotations

import itertools

import pytest
import torch

from qllm_runtime.memory.store import BlockStore

HEADS, SIZE, DIM = 2, 4, 8


def blocks(m: int, seed: int, r: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    key, value = (torch.randn(HEADS, m, SIZE, DIM, generator=generator) for _ in range(2))
    return key, value, None if r is None else torch.randn(HEADS, r, m, DIM, generator=generator)


Block = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def check(store: BlockStore, expected: list[Block], one_run: bool = True) -> None:
    key, value = (torch.cat([part[i] for part in expected], 1) for i in range(2))
    n = key.shape[1]
    assert len(store) == n
    shared = torch.randperm(n, generator=torch.Generator().manual_seed(n))[None]
    own = torch.stack([shared[0], shared[0].flip(0)])
    for ids in (shared, own):
        heads = torch.arange(HEADS)[:, None]
        pieces = torch.stack([ids, ids.flip(1)])  # [pieces, scopes, n]
        gathered = store.gather(pieces)
        assert torch.equal(store.keys(pieces), gathered[0])
        for actual, whole in zip(gathered, (key, value), strict=True):
            assert torch.equal(actual[:, 0], whole[heads, ids])
            assert torch.equal(actual[:, 1], whole[heads, ids.flip(1)])
        paged = store.in_place(pieces, None)
        assert (paged is None) == (not one_run)
        if paged is not None:
            assert torch.equal(paged.key[heads, paged.table[1]], key[heads, ids.flip(1)])
            assert torch.equal(paged.value[heads, paged.table[1]], value[heads, ids.flip(1)])
    summaries = key.transpose(1, 2) if expected[0][2] is None else torch.cat([part[2] for part in expected], 2)
    for count in range(1, n + 1):
        assert torch.equal(torch.cat(store.summaries(count), 2), summaries[:, :, :count])


@pytest.mark.parametrize("r", [1, 2, None])
def test_generations(r: int | None) -> None:
    """Every fork sees what there was when it was made and what it appended itself."""
    parts = [blocks(m, seed, r) for seed, m in enumerate((9, 1, 3, 2, 1))]
    root = BlockStore()
    root.append(*parts[0])
    child = root.fork()
    root.append(*parts[1])
    child.append(*parts[2])
    grandchild = child.fork()
    twin = grandchild.fork()
    child.append(*parts[3])
    twin.append(*parts[4])
    check(root, [parts[0], parts[1]])
    check(child, [parts[0], parts[2], parts[3]], one_run=False)
    check(grandchild, [parts[0], parts[2]], one_run=False)
    check(twin, [parts[0], parts[2], parts[4]], one_run=False)
    assert BlockStore().fork().kv_heads == 0
    assert twin.kv_heads == HEADS


@pytest.mark.parametrize("r", [1, 3, None])
def test_growth(r: int | None) -> None:
    store, parts = BlockStore(reserve=2), []
    for seed, m in enumerate(itertools.chain([1], [2, 5] * 4)):
        parts.append(blocks(m, seed, r))
        store.append(*parts[-1])
        check(store, parts)


def test_keys_that_represent_their_block_are_held_once() -> None:
    store = BlockStore(reserve=100)
    store.append(*blocks(3, 0, None))
    pages = 2 * HEADS * 100 * SIZE * DIM * 4
    assert store.nbytes() == pages
    (summaries,) = store.summaries(3)
    assert summaries.data_ptr() == store.pages[0].key.data_ptr()
    fork = store.fork()
    assert len(fork.summaries(3)) == 1  # nothing is copied to be scored
    assert fork.summaries(3)[0].data_ptr() == summaries.data_ptr()
    with_summaries = BlockStore(reserve=100)
    with_summaries.append(*blocks(3, 0, 2))
    assert with_summaries.nbytes() == pages + HEADS * 2 * 100 * DIM * 4
