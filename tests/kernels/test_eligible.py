"""Counts of blocks on the device."""

from __future__ import annotations

import torch
from making import random

from qllm_kernels import dispatch, select
from qllm_kernels.eligible import eligible_blocks


def test_eligible_blocks():
    starts = torch.tensor([0, 10, 25, 26, 29, 30, 31])
    counts = eligible_blocks(starts, n_init=2, n_local=20, block_size=4)
    assert counts.tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_as_with_counts_of_the_host():
    lookup, summaries, counts = random(2, 4, 8), random(2, 3, 9, 8, seed=1), [4, 9]
    expected = select.top_blocks(lookup, summaries, counts, 5, scopes=1)
    ids, valid, _ = dispatch.top_blocks(lookup, summaries, torch.tensor(counts), 5, scopes=1)
    assert torch.equal(ids, expected[0])
    assert torch.equal(valid, expected[1])
