"""Attention over segments against the direct formula in double precision."""

from __future__ import annotations

import pytest
import torch

from qllm_kernels.attention import apply_sinks, attend, merge, segment_logits


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def direct(query, key, value, scale, bias=None, softcap=None):
    """Output and log-sum-exp in double precision."""
    logits = query.double() @ key.double().transpose(-1, -2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.double()
    return torch.softmax(logits, -1) @ value.double(), logits.logsumexp(-1)


def close(actual, expected, tolerance=2e-6):
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x.double(), y, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("value_dim", [8, 12], ids=["square", "wide values"])
@pytest.mark.parametrize(("batch", "heads", "n", "m"), [(1, 1, 1, 1), (2, 3, 5, 7), (1, 2, 40, 130), (3, 1, 1, 600)])
@pytest.mark.parametrize("bias", [None, "row", "full"])
def test_attend(softcap, value_dim, batch, heads, n, m, bias):
    query, key, value = (
        random(batch, heads, n, 8),
        random(batch, heads, m, 8, seed=1),
        random(batch, heads, m, value_dim),
    )
    shape = {None: None, "row": (batch, 1, 1, m), "full": (n, m)}[bias]
    hide = None
    if shape is not None:
        hide = torch.zeros(shape).masked_fill_(random(*shape, seed=3) > 0.5, float("-inf"))
        hide[..., 0] = 0  # every query sees a key
    actual = attend(query, key, value, scale=0.3, bias=hide, softcap=softcap)
    close(actual, direct(query, key, value, 0.3, hide, softcap))
    assert actual[0].dtype == query.dtype
    assert actual[1].dtype == torch.float32


def test_attend_takes_overlapping_and_expanded_views():
    data = random(2, 40, 8)
    windows = data.as_strided((5, 2, 12, 8), (4 * 8, data.stride(0), 8, 1), 3 * 8)
    query = random(5, 2, 4, 8, seed=1)
    close(attend(query, windows, windows, scale=0.5), direct(query, windows, windows, 0.5))
    shared = data[:1, None].expand(-1, 5, -1, -1).transpose(0, 1)
    query = random(5, 1, 4, 8, seed=2)
    close(attend(query, shared, shared, scale=0.5), direct(query, shared, shared, 0.5))


@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 100.0])
def test_attend_is_stable(magnitude):
    query, key, value = (
        random(1, 2, 6, 8) * magnitude,
        random(1, 2, 9, 8, seed=1) * magnitude,
        random(1, 2, 9, 8, seed=2),
    )
    out, lse = attend(query, key, value, scale=1.0)
    expected, expected_lse = direct(query, key, value, 1.0)
    torch.testing.assert_close(out.double(), expected, atol=2e-3 if magnitude > 1 else 1e-5, rtol=1e-3)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_segment_logits(softcap):
    query, key = random(2, 3, 8), random(2, 5, 8, seed=1)
    expected = query.double() @ key.double().transpose(1, 2) * 0.7
    if softcap:
        expected = softcap * torch.tanh(expected / softcap)
        assert expected.abs().max() < softcap
    actual = segment_logits(query, key, scale=0.7, softcap=softcap)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cut", [1, 5, 10])
def test_merge_is_one_softmax(cut):
    query, key, value = random(2, 3, 4, 8), random(2, 3, 11, 8, seed=1), random(2, 3, 11, 8, seed=2)
    parts = [direct(query, key[:, :, rows], value[:, :, rows], 0.5) for rows in (slice(cut), slice(cut, None))]
    first, second = [(out.float(), lse.float()) for out, lse in parts]
    close(merge(first, second), direct(query, key, value, 0.5))
    close(merge(second, first), direct(query, key, value, 0.5))


def test_merge_of_very_unequal_parts():
    strong, weak = (torch.ones(1, 2, 3), torch.full((1, 2), 90.0)), (torch.zeros(1, 2, 3), torch.full((1, 2), -90.0))
    for out, lse in (merge(strong, weak), merge(weak, strong)):
        torch.testing.assert_close(out, torch.ones(1, 2, 3))
        torch.testing.assert_close(lse, torch.full((1, 2), 90.0))
    nothing = (torch.zeros(1, 2, 3), torch.full((1, 2), float("-inf")))
    for out, lse in (merge(strong, nothing), merge(nothing, strong)):
        torch.testing.assert_close(out, torch.ones(1, 2, 3))
        torch.testing.assert_close(lse, torch.full((1, 2), 90.0))


def test_sinks_take_their_share():
    query, key, value = random(1, 3, 4, 8), random(1, 3, 6, 8, seed=1), random(1, 3, 6, 8, seed=2)
    sinks = torch.tensor([0.5, -40.0, 60.0])
    logits = query.double() @ key.double().transpose(-1, -2)
    joint = torch.cat((logits, sinks.double()[None, :, None, None].expand(1, -1, 4, 1)), -1)
    expected = torch.softmax(joint, -1)[..., :-1] @ value.double(), joint.logsumexp(-1)
    out, lse = attend(query, key, value, scale=1.0)
    close([x[None] for x in apply_sinks(out[0], lse[0], sinks)], expected, 1e-5)
