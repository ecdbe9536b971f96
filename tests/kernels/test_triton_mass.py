"""Attention mass of the Triton kernel against the torch function, and of that against plain softmax weights."""

from __future__ import annotations

import torch
from hypothesis import given
from making import PREFILL, STEP, examples, poisoned, random, segments

from qllm_kernels import attention, mass, step
from qllm_kernels.gpu import mass as gpu


def check(window=True, dtype=torch.float32, **shape):
    given = segments(**shape)
    _, lse = attention.attend_pieces(given.near, given.key, given.value, given.far, **given.sizes)
    lse = torch.logaddexp(lse, torch.tensor(0.3))  # a sink takes part
    expected = mass.attention_mass(given.near, given.key, given.far, lse, window=window, **given.sizes)
    cast = given.to(dtype)
    with poisoned():
        actual = gpu.attention_mass(cast.near, cast.key, cast.far, lse, window=window, **given.sizes)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for name, part in vars(expected).items():
        found = getattr(actual, name)
        assert (found is None) == (part is None)
        if part is not None:
            torch.testing.assert_close(found, part, atol=tolerance, rtol=tolerance)
    return given, lse, actual


@examples(12)
@given(**PREFILL)
def test_prefill(dims, **shape):
    check(dim=dims[0], value_dim=dims[1], window=shape["short"], **shape)


@examples(10)
@given(**STEP)
def test_step(**shape):
    given = segments(length=1, hide=True, short=True, **shape)
    _, lse = attention.attend_pieces(given.near, given.key, given.value, given.far, **given.sizes)
    where = {name: torch.tensor([given.sizes[name]]) for name in ("slot", "back")}
    factors = {name: given.sizes[name] for name in ("scale", "softcap")}
    expected = step.step_mass(given.near, given.key.nan_to_num(), given.far, lse, **where, **factors)
    with poisoned():
        actual = gpu.step_mass(given.near, given.key, given.far, lse, **where, **factors)
    for name, part in vars(expected).items():
        torch.testing.assert_close(getattr(actual, name), part, atol=1e-5, rtol=1e-5)
    apart = mass.attention_mass(given.near, given.key, given.far, lse, **given.sizes)
    seen = slice(given.sizes["slot"], given.sizes["slot"] + given.sizes["back"] + 1)
    torch.testing.assert_close(actual.window[:, :, seen], apart.window)
    assert not actual.window[:, :, : seen.start].any() and not actual.window[:, :, seen.stop :].any()


@examples(10)
@given(**STEP)
def test_decode(**shape):
    given, lse, found = check(length=1, hide=True, short=True, **shape)
    total = sum(part.flatten(2).sum(2) for part in vars(found).values() if part is not None)  # [1, kv_heads]
    without_sink = torch.log(torch.exp(lse) - torch.exp(torch.tensor(0.3)))
    shares = torch.exp(without_sink - lse).view(given.key.shape[0], -1).sum(1)
    torch.testing.assert_close(total[0], shares, atol=1e-4, rtol=1e-4)


def test_weights_of_one_token_are_those_of_softmax():
    near, key = random(4, 1, 16), random(2, 6, 16, seed=1)
    weights = torch.softmax(near.view(2, 2, 16) @ key.mT * 0.2, -1)
    lse = torch.logsumexp(near.view(2, 2, 16) @ key.mT * 0.2, -1).view(4, 1)
    found = gpu.attention_mass(near, key, None, lse, slot=0, back=5, length=1, scale=0.2)
    torch.testing.assert_close(found.window[0], weights.sum(1))
    assert found.pages is None and found.loose is None


def test_half_precision():
    check(length=40, back=40, loose=20, pages=2, dtype=torch.float16)


def test_only_outside_where_nothing_is():
    assert check(window=False)[2] == mass.Mass(None, None, None)
