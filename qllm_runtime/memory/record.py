"""What a lookup chose, for tests, measurements and explanations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Lookup:
    """One lookup of one layer: the blocks a piece of queries was given.

    Attributes:
        start: Absolute index of the piece's first token.
        length: Tokens in the piece.
        n_blocks: Blocks there were to choose from.
        ids: Chosen blocks, ascending: [chosen] where all heads share a choice, else [kv_heads, chosen]. Block b holds
            the `block_size` tokens from absolute index `n_init + b * block_size` on.
        scores: Score of every block, [n_blocks] or [kv_heads, n_blocks]; None without blocks.
    """

    start: int
    length: int
    n_blocks: int
    ids: torch.Tensor
    scores: torch.Tensor | None


LookupHook = Callable[[Lookup], None]
LayerLookupHook = Callable[[int, Lookup], None]  # (layer, lookup)
