"""Formulas that the model is made of and that have no weights of their own: norm, attention, rotary positions, hashes.

PR 1166, sections 4 to 7, unless a docstring names another source. Shapes as in :mod:`golfbook.plain.model`; R are the
dimensions of a head that turn with the position.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from golfbook.config.architecture import ModelConfig

EPS = 2.0**-23  # of every norm without a gain
PRIMES = (36313, 27191, 51497)  # for the token itself, the one before it, and the one before that


def rms_norm(x: Tensor) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps)`` over the last axis."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def before(x: Tensor, steps: int = 1) -> Tensor:
    """Return what stands ``steps`` positions earlier in ``x`` (B, T, D), zeros before the start."""
    return F.pad(x, (0, 0, steps, 0))[:, : x.size(1)]


def masked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return ``softmax(q k^T / sqrt(d)) v`` over each position and those before it, (B, H, T, d).

    ``q`` is (B, H, T, d), ``k`` and ``v`` are (B, K, T, d): H / K neighbouring query heads share one head of keys.
    """
    share, time = q.size(1) // k.size(1), q.size(2)
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)  # (B, H, T, d)
    scores = q @ k.mT / q.size(-1) ** 0.5  # (B, H, T, T)
    seen = torch.ones(time, time, dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v


def rotary_angles(config: ModelConfig, positions: int, length: int, device: torch.device) -> Tensor:
    """Return the angle of each position and pair of dimensions, (positions, R/2) float64.

    For an input of ``length`` tokens above ``rope_train_length`` the base grows, which slows the slow pairs (NTK rule).
    """
    dims, base = config.rope_dims or config.head_dim, config.rope_base
    if length > config.rope_train_length:
        base = base * (length / config.rope_train_length) ** (dims / (dims - 2))
    frequencies = base ** -(torch.arange(0, dims, 2, dtype=torch.float64, device=device) / dims)  # (R/2,)
    return torch.arange(positions, dtype=torch.float64, device=device)[:, None] * frequencies


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Return heads ``x`` (B, T, H, d), the pairs (i, i + R/2) of their first R dimensions turned by minus the angle."""
    half = angles.size(1)
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)  # (T, 1, R/2)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def remove_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Return ``y - (y . n) n`` with n the direction of the position's own value: exclusive self-attention.

    ``y`` is (B, T, H, d), ``v`` (B, T, K, d).
    """
    direction = F.normalize(v, dim=-1).unsqueeze(3)  # (B, T, K, 1, d)
    y = y.unflatten(2, (v.size(2), -1))  # (B, T, K, H/K, d)
    return (y - (y * direction).sum(-1, keepdim=True) * direction).flatten(2, 3)


def bigram_rows(tokens: Tensor, rows: int, order: int = 2) -> Tensor:
    """Return the row of the hash table for the last ``order`` tokens at each position, (B, T) int64.

    The primes times the tokens are joined by exclusive or; the last row is for positions with too few predecessors.
    """
    key = PRIMES[0] * tokens
    for back in range(1, order):
        key = key ^ (PRIMES[back] * F.pad(tokens, (back, 0))[:, : tokens.size(1)])
    known = torch.arange(tokens.size(1), device=tokens.device) >= order - 1
    return torch.where(known, key % (rows - 1), rows - 1)


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Return ``[sin(t f), cos(t f)]`` (..., dim) of times (...), frequencies f from 1 down to 1/10000 (PR 1170)."""
    half = dim // 2
    frequencies = 10000.0 ** -(torch.arange(half, dtype=t.dtype, device=t.device) / max(half - 1, 1))
    angles = t.unsqueeze(-1) * frequencies
    return F.pad(torch.cat((angles.sin(), angles.cos()), dim=-1), (0, dim % 2))
