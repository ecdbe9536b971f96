"""Published block summaries and prefix sums of the Triton kernels against the torch functions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import examples, poisoned, random

from qllm_kernels import prefix, published
from qllm_kernels.gpu import prefix as gpu_prefix
from qllm_kernels.gpu import published as gpu


@examples(12)
@given(
    group=st.sampled_from([1, 2, 7, 16]),
    kv_heads=st.integers(1, 2),
    n_blocks=st.integers(1, 3),
    size=st.sampled_from([1, 5, 16, 40]),
    dim=st.sampled_from([20, 32]),
    n_local=st.integers(1, 60),
    late=st.integers(0, 80),
    best=st.integers(1, 5),
    softcap=st.sampled_from([None, 1.5]),
)
def test_published_means(group, kv_heads, n_blocks, size, dim, n_local, late, best, softcap):
    n, heads = n_blocks * size, group * kv_heads
    key, rotated = random(kv_heads, n_blocks, size, dim), random(kv_heads, n, dim, seed=1)
    reach = max(1, min(n + n_local - 1, n + late - 30))  # a text may end before all queries came
    query, lse = random(heads, reach, dim, seed=2), random(heads, reach + 9, seed=3)[:, :reach] + 3
    sizes = {"n_local": n_local, "repr_topk": min(best, size), "scale": 0.3, "softcap": softcap}
    expected = published.published_means(key, rotated, query, lse, **sizes)
    if reach < n:  # keys without any query tie at zero, which torch.topk does not resolve by position
        return
    with poisoned():
        actual = gpu.published_means(key, rotated, query, lse, **sizes)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_half_precision():
    key, query, lse = random(2, 2, 24, 32), random(4, 80, 32, seed=1), random(4, 80, seed=2) + 4
    rotated = key.flatten(1, 2)
    sizes = {"n_local": 30, "repr_topk": 3, "scale": 0.2}
    rounded = [x.half() for x in (key, rotated, query)]
    expected = published.published_means(*(x.float() for x in rounded), lse, **sizes)
    actual = gpu.published_means(*rounded, lse, **sizes)
    torch.testing.assert_close(actual.float(), expected, atol=2e-3, rtol=2e-3)


def test_what_is_refused():
    key = random(1, 1, 300, 8)
    assert "blocks of 300" in gpu.cannot_serve(key, key[0], key[0])


@examples(12)
@given(heads=st.integers(1, 3), n=st.sampled_from([1, 63, 64, 65, 200]), dim=st.sampled_from([8, 20, 100]))
def test_query_prefix(heads, n, dim):
    query = random(n, heads, dim).transpose(0, 1)
    with poisoned():
        actual = gpu_prefix.query_prefix(query)
    torch.testing.assert_close(actual, prefix.query_prefix(query), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tiles", [1, 9])
def test_many_tiles(monkeypatch, tiles):
    monkeypatch.setattr(gpu_prefix, "_TOKENS", 2)
    query = random(1, 2 * tiles, 4)
    torch.testing.assert_close(gpu_prefix.query_prefix(query), prefix.query_prefix(query), atol=1e-5, rtol=1e-5)
