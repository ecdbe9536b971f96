"""Attention of the Triton kernels against the torch functions, and the engine on them against the engine on torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qllm_kernels import attention
from qllm_kernels.attention import FarSegment
from qllm_kernels.gpu import attention as gpu

NAN = float("nan")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs begin as NaN, so that a place that is not written shows."""
    for name in ("empty", "new_empty"):
        owner = torch if name == "empty" else torch.Tensor
        make = getattr(owner, name)

        def filled(*args, make=make, **options):
            made = make(*args, **options)
            return made.fill_(NAN) if made.is_floating_point() else made

        monkeypatch.setattr(owner, name, filled)


def check(
    *, group=2, kv_heads=2, dim=32, value_dim=None, pieces=1, length=8, back=5, loose=0, hide=False, pages=0, page=16,
    scopes=1, softcap=None, short=False, dtype=torch.float32, seed=0,
):  # fmt: skip
    value_dim = value_dim or dim
    heads, rows, slot = group * kv_heads, pieces * length, 3
    slots = slot + (pieces - 1) * length + back + length
    near, query = random(heads, rows, dim, seed=seed), random(heads, rows, dim, seed=seed + 1)
    key, value = (
        torch.full((kv_heads, slots + 2, size), NAN) for size in (dim, value_dim)
    )  # what is not seen spoils everything
    key[:, slot:slots], value[:, slot:slots] = (
        random(kv_heads, slots - slot, size, seed=seed + 2) for size in (dim, value_dim)
    )
    far = None
    if loose or pages:
        parts: dict[str, torch.Tensor] = {}
        if loose:
            parts["key"], parts["value"] = (random(kv_heads, pieces, loose, x, seed=seed + 3) for x in (dim, value_dim))
            if hide:
                parts["hidden"] = random(pieces, scopes, loose, seed=seed + 4) > 0.3
                parts["hidden"][:, :, 0] = False
        if pages:
            table = torch.rand(pieces, scopes, 7, generator=torch.Generator().manual_seed(seed)).argsort(-1)
            parts["page_key"], parts["page_value"] = (
                random(kv_heads, 7, page, x, seed=seed + 5) for x in (dim, value_dim)
            )
            parts["table"] = table[:, :, :pages].sort(-1).values
            if short:
                parts["n_chosen"] = torch.arange(pieces, dtype=torch.int32) % pages + 1
        far = FarSegment(query, **parts)

    def cast(x):
        return x.to(dtype) if x.is_floating_point() else x

    sizes = {"slot": slot, "back": back, "length": length, "scale": 0.2, "softcap": softcap}
    expected = attention.attend_pieces(near, key, value, far, **sizes)
    if far is not None:
        far = FarSegment(**{name: None if x is None else cast(x) for name, x in vars(far).items()})
    actual = gpu.attend_pieces(cast(near), cast(key), cast(value), far, **sizes)
    assert actual[0].dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(actual[0].float(), expected[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(actual[1], expected[1], atol=tolerance, rtol=tolerance)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    group=st.sampled_from([1, 3, 4, 7, 16]),
    dims=st.sampled_from([(32, 32), (20, 24), (64, 64)]),
    pieces=st.integers(1, 3),
    length=st.integers(2, 9),
    back=st.integers(0, 50),
    loose=st.integers(0, 40),
    hide=st.booleans(),
    pages=st.integers(0, 3),
    page=st.sampled_from([5, 16, 40]),
    scopes=st.sampled_from([1, 2]),
    short=st.booleans(),
    softcap=st.sampled_from([None, 1.5]),
)
def test_prefill(group, dims, **shape):
    with pytest.MonkeyPatch.context() as patch:
        poisoned(patch)
        check(group=group, dim=dims[0], value_dim=dims[1], **shape)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    group=st.sampled_from([1, 4, 7, 16]),
    back=st.integers(0, 100),
    loose=st.integers(0, 70),
    pages=st.integers(0, 3),
    page=st.sampled_from([16, 40]),
    scopes=st.sampled_from([1, 2]),
    softcap=st.sampled_from([None, 1.5]),
)
def test_decode(group, back, loose, pages, page, scopes, softcap):
    with pytest.MonkeyPatch.context() as patch:
        poisoned(patch)
        check(
            group=group,
            back=back,
            loose=loose,
            pages=pages,
            page=page,
            scopes=scopes,
            softcap=softcap,
            length=1,
            hide=True,
        )


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


def test_what_is_refused():
    near, key = random(34, 2, 16), random(2, 5, 16)
    assert "17 heads" in gpu.cannot_serve(near, key, key, None)
    assert gpu.cannot_serve(near[:4], key, key, None) is None
    assert "differ in dtype" in gpu.cannot_serve(near[:4], key, key.half(), None)
    assert "not contiguous" in gpu.cannot_serve(near[:4], key.mT.contiguous().mT, key, None)
