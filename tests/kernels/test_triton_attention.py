"""Attention of the Triton kernels against the torch functions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from making import PREFILL, STEP, examples, poisoned, random, segments

from qllm_kernels import attention, step
from qllm_kernels.attention import FarSegment
from qllm_kernels.gpu import attention as gpu
from qllm_kernels.gpu.counters import completion_counters


def check(dtype=torch.float32, **shape):
    given = segments(**shape)
    expected = attention.attend_pieces(given.near, given.key, given.value, given.far, **given.sizes)
    cast = given.to(dtype)
    with poisoned():
        actual = gpu.attend_pieces(cast.near, cast.key, cast.value, cast.far, **given.sizes)
    assert actual[0].dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(actual[0].float(), expected[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(actual[1], expected[1], atol=tolerance, rtol=tolerance)


@examples(12)
@given(**PREFILL)
def test_prefill(dims, **shape):
    check(dim=dims[0], value_dim=dims[1], **shape)


@examples(10)
@given(**STEP)
def test_decode(**shape):
    check(length=1, hide=True, **shape)


@examples(10)
@given(**STEP)
def test_a_window_that_only_the_device_knows(**shape):
    given = segments(length=1, hide=True, short=True, **shape)
    expected = attention.attend_pieces(given.near, given.key, given.value, given.far, **given.sizes)
    where = {name: torch.tensor([given.sizes[name]]) for name in ("slot", "back")}
    kind = {name: given.sizes[name] for name in ("scale", "softcap")}
    with poisoned():
        actual = gpu.attend_step(given.near, given.key, given.value, given.far, **where, **kind)
    finite = (given.key.nan_to_num(), given.value.nan_to_num())
    plain = step.attend_step(given.near, *finite, given.far, **where, **kind)
    for each in (actual, plain):
        torch.testing.assert_close(each, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("serve", [step.attend_step, gpu.attend_step])
def test_sequences_of_different_lengths_in_one_launch(serve):
    backs, pages = [9, 0, 40], random(2, 6, 4, 16)
    key, value, near, query = random(2, 80, 16), random(2, 80, 16), random(6, 3, 16), random(6, 3, 16, seed=1)
    slots, chosen = [3, 20, 30], torch.tensor([2, 1, 3], dtype=torch.int32)
    far = FarSegment(
        query,
        random(2, 3, 5, 16),
        random(2, 3, 5, 16, seed=1),
        page_key=pages,
        page_value=pages + 1,
        table=torch.tensor([[[0, 2, 5]], [[1, 1, 1]], [[2, 3, 4]]]),
        n_chosen=chosen,
    )
    out, lse = serve(near, key, value, far, slot=torch.tensor(slots), back=torch.tensor(backs), scale=0.2)
    for i, (slot, back) in enumerate(zip(slots, backs, strict=True)):
        one = FarSegment(
            query[:, i : i + 1],
            far.key[:, i : i + 1],
            far.value[:, i : i + 1],
            page_key=pages,
            page_value=pages + 1,
            table=far.table[i : i + 1, :, : chosen[i]],
        )
        sizes = {"slot": slot, "back": back, "length": 1, "scale": 0.2}
        expected = attention.attend_pieces(near[:, i : i + 1], key, value, one, **sizes)
        torch.testing.assert_close((out[:, i : i + 1], lse[:, i : i + 1]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_far_keys_of_shorter_pieces(size):
    """Tokens of a question share a window, and each looks up pages of its own."""
    given = segments(pieces=2, length=6, back=9)
    far = segments(pieces=12 // size, length=size, loose=4, hide=True, pages=2, short=True).far
    expected = attention.attend_pieces(given.near, given.key, given.value, far, **given.sizes)
    with poisoned():
        actual = gpu.attend_pieces(given.near, given.key, given.value, far, **given.sizes)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 40])
def test_half_precision(length):
    check(length=length, back=40, loose=20, pages=2, dtype=torch.float16)


def test_large_heads():
    check(dim=256, kv_heads=1, length=3, back=20, loose=9)


def test_a_split_that_sees_nothing():
    """With all far keys hidden some programs have no key at all."""
    near, key, value = random(2, 1, 16), random(1, 3, 16, seed=1), random(1, 3, 16, seed=2)
    far = FarSegment(near, random(1, 1, 200, 16), random(1, 1, 200, 16), torch.ones(1, 1, 200, dtype=torch.bool))
    sizes = {"slot": 0, "back": 2, "length": 1, "scale": 0.2}
    expected = attention.attend_pieces(near, key, value, None, **sizes)
    for x, y in zip(gpu.attend_pieces(near, key, value, far, **sizes), expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("length", [1, 4])
def test_one_launch_joins_its_splits_every_time(monkeypatch, length):
    """The program that ends last sets its counter back, or the next call would join too early or never."""
    launches = []
    kernel = type(gpu.segment_attention)
    launch = kernel.__getitem__
    monkeypatch.setattr(kernel, "__getitem__", lambda self, grid: launches.append(grid) or launch(self, grid))
    for seed in range(3):
        check(length=length, pieces=2, back=90, loose=70, pages=3, page=40, seed=seed)
        assert not completion_counters(torch.device("cpu")).any()
    assert [grid[0] for grid in launches] == [launches[0][0]] * 3
    assert launches[0][0] > 1


def test_what_is_refused():
    near, key = random(34, 2, 16), random(2, 5, 16)
    assert "17 heads" in gpu.cannot_serve(near, key, key, None)
    assert gpu.cannot_serve(near[:4], key, key, None) is None
    assert "differ in dtype" in gpu.cannot_serve(near[:4], key, key.half(), None)
    loose = key[:, None]
    assert "differ in dtype" in gpu.cannot_serve(near[:4], key, key, FarSegment(near[:4].half(), loose, loose))
    many = loose.expand(-1, 65536, -1, -1)
    assert "65536 pieces" in gpu.cannot_serve(near[:4], key, key, FarSegment(near[:4], many, many))
    assert "not contiguous" in gpu.cannot_serve(near[:4], key.mT.contiguous().mT, key, None)
