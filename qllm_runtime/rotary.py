"""Rotary position embedding at positions of our own choosing, the way a model's own layers were seen to rotate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from typing_extensions import override

from qllm_kernels import rotary
from qllm_runtime.memory.base import Rotation, Tables

_LENGTH_DEPENDENT = ("longrope", "dynamic")
_TOLERANCE = 1e-2  # of what two numbers of a model in bfloat16 may differ by


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

    Where frequencies depend on the length of the text, positions up to `original_max_position_embeddings` have those of
    short texts, whatever longer texts were read before; positions after it have those of long texts.

    Args:
        module: The stock module.
        layer_type: Passed on to it, if it takes one.
        device: Where the table lives.
        long: Give all positions the frequencies of long texts.
        lead: Dimensions ahead of the positions that the module takes: [1], or [3, 1] for several axes.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        layer_type: str | None,
        device: torch.device,
        long: bool = False,
        lead: tuple[int, ...] = (1,),
    ) -> None:
        self._module = module
        self._args: tuple[Any, ...] = () if layer_type is None else (layer_type,)
        self.device, self._lead = device, lead
        self._cos = self._sin = torch.empty(0, 0)
        self._last: tuple[int, int, torch.Tensor, torch.Tensor] = (0, 0, self._cos, self._sin)
        config = getattr(module, "config", None)
        parameters = getattr(config, "rope_parameters", None) or {}
        if layer_type is not None and layer_type in parameters:
            parameters = parameters[layer_type]
        self.kind = kind = parameters.get("rope_type", "default")
        original = parameters.get("original_max_position_embeddings") or getattr(
            config, "max_position_embeddings", None
        )
        #: Longest frame that keeps the frequencies of short texts; None where frequencies do not depend on the length.
        self.original_max_position_embeddings: int | None = original if kind in _LENGTH_DEPENDENT else None
        self._beyond: RotaryTable | None = None
        self._least = 0
        if long and self.original_max_position_embeddings is not None:
            self._least, self.original_max_position_embeddings = self.original_max_position_embeddings + 1, None

    def rows(self, start: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tables of cos and sin [n, columns] of positions start .. start + n - 1."""
        if self.original_max_position_embeddings is not None and start + n > self.original_max_position_embeddings:
            if self._beyond is None:
                layer_type = self._args[0] if self._args else None
                self._beyond = RotaryTable(self._module, layer_type, self.device, True, self._lead)
            return self._beyond.rows(start, n)
        if self._last[:2] != (start, n):  # layer after layer asks for the same rows
            self._reserve(start + n)
            self._last = (start, n, self._cos[start : start + n], self._sin[start : start + n])
        return self._last[2], self._last[3]

    def _reserve(self, length: int) -> None:
        have = self._cos.shape[0]
        if length <= have:
            return
        grown = max(length, 2 * have, self._least)
        if self.original_max_position_embeddings is not None:
            grown = min(grown, self.original_max_position_embeddings)
        positions = torch.arange(grown, device=self.device).expand(*self._lead, grown)
        probe = torch.zeros(1, 1, 1, dtype=torch.float32, device=self.device)
        with unchanged(self._module):
            # a short call first: modules remember the longest one
            if self.original_max_position_embeddings is not None:
                self._module.forward(probe, positions[..., :1], *self._args)
            cos, sin = split(self._module.forward(probe, positions, *self._args))
        self._cos, self._sin = cos.float().to(self.device), sin.float().to(self.device)


def split(tables: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [n, columns] of what a rotary module returns for one sequence: two tables, or a complex one.

    Modules with tables for several axes (time, height, width) have the columns of them all.
    """
    cos, sin = (tables.real, tables.imag) if isinstance(tables, torch.Tensor) else tables
    n = cos.shape[-2]
    return cos.movedim(-2, 0).reshape(n, -1), sin.movedim(-2, 0).reshape(n, -1)


@dataclass(frozen=True)
class Layout:
    """How an attention layer rotates, as it was seen to.

    Attributes:
        columns: [rotary_dim] the column of the tables that turns each dimension.
        order: [head_dim] dimensions of a head, those that turn first: first members of all pairs, second members, the others.
            None where heads come in an order that `qllm_kernels.rotary` takes.
        interleaved: Pairs are neighbours; otherwise half the turning dimensions apart.
    """

    columns: tuple[int, ...]
    order: tuple[int, ...] | None
    interleaved: bool


def learn_layout(
    plain: torch.Tensor, quarter: torch.Tensor, turned: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> Layout | None:
    """Find out from what a layer makes of given tables which dimensions it turns, in which pairs, by which columns.

    Args:
        plain, quarter, turned: [rows, head_dim] the same heads with cos = 1 and sin = 0, with cos = 0 and sin = 1, and with an
            angle per column.
        cos, sin: [columns] of these angles. Columns that are always alike have the same angle.

    Returns:
        The layout, or None where nothing turns.

    Raises:
        ValueError: It is not a rotation of pairs of dimensions by the angles of the tables.
    """
    plain, quarter, turned = plain.double(), quarter.double(), turned.double()
    size = plain.norm(dim=0).clamp(min=1e-30)
    moving = ((quarter - plain).norm(dim=0) > _TOLERANCE * size).nonzero()[:, 0]
    if not len(moving):
        return None
    a, b, c = plain[:, moving], quarter[:, moving], turned[:, moving]
    likeness = (b / b.norm(dim=0).clamp(min=1e-30)).T @ (a / a.norm(dim=0).clamp(min=1e-30))
    likeness = likeness - likeness.T  # of a pair one may be zero, by a weight of zero
    partner = likeness.abs().argmax(1)
    sign = likeness.gather(1, partner[:, None])[:, 0].sign()
    alike = (b - sign * a[:, partner]).norm(dim=0) <= _TOLERANCE * b.norm(dim=0)
    paired = (partner[partner] == torch.arange(len(moving), device=partner.device)) & (sign[partner] == -sign)
    # c = x a + y b, with one x and y for both dimensions of a pair: of a single one, half precision may hide the smaller part

    def joint(each: torch.Tensor) -> torch.Tensor:
        return each + each[partner]

    square = joint((a * a).sum(0))
    x, y = joint((a * c).sum(0)) / square, joint((b * c).sum(0)) / square
    fits = joint((x * a + y * b - c).square().sum(0)) <= _TOLERANCE**2 * joint(c.square().sum(0))
    away, column = torch.hypot(x[:, None] - cos.double(), y[:, None] - sin.double()).min(1)
    if not bool((alike & paired & fits & (away < _TOLERANCE)).all()):
        raise ValueError("not a rotation of pairs of dimensions")
    columns = dict(zip(moving.tolist(), column.tolist(), strict=True))
    pairs = [(i, j) for i, j, s in zip(moving.tolist(), moving[partner].tolist(), sign.tolist(), strict=True) if s < 0]
    neighbours = [i for pair in pairs for i in pair]
    if neighbours == list(range(len(neighbours))):
        return Layout(tuple(columns[i] for i in neighbours), None, True)
    apart = [first for first, _ in pairs] + [second for _, second in pairs]
    order = apart + [i for i in range(plain.shape[1]) if i not in columns]
    known = order == list(range(len(order)))
    return Layout(tuple(columns[i] for i in apart), None if known else tuple(order), False)


class PairRotation(Rotation):
    """Turns the pairs of a layout by the rows of a table.

    Args:
        layout: Of the heads as they arrive (in its `order`).
        table: cos and sin.
        head_dim: Size of a head.
    """

    def __init__(self, layout: Layout, table: RotaryTable, head_dim: int) -> None:
        self._layout, self._table = layout, table
        self.original_max_position_embeddings = table.original_max_position_embeddings
        self._columns = torch.tensor(layout.columns, device=table.device)
        self._eye = torch.eye(head_dim, device=table.device)
        self._turn: tuple[int, torch.Tensor] | None = None
        self._rows: tuple[int, int, torch.Tensor, torch.Tensor] | None = None
        self._tables: Tables | None = None

    def _angles(self, start: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [n, rotary_dim] of positions start, start + 1, ..."""
        if self._rows is None or self._rows[:2] != (start, n):  # layer after layer asks for the same rows
            cos, sin = self._table.rows(start, n)
            self._rows = (start, n, cos[:, self._columns], sin[:, self._columns])
        return self._rows[2], self._rows[3]

    @override
    def rotate(self, x: torch.Tensor, start: int) -> torch.Tensor:
        return rotary.rotate(x, *self._angles(start, x.shape[-2]), interleaved=self._layout.interleaved)

    def _turned(self, position: int) -> torch.Tensor:
        """Matrix [head_dim, head_dim] that rotates a row to `position`: cheaper than the function when layers share it."""
        if self._turn is None or self._turn[0] != position:
            self._turn = (position, self.rotate_all(self._eye[None], position)[0])
        return self._turn[1]

    @override
    def rotate_pair(self, a: torch.Tensor, b: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        if a.shape[1] == 1:
            turn = self._turned(start)
            return (a.float() @ turn).to(a.dtype), (b.float() @ turn).to(b.dtype)
        return self.rotate(a, start), self.rotate(b, start)

    @override
    def rotate_all(self, x: torch.Tensor, position: int) -> torch.Tensor:
        return rotary.rotate(x, *self._angles(position, 1), interleaved=self._layout.interleaved)

    @override
    def tables(self, n: int, device: torch.device) -> Tables | None:
        if self.original_max_position_embeddings is not None:
            return None
        if self._tables is None or n > self._tables.cos.shape[0]:
            have = 0 if self._tables is None else self._tables.cos.shape[0]
            cos, sin = self._table.rows(0, max(n, 2 * have))
            self._tables = Tables(
                cos[:, self._columns].contiguous(), sin[:, self._columns].contiguous(), self._layout.interleaved
            )
        return self._tables


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
