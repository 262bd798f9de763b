"""Causal attention by whatever was measured to be fastest here: torch's own kernel, blocks of products, and others.

Softmax attention with scale 1/sqrt(d) and grouped queries is one formula; :func:`causal_attention` is the one door to
everything that can compute it. The tests compare each backend that runs here with the masked formula, ``make
gpu-check`` does the same on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from golfbook import compute
from golfbook.compute import SHORT, Backend
from golfbook.errors import RunError

QUERY_BLOCK = 128  # positions of one block on a CPU: what lies above the diagonal is skipped block by block


def causal_attention(q: Tensor, k: Tensor, v: Tensor, backend: Backend = "auto") -> Tensor:
    """Compute softmax attention of each position over itself and those before, scale 1/sqrt(d).

    ``q`` is (B, H, T, d), ``k`` and ``v`` are (B, K, S, d) with H a multiple of K; returns (B, H, T, d). S is T, or
    more where ``q`` are only the last T of S positions; torch's own kernel computes that. "auto" is what
    :mod:`golfbook.compute` was told last, else torch's own kernel. Raises :class:`RunError` for a backend that cannot
    run here.
    """
    if has_torch_function((q, k, v)):  # so that a TorchFunctionMode can watch attention whatever computes it
        return handle_torch_function(causal_attention, (q, k, v), q, k, v, backend)
    if k.size(2) > q.size(2):
        return _sdpa(q, k, v)
    return _COMPUTE[_auto(q, k, v) if backend == "auto" else backend](q, k, v)


def _auto(q: Tensor, k: Tensor, v: Tensor) -> Backend:
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return compute.attention_backend(training, q.dtype, q.size(2))


def candidates(device: torch.device, dtype: torch.dtype, training: bool) -> list[Backend]:
    """List the backends that are worth measuring here, torch's own kernel first.

    Blocks of matrix products on a CPU, FlashAttention-3 where it runs. Never flex attention: for a plain causal mask it
    has no advantage.
    """
    other: Backend = "blocked" if device.type == "cpu" else "flash3"
    return ["sdpa"] if why_not(other, device, dtype, training=training) else ["sdpa", other]


def why_not(backend: Backend, device: torch.device, dtype: torch.dtype, *, training: bool = True) -> str:
    """Say why a backend cannot run on this device in this dtype, backward too if ``training``; empty where it can."""
    if backend == "flex" and training and device.type == "cpu":
        return "flex attention has no backward pass on a CPU"
    if backend == "flash3":
        obstacle = flash3_obstacle()
        if obstacle:
            return f"FlashAttention-3 (package flash_attn_interface) cannot be imported: {obstacle}"
        if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
            return "FlashAttention-3 needs a Hopper GPU"
        if dtype not in (torch.bfloat16, torch.float16):
            return "FlashAttention-3 needs bfloat16 or float16"
    return ""


@functools.cache
def flash3_obstacle() -> str:
    """Return why FlashAttention-3 cannot be imported; empty where it can."""
    try:
        import flash_attn_interface  # noqa: F401
    except (ImportError, OSError) as error:  # missing, or built for another torch
        return str(error)
    return ""


def require(backend: Backend, device: torch.device, dtype: torch.dtype, *, training: bool = True) -> None:
    """Raise :class:`RunError` with the reason where :func:`why_not` has one."""
    reason = why_not(backend, device, dtype, training=training)
    if reason:
        raise RunError(f"machine.attention '{backend}' cannot run here: {reason}; use 'auto'")


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    time, read = q.size(2), k.size(2)
    seen: dict[str, Any] = {"is_causal": read == time}
    if read > time > 1:  # the last position sees all of them, the one before it one less
        seen["attn_mask"] = torch.ones(time, read, dtype=torch.bool, device=q.device).tril_(read - time)
    if q.is_cuda and q.dtype not in (torch.bfloat16, torch.float16):
        # only the kernel for half precision shares keys; the others would fall back to all scores in memory
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, **seen)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **seen)


def _flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    require("flash3", q.device, q.dtype)
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=True)
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    require("flex", q.device, q.dtype, training=training)
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

    with torch.inference_mode(False):  # a mask made while scoring must stay usable by autograd
        return create_block_mask(lambda b, h, query, key: query >= key, None, None, time, time, device=str(device))


def _ordered(x: Tensor, groups: int, factor: float = 1.0) -> Tensor:
    """Return ``factor`` times (B, G * n, T, d), contiguous as (B * G, T * n, d): queries of one key, earliest first."""
    batch, heads, time, width = x.shape
    share = heads // groups
    out = x.new_empty(batch, groups, time, share, width)
    torch.mul(x.view(batch, groups, share, time, width).transpose(2, 3), factor, out=out)
    return out.view(batch * groups, time * share, width)


def _unordered(x: Tensor, shape: torch.Size, groups: int) -> Tensor:
    """Undo :func:`_ordered`: shape (B, heads, T, d) again, in memory (B, T, heads, d) as the linear maps have it."""
    batch, heads, time, width = shape
    x = x.view(batch, groups, time, heads // groups, width).permute(0, 2, 1, 3, 4)
    return x.clone(memory_format=torch.contiguous_format).view(batch, time, heads, width).transpose(1, 2)


def _blocks(q: Tensor, k: Tensor, masks: bool = True) -> Iterator[tuple[slice, int, Tensor]]:
    """Return the rows of each block of queries, the number of keys they see, and the mask of the last of these.

    Without ``masks`` the keys stand in their place, where only sizes are asked.
    """
    time, share = k.size(1), q.size(1) // k.size(1)
    size = QUERY_BLOCK if time > SHORT else QUERY_BLOCK // 2
    for start in range(0, time, size):
        stop = min(start + size, time)
        mask = _mask(stop - start, share, q.dtype, q.device) if masks else k
        yield slice(start * share, stop * share), stop, mask


@functools.lru_cache(maxsize=64)
def _mask(time: int, share: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what is added to the scores of ``time`` positions with ``share`` queries each: -inf above the diagonal."""
    with torch.inference_mode(False):
        mask = torch.full((time, time), float("-inf"), dtype=dtype, device=device)
        return mask.triu_(1).repeat_interleave(share, 0)


def _infer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute the output (B, H, T, d) alone: all blocks share two buffers, and no weights outlive their block."""
    shape, groups, width = q.shape, k.size(1), q.size(3)
    q, k, v = _ordered(q, groups, width**-0.5), _ordered(k, groups), _ordered(v, groups)
    out = torch.empty_like(q)
    most = max(rows.stop - rows.start for rows, _, _ in _blocks(q, k, masks=False))
    buffers = q.new_empty(2, q.size(0) * most * k.size(1))
    for rows, stop, mask in _blocks(q, k):
        block = (q.size(0), rows.stop - rows.start, stop)
        scores, weights = (buffer[: prod(block)].view(block) for buffer in buffers)
        torch.bmm(q[:, rows], k[:, :stop].mT, out=scores)
        scores[:, :, stop - mask.size(1) :] += mask
        torch.softmax(scores, -1, out=weights)
        torch.bmm(weights, v[:, :stop], out=out[:, rows])
    return _unordered(out, shape, groups)


def _run(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Compute the output (B, H, T, d), and keep for the backward pass: ordered q, k, v, output, weights by block."""
    shape, groups, width = q.shape, k.size(1), q.size(3)
    q, k, v = _ordered(q, groups, width**-0.5), _ordered(k, groups), _ordered(v, groups)
    out, kept = torch.empty_like(q), []
    for rows, stop, mask in _blocks(q, k):
        scores = torch.bmm(q[:, rows], k[:, :stop].mT)
        scores[:, :, stop - mask.size(1) :] += mask
        weights = scores.softmax(-1)
        torch.bmm(weights, v[:, :stop], out=out[:, rows])
        kept.append(weights)
    return [_unordered(out, shape, groups), q, k, v, out, *kept]


def _run_backward(gradient: Tensor, saved: Sequence[Tensor], groups: int) -> list[Tensor]:
    """Return the gradients of q (B, H, T, d), k and v (B, K, T, d) from that of the output and what :func:`_run` kept.

    ``groups`` is K. Sums over blocks are float32.
    """
    q, k, v, out, *kept = saved
    query_shape, width = gradient.shape, q.size(-1)
    key_shape = torch.Size((query_shape[0], groups, *query_shape[2:]))
    gradient = _ordered(gradient, groups)
    d_q = torch.empty_like(q)
    d_k, d_v = (torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v))
    mean = (gradient * out).sum(-1, keepdim=True)
    for (rows, stop, _), weights in zip(_blocks(q, k), kept, strict=True):
        d_v[:, :stop] += torch.bmm(weights.mT, gradient[:, rows])
        d_scores = torch.bmm(gradient[:, rows], v[:, :stop].mT).sub_(mean[:, rows]).mul_(weights)
        torch.bmm(d_scores, k[:, :stop], out=d_q[:, rows])
        d_k[:, :stop] += torch.bmm(d_scores.mT, q[:, rows])
    d_q.mul_(width**-0.5)
    return [
        _unordered(d_q, query_shape, groups),
        _unordered(d_k.to(k.dtype), key_shape, groups),
        _unordered(d_v.to(v.dtype), key_shape, groups),
    ]


class _BlockedAttention(torch.autograd.Function):
    """Attention whose probabilities are kept block by block; what lies above the diagonal blocks is never computed."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        if not any(ctx.needs_input_grad):
            return _infer(*inputs)
        output, *saved = _run(*inputs)
        ctx.save_for_backward(*saved)
        ctx.groups = inputs[1].size(1)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(_run_backward(gradients[0], ctx.saved_tensors, ctx.groups))


# The same as one opaque step for torch.compile, which would unroll the loop over blocks.
_op = torch.library.custom_op(
    "golfbook::blocked_attention", _run, mutates_args=(), schema="(Tensor q, Tensor k, Tensor v) -> Tensor[]"
)
_backward_op = torch.library.custom_op(
    "golfbook::blocked_attention_backward", _run_backward, mutates_args=(),
    schema="(Tensor gradient, Tensor[] saved, int groups) -> Tensor[]",
)  # fmt: skip


@_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    (batch, heads, time, width), groups = q.shape, k.size(1)
    queries = q.new_empty(batch * groups, time * (heads // groups), width)
    keys = q.new_empty(batch * groups, time, width)
    weights = [
        q.new_empty(batch * groups, rows.stop - rows.start, stop)
        for rows, stop, _ in _blocks(queries, keys, masks=False)
    ]
    output = q.new_empty(batch, time, heads, width).transpose(1, 2)
    return [output, *(torch.empty_like(x) for x in (queries, keys, keys, queries)), *weights]


@_backward_op.register_fake
def _(gradient: Tensor, saved: list[Tensor], groups: int) -> list[Tensor]:
    batch, heads, time, width = gradient.shape
    return [gradient.new_empty(batch, time, n, width).transpose(1, 2) for n in (heads, groups, groups)]


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.groups = inputs[1].size(1)


def _backward(ctx: Any, gradients: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(_backward_op(gradients[0], list(ctx.saved_tensors), ctx.groups))


_op.register_autograd(_backward, setup_context=_keep)


def _blocked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _op(q, k, v)[0] if torch.compiler.is_compiling() else _BlockedAttention.apply(q, k, v)


_COMPUTE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "blocked": _blocked,
    "sdpa": _sdpa,
    "flex": _flex,
    "flash3": _flash3,
}
