"""The second stage of a choice against the choice among all blocks, and against loops."""

from __future__ import annotations

import pytest
import torch
from making import random

from qllm_kernels.choice import choose_blocks
from qllm_kernels.refine import key_scores, refine_choice

KV_HEADS, SIZE, DIM, BLOCKS = 2, 5, 8, 11


def gathered(key: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[kv_heads, pieces, m, size, dim] of keys [kv_heads, n, size, dim]."""
    own = ids.repeat_interleave(KV_HEADS // ids.shape[1], 1)  # [pieces, kv_heads, m]
    return torch.stack([key[h][own[:, h]] for h in range(KV_HEADS)])


@pytest.mark.parametrize("question", [False, True])
@pytest.mark.parametrize("scopes", [1, 2])
@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("counts", [[11, 11], [4, 9], [1, 3]])
def test_with_all_blocks_as_candidates_it_is_the_choice_by_every_key(counts, device, scopes, question):
    lookup, key = random(2, 4, DIM), random(KV_HEADS, BLOCKS, SIZE, DIM, seed=1)
    options = {"scopes": scopes, "weight": 0.7, "question": random(scopes, BLOCKS, seed=2) * 5 if question else None}
    given = torch.tensor(counts) if device else counts
    expected = choose_blocks(lookup, [key.transpose(1, 2)], given, 3, **options)
    candidates = torch.arange(BLOCKS).expand(2, scopes, -1)
    ids, valid, scores = refine_choice(lookup, gathered(key, candidates), candidates, given, 3, **options)
    assert (valid is None) == (expected[1] is None)
    seen = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    assert valid is None or torch.equal(valid, expected[1])
    assert torch.equal(ids[seen], expected[0][seen])
    for piece, count in enumerate(counts):
        torch.testing.assert_close(scores[piece, :, :count], expected[2][piece, :, :count], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scopes", [1, 2])
def test_the_best_candidates(scopes):
    lookup, key, question = random(2, 4, DIM), random(KV_HEADS, BLOCKS, SIZE, DIM, seed=1), random(scopes, 14, seed=2)
    candidates = torch.stack([torch.randperm(BLOCKS)[: 5 * scopes].view(scopes, 5).sort(-1).values for _ in range(2)])
    scores = key_scores(lookup, gathered(key, candidates), scopes=scopes)
    counts = [BLOCKS, BLOCKS]
    ids, valid, _ = refine_choice(
        lookup, gathered(key, candidates), candidates, counts, 2, scopes=scopes, question=question, weight=0.5
    )
    assert valid is None
    for piece in range(2):
        for scope in range(scopes):
            heads = range(4)[scope * 4 // scopes : (scope + 1) * 4 // scopes]
            blocks = candidates[piece, scope].tolist()
            current = torch.tensor(
                [sum((key[h // 2, block] @ lookup[piece, h]).max().item() for h in heads) for block in blocks]
            )
            torch.testing.assert_close(scores[piece, scope], current, atol=1e-4, rtol=1e-4)
            asked = question[scope, :BLOCKS]
            asked = ((asked - asked.mean()) / asked.std(correction=0))[blocks]
            total = (current - current.mean()) / current.std(correction=0) + 0.5 * asked
            assert ids[piece, scope].tolist() == sorted(blocks[i] for i in total.topk(2).indices)


def test_places_without_a_candidate_are_never_chosen():
    lookup, key = random(1, 4, DIM), random(KV_HEADS, BLOCKS, SIZE, DIM, seed=1)
    counts, bounds = torch.tensor([3]), torch.cat((key.amax(2), key.amin(2)), -1)[:, None]
    candidates, there, _ = choose_blocks(lookup, [bounds], counts, 6, scopes=1, bounds=True)
    assert there.sum() == 3
    ids, valid, _ = refine_choice(lookup, gathered(key, candidates), candidates, counts, 5, scopes=1)
    assert valid.tolist() == [[[True, True, True, False, False]]]
    assert ids[valid].tolist() == [0, 1, 2]
