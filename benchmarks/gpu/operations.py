"""Each operation as the dispatcher serves it: its error against double precision and its speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.timing import copies, spent
from qllm_kernels import attention, dispatch, select
from qllm_kernels.attention import FarSegment

#: What measures each row of a table; one that fails leaves the others.
Rows = dict[str, Callable[[], dict[str, Any]]]
Segments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, FarSegment]


@dataclass(frozen=True)
class Shape:
    """A model's attention and the memory it is served with."""

    name: str
    heads: int
    kv_heads: int
    dim: int = 128
    n_local: int = 4096
    block: int = 64
    topk: int = 32
    piece: int = 256
    pieces: int = 32
    n_blocks: int = 16384
    r: int = 4
    n_init: int = 64


SHAPES = (Shape("Llama-3-8B", 32, 8), Shape("Qwen2.5-1.5B", 12, 2))


def tiny(shape: Shape) -> Shape:
    """The same heads with little to do."""
    return replace(
        shape, heads=4, kv_heads=2, dim=32, n_local=64, block=16, topk=2, piece=16, pieces=2, n_blocks=40, n_init=4
    )


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference over that of what is expected."""
    difference = actual.double().cpu() - expected.double()
    return (difference.pow(2).mean().sqrt() / expected.double().pow(2).mean().sqrt()).item()


def verdict(error: float, plain: float, sound: bool) -> dict[str, Any]:
    """Row of an operation: its error, that of the torch function in the same dtype, and whether the former is fine."""
    return {"error": error, "torch_error": plain, "ok": sound and error < max(2 * plain, 1e-5)}


def as_double(x: torch.Tensor) -> torch.Tensor:
    return x.cpu().double() if x.is_floating_point() else x.cpu()


class Operations:
    """Random data of one shape on one device.

    Args:
        shape: Sizes.
        device, dtype: Where and as what.
    """

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def _random(self, *sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=self._generator, device=self.device, dtype=self.dtype)

    def _lookup(self, pieces: int) -> tuple[torch.Tensor, torch.Tensor]:
        s = self.shape
        return self._random(pieces, s.heads, s.dim).float(), self._random(s.kv_heads, s.r, s.n_blocks, s.dim)

    def _segments(self, pieces: int, length: int, *, paged: bool) -> tuple[Segments, dict[str, Any]]:
        s = self.shape
        near, query = (self._random(s.heads, pieces * length, s.dim) for _ in range(2))
        slots = s.n_local + pieces * length
        key, value = (self._random(s.kv_heads, slots, s.dim) for _ in range(2))
        if paged:
            pages = [self._random(s.kv_heads, 4 * s.topk, s.block, s.dim) for _ in range(2)]
            order = torch.rand(pieces, 1, 4 * s.topk, generator=self._generator, device=self.device).argsort(-1)
            loose = [self._random(s.kv_heads, pieces, s.n_init, s.dim) for _ in range(2)]
            table = order[:, :, : s.topk].sort(-1).values
            far = FarSegment(query, loose[0], loose[1], page_key=pages[0], page_value=pages[1], table=table)
        else:
            m = s.n_init + s.topk * s.block
            far = FarSegment(
                query, self._random(s.kv_heads, pieces, m, s.dim), self._random(s.kv_heads, pieces, m, s.dim)
            )
        return (near, key, value, far), {"slot": 0, "back": s.n_local, "length": length, "scale": s.dim**-0.5}

    # -------------------------------------------------------------- correctness

    def errors(self) -> Rows:
        """Of every operation: error of what serves, error of the torch function in the same dtype, and whether that is fine."""
        rows: Rows = {}
        for name, pieces in (("selection, decode", 1), ("selection, prefill", self.shape.pieces)):
            rows[name] = partial(self._selection_error, pieces)
        for name, pieces, length in (("attention, decode", 1, 1), ("attention, prefill", 2, self.shape.piece)):
            for paged in (False, True):
                kind = "pages" if paged else "gathered"
                rows[f"{name}, {kind}"] = partial(self._attention_error, pieces, length, paged=paged)
        return rows

    def _selection_error(self, pieces: int) -> dict[str, Any]:
        lookup, summaries = self._lookup(pieces)
        counts, topk = [self.shape.n_blocks] * pieces, self.shape.topk
        ids, _, scores = dispatch.choose_blocks(lookup, [summaries], counts, topk, scopes=1)
        dtype = summaries.dtype
        expected = select.block_scores(lookup.to(dtype).double().cpu(), summaries.double().cpu(), scopes=1)
        plain = select.block_scores(lookup, summaries, scopes=1)
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :topk].sort(-1).values
        return verdict(relative_error(scores, expected), relative_error(plain, expected), bool(torch.equal(ids, best)))

    def _attention_error(self, pieces: int, length: int, *, paged: bool) -> dict[str, Any]:
        inputs, sizes = self._segments(pieces, length, paged=paged)
        out, lse = dispatch.attend_pieces(*inputs, **sizes)
        plain, _ = attention.attend_pieces(*inputs, **sizes)
        near, key, value, far = inputs
        double: dict[str, Any] = {name: x if x is None else as_double(x) for name, x in vars(far).items()}
        expected, expected_lse = attention.attend_pieces(
            as_double(near), as_double(key), as_double(value), replace(far, **double), **sizes
        )
        finite = bool(torch.isfinite(out).all()) and relative_error(lse, expected_lse) < 1e-2
        return verdict(relative_error(out, expected), relative_error(plain, expected), finite)

    # -------------------------------------------------------------- speed

    def speeds(self) -> Rows:
        """Of every operation: microseconds, and GB/s or TFLOP/s of what it must read or multiply; "of": the ceiling of that."""
        rows: Rows = {}
        for name, pieces in (("selection, decode", 1), ("selection, prefill", self.shape.pieces)):
            rows[name] = partial(self._selection_speed, pieces)
        for paged in (False, True):
            kind = "pages" if paged else "gathered"
            rows[f"attention, decode, {kind}"] = partial(self._decode_speed, paged=paged)
            rows[f"attention, prefill, {kind}"] = partial(self._prefill_speed, paged=paged)
        return rows

    def _selection_speed(self, pieces: int) -> dict[str, float]:
        s = self.shape
        read = s.kv_heads * s.r * s.n_blocks * s.dim * self.dtype.itemsize
        return self._bandwidth(lambda: self._selection(*self._lookup(pieces), pieces), read)

    def _decode_speed(self, *, paged: bool) -> dict[str, float]:
        s = self.shape
        keys = s.n_local + 1 + s.n_init + s.topk * s.block
        read = 2 * s.kv_heads * keys * s.dim * self.dtype.itemsize
        return self._bandwidth(lambda: self._attention(*self._segments(1, 1, paged=paged)), read)

    def _prefill_speed(self, *, paged: bool) -> dict[str, float]:
        s = self.shape
        inputs, sizes = self._segments(s.pieces, s.piece, paged=paged)
        # a query sees the window before its piece and half the piece on average
        seen = s.n_local + (s.piece + 1) / 2 + s.n_init + s.topk * s.block
        work = 4 * s.heads * s.pieces * s.piece * seen * s.dim
        return self._rate([self._attention(inputs, sizes)], work)

    def _rate(self, calls: list[Callable[[], object]], work: int | float) -> dict[str, Any]:
        """Row of long calls that multiply so much."""
        row = spent(calls, self.device, least=5)
        return row | {"tflop_s": work / row["us"] / 1e6, "of": "matmul_tflop_s"}

    def _bandwidth(self, make: Callable[[], Callable[[], object]], read: int, of: str = "copy_gb_s") -> dict[str, Any]:
        """Row of calls that read `read` bytes; `make` makes one with data of its own."""
        calls = copies(make, read, self.device)
        row = spent(calls, self.device)
        return row | {"gb_s": read / row["us"] / 1e3, "of": of, "copies": len(calls)}

    def _selection(self, lookup: torch.Tensor, summaries: torch.Tensor, pieces: int) -> Callable[[], object]:
        counts = torch.tensor([self.shape.n_blocks] * pieces, device=self.device)
        return lambda: dispatch.choose_blocks(lookup, [summaries], counts, self.shape.topk, scopes=1)

    @staticmethod
    def _attention(inputs: Segments, sizes: dict[str, Any]) -> Callable[[], object]:
        return lambda: dispatch.attend_pieces(*inputs, **sizes)
