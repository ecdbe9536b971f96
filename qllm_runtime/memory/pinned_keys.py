"""Keys outside the window that no lookup changes: initial tokens and question."""

from __future__ import annotations

from typing import NamedTuple

import torch

from qllm_kernels.choice import seen_twice
from qllm_runtime.memory.query import PinnedQuery

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


class PinnedKeys(NamedTuple):
    """Initial tokens and, if `asked`, tokens of the question.

    Attributes:
        question: The question's queries, which say whose tokens they are.
        asked: Whether they are here.
        key, value: [kv_heads, 1, m, head_dim or value_dim].
        position: [m] absolute index of a question's token; -1 for others.
        block: [m] the block that a question's token is in, or will be; -1 for others.
    """

    question: torch.Tensor | None
    asked: bool
    key: torch.Tensor
    value: torch.Tensor
    position: torch.Tensor
    block: torch.Tensor

    @classmethod
    def of(
        cls,
        initial: KeysAndValues | None,
        query: PinnedQuery,
        like: KeysAndValues,
        *,
        asked: bool,
        n_init: int,
        size: int,
    ) -> PinnedKeys:
        """Those of a memory.

        Args:
            initial: [kv_heads, n, head_dim or value_dim], or None.
            query: The question.
            like: Keys and values of no token on the device.
            asked: As above.
            n_init, size: Initial tokens, and tokens of a block.
        """
        parts = [like if initial is None else initial]
        n_initial = parts[0][0].shape[1]
        position = torch.full((n_initial,), -1, device=like[0].device)
        if asked and len(query.positions):
            parts.append((query.key, query.value))
            position = torch.cat((position, query.positions))
        key, value = (torch.cat(x, 1)[:, None] for x in zip(*parts, strict=True))
        block = torch.div(position - n_init, size, rounding_mode="floor")
        return cls(query.tokens, asked, key, value, position, torch.where(position < 0, -1, block))

    def hidden(self, ids: torch.Tensor, border: torch.Tensor | None) -> torch.Tensor:
        """Where one of these would be a token's second appearance, beside that in a block or in the window.

        Args:
            ids: [pieces, scopes, k] blocks that are seen.
            border: [pieces] first token of each window; None: all of them begin after the question.

        Returns:
            [pieces, scopes, m].
        """
        return seen_twice(ids, self.block, self.position, border)
