"""Deterministic fills of weights and tokens, under which published values were computed.

``fill_hashed`` and ``hashed_tokens`` follow the fill rule under which the published PR 1166/1170/1232 modules were
evaluated on a CPU in float32; ``sine`` is the generator of the PR 1406 vectors.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch


def splitmix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64 of uint64 values, with wrap-around."""
    with np.errstate(over="ignore"):
        z = x + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def hashed_integers(tag: str, count: int) -> np.ndarray:
    """``count`` uint64 values that depend on ``tag`` only."""
    start = np.uint64(zlib.crc32(tag.encode())) << np.uint64(32)
    return splitmix64(start + np.arange(count, dtype=np.uint64))


def uniform(tag: str, count: int) -> np.ndarray:
    """``count`` values in [0, 1), float64."""
    return (hashed_integers(tag, count) >> np.uint64(11)).astype(np.float64) / 2.0**53


def hashed_tokens(tag: str, count: int) -> np.ndarray:
    """``count`` token ids below 1024."""
    return (hashed_integers(tag, count) % np.uint64(1024)).astype(np.int64)


def hashed_batch(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, both (rows, length) int64."""
    block = torch.from_numpy(hashed_tokens("tokens", rows * (length + 1))).view(rows, length + 1)
    return block[:, :-1], block[:, 1:]


@torch.no_grad()
def fill_hashed(model: torch.nn.Module) -> None:
    """Give every parameter the value the fill rule assigns to its name."""
    ones = {"attn_scale", "mlp_scale", "skip_weights", "ttt_ln_w", "q_gain", "scale"}
    for name, parameter in model.named_parameters():
        r = torch.from_numpy(2 * uniform(name, parameter.numel()) - 1).view(parameter.shape)
        last = name.rsplit(".", 1)[-1]
        if last == "resid_mix":
            value = 0.1 * r
            value[0] += 1
        elif last in ones or name.endswith("post_norm.weight") or "ve_layer_scales" in name:
            value = 1 + 0.1 * r
        elif parameter.ndim >= 2:
            value = r * (3.0 / parameter.shape[-1]) ** 0.5
        else:
            value = 0.5 * r
        parameter.copy_(value)


def sine(tag: int, *shape: int) -> torch.Tensor:
    """Generator of the PR 1406 vectors: values in [-0.5, 0.5), row-major, float64."""
    j = np.arange(1, int(np.prod(shape)) + 1, dtype=np.float64)
    x = 43758.5453 * np.sin(12.9898 * j + 78.233 * (tag + 1))
    return torch.from_numpy(x - np.floor(x) - 0.5).view(shape)
