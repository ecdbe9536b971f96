"""Initialisation with induction heads in place: without them a small model needs many times the tokens to find them.

Layer 0 copies earlier tokens into fixed parts of the residual stream, layers 1 and 2 compare the recent past of the
query with the recent past of every key and copy the key's token. Everything is trained from there without constraint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from tokenizers import Tokenizer
from torch import Tensor

from recipes.model import Attention, Layer, Reader, ReaderConfig, rope_frequencies

OFFSETS = (1, 2, 3, 4, 5, 6, 8, 10)
EMBED_STD = 0.05
CONSTANT = 6.0
PEAK = 24.0
WRITE = 2.5
MATCH = 2.5
COPY = 6.0
SLOW_FROM = 7
# Layers of the network that is made deeper.
SHALLOW = 4


def _offset_query(freq: Tensor, offset: int, strength: float) -> tuple[Tensor, Tensor]:
    """Constant query and key whose rotary score peaks at a distance of ``offset``; shapes [e]."""
    half = len(freq)
    amplitude = torch.zeros(half)
    amplitude[:6] = torch.tensor([1.0, 0.9, 0.7, 0.5, 0.3, 0.2])
    amplitude *= strength * math.sqrt(2 * half) / amplitude.sum()
    root = amplitude.sqrt()
    key = torch.cat((root, torch.zeros(half)))
    # Rotating the query back by the offset makes key and query coincide there.
    query = torch.cat((root * (offset * freq).cos(), -root * (offset * freq).sin()))
    return query, key


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random matrix [rows, columns] with orthonormal rows (rows <= columns)."""
    q: Tensor = torch.linalg.qr(torch.randn(columns, rows, generator=generator))[0]
    return q.T.contiguous()


def _place(rows: Tensor, at: Sequence[int], size: int) -> Tensor:
    """Matrix of ``size`` rows, zero but for ``rows`` at the given indices."""
    out = torch.zeros(size, rows.shape[1])
    out[list(at)] = rows
    return out


@dataclass(frozen=True)
class _Parts:
    """Parts of the residual stream but for its last dimension, each a matrix [e, d - 1] that a head reads or writes by.

    Attributes:
        slots: Per head of layer 0, where it writes what an earlier token was.
        share: What of a token is written there, and compared.
        views: Per group of heads, what of a token is copied.
    """

    slots: list[Tensor]
    share: Tensor
    views: list[Tensor]


@torch.no_grad()
def initialise(model: Reader, tokenizer: Tokenizer | None, seed: int) -> None:
    """Initialise in place.

    Args:
        model: The model.
        tokenizer: When given, the embeddings of a word with and without its leading space start half alike.
        seed: Seed of every random draw.
    """
    gen = torch.Generator().manual_seed(seed)
    _draw(model, tokenizer, gen)
    parts = _parts(model.config, gen)
    first, *matching = (cast(Layer, layer).self_attn for layer in list(model.layers)[:3])
    _copy_earlier(first, parts)
    for n, attention in enumerate(matching, start=1):
        _match_and_copy(attention, parts, n)


def _draw(model: Reader, tokenizer: Tokenizer | None, gen: torch.Generator) -> None:
    """Random weights everywhere, and the last dimension of the embeddings constant."""
    for name, p in model.named_parameters():
        if p.ndim == 2:
            p.normal_(0.0, 0.4 / math.sqrt(p.shape[1]), generator=gen)
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            p.mul_(0.3)
    table = model.embed_tokens.weight
    table.normal_(0.0, EMBED_STD, generator=gen)
    if tokenizer is not None:
        vocab = tokenizer.get_vocab()
        for token, i in vocab.items():
            bare = vocab.get(token[1:]) if token.startswith("Ġ") and len(token) > 1 else None
            if bare is not None:
                table[i] = (table[i] + table[bare]) / math.sqrt(2)
    table[:, -1] = CONSTANT * EMBED_STD
    model.norm.weight.fill_(1.5)
    model.norm.weight[-1] = 0.0


def _parts(c: ReaderConfig, gen: torch.Generator) -> _Parts:
    """Random parts that do not overlap: the slots of the heads, and what is left for copying."""
    d, e = c.hidden_size, c.head_dim
    slow = [i for i in range(e) if i % (e // 2) >= SLOW_FROM * e // 32]
    basis = _orthonormal(d - 1, d - 1, gen)
    clean = basis[c.heads * len(slow) :]
    slots = [_place(basis[h * len(slow) : (h + 1) * len(slow)], slow, e) for h in range(c.heads)]
    share = _place(_orthonormal(len(slow), len(clean), gen) @ clean, slow, e)
    step = min(e, len(clean) // c.kv_heads)
    views = [_place(clean[g * step : (g + 1) * step], range(step), e) for g in range(c.kv_heads)]
    return _Parts(slots, share, views)


def _copy_earlier(att: Attention, parts: _Parts) -> None:
    """Heads of layer 0: each writes the token of one of ``OFFSETS`` before into its slot."""
    c = att.config
    e, groups, freq = c.head_dim, c.heads // c.kv_heads, rope_frequencies(c)
    att.q_proj.weight.mul_(0.2)
    att.k_proj.weight.mul_(0.2)
    for h in range(c.heads):
        head, group = slice(h * e, (h + 1) * e), slice(h // groups * e, (h // groups + 1) * e)
        query, key = _offset_query(freq, OFFSETS[h % len(OFFSETS)], PEAK)
        att.q_proj.weight[head, -1] = query / CONSTANT
        att.k_proj.weight[group, -1] = key / CONSTANT
        att.v_proj.weight[group, :-1] = parts.share
        att.o_proj.weight[:-1, head] = parts.slots[h].T * EMBED_STD * WRITE


def _match_and_copy(att: Attention, parts: _Parts, n: int) -> None:
    """Heads of layer ``n``, 1 or 2: they find tokens with the same recent past as the query, and copy them."""
    c = att.config
    e, groups = c.head_dim, c.heads // c.kv_heads
    by_offset = {OFFSETS[h % len(OFFSETS)]: parts.slots[h] for h in range(c.heads)}
    att.q_proj.weight.mul_(0.3)
    att.k_proj.weight.mul_(0.3)
    for g in range(c.kv_heads):
        rows = slice(g * e, (g + 1) * e)
        # Bigram heads match the current token with the one before each key, the others the last few with the few
        # before; in layer 2 the last group leaves out the nearest ones, where facts of one template agree.
        past = () if g % 2 == 0 else (2, 3, 4, 5, 6) if n == 1 or g < c.kv_heads - 1 else (3, 4, 5, 6)
        near = 0.0 if past == (3, 4, 5, 6) else 1.0
        key, query = by_offset[1] * near, parts.share * near
        for o in past:
            key = key + by_offset[o] * 0.7
            query = query + by_offset[o - 1] * 0.7
        att.k_proj.weight[rows, :-1] += MATCH * key
        for j in range(g * groups, (g + 1) * groups):
            head = slice(j * e, (j + 1) * e)
            att.q_proj.weight[head, :-1] += MATCH * query
            att.o_proj.weight[:-1, head] += parts.views[g].T * EMBED_STD * COPY
        att.v_proj.weight[rows, :-1] += parts.views[g]


def places(layers: int) -> tuple[int, ...]:
    """Where the layers of the shallow network go in one of so many; those between and behind begin without effect.

    Half of the new ones stand before its last layer, half behind it.
    """
    return (*range(SHALLOW - 1), layers // 2 + 1)


@torch.no_grad()
def grow(model: Reader, shallow: dict[str, Tensor]) -> None:
    """Make a deeper network compute what a shallower one does.

    Args:
        model: The deeper network, initialised; its other layers keep their weights but for what they write, which is 0.
        shallow: State of a network of ``SHALLOW`` layers.
    """
    state, grown = model.state_dict(), places(model.config.layers)
    for name, value in shallow.items():
        head, _, rest = name.removeprefix("layers.").partition(".")
        state[f"layers.{grown[int(head)]}.{rest}" if name.startswith("layers.") else name] = value
    for n in set(range(model.config.layers)) - set(grown):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            state[f"layers.{n}.{part}.weight"].zero_()
    model.load_state_dict(state)
