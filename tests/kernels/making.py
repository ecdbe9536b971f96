"""Random arguments for kernels, and memory that is NaN wherever nobody has written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st

from qllm_kernels.attention import FarSegment

NAN = float("nan")


def examples(n: int) -> settings:
    """The same `n` examples each time; a failing one is reported as it is (making it smaller takes minutes)."""
    return settings(max_examples=n, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory begins as NaN, so that a place that is not written shows."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            make = getattr(owner, name)

            def filled(*args: Any, make: Any = make, **options: Any) -> torch.Tensor:
                made = make(*args, **options)
                return made.fill_(NAN) if made.is_floating_point() else made

            patch.setattr(owner, name, filled)
        yield


@dataclass
class Segments:
    """Arguments of `attend_pieces`; keys and values that no query may see are NaN."""

    near: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    far: FarSegment | None
    sizes: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Segments:
        def cast(x: torch.Tensor | None) -> torch.Tensor | None:
            return x.to(dtype) if x is not None and x.is_floating_point() else x

        far = None if self.far is None else FarSegment(**{name: cast(x) for name, x in vars(self.far).items()})
        return Segments(cast(self.near), cast(self.key), cast(self.value), far, self.sizes)


def segments(
    *, group=2, kv_heads=2, dim=32, value_dim=None, pieces=1, length=8, back=5, loose=0, hide=False, pages=0, page=16,
    scopes=1, softcap=None, short=False, seed=0,
) -> Segments:  # fmt: skip
    value_dim = value_dim or dim
    heads, rows, slot = group * kv_heads, pieces * length, 3
    slots = slot + (pieces - 1) * length + back + length
    near, query = random(heads, rows, dim, seed=seed), random(heads, rows, dim, seed=seed + 1)
    key, value = (torch.full((kv_heads, slots + 2, size), NAN) for size in (dim, value_dim))
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
            parts["table"] = table[:, :, :pages].sort(-1).values
            parts["page_key"], parts["page_value"] = (
                random(kv_heads, 7, page, x, seed=seed + 5) for x in (dim, value_dim)
            )
            for unused in set(range(7)) - set(parts["table"].flatten().tolist()):
                parts["page_key"][:, unused] = parts["page_value"][:, unused] = NAN
            if short:
                parts["n_chosen"] = torch.arange(pieces, dtype=torch.int32) % pages + 1
        far = FarSegment(query, **parts)
    return Segments(
        near, key, value, far, {"slot": slot, "back": back, "length": length, "scale": 0.2, "softcap": softcap}
    )


PREFILL = {
    "group": st.sampled_from([1, 3, 4, 7, 16]),
    "dims": st.sampled_from([(32, 32), (20, 24), (64, 64)]),
    "pieces": st.integers(1, 3),
    "length": st.integers(2, 9),
    "back": st.integers(0, 50),
    "loose": st.integers(0, 40),
    "hide": st.booleans(),
    "pages": st.integers(0, 3),
    "page": st.sampled_from([5, 16, 40]),
    "scopes": st.sampled_from([1, 2]),
    "short": st.booleans(),
    "softcap": st.sampled_from([None, 1.5]),
}
STEP = {
    "group": st.sampled_from([1, 4, 7, 16]),
    "back": st.integers(0, 100),
    "loose": st.integers(0, 70),
    "pages": st.integers(0, 3),
    "page": st.sampled_from([16, 40]),
    "scopes": st.sampled_from([1, 2]),
    "softcap": st.sampled_from([None, 1.5]),
}
