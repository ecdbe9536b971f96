"""A token's append and its choice of blocks in one launch of the Triton kernels, against the torch functions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import NAN, examples, poisoned, random

from qllm_kernels import choice, rotary
from qllm_kernels.choice import Pinned
from qllm_kernels.gpu import append as gpu
from qllm_kernels.gpu.counters import completion_counters
from qllm_kernels.rotary import Arrival, Destination


def arrival(
    *, group: int, kv_heads: int, dims: tuple[int, int, int], interleaved: bool, dtype: torch.dtype, seed: int
) -> Arrival:
    """A token that goes to slot 5 of its window; places of buffers that nobody writes are NaN."""
    dim, value_dim, turned = dims
    heads = group * kv_heads
    # as projections hand them out: a token's heads in a row
    query, key = (random(1, n, dim, seed=seed + n).to(dtype).transpose(0, 1) for n in (heads, kv_heads))
    value = random(1, kv_heads, value_dim, seed=seed + 2).to(dtype).transpose(0, 1)
    angles, slot = torch.rand(9, turned, generator=torch.Generator().manual_seed(seed)) * 6, torch.tensor([5])
    window, raw = (
        Destination(*(torch.full((kv_heads, 9, x), NAN, dtype=dtype) for x in (dim, value_dim)), slot) for _ in range(2)
    )
    raw = dataclasses.replace(raw, value=None)
    return Arrival(query, key, value, angles.cos(), angles.sin(), slot, window, raw, interleaved)


@examples(16)
@given(
    group=st.sampled_from([1, 3, 16]),
    kv_heads=st.sampled_from([1, 2, 3]),
    dims=st.sampled_from([(16, 16, 16), (20, 12, 12), (32, 24, 8)]),
    interleaved=st.booleans(),
    per_head=st.booleans(),
    bounds=st.booleans(),
    r=st.sampled_from([1, 3]),
    n_blocks=st.sampled_from([1, 9, 140]),
    topk=st.integers(1, 20),
    asked=st.booleans(),
    half=st.booleans(),
    pins=st.sampled_from([0, 1, 70]),
    seed=st.integers(0, 99),
)
def test_append_and_choose(
    group, kv_heads, dims, interleaved, per_head, bounds, r, n_blocks, topk, asked, half, pins, seed
):
    dtype = torch.float16 if half else torch.float32
    made = {
        "group": group,
        "kv_heads": kv_heads,
        "dims": dims,
        "interleaved": interleaved,
        "dtype": dtype,
        "seed": seed,
    }
    new, same = arrival(**made), arrival(**made)
    far = torch.stack((new.cos[2], new.sin[2]))
    scopes = kv_heads if per_head else 1
    r, width = (1, 2 * dims[0]) if bounds else (r, dims[0])
    buffer = torch.full((kv_heads, r, n_blocks + 3, width), NAN, dtype=dtype)
    buffer[:, :, :n_blocks] = random(kv_heads, r, n_blocks, width, seed=seed).to(dtype)
    parts = [buffer[:, :, :n_blocks]]
    question = torch.full((scopes, n_blocks + 5), NAN)
    question[:, :n_blocks] = 3 * random(scopes, n_blocks, seed=seed + 9) + 100
    counts = torch.randint(0, n_blocks + 1, (1,), generator=torch.Generator().manual_seed(seed))
    border = torch.tensor([40])
    drawn = torch.Generator().manual_seed(seed)
    block, position = (torch.randint(-1, top, (pins,), generator=drawn) for top in (n_blocks + 2, 60))
    hidden = torch.zeros(1, scopes, pins, dtype=torch.bool)
    pinned = Pinned(block, position, border, hidden) if pins else None
    kind = {"scopes": scopes, "question": question if asked else None, "weight": 0.7, "bounds": bounds}
    with poisoned():
        near, far_query, ids, valid = gpu.append_and_choose(new, far, parts, counts, topk, **kind, pinned=pinned)
    wanted = rotary.rotate_append(same, far)
    tolerance = 4e-3 if half else 1e-5
    torch.testing.assert_close((near, far_query), wanted, atol=tolerance, rtol=tolerance)
    for place, expected in ((new.window, same.window), (new.raw, same.raw)):
        for x, y in ((place.key, expected.key), (place.value, expected.value)):
            if x is not None:
                torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance, equal_nan=True)
    lookup, widened = far_query.float().transpose(0, 1), [part.float() for part in parts]
    exact = choice.choose_blocks(lookup, widened, counts, topk, **kind)
    assert torch.equal(valid, exact[1])
    if not half:
        assert torch.equal(ids, exact[0])
    else:  # scores differ in their last bits: what is chosen is as good as the best to within these
        ranked = exact[2][..., : int(counts)].gather(-1, ids) if int(counts) else exact[2][..., :0]
        best = exact[2].gather(-1, exact[0]) if int(counts) else ranked
        torch.testing.assert_close(ranked.sort(-1).values, best.sort(-1).values, atol=5e-2, rtol=5e-2)
    if pinned is not None:
        assert torch.equal(hidden, choice.seen_twice(ids, block, position, border))
    assert not completion_counters(torch.device("cpu")).any()


@pytest.mark.parametrize("scopes", [1, 3])
def test_every_head_is_taken_in_whatever_the_grid(scopes):
    """Twelve heads on one or three columns of programs, the last row of which is not full."""
    new = arrival(group=3, kv_heads=3, dims=(16, 16, 16), interleaved=False, dtype=torch.float32, seed=1)
    far, parts = torch.stack((new.cos[2], new.sin[2])), [random(3, 1, 70, 16)]
    with poisoned():
        near, far_query, *_ = gpu.append_and_choose(new, far, parts, torch.tensor([70]), 4, scopes=scopes)
    assert not near.isnan().any() and not far_query.isnan().any()
    for buffer in (new.window.key, new.window.value, new.raw.key):
        assert not buffer[:, 5].isnan().any() and buffer[:, :5].isnan().all() and buffer[:, 6:].isnan().all()


def test_what_is_refused():
    new = arrival(group=2, kv_heads=1, dims=(16, 16, 16), interleaved=False, dtype=torch.float32, seed=1)
    assert gpu.cannot_serve(new, [random(1, 1, 4, 16)]) is None
    assert "float64" in gpu.cannot_serve(new, [random(1, 1, 4, 16).double()])
    assert "differ in dtype" in gpu.cannot_serve(
        dataclasses.replace(new, value=new.value.half()), [random(1, 1, 4, 16)]
    )
