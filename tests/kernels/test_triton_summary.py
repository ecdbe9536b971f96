"""Block summaries of the Triton kernels against the torch functions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm_kernels import summary
from qllm_kernels.gpu import summary as gpu


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block_view(kv_heads: int, n_blocks: int, size: int, dim: int) -> torch.Tensor:
    """Blocks as the window hands them out: a view into a longer buffer."""
    buffer = torch.full((kv_heads, n_blocks * size + 9, dim), float("nan"))
    buffer[:, 4 : 4 + n_blocks * size] = random(kv_heads, n_blocks * size, dim)
    return buffer[:, 4 : 4 + n_blocks * size].view(kv_heads, n_blocks, size, dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("size", "dim"), [(1, 20), (12, 32), (64, 40)])
def test_mean_keys(size, dim, dtype):
    key = block_view(2, 3, size, dim).to(dtype)
    expected = summary.mean_keys(key)
    torch.testing.assert_close(gpu.mean_keys(key).float(), expected.float(), atol=1e-3, rtol=1e-3)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    kv_heads=st.integers(1, 3),
    n_blocks=st.integers(1, 3),
    size=st.sampled_from([1, 5, 16, 48]),
    dim=st.sampled_from([20, 32, 80]),
    n_local=st.integers(1, 60),
    best=st.integers(1, 5),
)
def test_linear_top_keys(kv_heads, n_blocks, size, dim, n_local, best):
    key, n = block_view(kv_heads, n_blocks, size, dim), n_blocks * size
    rotated, query = random(kv_heads, n, dim, seed=1), random(kv_heads, n + n_local, dim, seed=2)
    prefix = torch.nn.functional.pad(query.cumsum(1), (0, 0, 1, 0))
    best = min(best, size)
    expected = summary.linear_top_keys(key, rotated, prefix, n_local, best)
    assert torch.equal(gpu.linear_top_keys(key, rotated, prefix, n_local, best), expected)


def test_ties_go_to_the_earlier_token():
    key = block_view(1, 1, 8, 16)
    rotated, prefix = torch.zeros(1, 8, 16), torch.zeros(1, 12, 16)
    assert torch.equal(gpu.linear_top_keys(key, rotated, prefix, 3, 2)[0, :, 0], key[0, 0, :2])


def test_what_is_refused():
    assert gpu.cannot_serve(random(1, 1, 4, 8)) is None
    assert "blocks of 300" in gpu.cannot_serve(random(1, 1, 300, 8))
