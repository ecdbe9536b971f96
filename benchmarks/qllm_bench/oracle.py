"""The oracle: lookups that can't miss, the ceiling for any better way of choosing blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from qllm_runtime.config import MemoryConfig
from qllm_runtime.memory.far_context import FarContext
from qllm_runtime.memory.record import Lookup, LookupHook
from qllm_runtime.prompt import Prompt


def needed_tokens(prompt: Prompt, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Tokens of the prompt that hold characters of the spans of its (first) document."""
    return sorted({token for span in spans for token in prompt.document_spans[0].tokens(*span)})


@contextmanager
def forced(tokens: Sequence[int], memory: MemoryConfig) -> Iterator[None]:
    """While it lasts, every lookup of every layer chooses the blocks of these tokens first.

    The other places go to the blocks that score best, so the attention budget stays the same.

    Args:
        tokens: Absolute indices of tokens.
        memory: Block size and initial tokens; blocks begin after the latter.
    """
    blocks = sorted({(t - memory.n_init) // memory.block_size for t in tokens if t >= memory.n_init})
    original = FarContext.look_up

    def look_up(
        self: FarContext,
        lookup: torch.Tensor,
        counts: Sequence[int],
        starts: Sequence[int],
        length: int,
        hook: LookupHook | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        seen: list[Lookup] = []
        ids, valid = original(self, lookup, counts, starts, length, seen.append)
        for piece, record in enumerate(seen):
            if record.scores is not None and record.n_blocks > ids.shape[2]:  # else all of them are chosen
                scores = record.scores.clone().reshape(-1, record.n_blocks)
                scores[:, [block for block in blocks if block < record.n_blocks]] = float("inf")
                ids[piece] = scores.topk(ids.shape[2]).indices.sort().values.to(ids)
            if hook is not None:
                hook(replace(record, ids=ids[piece].reshape(record.ids.shape)))
        return ids, valid

    patched: Any = FarContext
    patched.look_up = look_up
    try:
        yield
    finally:
        patched.look_up = original
