"""What pieces see outside their windows, as kernels take it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qllm_kernels.attention import FarSegment
from qllm_runtime.memory.store import PagedKeys


class FarKeys(NamedTuple):
    """Everything outside the window that pieces see.

    Attributes:
        key, value: [kv_heads, pieces, m, head_dim] initial tokens, looked-up blocks unless they are in `paged`, question.
        hidden: True where one of these is not seen, [pieces, scopes, m]; None when all are.
        ids: Chosen blocks [pieces, scopes, k] in the order of their keys, or None for policies without blocks.
        paged: The blocks in their pages, or None.
        n_chosen: [pieces] int32, how many of the first `paged` ones a piece sees; None: all.
        blocks: Keys and values [kv_heads, k * block_size, ...] of the blocks of a single piece, apart from `key` and `value`.
    """

    key: torch.Tensor
    value: torch.Tensor
    hidden: torch.Tensor | None
    ids: torch.Tensor | None
    paged: PagedKeys | None = None
    n_chosen: torch.Tensor | None = None
    blocks: tuple[torch.Tensor, torch.Tensor] | None = None

    def segment(self, query: torch.Tensor) -> FarSegment:
        """What kernels take, for these queries [heads, pieces * length, head_dim] in far form."""
        if self.paged is None:
            return FarSegment(query, self.key, self.value, self.hidden)
        return FarSegment(query, self.key, self.value, self.hidden, *self.paged, self.n_chosen)
