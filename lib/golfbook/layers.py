"""Building blocks of the published transformers: norm, rotary positions, attention and its options, MLP, embeddings.

Formulae follow PR 1166 (sections 4-7 of its description) unless a docstring names another source. Shapes: B rows, T
positions, D model width, H query heads, K key/value heads, d = D/H. Linear maps are ``y = x W^T`` without bias.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golfbook.config import ModelConfig

RMS_EPS = torch.finfo(torch.float32).eps


def rms_norm(x: Tensor) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` over the last axis, no gain, eps = 2^-23; the result keeps the dtype of ``x``.

    The dtype is pinned because torch 2.12 moved ``rms_norm`` to autocast's float32 list; the published runs used older
    releases, where a bfloat16 stream stays bfloat16.
    """
    return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS).to(x.dtype)


@functools.lru_cache(maxsize=16)
def rope_tables(length: int, dims: int, base: float, train_length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each (length, dims/2) float32.

    Beyond ``train_length`` positions the base grows to ``base * (length/train_length)^(dims/(dims-2))`` (NTK rule, PR
    1166 section 5). Computed in float32 at any length; the published code rounds short tables to bfloat16 by accident.
    """
    if length > train_length:
        base = base * (length / train_length) ** (dims / (dims - 2))
    with torch.inference_mode(False):  # tables made while scoring must stay usable by autograd
        exponents = torch.arange(0, dims, 2, dtype=torch.float32, device=device) / dims
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), base**-exponents)
        return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first ``2 * cos.size(-1)`` dimensions of ``x`` (B, T, heads, d); the others pass through.

    Half-split layout, rotation by minus the angle: ``a' = a cos + b sin``, ``b' = b cos - a sin``.
    """
    half = cos.size(-1)
    cos, sin = cos[:, None, :].to(x.dtype), sin[:, None, :].to(x.dtype)
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, x[..., 2 * half :]), dim=-1)


def exclusive_attention(y: Tensor, v: Tensor) -> Tensor:
    """Remove from each head's output its component along the token's own value (XSA, PR 1166 section 5 step 8).

    ``y`` is (B, T, H, d), ``v`` (B, T, K, d); query head h belongs to value head h // (H/K).
    """
    batch, time, kv_heads, width = v.shape
    y = y.view(batch, time, kv_heads, -1, width)
    direction = F.normalize(v, dim=-1, eps=1e-12).unsqueeze(-2)
    return (y - (y * direction).sum(-1, keepdim=True) * direction).flatten(2, 3)


class Attention(nn.Module):
    """Causal grouped-query attention with QK norm, partial RoPE and a per-head query gain (PR 1166 section 5).

    Options: exclusive self-attention, a per-head output gate, and mixing in the values of layer 0 (PR 1170).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        dim, head_dim = config.model_dim, config.head_dim
        kv_dim = config.num_kv_heads * head_dim
        self.config = config
        self.exclusive = layer in config.xsa_layers
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        if config.value_residual:
            self.vr_lambda = nn.Parameter(torch.tensor([0.5, 0.5]))
        self.c_q = nn.Linear(dim, dim, bias=False)
        self.c_k = nn.Linear(dim, kv_dim, bias=False)
        self.c_v = nn.Linear(dim, kv_dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)
        if config.gated_attention:
            self.attn_gate = nn.Linear(dim, config.num_heads, bias=True)

    def forward(
        self, x: Tensor, value_embedding: Tensor | None = None, first_values: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (output (B, T, D), raw values (B, T, K*d)).

        ``value_embedding`` (B, T, K*d) is added to the values; ``first_values`` are layer 0's raw values.
        """
        config = self.config
        batch, time, _ = x.shape
        q = self.c_q(x).view(batch, time, config.num_heads, config.head_dim)
        k = self.c_k(x).view(batch, time, config.num_kv_heads, config.head_dim)
        v = raw = self.c_v(x)
        if value_embedding is not None:
            v = raw = v + value_embedding
        if first_values is not None:
            mix = self.vr_lambda.to(v.dtype)
            v = mix[0] * first_values + mix[1] * v
        v = v.view(batch, time, config.num_kv_heads, config.head_dim)
        cos, sin = rope_tables(
            time, config.rope_dims or config.head_dim, config.rope_base, config.rope_train_length, x.device
        )
        q, k = apply_rope(rms_norm(q), cos, sin), apply_rope(rms_norm(k), cos, sin)
        q = q * self.q_gain.to(q.dtype)[:, None]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        ).transpose(1, 2)
        if self.exclusive:
            y = exclusive_attention(y, v)
        if config.gated_attention:
            y = y * torch.sigmoid(self.attn_gate(x)).unsqueeze(-1)
        return self.proj(y.reshape(batch, time, -1)), raw


class MLP(nn.Module):
    """``W_proj leaky(W_fc x)^2`` with negative slope 0.5: z^2 above zero, z^2/4 below (PR 1166 section 4.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = int(config.mlp_mult * config.model_dim)
        self.fc = nn.Linear(config.model_dim, hidden, bias=False)
        self.proj = nn.Linear(hidden, config.model_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        return self.proj(F.leaky_relu(self.fc(x), 0.5).square())


class Block(nn.Module):
    """One layer: residual mix with the embedding stream, attention, MLP (PR 1166 section 4.1).

    ``u = r0 x + r1 x0``; ``y = u + alpha Attn(s rms(u))``; ``out = y + beta MLP(s rms(y))`` with s = 1/sqrt(layer+1).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        dim = config.model_dim
        self.scale = 1.0 / math.sqrt(layer + 1) if config.ln_scale else 1.0
        self.attn_scale = nn.Parameter(torch.ones(dim))
        self.mlp_scale = nn.Parameter(torch.ones(dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, x0: Tensor, value_embedding: Tensor | None = None, first_values: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (stream (B, T, D), raw values of this layer (B, T, K*d))."""
        mix = self.resid_mix.to(x.dtype)
        u = mix[0] * x + mix[1] * x0
        attended, values = self.attn(self.scale * rms_norm(u), value_embedding, first_values)
        y = u + self.attn_scale.to(x.dtype) * attended
        return y + self.mlp_scale.to(x.dtype) * self.mlp(self.scale * rms_norm(y)), values


class BigramHash(nn.Module):
    """Embedding of the (previous, current) token pair by a hash into a small table (PR 1166 section 4 step 2).

    Row ``h = ((36313 t) xor (27191 t_prev)) mod (rows - 1)``; the last row serves position 0 of every sequence.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rows = config.bigram.vocab_size
        self.scale = nn.Parameter(torch.tensor(0.05))
        self.embed = nn.Embedding(self.rows, config.bigram.dim)
        self.proj = nn.Linear(config.bigram.dim, config.model_dim, bias=False)

    def rows_of(self, tokens: Tensor) -> Tensor:
        """Table rows (B, T) int64 of ``tokens`` (B, T) int64."""
        pairs = torch.bitwise_xor(36313 * tokens[:, 1:], 27191 * tokens[:, :-1]) % (self.rows - 1)
        return F.pad(pairs, (1, 0), value=self.rows - 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids (B, T) to vectors (B, T, D)."""
        vectors = self.proj(self.embed(self.rows_of(tokens)))
        return self.scale.to(vectors.dtype) * vectors


class SmearGate(nn.Module):
    """Mix each position with its predecessor: ``(1-g) x_t + g x_{t-1}``, g = sigmoid(gate), x_{-1} = 0 (PR 1166)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(config.model_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        gate = torch.sigmoid(self.gate).to(x.dtype)
        return (1 - gate) * x + gate * F.pad(x, (0, 0, 1, -1))


class ValueEmbedding(nn.Module):
    """A second token embedding, as wide as the values, shared by the layers that add it (PR 1166 section 7)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1))
        self.embed = nn.Embedding(config.vocab_size, config.value_embedding.dim)
        self.proj = nn.Linear(config.value_embedding.dim, config.num_kv_heads * config.head_dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids (B, T) to (B, T, K*d)."""
        vectors = self.proj(self.embed(tokens))
        return self.scale.to(vectors.dtype) * vectors
