"""Block summaries against loops over tokens in double precision."""

from __future__ import annotations

import pytest
import torch

from qllm_kernels.summary import key_bounds, linear_token_scores, mean_keys, softmax_mass, top_keys


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 4])
def test_mean_keys(size):
    key = random(2, 3, size, 8)
    actual = mean_keys(key)
    assert actual.shape == (2, 1, 3, 8)
    torch.testing.assert_close(actual[:, 0].double(), key.double().mean(2), atol=1e-6, rtol=1e-6)


def test_mean_keys_adds_up_in_single_precision():
    key = torch.full((1, 1, 4096, 1), 1.0, dtype=torch.float16)
    assert mean_keys(key).dtype == torch.float16
    assert mean_keys(key * 16).item() == 16.0  # a sum in half precision would overflow


@pytest.mark.parametrize("size", [1, 4])
def test_key_bounds(size):
    key = random(2, 3, size, 8)
    actual = key_bounds(key)
    assert actual.shape == (2, 1, 3, 16)
    for head in range(2):
        for block in range(3):
            for dim in range(8):
                values = key[head, block, :, dim].tolist()
                assert actual[head, 0, block, dim] == max(values)
                assert actual[head, 0, block, 8 + dim] == min(values)


@pytest.mark.parametrize(("n", "n_local"), [(1, 1), (6, 4), (4, 9)])
def test_linear_token_scores(n, n_local):
    key, query = random(2, n, 8), random(2, n + n_local, 8, seed=1)
    expected = torch.zeros(2, n, dtype=torch.double)
    for i in range(n):
        for j in range(i + 1, i + n_local + 1):
            expected[:, i] += (query[:, j].double() * key[:, i].double()).sum(-1) / n_local
    prefix = torch.nn.functional.pad(query.cumsum(1), (0, 0, 1, 0))
    assert prefix.shape[1] == n + n_local + 1
    torch.testing.assert_close(linear_token_scores(key, prefix, n_local).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("repr_topk", [1, 3, 5])
def test_top_keys(heads, repr_topk):
    key, scores = random(2, 3, 5, 8), random(heads, 3, 5, seed=1)
    actual = top_keys(key, scores, repr_topk)
    assert actual.shape == (heads, repr_topk, 3, 8)
    for h in range(heads):
        for block in range(3):
            best = sorted(sorted(range(5), key=lambda t, row=scores[h, block]: -row[t])[:repr_topk])
            assert torch.equal(actual[h, :, block], key[h // (heads // 2), block, best])


@pytest.mark.parametrize("softcap", [None, 1.0])
@pytest.mark.parametrize(("heads", "m", "n_local"), [(2, 1, 1), (2, 4, 6), (6, 8, 3)])
def test_softmax_mass(heads, m, n_local, softcap):
    n = m + n_local - 1
    query, key, lse = random(heads, n, 8), random(2, m, 8, seed=1), random(heads, n, seed=2) + 2
    expected = torch.zeros(heads, m, dtype=torch.double)
    for h in range(heads):
        for i in range(m):
            for p in range(i, min(i + n_local, n)):
                logit = (query[h, p].double() @ key[h // (heads // 2), i].double()) * 0.4
                logit = logit if softcap is None else softcap * torch.tanh(logit / softcap)
                expected[h, i] += torch.exp(logit - lse[h, p].double())
    actual = softmax_mass(query, key, lse, n_local=n_local, scale=0.4, softcap=softcap)
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)


def test_softmax_mass_ignores_what_it_does_not_see():
    """Logits outside the window may be huge; they must not turn into infinities."""
    query, key, lse = torch.full((1, 3, 2), 50.0), torch.full((1, 3, 2), 50.0), torch.full((1, 3), 5000.0)
    lse[0, 2] = 0.0  # position 2 sees only itself
    query[0, 2] = 0.0
    actual = softmax_mass(query, key, lse, n_local=1, scale=1.0)
    torch.testing.assert_close(actual, torch.ones(1, 3))
