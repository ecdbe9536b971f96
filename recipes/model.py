"""The reader's network for training: a Llama whose state dict loads into transformers, plus its initialisation."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.attention import FAR_AWAY, attend, attend_whole, causal_bias, split_bias
from recipes.tokenizer import THOUGHTS, VOCABULARY


@dataclass(frozen=True)
class ReaderConfig:
    """Sizes of the network.

    Attributes:
        vocab_size: Tokens in the vocabulary.
        hidden_size: Width of the residual stream.
        layers: Number of decoder layers.
        heads: Query heads.
        kv_heads: Key/value heads.
        head_dim: Dimension of one head.
        intermediate_size: Width of the gated MLP.
        rope_theta: Base of the rotary frequencies.
        rms_eps: Epsilon of the RMS norms.
        max_positions: Context the model is declared for, in tokens; the last minute of training goes up to twice that.
    """

    vocab_size: int = VOCABULARY + len(THOUGHTS)
    hidden_size: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    intermediate_size: int = 640
    rope_theta: float = 5e5
    rms_eps: float = 1e-6
    max_positions: int = 512

    def to_llama(self) -> dict[str, object]:
        """Keyword arguments of ``transformers.LlamaConfig`` for this network."""
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "rms_norm_eps": self.rms_eps,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
        }

    def to_dict(self) -> dict[str, object]:
        """Plain dictionary, for checkpoints."""
        return asdict(self)


#: Networks by name. Both fit 12 MB in fp16; deeper rather than wider, for facts that take several steps to find.
SIZES = {"small": ReaderConfig(), "large": ReaderConfig(layers=8, intermediate_size=608)}


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of ``x``."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rope_frequencies(config: ReaderConfig) -> Tensor:
    """Angular frequency of each rotary pair, shape [head_dim / 2]."""
    half = config.head_dim // 2
    return torch.exp(-math.log(config.rope_theta) * torch.arange(half, dtype=torch.float32) / half)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE: ``x`` [..., d] by angles whose cos and sin broadcast to [..., d/2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def takes_whole(device: torch.device) -> bool:
    """Whether attention there takes a batch whole; else one sequence after another."""
    return device.type == "cuda"


class Attention(nn.Module):
    """Grouped-query attention; distances beyond ``n_local`` can be clamped as the lookup engine does."""

    def __init__(self, config: ReaderConfig) -> None:
        super().__init__()
        self.config = config
        d, h, g, e = config.hidden_size, config.heads, config.kv_heads, config.head_dim
        self.q_proj = nn.Linear(d, h * e, bias=False)
        self.k_proj = nn.Linear(d, g * e, bias=False)
        self.v_proj = nn.Linear(d, g * e, bias=False)
        self.o_proj = nn.Linear(h * e, d, bias=False)

    def forward(self, x: Tensor, angles: Angles) -> Tensor:
        """Attend causally.

        Args:
            x: Normed residual stream, [B, T, D].
            angles: Rotations and masks shared by all layers.

        Returns:
            Output [B, T, D].
        """
        b, t, _ = x.shape
        c = self.config
        q = self.q_proj(x).view(b, t, c.heads, c.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, t, c.kv_heads, c.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, t, c.kv_heads, c.head_dim).transpose(1, 2)
        far = None if angles.far_cos is None else (rotate(q, angles.far_cos, cast(Tensor, angles.far_sin)), k)
        qr, kr = rotate(q, angles.cos, angles.sin), rotate(k, angles.cos, angles.sin)
        if angles.whole:
            out = attend_whole(qr, kr, v, angles.bias, far)
        else:
            out = attend(qr, kr, v, cast(Tensor, angles.bias), angles.near, far)
        mixed: Tensor = self.o_proj(out.transpose(1, 2).reshape(b, t, -1))
        return mixed


@dataclass
class Angles:
    """Rotations cos/sin [B, 1, T, e/2] and bias of one batch; with a clamp also far angle and mask.

    Bias and mask are those of `attend`, or of `attend_whole` where the batch is to be taken whole.
    """

    cos: Tensor
    sin: Tensor
    bias: Tensor | None
    far_cos: Tensor | None = None
    far_sin: Tensor | None = None
    near: Tensor | None = None
    whole: bool = False


class MLP(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, config: ReaderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to [..., D]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: ReaderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_eps)

    def forward(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        """Return the new residual stream and the normed input of the attention."""
        normed = self.input_layernorm(x)
        x = x + self.self_attn(normed, angles)
        return x + self.mlp(self.post_attention_layernorm(x)), normed


class Reader(nn.Module):
    """The network without its head; the head is the transposed embedding."""

    def __init__(self, config: ReaderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_eps)
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)

    def angles(self, positions: Tensor, n_local: int | None, keep: Tensor | None = None) -> Angles:
        """Rotations for a batch.

        Args:
            positions: Positions [B, T], increasing, possibly with gaps.
            n_local: Distance from which keys are seen un-rotated by queries rotated at ``n_local - 1``.
            keep: Keys [B, T] that stay visible from afar; all when omitted.
        """
        freq = self.frequencies
        assert isinstance(freq, Tensor)
        whole = takes_whole(positions.device)
        theta = positions[:, None, :, None].float() * freq
        cos, sin = theta.cos(), theta.sin()
        if n_local is None:
            bias = None if whole else causal_bias(positions.shape[1], positions.device)
            return Angles(cos, sin, bias, whole=whole)
        distance = positions[:, None, :, None] - positions[:, None, None, :]
        near = distance < n_local
        visible = distance >= 0
        if keep is not None:
            visible = visible & (near | keep[:, None, None, :])
        far = (n_local - 1) * freq
        if whole:
            kind = positions.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
            return Angles(cos, sin, split_bias(visible, near, dtype), far.cos(), far.sin(), whole=True)
        bias = torch.zeros(visible.shape, device=positions.device).masked_fill_(~visible, FAR_AWAY)
        return Angles(cos, sin, bias, far.cos(), far.sin(), near)

    def forward(
        self, ids: Tensor, positions: Tensor, n_local: int | None = None, keep: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the network.

        Returns:
            Normed hidden states [B, T, D] and the normed input [B, T, D] of every layer's attention.
        """
        angles = self.angles(positions, n_local, keep)
        x = self.embed_tokens(ids)
        inputs = []
        for layer in self.layers:
            x, normed = layer(x, angles)
            inputs.append(normed)
        return self.norm(x), inputs

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of normed hidden states [..., D]."""
        return hidden @ self.embed_tokens.weight.T
