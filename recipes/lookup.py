"""The auxiliary lookup objective of the phase ``reader``: a token's lookup should find the block its question needs.

As in the engine, a block scores the sum over heads of its best match among its keys: queries are rotated to the far
distance, keys are not. Cross-entropy against every other block of the batch and of recent batches. The layers' inputs
are detached, so that only the query and key projections learn from it.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from recipes.batches import BLOCK, N_INIT, Batch
from recipes.model import Reader, ReaderConfig, rotate

LAYERS = (1, 2)
BANK = 1024
SHARPNESS = 3.0
WINDOWS = (128, 256, 256, 256, 384, 512)


class LookupObjective:
    """Cross-entropy of choosing the blocks a question needs.

    Args:
        config: Sizes of the network.
        weight: Weight of this loss beside the answers' loss.
    """

    def __init__(self, config: ReaderConfig, weight: float = 0.1) -> None:
        self.config = config
        self.weight = weight
        self.banks: dict[int, Tensor] = {}

    def blocks(self, batch: Batch) -> tuple[Tensor, dict[tuple[int, int], int]]:
        """Flat indices of the document's whole blocks in [B * blocks], and the place of (row, block) among them."""
        per_row = (batch.ids.shape[1] - N_INIT) // BLOCK
        flat: list[int] = []
        place: dict[tuple[int, int], int] = {}
        for row, asks in enumerate(batch.asks):
            if not asks:
                continue
            stop, start = asks[0][0][0], batch.pinned[row][1]
            for n in range(per_row):
                a = N_INIT + n * BLOCK
                if a >= start and a + BLOCK <= stop:
                    place[row, n] = len(flat)
                    flat.append(row * per_row + n)
        return torch.tensor(flat, dtype=torch.long), place

    def queries(
        self, batch: Batch, place: dict[tuple[int, int], int], rng: random.Random
    ) -> tuple[list[tuple[int, int]], list[list[int]]]:
        """Tokens (row, token) that look up, and the blocks each should find.

        Per question: one of its last tokens, one of the answer's tokens ahead of the value and the one right before it.
        """
        rows: list[tuple[int, int]] = []
        targets: list[list[int]] = []
        for row, asks in enumerate(batch.asks):
            for question, answer, needs in asks:
                wanted = sorted(
                    {
                        place[row, i]
                        for a, b in needs
                        for i in range((a - N_INIT) // BLOCK, (b - 1 - N_INIT) // BLOCK + 1)
                        if (row, i) in place
                    }
                )
                if not wanted:
                    continue
                value = next(t for t in range(*answer) if batch.weights[row, t] >= 3.0) - 1
                tokens = {
                    rng.randrange((question[0] + question[1]) // 2, question[1]),
                    rng.randint(answer[0] - 1, value),
                    value,
                }
                rows += [(row, t) for t in sorted(tokens)]
                targets += [wanted] * len(tokens)
        return rows, targets

    def __call__(self, model: Reader, inputs: list[Tensor], batch: Batch, rng: random.Random) -> Tensor:
        """Loss of one batch.

        Args:
            model: The model.
            inputs: Normed input [B, T, D] of every layer's attention.
            batch: The batch they come from.
            rng: Source of the window the far angle belongs to.
        """
        device = inputs[0].device
        flat, place = self.blocks(batch)
        rows, targets = self.queries(batch, place, rng)
        if not rows:
            return torch.zeros((), device=device)
        flat = flat.to(device)
        length = batch.ids.shape[1]
        at = torch.tensor([r * length + t for r, t in rows], device=device)
        pairs = torch.tensor([(i, w) for i, ws in enumerate(targets) for w in ws], device=device)
        counts = torch.tensor([1.0 / len(ws) for ws in targets for _ in ws], device=device)
        positive = torch.zeros(len(rows), len(flat), dtype=torch.bool, device=device)
        positive[pairs[:, 0], pairs[:, 1]] = True
        frequencies = model.frequencies
        assert isinstance(frequencies, Tensor)
        angle = (rng.choice(WINDOWS) - 1) * frequencies
        c = self.config
        total = torch.zeros((), device=device)
        for n in LAYERS:
            attention = model.layers[n].self_attn
            x = inputs[n].detach()
            q = attention.q_proj(x.flatten(0, 1)[at]).view(-1, c.heads, c.head_dim)
            far = rotate(q, angle.cos(), angle.sin()).to(x.dtype)
            whole = x[:, N_INIT : N_INIT + (length - N_INIT) // BLOCK * BLOCK].reshape(-1, BLOCK, c.hidden_size)[flat]
            keys = attention.k_proj(whole).view(-1, c.kv_heads, c.head_dim)
            bank = self.banks.get(n)
            every = keys if bank is None else torch.cat((keys, bank))
            # [G, rows * group, e] x [G, e, keys]
            grouped = far.view(-1, c.kv_heads, c.heads // c.kv_heads, c.head_dim).transpose(0, 1).flatten(1, 2)
            dots = grouped @ every.permute(1, 2, 0)
            best = dots.unflatten(-1, (-1, BLOCK)).amax(-1)
            scores = best.view(c.kv_heads, len(rows), -1, best.shape[-1]).float().sum((0, 2))
            # Only the order of blocks matters to a lookup, so the scale of the scores is taken out.
            scores = scores * (SHARPNESS / (scores.detach().std(-1, keepdim=True) + 1e-6))
            # The other blocks a question needs do not count against the one at hand.
            others = scores.masked_fill(torch.nn.functional.pad(positive, (0, scores.shape[1] - len(flat))), -torch.inf)
            rest = others.logsumexp(-1)
            hit = scores[pairs[:, 0], pairs[:, 1]]
            losses = torch.logaddexp(hit, rest[pairs[:, 0]]) - hit
            total = total + (losses * counts).sum() / len(rows)
            kept = keys.detach()
            self.banks[n] = kept if bank is None else torch.cat((kept, bank))[: BANK * BLOCK]
        return total / len(LAYERS)
