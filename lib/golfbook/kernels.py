"""Fused element-wise maths and blocked attention: the same formulae as in :mod:`golfbook.layers`, fewer passes.

Autograd's own backward of a composed formula keeps every intermediate and walks over memory once for each of them; at
the sizes of this workbook that costs as much as the matrix products. Each function here has a backward pass written by
hand and a test against the plain formula.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

RMS_EPS = torch.finfo(torch.float32).eps
QUERY_BLOCK = 64  # query rows of one block on a CPU: what lies above the diagonal is skipped block by block


def rms_norm(x: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * x / sqrt(mean(x^2) + eps)`` over the last axis, no gain, eps = 2^-23; keeps the dtype of ``x``.

    The dtype is pinned because torch 2.12 moved its own ``rms_norm`` to autocast's float32 list; the published runs
    used older releases, where a bfloat16 stream stays bfloat16. Statistics are float32.
    """
    return _RMSNorm.apply(x, scale)


def squared_leaky_relu(x: Tensor, slope: float) -> Tensor:
    """``leaky_relu(x, slope)^2``: x^2 above zero, (slope x)^2 below (PR 1166 section 4.2)."""
    return _SquaredLeakyReLU.apply(x, slope)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of each position over itself and those before, scale 1/sqrt(d).

    ``q`` is (B, H, T, d), ``k`` and ``v`` are (B, K, T, d) with H a multiple of K; returns (B, H, T, d). On a GPU this
    is torch's fused kernel. On a CPU the queries go through in blocks of plain matrix products: torch's CPU kernel is
    slower than that for short sequences, above all in bfloat16.
    """
    if has_torch_function((q, k, v)):  # so that a TorchFunctionMode can watch attention whatever computes it
        return handle_torch_function(causal_attention, (q, k, v), q, k, v)
    if q.is_cuda or q.is_meta:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    batch, heads, time, width = q.shape
    groups = k.size(1)
    queries = (q * width**-0.5).view(batch, groups, heads // groups, time, width)
    outputs = []
    for start in range(0, time, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, time)
        block = queries[:, :, :, start:stop].flatten(2, 3)
        scores = (block @ k[:, :, :stop].mT).unflatten(2, (-1, stop - start))
        mask = _mask(start, stop, scores.dtype, scores.device)
        weights = (scores + mask).softmax(-1).flatten(2, 3)
        outputs.append((weights @ v[:, :, :stop]).unflatten(2, (-1, stop - start)))
    return torch.cat(outputs, dim=3).view(batch, heads, time, width)


@functools.lru_cache(maxsize=256)
def _mask(start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        mask = torch.full((stop - start, stop), float("-inf"), dtype=dtype, device=device)
        return mask.triu_(start + 1)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, scale = inputs
        wide = torch.promote_types(x.dtype, torch.float32)
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = inverse.square_().div_(x.size(-1)).add_(RMS_EPS).rsqrt_()
        normed = torch.mul(x, inverse, out=torch.empty_like(x))
        ctx.scale = scale
        ctx.save_for_backward(normed, inverse)
        return normed if scale == 1.0 else normed * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        normed, inverse = ctx.saved_tensors
        g = gradients[0]
        dot = (g * normed).mean(-1, keepdim=True, dtype=inverse.dtype).to(g.dtype)
        return torch.addcmul(g, normed, dot, value=-1.0).mul_((inverse * ctx.scale).to(g.dtype)), None


class _SquaredLeakyReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, slope = inputs
        ctx.slope = slope
        ctx.save_for_backward(x)
        return F.leaky_relu(x, slope).square_()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return F.leaky_relu(x, ctx.slope * ctx.slope).mul_(2.0).mul_(gradients[0]), None
