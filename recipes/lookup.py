"""The auxiliary lookup objective of the phase ``reader``: the right block should win when keys are averaged per block.

A query (the mean over a question's tokens, alone or with the token being answered) is rotated as for a far key and
compared with the mean un-rotated key of every block of the batch and of recent batches; cross-entropy, heads summed.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from recipes.batches import BLOCK, N_INIT, Batch
from recipes.model import Reader, ReaderConfig, rotate

LAYERS = (1, 2)
BANK = 3072
SHARPNESS = 3.0
WINDOWS = (128, 256, 256, 256, 384, 512)


class LookupObjective:
    """Cross-entropy of choosing the blocks a question needs.

    Args:
        config: Sizes of the network.
        weight: Weight of this loss beside the answers' loss.
    """

    def __init__(self, config: ReaderConfig, weight: float = 0.03) -> None:
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
    ) -> tuple[list[list[tuple[int, int, float]]], list[list[int]]]:
        """Queries as weighted tokens (row, token, weight), and the blocks each should find."""
        rows: list[list[tuple[int, int, float]]] = []
        targets: list[list[int]] = []
        for row, asks in enumerate(batch.asks):
            for n, (question, answer, needs) in enumerate(asks):
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
                mean = [(row, t, 1.0 / (question[1] - question[0])) for t in range(*question)]
                token = (row, rng.randrange(answer[0] - 1, answer[1] - 1), 1.0)
                kinds = [mean, [*mean, token]]
                pinned = batch.pinned[row]
                if n == 0 and pinned[1] > pinned[0]:
                    kinds.append([(row, t, 1.0 / (pinned[1] - pinned[0])) for t in range(*pinned)])
                rows += kinds
                targets += [wanted] * len(kinds)
        return rows, targets

    def __call__(self, model: Reader, probes: list[tuple[Tensor, Tensor]], batch: Batch, rng: random.Random) -> Tensor:
        """Loss of one batch.

        Args:
            model: The model, for its rotary frequencies.
            probes: Un-rotated queries and keys of every layer.
            batch: The batch they come from.
            rng: Source of the window the far angle belongs to.
        """
        device = probes[0][0].device
        flat, place = self.blocks(batch)
        rows, targets = self.queries(batch, place, rng)
        if not rows:
            return torch.zeros((), device=device)
        flat = flat.to(device)
        length = batch.ids.shape[1]
        at = torch.tensor([r * length + t for q in rows for r, t, _ in q], device=device)
        share = torch.tensor([w for q in rows for _, _, w in q], device=device)
        owner = torch.tensor([i for i, q in enumerate(rows) for _ in q], device=device)
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
            q, k = (x.float() for x in probes[n])
            tokens = q.transpose(1, 2).reshape(-1, c.heads * c.head_dim)
            pooled = torch.zeros(len(rows), tokens.shape[1], device=device).index_add(
                0, owner, tokens[at] * share[:, None]
            )
            far = rotate(pooled.view(-1, c.heads, c.head_dim), angle.cos(), angle.sin())
            grouped = far.view(-1, c.kv_heads, c.heads // c.kv_heads, c.head_dim).sum(2).flatten(1)
            whole = k[:, :, N_INIT : N_INIT + (length - N_INIT) // BLOCK * BLOCK]
            means = (
                whole.reshape(*whole.shape[:2], -1, BLOCK, c.head_dim)
                .mean(3)
                .transpose(1, 2)
                .flatten(0, 1)
                .flatten(1)[flat]
            )
            bank = self.banks.get(n)
            keys = means if bank is None else torch.cat((means, bank))
            scores = grouped @ keys.T
            # Only the order of blocks matters to a lookup, so the scale of the scores is taken out.
            scores = scores * (SHARPNESS / (scores.detach().std(-1, keepdim=True) + 1e-6))
            # The other blocks a question needs do not count against the one at hand.
            others = scores.masked_fill(torch.nn.functional.pad(positive, (0, len(keys) - len(flat))), -torch.inf)
            rest = others.logsumexp(-1)
            hit = scores[pairs[:, 0], pairs[:, 1]]
            losses = torch.logaddexp(hit, rest[pairs[:, 0]]) - hit
            total = total + (losses * counts).sum() / len(rows)
            kept = means.detach()
            self.banks[n] = kept if bank is None else torch.cat((kept, bank))[:BANK]
        return total / len(LAYERS)
