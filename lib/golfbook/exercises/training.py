"""Exercises of 03: Newton-Schulz, the decay of a moving average, the straight-through estimator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from golfbook.compress.quantizer import quantize
from golfbook.config.architecture import ModelConfig
from golfbook.config.schema import AveragingConfig, QuantizeConfig, TrainConfig
from golfbook.exercises.check import Misconception
from golfbook.model.layers import MLP
from golfbook.train import muon, qat
from golfbook.train.schedules import schedule_table, step_weights

STEPS = 5
CLOSE = 2e-3  # float32 against float32, in another order of products


def newton_schulz(answer: Callable[[Tensor], Tensor]) -> str:
    """Judge ``answer(matrix)``, five quintic steps in float32, by :func:`golfbook.train.muon.newton_schulz`."""
    for rows, columns in ((6, 10), (10, 6), (8, 8)):
        matrix = torch.randn(rows, columns)
        given = matrix.clone()
        result, right = answer(matrix), muon.newton_schulz(given, STEPS, torch.float32)
        if not torch.equal(matrix, given):
            raise Misconception("your function changes the gradient that it is given; the next step would miss it")
        if result.shape != right.shape:
            shapes = f"{tuple(result.shape)} for a matrix of {tuple(right.shape)}"
            raise Misconception(f"it returns {shapes}; X keeps its shape, wide or tall")
        if not _close(result, right):
            raise Misconception(_why_not_orthogonal(answer, given, result))
        if not _close(answer(1000 * given), right):
            raise Misconception(
                "a gradient a thousand times as large gives another direction; take its size away first"
            )
    zero = answer(torch.zeros(6, 10))
    if not torch.isfinite(zero).all():
        raise Misconception("a zero gradient becomes NaN: 0/0. A matrix that got no signal in a step must stay still")
    return "it agrees with muon.newton_schulz on wide, tall, thousandfold and zero matrices"


def _why_not_orthogonal(answer: Callable[[Tensor], Tensor], matrix: Tensor, result: Tensor) -> str:
    scaled = answer(matrix / torch.linalg.matrix_norm(matrix))
    if _close(scaled, muon.newton_schulz(matrix, STEPS, torch.float32)):
        return "singular values above 1 run away along the polynomial; which norm brings all of them below 1 at first?"
    spectral = muon.QUINTIC
    x = matrix / torch.linalg.matrix_norm(matrix, ord=2)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = spectral[0] * x + (spectral[1] * gram + spectral[2] * gram @ gram) @ x
    if _close(result, x):
        return "you divide by the largest singular value; that needs an SVD, which the iteration is there to avoid"
    sizes = torch.linalg.svdvals(result)
    return f"singular values end between {sizes.min():.2g} and {sizes.max():.2g}, and the library's end elsewhere"


def largest_decay(answer: Callable[[int, float], float]) -> str:
    """Judge ``answer(steps, share)``, the largest EMA decay that leaves at most ``share`` of the initial weights."""
    luck = np.random.default_rng()
    for steps, share in ((300, 0.01), *((int(luck.integers(50, 400)), float(luck.uniform(0.002, 0.2))) for _ in "123")):
        decay = float(answer(steps, share))
        if not 0 < decay < 1:
            raise Misconception(f"a decay of {decay:g} is none: it lies between 0 and 1")
        config = TrainConfig(steps=steps, averaging=AveragingConfig(method="ema", ema_decay=decay))
        left = step_weights(config, schedule_table(config))[1]
        what = f"{decay:.6g} leaves {left:.2%} of the initial weights after {steps} steps, not {share:.2%}"
        if abs(decay - (1 - 1 / steps)) < 1e-9:
            raise Misconception(f"{what}: a horizon as long as the run still holds exp(-1) of where it began")
        if abs(decay - share ** (1 / steps)) < 1e-9:
            continue
        if left > share:
            raise Misconception(f"{what}: what is left shrinks by the factor beta in every step")
        raise Misconception(f"{what}: a larger decay would do, and average over more steps")
    return "schedules.step_weights finds just that share of the initial weights"


def straight_through(answer: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]) -> str:
    """Judge ``answer(weight, quantise)``, which the forward pass uses in place of ``weight``, by the library's QAT."""
    config = QuantizeConfig(matrix_bits=3, passthrough_numel=0, scale_floor=False)
    model = MLP(ModelConfig(model_dim=16, num_heads=4, num_kv_heads=2, rope_dims=4, mlp_mult=0.5))
    layer, inputs, targets = model.fc, torch.randn(20, 16), torch.randn(20, 8)
    with qat.fake_quantized(model, config):
        (layer(inputs) - targets).square().mean().backward()
    weight = layer.weight.detach().clone().requires_grad_()

    def quantise(w: Tensor) -> Tensor:
        stored = quantize({"w": w}, {"w": "mlp"}, config)["w"].dequantize()
        return stored + 0 * w  # as differentiable as rounding is: with a derivative of zero

    used = answer(weight, quantise)
    if not _close(used, quantise(weight)):
        sees = "still sees the exact" if _close(used, weight) else "sees neither the exact nor the stored"
        raise Misconception(f"the forward pass {sees} weights")
    if used.requires_grad:
        (nn.functional.linear(inputs, used) - targets).square().mean().backward()
    if weight.grad is None:
        raise Misconception("no gradient reaches the exact weights: everything on the way is detached")
    if not weight.grad.any():
        raise Misconception("the gradient is zero everywhere: round is flat, so what goes through it learns nothing")
    if layer.weight.grad is None or not _close(weight.grad, layer.weight.grad):
        raise Misconception("a gradient arrives, but not the one at the stored weights, unchanged")
    return "value and gradient are those of qat.fake_quantized: taken at the stored weights, applied to the exact ones"


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.isfinite(a).all()) and bool((a - b).abs().max() <= CLOSE)


EXERCISES: dict[str, Callable[[Any], str]] = {"03.1": newton_schulz, "03.2": largest_decay, "03.3": straight_through}
