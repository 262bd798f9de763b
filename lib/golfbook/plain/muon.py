"""Muon as its formulas, one matrix at a time: momentum, Nesterov, Newton-Schulz, decay (PR 1166 section 14).

The polynomials of Polar Express are found here from what they are made for (Amsel, Persson, Musco and Gower, 2025,
arXiv 2505.16932): each is the odd quintic that stays nearest to 1 on the interval where singular values then lie.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from golfbook.config.schema import TrainConfig

Polynomial = tuple[float, float, float]  # a x + b x^3 + c x^5
QUINTIC: Polynomial = (3.4445, -4.7750, 2.0315)
LIMIT: Polynomial = (1.875, -1.25, 0.375)  # flattest at 1: what the polynomials tend to as the interval shrinks
SMALLEST = 1e-3  # singular values that Polar Express starts from lie between this and 1
CUSHION = 0.02407327424182761  # no interval is taken wider than 1 to 1/CUSHION, which costs speed and gains accuracy
SAFETY = 1.01  # keeps rounded values inside the interval that the next polynomial was made for
NORM_EPS = 1e-7


def nearest_to_one(low: float, high: float) -> Polynomial:
    """Return the a, b, c with the smallest maximum of ``|1 - a x - b x^3 - c x^5|`` on ``low <= x <= high``.

    By Remez's exchange: the best error has one size and changing signs at four points, the ends and two extrema.
    """
    inner = (3 * low + high) / 4, (low + 3 * high) / 4
    error, previous = np.inf, None
    while previous is None or abs(error - previous) > 1e-15:
        points = np.array([low, *inner, high])
        signs = np.array([1.0, -1.0, 1.0, -1.0])
        system = np.stack([points, points**3, points**5, signs], axis=1)  # (4, 4)
        previous, (a, b, c, error) = error, np.linalg.solve(system, np.ones(4))
        root = np.sqrt(9 * b * b - 20 * a * c)  # the slope a + 3 b x^2 + 5 c x^4 is zero at the extrema
        inner = np.sqrt((-3 * b - root) / (10 * c)), np.sqrt((-3 * b + root) / (10 * c))
    return float(a), float(b), float(c)


def polar_express(steps: int) -> list[Polynomial]:
    """Return the polynomials of ``steps`` steps; all but those at the limit are p(x / 1.01)."""
    low, high, found = SMALLEST, 1.0, []
    for _ in range(steps):
        if low / high >= 1 - 5e-6:
            found.append(LIMIT)
            continue
        a, b, c = nearest_to_one(max(low, CUSHION * high), high)
        ends = [a * x + b * x**3 + c * x**5 for x in (low, high)]
        a, b, c = (2 * weight / sum(ends) for weight in (a, b, c))  # so that the values lie around 1 again
        low = a * low + b * low**3 + c * low**5
        high = 2 - low
        found.append((a / SAFETY, b / SAFETY**3, c / SAFETY**5))
    return found


def newton_schulz(x: Tensor, polynomials: Sequence[Polynomial], safety: float = 1.0) -> Tensor:
    """Return about ``U V^T`` for ``x = U S V^T`` (rows, columns): every singular value goes through the polynomials.

    With ``A = X X^T`` a step is ``X <- a X + b A X + c A A X``. A stack (n, rows, columns) is taken matrix by matrix.
    """
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x  # the small side first: A is as small as it can be
    x = x / (safety * x.norm(dim=(-2, -1), keepdim=True) + NORM_EPS)
    for a, b, c in polynomials:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class PlainMuon:
    """Muon over ``parameters`` with gradients: matrices, or stacks of them (n, rows, columns) as PR 1166 keeps them.

    ``lr`` and ``momentum`` are those of the next step, at first the ones of ``config``.
    """

    def __init__(self, parameters: Sequence[Tensor], config: TrainConfig) -> None:
        self.parameters, self.config = parameters, config
        self.lr, self.momentum = config.optimizer.matrix_lr, config.optimizer.muon_momentum
        self.dtype = getattr(torch, config.optimizer.muon_dtype)
        dtype = getattr(torch, config.optimizer.muon_momentum_dtype)
        self.momenta = [torch.zeros_like(p, dtype=dtype) for p in parameters]
        polar = config.optimizer.newton_schulz_coefficients == "polar_express"
        steps = config.optimizer.newton_schulz_steps
        self.polynomials = polar_express(steps) if polar else [QUINTIC] * steps
        self.safety = SAFETY if polar else 1.0

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix: ``m <- mu m + g; W <- (1 - lr wd) W - lr sqrt(max(1, rows/columns)) NS(g + mu m)``."""
        for weight, momentum in zip(self.parameters, self.momenta, strict=True):
            assert weight.grad is not None
            gradient = weight.grad.to(momentum.dtype)
            momentum.mul_(self.momentum).add_(gradient)
            update = gradient + self.momentum * momentum
            if self.config.optimizer.muon_row_norm:
                norms = update.float().norm(dim=-1, keepdim=True).clamp_min(NORM_EPS)  # (rows, 1)
                update = (update.float() / norms).to(update.dtype)
            update = newton_schulz(update.to(self.dtype), self.polynomials, self.safety)
            weight.mul_(1 - self.lr * self.config.optimizer.muon_weight_decay)
            weight.sub_(self.lr * max(1.0, weight.size(-2) / weight.size(-1)) ** 0.5 * update.to(weight.dtype))
