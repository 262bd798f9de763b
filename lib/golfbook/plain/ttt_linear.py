"""TTT-Linear as its formulas: a linear map per head that takes gradient steps while it reads (PR 1166 section 8).

The map W, b learns to send the key k of a token to the difference of its value and key, under a norm n with gain gamma
and shift delta: its loss is ``|gamma n(k W + b) + delta - (v - k)|^2 / 2``. Every row starts from the trained weights.
The gradient is written out here, so that autograd is left to differentiate through all of it in training.

Shapes: B rows, T positions, H heads, d = D / H, size the tokens of a mini-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from golfbook.config.architecture import TTTLinearConfig

EPS = 1e-6


def normalised(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(z - mean) / std`` over the last axis, and the std."""
    std = (z.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
    return (z - z.mean(-1, keepdim=True)) / std, std


def inner_gradient(z: Tensor, target: Tensor, gamma: Tensor, delta: Tensor) -> Tensor:
    """Return the gradient at ``z`` (..., d) of ``|gamma n(z) + delta - target|^2 / 2``, of each row."""
    normed, std = normalised(z)
    p = gamma * (gamma * normed + delta - target)  # the gradient at n(z)
    return (p - p.mean(-1, keepdim=True) - normed * (p * normed).mean(-1, keepdim=True)) / std


def by_token(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, delta: Tensor, eta: float, size: int
) -> Tensor:
    """Return the outputs (B, H, T, d), one token after the other: learn from the token, then answer its query.

    ``q``, ``k``, ``v`` are (B, H, T, d), ``weight`` (B, H, d, d), ``bias`` (B, H, 1, d), ``gamma`` and ``delta``
    (H, 1, d), ``eta`` is the learning rate. All tokens of a mini-batch take their gradient at its first weights.
    """
    outputs = []
    for t in range(q.size(2)):
        if t % size == 0:
            start_weight, start_bias = weight, bias
        q_t, k_t, v_t = (x[:, :, t : t + 1] for x in (q, k, v))  # (B, H, 1, d)
        gradient = inner_gradient(k_t @ start_weight + start_bias, v_t - k_t, gamma, delta)
        weight = weight - eta * k_t.mT @ gradient
        bias = bias - eta * gradient
        outputs.append(q_t + gamma * normalised(q_t @ weight + bias)[0] + delta)
    return torch.cat(outputs, dim=2)


def by_mini_batch(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, delta: Tensor, eta: float, size: int
) -> Tensor:
    """Return what :func:`by_token` returns, in one go for each mini-batch, as the published code does.

    Within a mini-batch token t has the weights ``W - eta sum_{s<=t} k_s^T g_s``, so its answer is ``q_t W - eta
    sum_{s<=t} (q_t . k_s) g_s``: a product with the lower triangle of ``q k^T``.
    """
    lower = torch.ones(size, size, dtype=q.dtype, device=q.device).tril()
    outputs = []
    for m in range(0, q.size(2), size):
        q_m, k_m, v_m = (x[:, :, m : m + size] for x in (q, k, v))  # (B, H, size, d)
        gradient = inner_gradient(k_m @ weight + bias, v_m - k_m, gamma, delta)
        y = q_m @ weight - eta * (q_m @ k_m.mT).tril() @ gradient + bias - eta * lower @ gradient
        outputs.append(q_m + gamma * normalised(y)[0] + delta)
        weight = weight - eta * k_m.mT @ gradient
        bias = bias - eta * gradient.sum(2, keepdim=True)
    return torch.cat(outputs, dim=2)


def refine(
    weights: Mapping[str, Tensor], x: Tensor, config: TTTLinearConfig, inner: Callable[..., Tensor] = by_mini_batch
) -> Tensor:
    """Return the correction (B, T, D) that is added to ``x`` (B, T, D).

    ``weights`` are those of ``ttt_refiner``, ``inner`` one of the two loops above. Tokens after the last whole
    mini-batch get zeros. The loop is in float32 where ``x`` is coarser: small steps would be lost in bfloat16.
    """
    batch, time, dim = x.shape
    width, used = dim // config.num_heads, time - time % config.mini_batch
    if not used:
        return torch.zeros_like(x)
    w = {name: weight.to(torch.promote_types(x.dtype, torch.float32)) for name, weight in weights.items()}
    q, k, v = (
        F.linear(x[:, :used], weights[f"theta_{letter}.weight"])
        .unflatten(-1, (-1, width))
        .transpose(1, 2)
        .to(w["W1"].dtype)
        for letter in "QKV"
    )  # (B, H, used, d)
    start = (w[name].expand(batch, -1, -1, -1) for name in ("W1", "b1"))
    gamma, delta = w["ttt_ln_w"][:, None], w["ttt_ln_b"][:, None]  # (H, 1, d)
    outputs = inner(q, k, v, *start, gamma, delta, config.base_lr / width, config.mini_batch)
    joined = outputs.transpose(1, 2).flatten(2)  # (B, used, D)
    normed = F.layer_norm(joined, (dim,), w["post_norm.weight"], w["post_norm.bias"], EPS).to(x.dtype)
    return F.pad(torch.sigmoid(weights["gate"]) * F.linear(normed, weights["o_proj.weight"]), (0, 0, 0, time - used))
