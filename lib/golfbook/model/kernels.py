"""Fused element-wise maths: the same formulae as in :mod:`golfbook.model.layers`, in fewer passes over memory.

Autograd's own backward of a composed formula keeps every intermediate and walks over memory once for each of them; at
the sizes of this workbook that costs as much as the matrix products. Each function here has a backward pass written by
hand and a test against the plain formula; torch.compile, which fuses by itself, gets the plain formula. Statistics are
float32, or float64 for float64; factors that belong to a row or a channel are rounded to the dtype of the stream before
they multiply it, because passes over two dtypes are slow.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

RMS_EPS = torch.finfo(torch.float32).eps
MOST_TABLES = 8  # rotary tables kept: queries and keys of a few lengths
_tables: dict[tuple[object, ...], tuple[Tensor, Tensor, Tensor, Tensor]] = {}


def rms_norm(x: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``scale * x / sqrt(mean(x^2) + eps)`` over the last axis, no gain, eps = 2^-23; keeps the dtype of ``x``.

    The dtype is pinned because torch 2.12 moved its own ``rms_norm`` to autocast's float32 list; the published runs
    used older releases, where a bfloat16 stream stays bfloat16.
    """
    if torch.compiler.is_compiling():
        return (scale * F.rms_norm(x.to(_wide(x.dtype)), x.shape[-1:], eps=RMS_EPS)).to(x.dtype)
    return _RMSNorm.apply(x, scale)


def squared_leaky_relu(x: Tensor, slope: float) -> Tensor:
    """Return ``leaky_relu(x, slope)^2``: x^2 above zero, (slope x)^2 below (PR 1166 section 4.2)."""
    if torch.compiler.is_compiling():
        return F.leaky_relu(x, slope).square()
    return _SquaredLeakyReLU.apply(x, slope)


def mix(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Return ``weights[0] * x + weights[1] * y``, one weight a channel: ``x``, ``y`` (..., D), ``weights`` (2, D)."""
    if torch.compiler.is_compiling():
        return weights[0].to(x.dtype) * x + weights[1].to(x.dtype) * y
    return _Mix.apply(x, y, weights)


def add_scaled(x: Tensor, scale: Tensor, y: Tensor) -> Tensor:
    """Return ``x + scale * y`` with one scale a channel: ``x``, ``y`` (..., D) of one dtype, ``scale`` (D,)."""
    if torch.compiler.is_compiling():
        return x + scale.to(x.dtype) * y
    return _AddScaled.apply(x, scale, y)


def normed_heads(x: Tensor, cos: Tensor, sin: Tensor, gain: Tensor | None = None) -> Tensor:
    """Return ``gain * rotate(rms_norm(x))`` of heads ``x`` (B, T, H, d): queries and keys (PR 1166 section 5).

    ``cos`` and ``sin`` (T, R/2) rotate the first R dimensions in the half-split layout by minus the angle: ``a' = a cos
    + b sin``, ``b' = b cos - a sin``. ``gain`` (H,) has one factor a head.
    """
    if torch.compiler.is_compiling():
        half, x = cos.size(-1), rms_norm(x)
        cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
        a, b = x[..., :half], x[..., half : 2 * half]
        x = torch.cat((a * cos + b * sin, b * cos - a * sin, x[..., 2 * half :]), dim=-1)
        return x if gain is None else x * gain.to(x.dtype)[:, None]
    return _NormedHeads.apply(x, cos, sin, gain)


def remove_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Return ``y - (y . v) v / (v . v)``: exclusive self-attention (XSA, PR 1166 section 5 step 8).

    ``y`` is (B, T, H, d), ``v`` (B, T, K, d); query head h belongs to value head h // (H/K).
    """
    if torch.compiler.is_compiling():
        direction = F.normalize(v.to(_wide(v.dtype)), dim=-1).repeat_interleave(y.size(2) // v.size(2), 2)
        return (y - (y * direction).sum(-1, keepdim=True) * direction).to(y.dtype)
    return _RemoveOwnValue.apply(y, v)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _inverse_rms(x: Tensor) -> Tensor:
    inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x.dtype))
    return inverse.square_().div_(x.size(-1)).add_(RMS_EPS).rsqrt_()


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Return the sums of products over the last axis, kept as an axis of 1, in the wide dtype."""
    return (x * y).sum(-1, keepdim=True, dtype=_wide(x.dtype))


def _by_channel(x: Tensor, y: Tensor, like: Tensor) -> Tensor:
    """Return the sums of products over all axes but the last, shaped and typed as ``like``."""
    return (x * y).flatten(0, -2).sum(0, dtype=_wide(x.dtype)).to(like.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, scale = inputs
        inverse = _inverse_rms(x)
        normed = x * inverse.to(x.dtype)
        ctx.scale = scale
        ctx.save_for_backward(normed, inverse)
        return normed if scale == 1.0 else normed * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        normed, inverse = ctx.saved_tensors
        g = gradients[0]
        mean = (g * normed).sum(-1, keepdim=True).div_(g.size(-1))  # added in float32, rounded once
        return torch.addcmul(g, normed, mean, value=-1.0).mul_((inverse * ctx.scale).to(g.dtype)), None


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
        return F.leaky_relu(x, ctx.slope * ctx.slope).mul_(gradients[0]).mul_(2.0), None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        x, y, weights = inputs
        ctx.save_for_backward(x, y, weights)
        first, second = weights.to(x.dtype)
        return (x * first).addcmul_(y, second)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y, weights = ctx.saved_tensors
        g = gradients[0]
        first, second = weights.to(g.dtype)
        return g * first, g * second, torch.stack((_by_channel(g, x, weights), _by_channel(g, y, weights)))


class _AddScaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        x, scale, y = inputs
        ctx.save_for_backward(scale, y)
        return torch.addcmul(x, y, scale.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale, y = ctx.saved_tensors
        g = gradients[0]
        return g, _by_channel(g, y, scale), g * scale.to(g.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float = 1.0) -> None:
    """Rotate the first dimensions of ``x`` (B, T, H, d) by minus the angle, in place: ``x cos + (b, -a) sin``.

    ``direction`` -1 turns back. The tables are as wide as the heads, so that both products run over whole rows.
    """
    half = cos.size(-1)
    swapped = torch.cat((x[..., half : 2 * half], x[..., :half], x[..., 2 * half :]), dim=-1)
    whole_cos, whole_sin = _whole_tables(cos, sin, x)
    x.mul_(whole_cos).addcmul_(swapped, whole_sin, value=direction)


def _whole_tables(cos: Tensor, sin: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors (T, H, d) of ``x`` (B, T, H, d) and of its swapped halves; 1 and 0 where nothing turns."""
    key = (cos.data_ptr(), sin.data_ptr(), cos.size(-1), *x.shape[1:], x.dtype)
    if key not in _tables:
        if len(_tables) >= MOST_TABLES:
            _tables.clear()
        heads, width = x.shape[2:]
        with torch.inference_mode(False), torch.no_grad():  # made while scoring, they must stay usable in training
            rest = cos.new_zeros(len(cos), width - 2 * cos.size(-1))
            pair = torch.cat((cos, cos, rest + 1), dim=-1), torch.cat((sin, -sin, rest), dim=-1)
            whole = [t.to(x.dtype).unsqueeze(1).expand(-1, heads, -1).contiguous() for t in pair]
        _tables[key] = (whole[0], whole[1], cos, sin)  # while these live, nothing else has their addresses
    return _tables[key][:2]


class _NormedHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, cos, sin, gain = inputs
        inverse = _inverse_rms(x)
        factor = (inverse if gain is None else inverse * gain[:, None]).to(x.dtype)
        ctx.has_gain = gain is not None
        ctx.save_for_backward(x, cos, sin, inverse, *(() if gain is None else (gain,)))
        y = x * factor
        _rotate(y, cos, sin)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, Tensor | None]:
        x, cos, sin, inverse, *rest = ctx.saved_tensors
        g = gradients[0].clone(memory_format=torch.contiguous_format)
        _rotate(g, cos, sin, -1.0)
        gain = rest[0][:, None] if ctx.has_gain else 1.0
        dot = _dot(g, x).mul_(inverse)  # with the normed heads
        along = (inverse.square() * dot).mul_(gain).div_(-x.size(-1)).to(g.dtype)
        d_x = g.mul_((inverse * gain).to(g.dtype)).addcmul_(x, along)
        return d_x, None, None, dot.sum((0, 1, 3)).to(rest[0].dtype) if ctx.has_gain else None


class _RemoveOwnValue(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        y, v = inputs
        batch, time, heads, width = y.shape
        v = v.unsqueeze(3)
        y = y.view(batch, time, v.size(2), -1, width)
        inverse = torch.linalg.vector_norm(v, dim=-1, keepdim=True, dtype=_wide(v.dtype)).clamp_min_(1e-12)
        inverse = inverse.square_().reciprocal_()
        share = (_dot(y, v) * inverse).to(y.dtype)
        out = torch.addcmul(y, share, v, value=-1.0).view(batch, time, heads, width)
        ctx.save_for_backward(out, v, inverse, share)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        out, v, inverse, share = ctx.saved_tensors
        g = gradients[0].reshape(*v.shape[:3], -1, v.size(-1))
        along = (_dot(g, v) * inverse).to(g.dtype)
        d_y = torch.addcmul(g, along, v, value=-1.0)
        pulled = (share * g).addcmul_(along, out.view_as(g)).sum(3)
        d_v = torch.addcmul(pulled.neg_(), (share * along).sum(3), v.squeeze(3))
        return d_y.view_as(out), d_v
