"""Rotary position embedding at positions of our own choosing, through the architecture's own function."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from typing_extensions import override

from qllm_kernels import rotary
from qllm_runtime.memory.base import Rotation, Tables

_LENGTH_DEPENDENT = ("longrope", "dynamic")


def short_length(config: Any) -> float:
    """Length up to which a model of this configuration keeps the rotary frequencies of short texts; mostly unlimited."""
    limits = [
        kind.get("original_max_position_embeddings")
        for kind in _kinds(config)
        if kind.get("rope_type") in _LENGTH_DEPENDENT
    ]
    return min((limit for limit in limits if limit), default=float("inf"))


def thetas(config: Any) -> set[float]:
    """Bases of the rotary frequencies of a model of this configuration, one per kind of layer."""
    return {float(kind["rope_theta"]) for kind in _kinds(config) if kind.get("rope_theta")}


def _kinds(config: Any) -> list[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    return [parameters, *(each for each in parameters.values() if isinstance(each, dict))]


@contextmanager
def unchanged(module: torch.nn.Module) -> Iterator[None]:
    """Put back what calls inside the block make a rotary module remember: some kinds keep the longest length they saw."""
    buffers = dict(module._buffers)
    attributes = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    try:
        yield
    finally:
        module._buffers.update(buffers)
        vars(module).update(attributes)


class RotaryTable:
    """cos and sin of one rotary module (and layer type) for positions 0, 1, 2, ...; grown on demand.

    The table is computed by the stock module, bypassing hooks, so every `rope_scaling` is included.

    Where frequencies depend on the length of the text, positions up to `comfortable_length` have those of short texts,
    whatever longer texts were read before; positions behind it have those of long texts.

    Args:
        module: The stock module.
        layer_type: Passed on to it, if it takes one.
        device: Where the table lives.
        long: Give all positions the frequencies of long texts.
    """

    def __init__(
        self, module: torch.nn.Module, layer_type: str | None, device: torch.device, long: bool = False
    ) -> None:
        self._module = module
        self._args: tuple[Any, ...] = () if layer_type is None else (layer_type,)
        self._device = device
        self._cos = self._sin = torch.empty(1, 0, 0)
        self._last: tuple[int, int, torch.Tensor, torch.Tensor] = (0, 0, self._cos, self._sin)
        config = getattr(module, "config", None)
        parameters = getattr(config, "rope_parameters", None) or {}
        if layer_type is not None and layer_type in parameters:
            parameters = parameters[layer_type]
        self.kind = kind = parameters.get("rope_type", "default")
        original = parameters.get("original_max_position_embeddings") or getattr(
            config, "max_position_embeddings", None
        )
        #: Longest frame that keeps the frequencies of short texts; None when frequencies do not depend on length.
        self.comfortable_length: int | None = original if kind in _LENGTH_DEPENDENT else None
        self._beyond: RotaryTable | None = None
        self._least = 0
        if long and self.comfortable_length is not None:
            self._least, self.comfortable_length = self.comfortable_length + 1, None

    def rows(self, start: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables of cos and sin [1, n, rotary_dim] of positions start .. start + n - 1."""
        if self.comfortable_length is not None and start + n > self.comfortable_length:
            if self._beyond is None:
                layer_type = self._args[0] if self._args else None
                self._beyond = RotaryTable(self._module, layer_type, self._device, long=True)
            return self._beyond.rows(start, n)
        if self._last[:2] != (start, n):  # layer after layer asks for the same rows
            self._reserve(start + n)
            self._last = (start, n, self._cos[:, start : start + n], self._sin[:, start : start + n])
        return self._last[2], self._last[3]

    def _reserve(self, length: int) -> None:
        have = self._cos.shape[1]
        if length <= have:
            return
        grown = max(length, 2 * have, self._least)
        if self.comfortable_length is not None:
            grown = min(grown, self.comfortable_length)
        positions = torch.arange(grown, device=self._device)[None]
        probe = torch.zeros(1, 1, 1, dtype=torch.float32, device=self._device)
        with unchanged(self._module):
            cos, sin = self._module.forward(probe, positions, *self._args)
        self._cos, self._sin = cos.float().to(self._device), sin.float().to(self._device)


class ArchitectureRotation(Rotation):
    """Applies `apply_rotary_pos_emb` of the attention module's own architecture.

    Args:
        attention: A module of that architecture.
        table: cos and sin.
        head_dim: Size of a head; the function may rotate only a part of it.
    """

    def __init__(self, attention: torch.nn.Module, table: RotaryTable, head_dim: int) -> None:
        self._apply = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        self._table = table
        self.comfortable_length = table.comfortable_length
        cos, _ = table.rows(0, 1)
        self._eye = torch.eye(head_dim, device=cos.device)[None, :, None]  # rows as heads of one token
        self._turn: tuple[int, torch.Tensor] | None = None
        self._tables: Tables | None = None
        self._pairs: tuple[int, bool] | None = None  # rotated dimensions, interleaved
        self._knows_pairs = False
        sample = self._eye[:, :1]
        try:
            self._rotary_dim = head_dim
            self._rotate(sample, sample[:, :0], 0, 1)
        except RuntimeError:  # partial rotary outside the function: it is handed the rotary dimensions only
            self._rotary_dim = cos.shape[-1]
            self._rotate(sample, sample[:, :0], 0, 1)

    def _rotate(self, a: torch.Tensor, b: torch.Tensor, start: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self._table.rows(start, n)
        dim = self._rotary_dim
        if dim == a.shape[-1]:
            out: tuple[torch.Tensor, torch.Tensor] = self._apply(a, b, cos, sin)
            return out
        a_turned, b_turned = self._apply(a[..., :dim], b[..., :dim], cos, sin)
        return torch.cat((a_turned, a[..., dim:]), -1), torch.cat((b_turned, b[..., dim:]), -1)

    @override
    def rotate(self, x: torch.Tensor, start: int) -> torch.Tensor:
        x4 = x[None].float()
        return self._rotate(x4, x4[:, :0], start, x.shape[1])[0][0].to(x.dtype)

    def _turned(self, position: int) -> torch.Tensor:
        """Matrix [head_dim, head_dim] that rotates a row to `position`: cheaper than the function when layers share it."""
        if self._turn is None or self._turn[0] != position:
            self._turn = (position, self._rotate(self._eye, self._eye[:, :0], position, 1)[0][0, :, 0])
        return self._turn[1]

    @override
    def rotate_pair(self, a: torch.Tensor, b: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        if a.shape[1] == 1:
            turn = self._turned(start)
            return (a.float() @ turn).to(a.dtype), (b.float() @ turn).to(b.dtype)
        a4, b4 = self._rotate(a[None].float(), b[None].float(), start, a.shape[1])
        return a4[0].to(a.dtype), b4[0].to(b.dtype)

    @override
    def rotate_all(self, x: torch.Tensor, position: int) -> torch.Tensor:
        # the rows become heads of a single token, so that all of them meet the same table row
        x4 = x.float().reshape(1, -1, 1, x.shape[-1])
        return self._rotate(x4, x4[:, :0], position, 1)[0].reshape(x.shape).to(x.dtype)

    @override
    def tables(self, n: int, device: torch.device) -> Tables | None:
        if self.comfortable_length is not None:
            return None
        if not self._knows_pairs:
            self._pairs, self._knows_pairs = self._find_pairs(), True
        if self._pairs is not None and (self._tables is None or n > self._tables.cos.shape[0]):
            have = 0 if self._tables is None else self._tables.cos.shape[0]
            self._tables = self._paired(max(n, 2 * have), *self._pairs)
        return self._tables

    def _find_pairs(self) -> tuple[int, bool] | None:
        """How many dimensions the function rotates and which belong together; None: neither in halves nor as neighbours."""
        head_dim = self._eye.shape[-1]
        sample = torch.randn(1, 5, head_dim, generator=torch.Generator().manual_seed(0)).to(self._eye.device)
        expected = self.rotate(sample, 0)
        width = self._table.rows(0, 1)[0].shape[-1]
        for dim in (width, 2 * width):  # tables of some models hold one column per pair
            for interleaved in (False, True):
                if dim <= head_dim:
                    cos, sin, _ = self._paired(5, dim, interleaved)
                    if torch.allclose(rotary.rotate(sample, cos, sin, interleaved=interleaved), expected, atol=1e-4):
                        return dim, interleaved
        return None

    def _paired(self, n: int, dim: int, interleaved: bool) -> Tables:
        """Tables read off what the function makes of ones at the first or the second members of all pairs."""
        second = torch.arange(dim, device=self._eye.device)
        second = second % 2 == 1 if interleaved else second >= dim // 2
        probe = torch.zeros(1, n, self._eye.shape[-1], device=self._eye.device)
        probe[:, :, :dim] = second.float()
        by_second = self.rotate(probe, 0)[0, :, :dim]
        probe[:, :, :dim] = 1 - second.float()
        by_first = self.rotate(probe, 0)[0, :, :dim]
        return Tables(torch.where(second, by_second, by_first), torch.where(second, by_first, -by_second), interleaved)


class NoRotation(Rotation):
    """A layer without positional embedding."""

    @override
    def tables(self, n: int, device: torch.device) -> Tables | None:
        one = torch.ones(n, 2, device=device)
        return Tables(one, torch.zeros_like(one), False)

    @override
    def rotate(self, x: torch.Tensor, start: int) -> torch.Tensor:
        return x

    @override
    def rotate_pair(self, a: torch.Tensor, b: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        return a, b

    @override
    def rotate_all(self, x: torch.Tensor, position: int) -> torch.Tensor:
        return x
