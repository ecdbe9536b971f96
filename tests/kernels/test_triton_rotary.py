"""Rotation and append of the Triton kernel against the torch function."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import given
from hypothesis import strategies as st
from making import NAN, examples, poisoned, random

from qllm_kernels import rotary
from qllm_kernels.gpu import rotary as gpu
from qllm_kernels.rotary import Arrival, Destination


@examples(12)
@given(
    group=st.integers(1, 16),
    kv_heads=st.integers(1, 3),
    n=st.sampled_from([1, 1, 2, 17, 33]),
    dims=st.sampled_from([(8, 8, 8), (20, 12, 12), (32, 24, 8), (48, 16, 48)]),
    interleaved=st.booleans(),
    half=st.booleans(),
    once=st.booleans(),
    seed=st.integers(0, 9),
)
def test_rotate_append(group, kv_heads, n, dims, interleaved, half, once, seed):
    dim, value_dim, turned = dims
    dtype = torch.float16 if half else torch.float32
    query, key = (
        random(kv_heads * group, n, dim, seed=seed).to(dtype),
        random(kv_heads, n, dim, seed=seed + 1).to(dtype),
    )
    value = random(n, kv_heads, value_dim, seed=seed + 2).to(dtype).transpose(0, 1)  # as projections hand them out
    angles = torch.rand(90, turned) * 6
    order = torch.rand(80, generator=torch.Generator().manual_seed(seed)).argsort()
    rows = torch.where(order[40 : 40 + n] % 5 == 0, -1, order[40 : 40 + n])

    def buffers():
        pages = (torch.full((kv_heads, 20, 4, x), NAN, dtype=dtype) for x in (dim, value_dim))
        window = (torch.full((kv_heads, 80, x), NAN, dtype=dtype) for x in (dim, value_dim))
        page_key, page_value = (x.flatten(1, 2) for x in pages)
        return Destination(*window, order[:n]), Destination(page_key, None if once else page_value, rows)

    places, expected_places = buffers(), buffers()
    tables = (angles.cos(), angles.sin(), torch.arange(50, 50 + n))
    given = (query, key, value, *tables)
    far = torch.stack((angles[3].cos(), angles[3].sin())) if seed % 3 else None
    expected = rotary.rotate_append(Arrival(*given, *expected_places, interleaved), far)
    with poisoned():
        actual = gpu.rotate_append(Arrival(*given, *places, interleaved), far)
    tolerance = 2e-3 if half else 1e-6
    assert (actual[1] is None) == (far is None)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    for place, wanted in zip(places, expected_places, strict=True):
        for name in ("key", "value"):
            x, y = getattr(place, name), getattr(wanted, name)
            if x is None:
                continue
            torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance, equal_nan=True)
    if not (rows < 0).any():
        assert torch.equal(places[1].key[:, rows], key)


def test_what_is_refused():
    query, key = random(2, 1, 16), random(1, 1, 16)
    place = Destination(random(1, 4, 16), random(1, 4, 16), torch.zeros(1, dtype=torch.int64))
    new = Arrival(query, key, key, random(4, 16), random(4, 16), place.rows, place, place)
    assert gpu.cannot_serve(new) is None
    other = dataclasses.replace(place, key=place.key.half())
    assert "differ in dtype" in gpu.cannot_serve(dataclasses.replace(new, raw=other))
