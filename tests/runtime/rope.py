"""A rotary embedding of the plainest kind, for memories without a model."""

from __future__ import annotations

import torch

from qllm_runtime.memory.base import Rotation


class Rope(Rotation):
    """Rotates halves; `scaling` multiplies every rotated vector, as yarn does."""

    def __init__(self, dim: int, theta: float = 100.0, scaling: float = 1.2) -> None:
        self._frequencies = theta ** (-torch.arange(0, dim, 2) / dim)
        self._scaling = scaling

    def _turn(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angles = positions[:, None] * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        a, b = x.float().chunk(2, -1)
        return (torch.cat((a * cos - b * sin, b * cos + a * sin), -1) * self._scaling).to(x.dtype)

    def rotate(self, x: torch.Tensor, start: int) -> torch.Tensor:
        return self._turn(x, torch.arange(start, start + x.shape[1]))

    def rotate_pair(self, a: torch.Tensor, b: torch.Tensor, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rotate(a, start), self.rotate(b, start)

    def rotate_all(self, x: torch.Tensor, position: int) -> torch.Tensor:
        return self._turn(x, torch.full((x.shape[1],), position))

    def at(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """Rotate `x` [rows, head_dim] to one position."""
        return self.rotate_all(x[None], position)[0]
