"""The torch function of the choice by current tokens and question, against loops."""

from __future__ import annotations

import pytest
import torch
from making import random

from qllm_kernels import dispatch, select
from qllm_kernels.choice import Pinned, choose_blocks
from qllm_kernels.rotary import Arrival, Destination, rotate


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("scopes", [1, 2])
def test_terms_are_standardised_over_what_a_piece_may_choose(scopes, on_device):
    lookup, parts = random(3, 4, 8), [random(2, 2, n, 8, seed=n) for n in (6, 3)]
    question, counts = random(scopes, 9, seed=5) * 7 + 40, [2, 7, 9]
    given = torch.tensor(counts) if on_device else counts
    ids, valid, scores = choose_blocks(lookup, parts, given, 4, scopes=scopes, question=question, weight=0.7)
    plain = select.block_scores(lookup, torch.cat(parts, 2), scopes=scopes)
    for piece, count in enumerate(counts):
        for scope in range(scopes):
            terms = [plain[piece, scope, :count], question[scope, :count]]
            terms = [(x - x.mean()) / x.std(correction=0) for x in terms]
            expected = terms[0] + 0.7 * terms[1]
            torch.testing.assert_close(scores[piece, scope, :count], expected, atol=1e-4, rtol=1e-4)
            best = sorted(sorted(range(count), key=lambda i, row=expected: -row[i])[:4])
            assert ids[piece, scope][valid[piece, scope]].tolist() == best


def test_without_a_question_it_is_the_choice_by_current_tokens():
    lookup, summaries = random(2, 4, 8), random(2, 3, 9, 8, seed=1)
    parts = [summaries[:, :, :4], summaries[:, :, 4:]]
    expected = select.block_scores(lookup, summaries, scopes=2)
    for counts in ([9, 9], [3, 9]):
        ids, valid, scores = choose_blocks(lookup, parts, counts, 5, scopes=2)
        wanted, seen = select.select_blocks(expected, torch.tensor(counts), 5)
        assert torch.equal(ids, wanted)
        assert seen.all() if valid is None else torch.equal(valid, seen)
        torch.testing.assert_close(scores, expected)


def test_counts_of_the_device_choose_as_those_of_the_host():
    lookup, parts = random(2, 4, 8), [random(2, 3, 9, 8, seed=1)]
    expected = choose_blocks(lookup, parts, [4, 9], 5, scopes=1)
    ids, valid, _ = choose_blocks(lookup, parts, torch.tensor([4, 9]), 5, scopes=1)
    assert torch.equal(ids, expected[0])
    assert torch.equal(valid, expected[1])


def test_valid_is_left_out_where_the_host_knows():
    lookup, parts = random(2, 2, 8), [random(1, 1, 5, 8)]
    assert choose_blocks(lookup, parts, [3, 5], 3, scopes=1)[1] is None
    assert choose_blocks(lookup, parts, [2, 5], 3, scopes=1)[1] is not None
    assert choose_blocks(lookup, parts, torch.tensor([3, 5]), 3, scopes=1)[1] is not None


@pytest.mark.parametrize("lengths", [[9], [6, 3]])
def test_append_and_choose_is_append_then_choose(lengths):
    query, key, slot = random(4, 1, 8), random(2, 1, 8, seed=1), torch.tensor([3])
    parts = list(random(2, 1, 9, 8, seed=2).split(lengths, 2))
    cos, sin = random(5, 8, seed=3), random(5, 8, seed=4)
    window = Destination(torch.zeros(2, 5, 8), torch.zeros(2, 5, 8), slot)
    raw = Destination(torch.zeros(2, 5, 8), None, slot)
    far = torch.stack((cos[1], sin[1]))
    block, position = torch.tensor([0, 4, 5, -1]), torch.tensor([8, 6, 7, -1])
    pinned = Pinned(block, position, torch.tensor([7]), torch.empty(1, 1, 4, dtype=torch.bool))
    near, far_query, ids, valid = dispatch.append_and_choose(
        Arrival(query, key, key, cos, sin, slot, window, raw), far, parts, torch.tensor([7]), 3, scopes=1, pinned=pinned
    )
    torch.testing.assert_close(near, rotate(query, cos[3:4], sin[3:4]))
    torch.testing.assert_close(far_query, rotate(query, cos[1:2], sin[1:2]))
    assert torch.equal(raw.key[:, 3:4], key)
    expected = choose_blocks(far_query.transpose(0, 1), parts, torch.tensor([7]), 3, scopes=1)
    assert torch.equal(ids, expected[0])
    assert torch.equal(valid, expected[1])
    seen = ids[0, 0].tolist()
    assert pinned.hidden[0, 0].tolist() == [True, 4 in seen, True, False]
