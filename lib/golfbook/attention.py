"""Causal attention by whatever computes it fastest here: blocks of matrix products on a CPU, fused kernels on a GPU.

Softmax attention with scale 1/sqrt(d) and grouped queries is one formula; :func:`causal_attention` is the one door to
everything that can compute it. The tests compare each backend that runs here with the masked formula, ``make
gpu-check`` does the same on a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from golfbook.errors import RunError

Backend = Literal["auto", "blocked", "sdpa", "flex", "flash3"]
QUERY_BLOCK = 128  # positions of one block on a CPU: what lies above the diagonal is skipped block by block
SHORT = 512  # up to this length blocks are half as long


def causal_attention(q: Tensor, k: Tensor, v: Tensor, backend: Backend = "auto") -> Tensor:
    """Softmax attention of each position over itself and those before, scale 1/sqrt(d).

    ``q`` is (B, H, T, d), ``k`` and ``v`` are (B, K, T, d) with H a multiple of K; returns (B, H, T, d). What "auto"
    stands for says :func:`choose`. Raises :class:`RunError` for a backend that cannot run here.
    """
    if has_torch_function((q, k, v)):  # so that a TorchFunctionMode can watch attention whatever computes it
        return handle_torch_function(causal_attention, (q, k, v), q, k, v, backend)
    if backend == "auto":
        backend = choose(q.device, q.dtype)
    return _COMPUTE[backend](q, k, v)


def choose(device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that "auto" stands for.

    FlashAttention-3 where its package is importable, the GPU is a Hopper and the dtype is bfloat16 or float16; torch's
    fused kernel on other GPUs; on a CPU plain matrix products by blocks, which beat torch's CPU kernel at the lengths
    used here, above all in bfloat16. Flex attention is never chosen: for a plain causal mask it has no advantage.
    """
    if device.type == "cpu":
        return "blocked"
    return "sdpa" if device.type != "cuda" or why_not("flash3", device, dtype) else "flash3"


def why_not(backend: Backend, device: torch.device, dtype: torch.dtype) -> str:
    """Why a backend cannot run on this device in this dtype; empty where it can."""
    if backend == "flash3":
        if importlib.util.find_spec("flash_attn_interface") is None:
            return "the package flash_attn_interface (FlashAttention-3) is not installed"
        if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
            return "FlashAttention-3 needs a Hopper GPU"
        if dtype not in (torch.bfloat16, torch.float16):
            return "FlashAttention-3 needs bfloat16 or float16"
    return ""


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    reason = why_not("flash3", q.device, q.dtype)
    if reason:
        raise RunError(f"train.attention 'flash3' cannot run here: {reason}; use 'auto'")
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    if not q.is_cuda and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise RunError("train.attention 'flex' cannot run here: it has no backward pass on a CPU; use 'auto'")
    compute: Any = flex_attention
    if q.is_cuda and not torch.compiler.is_compiling():
        compute = _compiled_flex()  # uncompiled, it is the masked formula with all scores in memory
    return compute(q, k, v, block_mask=_block_mask(q.size(2), q.device), enable_gqa=True)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=8)
def _block_mask(time: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, query, key: query >= key, None, None, time, time, device=str(device))


def _ordered(x: Tensor, groups: int, factor: float = 1.0) -> Tensor:
    """``factor`` times (B, G * n, T, d) as contiguous (B * G, T * n, d): queries of the same keys, earliest first."""
    batch, heads, time, width = x.shape
    share = heads // groups
    out = x.new_empty(batch, groups, time, share, width)
    torch.mul(x.view(batch, groups, share, time, width).transpose(2, 3), factor, out=out)
    return out.view(batch * groups, time * share, width)


def _unordered(x: Tensor, shape: torch.Size, groups: int) -> Tensor:
    """Undo :func:`_ordered`: shape (B, heads, T, d) again, in memory (B, T, heads, d) as the linear maps have it."""
    batch, heads, time, width = shape
    x = x.view(batch, groups, time, heads // groups, width).permute(0, 2, 1, 3, 4)
    return x.contiguous().view(batch, time, heads, width).transpose(1, 2)


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, int, Tensor]]:
    """Rows of each block of queries, the number of keys that they see, and the mask of the last of these keys."""
    time, share = k.size(1), q.size(1) // k.size(1)
    size = QUERY_BLOCK if time > SHORT else QUERY_BLOCK // 2
    for start in range(0, time, size):
        stop = min(start + size, time)
        yield slice(start * share, stop * share), stop, _mask(stop - start, share, q.dtype, q.device)


@functools.lru_cache(maxsize=64)
def _mask(time: int, share: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Added to the scores of ``time`` positions with ``share`` queries each: -inf above the diagonal."""
    with torch.inference_mode(False):
        mask = torch.full((time, time), float("-inf"), dtype=dtype, device=device)
        return mask.triu_(1).repeat_interleave(share, 0)


class _BlockedAttention(torch.autograd.Function):
    """Attention whose probabilities are kept block by block; sums over blocks are float32."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        groups, width = inputs[1].size(1), inputs[1].size(3)
        q, k, v = (_ordered(x, groups, factor) for x, factor in zip(inputs, (width**-0.5, 1.0, 1.0), strict=True))
        out, kept = torch.empty_like(q), []
        for rows, stop, mask in _blocks(q, k):
            scores = torch.bmm(q[:, rows], k[:, :stop].mT)
            scores[:, :, stop - mask.size(1) :] += mask
            weights = scores.softmax(-1)
            torch.bmm(weights, v[:, :stop], out=out[:, rows])
            kept.append(weights)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(q, k, v, out, *kept)
            ctx.shapes = [x.shape for x in inputs]
        return _unordered(out, inputs[0].shape, groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        q, k, v, out, *kept = ctx.saved_tensors
        groups, width = ctx.shapes[1][1], q.size(-1)
        d_out = _ordered(gradients[0], groups)
        d_q = torch.empty_like(q)
        d_k, d_v = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
        mean = (d_out * out).sum(-1, keepdim=True)
        for (rows, stop, _), weights in zip(_blocks(q, k), kept, strict=True):
            d_v[:, :stop] += torch.bmm(weights.mT, d_out[:, rows])
            d_scores = torch.bmm(d_out[:, rows], v[:, :stop].mT).sub_(mean[:, rows]).mul_(weights)
            torch.bmm(d_scores, k[:, :stop], out=d_q[:, rows])
            d_k[:, :stop] += torch.bmm(d_scores.mT, q[:, rows])
        found = d_q.mul_(width**-0.5), d_k.to(k.dtype), d_v.to(v.dtype)
        return tuple(_unordered(d, shape, groups) for d, shape in zip(found, ctx.shapes, strict=True))


_COMPUTE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "blocked": lambda q, k, v: _BlockedAttention.apply(q, k, v),
    "sdpa": _sdpa,
    "flex": _flex,
    "flash3": _flash3,
}
