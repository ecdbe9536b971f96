"""Every operation of the dispatcher reaches its kernel, and both sides take the same arguments."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from making import random, segments

from qllm_kernels import dispatch
from qllm_kernels.residency import Residency
from qllm_kernels.rotary import Arrival, Destination

ONE = segments(length=1, back=4, loose=3, pages=2, dim=16)
PLACE = {name: torch.tensor([ONE.sizes[name]]) for name in ("slot", "back")}
KEY, VALUE = ONE.key.nan_to_num(), ONE.value.nan_to_num()
LSE = random(4, 1)
MOVES, COUNT = torch.tensor([[[1, 0]]]), torch.ones(1, dtype=torch.int32)


def _append() -> torch.Tensor:
    place = Destination(torch.zeros(2, 4, 16), torch.zeros(2, 4, 16), torch.tensor([2]))
    tables = LSE.view(2, 2)
    new = Arrival(ONE.near, KEY[:, 3:4], KEY[:, 4:5], tables, tables, PLACE["slot"] - 3, place, place)
    near, far = dispatch.rotate_append(new, tables)
    assert far is not None
    return torch.cat((near.flatten(), far.flatten(), place.key.flatten()))


def _copied(serve: Callable[..., None], dtype: torch.dtype, *scales: torch.Tensor) -> torch.Tensor:
    target = torch.zeros(2, 2, 3, 4, dtype=dtype)
    if serve is dispatch.dequantise_pages:
        serve(random(2, 2, 3, 4).to(torch.float8_e4m3fn), *scales, target, MOVES, COUNT)
    else:
        serve(random(2, 2, 3, 4), target, *scales, MOVES, COUNT)
    return target.float()


CALLS: dict[str, tuple[str, Callable[[], Any]]] = {
    "block_scores": ("select", lambda: dispatch.block_scores(random(1, 4, 16), random(2, 2, 9, 16), scopes=1)),
    "choose_blocks": (
        "select",
        lambda: dispatch.choose_blocks(
            random(1, 4, 16), [random(2, 2, 9, 16)], [9], 2, scopes=1, question=random(1, 9), weight=0.5
        )[0],
    ),
    "refine_pages": (
        "refine",
        lambda: dispatch.refine_pages(
            random(1, 4, 16),
            random(2, 5, 3, 16),
            torch.tensor([[[4, 0, 2]]]),
            torch.tensor([[[1, 5, 6]]]),
            [9],
            2,
            scopes=1,
            question=random(1, 9),
            weight=0.5,
        )[0],
    ),
    "attend_pieces": ("attention", lambda: dispatch.attend_pieces(ONE.near, KEY, VALUE, ONE.far, **ONE.sizes)[0]),
    "attend_step": ("attention", lambda: dispatch.attend_step(ONE.near, KEY, VALUE, ONE.far, **PLACE, scale=0.2)[0]),
    "attention_mass": ("mass", lambda: dispatch.attention_mass(ONE.near, KEY, ONE.far, LSE, **ONE.sizes).pages),
    "step_mass": ("mass", lambda: dispatch.step_mass(ONE.near, KEY, ONE.far, LSE, **PLACE, scale=0.2).pages),
    "mean_keys": ("summary", lambda: dispatch.mean_keys(random(1, 2, 4, 8))),
    "linear_top_keys": (
        "summary",
        lambda: dispatch.linear_top_keys(random(1, 2, 4, 8), random(1, 8, 8), random(1, 14, 8), 5, 2),
    ),
    "query_prefix": ("prefix", lambda: dispatch.query_prefix(random(1, 5, 8))),
    "published_means": (
        "published",
        lambda: dispatch.published_means(
            random(1, 2, 4, 16), random(1, 8, 16), random(2, 12, 16), random(2, 12), n_local=5, repr_topk=2, scale=0.3
        ),
    ),
    "rotate_append": ("rotary", _append),
    "copy_pages": ("pages", lambda: _copied(dispatch.copy_pages, torch.float32)),
    "quantise_pages": ("pages", lambda: _copied(dispatch.quantise_pages, torch.float8_e4m3fn, torch.zeros(2, 2))),
    "dequantise_pages": ("pages", lambda: _copied(dispatch.dequantise_pages, torch.float32, torch.ones(2, 2))),
    "admit_pages": (
        "residency",
        lambda: dispatch.admit_pages(Residency.empty(1, 9, 3, torch.device("cpu")), torch.tensor([[[4, 2]]]), None)[1],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_dispatch(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module, call = CALLS[name]
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    dispatch.backend.cache_clear()
    expected = call()
    gpu = importlib.import_module(f"qllm_kernels.gpu.{module}")
    served, real = [], getattr(gpu, name)
    monkeypatch.setattr(gpu, name, lambda *args, **options: served.append(name) or real(*args, **options))
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    dispatch.backend.cache_clear()
    actual = call()
    dispatch.backend.cache_clear()
    assert served == [name]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_no_operation_is_forgotten():
    assert CALLS.keys() == {
        name
        for name, what in vars(dispatch).items()
        if callable(what) and getattr(what, "__doc__", None) and what.__doc__.startswith("See :func:")
    }
