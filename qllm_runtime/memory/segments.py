"""Plain tensors that grow, and one softmax over two kinds of keys: the parts of faithful mode."""

from __future__ import annotations

from dataclasses import dataclass

import torch


class Rows:
    """A tensor [groups, n, width] that grows along n, doubling its storage when full.

    Attributes:
        length: Rows in use (n).
    """

    def __init__(self) -> None:
        self.length = 0
        self._data: torch.Tensor | None = None

    @property
    def rows(self) -> torch.Tensor:
        """What has been appended, [groups, length, width]."""
        if self._data is None:
            raise RuntimeError("nothing appended yet")
        return self._data[:, : self.length]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return 0 if self._data is None else self._data.nbytes

    def extend(self, x: torch.Tensor) -> None:
        """Append `x` [groups, m, width]."""
        total = self.length + x.shape[1]
        if self._data is None or total > self._data.shape[1]:
            grown = x.new_empty(x.shape[0], max(total, 2 * self.length), x.shape[2])
            if self._data is not None:
                grown[:, : self.length] = self.rows
            self._data = grown
        self._data[:, self.length : total] = x
        self.length = total

    def copy(self) -> Rows:
        """An independent copy."""
        other = Rows()
        if self._data is not None:
            other.extend(self.rows)
        return other


@dataclass(frozen=True, eq=False)
class Segment:
    """Keys of one kind and the queries that look at them, both rotated as that kind demands.

    Attributes:
        query: [heads, l, head_dim].
        keys: [kv_heads, n, head_dim].
        values: [kv_heads, n, head_dim].
        mask: [l, n] true where a query sees a key, or None if all see all.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None

    def logits(self, scale: float) -> torch.Tensor:
        """[heads, l, n], minus infinity where masked."""
        heads, length, width = self.query.shape
        groups, n, _ = self.keys.shape
        grouped = self.query.reshape(groups, heads // groups * length, width)
        logits = (grouped @ self.keys.transpose(1, 2) * scale).view(heads, length, n)
        return logits if self.mask is None else logits.masked_fill(~self.mask, float("-inf"))

    def mix(self, weights: torch.Tensor) -> torch.Tensor:
        """Values [heads, l, d] weighted by [heads, l, n]."""
        heads, length, n = weights.shape
        groups, _, width = self.values.shape
        return (weights.reshape(groups, heads // groups * length, n) @ self.values).view(heads, length, width)


def attend_jointly(local: Segment, far: Segment, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax over both segments: output [l, heads, d] and weights [heads, l, local keys + far keys]."""
    weights = torch.cat((local.logits(scale), far.logits(scale)), dim=2).softmax(dim=2)
    n_local = local.keys.shape[1]
    return (local.mix(weights[:, :, :n_local]) + far.mix(weights[:, :, n_local:])).transpose(0, 1), weights


def distances(start: int, stop: int, first: int, last: int, device: torch.device) -> torch.Tensor:
    """[stop - start, last - first] distances from queries [start, stop) back to keys [first, last)."""
    return torch.arange(start, stop, device=device)[:, None] - torch.arange(first, last, device=device)
