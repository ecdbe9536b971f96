"""Far keys that stay where they are from one lookup to the next."""

from __future__ import annotations

import torch

from qllm_runtime.memory.store import BlockStore


class Resident:
    """Keys and values that one piece sees outside its window: initial tokens, blocks, question.

    Token after token mostly looks up the same blocks. They keep their places; only new ones are copied, to the places of
    those that are not wanted any more.

    Args:
        question: The question's queries these belong to.
        key, value: [kv_heads, m, head_dim or value_dim].
        n_initial: Initial tokens among them.
        block_size: Tokens of a block.
        ids: The blocks, in order; a list per scope.

    Attributes:
        ids: [1, scopes, k] the block in each place.
        hidden: True where a key is not seen, [1, scopes, m]; None when all are.
        border: Absolute index that `hidden` depends on.
    """

    def __init__(
        self,
        question: torch.Tensor | None,
        key: torch.Tensor,
        value: torch.Tensor,
        n_initial: int,
        block_size: int,
        ids: list[list[int]],
    ) -> None:
        self.question = question
        self.key, self.value = key, value
        self.ids = torch.tensor([ids])
        self.hidden: torch.Tensor | None = None
        self.border = -1
        self._wanted = ids
        self._held = [list(row) for row in ids]
        share = key.shape[0] // len(ids)
        self._heads = [slice(scope * share, (scope + 1) * share) for scope in range(len(ids))]
        places = [
            slice(at, at + block_size) for at in range(n_initial, n_initial + len(ids[0]) * block_size, block_size)
        ]
        self._places = [[(key[heads, rows], value[heads, rows]) for rows in places] for heads in self._heads]

    def serves(self, question: torch.Tensor | None, k: int) -> bool:
        """Whether lookups of `k` blocks under this question find their places here."""
        return self.question is question and len(self._wanted[0]) == k

    def exchange(self, wanted: list[list[int]], store: BlockStore) -> None:
        """Make these blocks, a list per scope, the ones that are seen."""
        if wanted == self._wanted:
            return
        self._wanted = wanted
        for ids, held, places, heads in zip(wanted, self._held, self._places, self._heads, strict=True):
            free = [place for place, block in enumerate(held) if block not in ids]
            for place, block in zip(free, set(ids).difference(held), strict=True):
                held[place] = block
                for target, source in zip(places[place], store.block(block), strict=True):
                    target.copy_(source[heads])
        self.ids = torch.tensor([self._held])
        self.border = -1  # `hidden` is to be found anew
