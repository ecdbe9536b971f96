"""The auxiliary lookup objective of the phase ``reader``: a question's lookup should find the blocks it needs.

As in the engine, a block's score for a token is the sum over heads of the best match among its keys, with the query
rotated to the far distance and the keys not at all; a question's score is the sum over its tokens, scores are
standardised over the blocks, and while the answer is written the current token's are added. Cross-entropy over all blocks
of the batch and of recent batches. The layers' inputs are detached, so that only the query and key projections learn.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.batches import BLOCK, N_INIT, Batch
from recipes.model import Reader, ReaderConfig, rotate

BANK = 512
SHARPNESS = 2.0
WINDOWS = (128, 256, 256, 256, 384, 512)


@dataclass(frozen=True)
class Targets:
    """Lookups of one batch, one question per sample.

    Attributes:
        tokens: Flat indices [N] of the questions' tokens in [B * T].
        owner: Question [N] that each belongs to.
        current: Flat indices [Q] of the token ahead of each answer's value.
        wanted: Blocks that each question needs, [Q, blocks].
    """

    tokens: Tensor
    owner: Tensor
    current: Tensor
    wanted: Tensor


class LookupObjective:
    """Cross-entropy of choosing the blocks a question needs, over the layers but the first and the last.

    Args:
        config: Sizes of the network.
        weight: Weight of this loss beside the answers' loss.
    """

    def __init__(self, config: ReaderConfig, weight: float = 0.15) -> None:
        self.config = config
        self.weight = weight
        self.layers = range(1, config.layers - 1)
        self.banks: dict[int, Tensor] = {}

    def state_dict(self) -> dict[int, Tensor]:
        """Keys of recent blocks, by layer."""
        return dict(self.banks)

    def load_state_dict(self, state: dict[int, Tensor], device: torch.device) -> None:
        """Restore what :meth:`state_dict` returned, on a device."""
        self.banks = {layer: keys.to(device) for layer, keys in state.items()}

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

    def targets(self, batch: Batch, place: dict[tuple[int, int], int], rng: random.Random) -> Targets | None:
        """The lookups to learn from, or None when no question of the batch needs a whole block."""
        length = batch.ids.shape[1]
        tokens: list[int] = []
        owner: list[int] = []
        current: list[int] = []
        wanted: list[set[int]] = []
        for row, asks in enumerate(batch.asks):
            for question, answer, needs in rng.sample(asks, len(asks)):
                blocks = {
                    place[row, i]
                    for a, b in needs
                    for i in range((a - N_INIT) // BLOCK, (b - 1 - N_INIT) // BLOCK + 1)
                    if (row, i) in place
                }
                if blocks:
                    tokens += range(row * length + question[0], row * length + question[1])
                    owner += [len(wanted)] * (question[1] - question[0])
                    value = next(t for t in range(*answer) if batch.weights[row, t] >= 3.0) - 1
                    current.append(row * length + value)
                    wanted.append(blocks)
                    break
        if not wanted:
            return None
        mask = torch.zeros(len(wanted), len(place), dtype=torch.bool)
        for n, blocks in enumerate(wanted):
            mask[n, list(blocks)] = True
        return Targets(torch.tensor(tokens), torch.tensor(owner), torch.tensor(current), mask)

    def __call__(self, model: Reader, inputs: list[Tensor], batch: Batch, rng: random.Random) -> Tensor:
        """Loss of one batch.

        Args:
            model: The model.
            inputs: Normed input [B, T, D] of every layer's attention.
            batch: The batch they come from.
            rng: Source of the questions and of the window the far angle belongs to.
        """
        device = inputs[0].device
        flat, place = self.blocks(batch)
        goal = self.targets(batch, place, rng)
        if goal is None:
            return torch.zeros((), device=device)
        flat, owner, wanted = flat.to(device), goal.owner.to(device), goal.wanted.to(device)
        at = torch.cat((goal.tokens, goal.current)).to(device)
        length, c = batch.ids.shape[1], self.config
        frequencies = model.frequencies
        assert isinstance(frequencies, Tensor)
        angle = (rng.choice(WINDOWS) - 1) * frequencies
        total = torch.zeros((), device=device)
        for n in self.layers:
            attention = model.layers[n].self_attn
            x = inputs[n].detach()
            q = attention.q_proj(x.flatten(0, 1)[at]).view(-1, c.heads, c.head_dim)
            far = rotate(q, angle.cos(), angle.sin()).to(q.dtype)
            whole = x[:, N_INIT : N_INIT + (length - N_INIT) // BLOCK * BLOCK].reshape(-1, BLOCK, c.hidden_size)[flat]
            keys = attention.k_proj(whole).view(-1, c.kv_heads, c.head_dim)
            bank = self.banks.get(n)
            every = keys if bank is None else torch.cat((keys, bank))
            kept = keys.detach()
            self.banks[n] = kept if bank is None else torch.cat((kept, bank))[: BANK * BLOCK]
            scores = self.scores(far, every)
            asked = torch.zeros(len(wanted), scores.shape[1], device=device).index_add(0, owner, scores[: len(owner)])
            question = standardise(asked)
            for lookup in (question, question + standardise(scores[len(owner) :])):
                total = total + cross_entropy(SHARPNESS * lookup, wanted)
        return total / (2 * len(self.layers))

    def scores(self, far: Tensor, keys: Tensor) -> Tensor:
        """[tokens, blocks] sum over heads of the best match of queries [tokens, H, e] among keys [blocks * BLOCK, G, e]."""
        c = self.config
        total = torch.zeros(len(far), len(keys) // BLOCK, device=far.device)
        for g in range(c.kv_heads):
            rows = far.view(len(far), c.kv_heads, -1, c.head_dim)[:, g].flatten(0, 1)
            best = (rows @ keys[:, g].T).unflatten(-1, (-1, BLOCK)).max(-1).values
            total = total + best.view(len(far), -1, best.shape[-1]).float().sum(1)
        return total


def standardise(scores: Tensor) -> Tensor:
    """Scores with mean 0 and variance 1 over the blocks, as a lookup of the engine adds them."""
    centred = scores - scores.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True).sqrt() + 1e-6)


def cross_entropy(scores: Tensor, wanted: Tensor) -> Tensor:
    """Mean cross-entropy of the wanted blocks [Q, blocks] under scores [Q, blocks and more]; they do not compete."""
    wanted = F.pad(wanted, (0, scores.shape[1] - wanted.shape[1]))
    rest = scores.masked_fill(wanted, -torch.inf).logsumexp(-1, keepdim=True)
    losses = torch.logaddexp(scores, rest) - scores
    return (losses * wanted).sum(-1).div(wanted.sum(-1)).mean()
