"""What optimisers do, small enough to see: directions of a gradient under Newton-Schulz, momentum in a valley."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from golfbook.train import muon

ARRIVED = 0.01  # of the distance at the start
PATIENCE = 400  # steps
BAND = (0.7, 1.3)  # around 1, where the published Newton-Schulz leaves most directions


@dataclass(frozen=True)
class Valley:
    """Hold a quadratic loss ``(flat x^2 + steep y^2) / 2``, whose minimum is the origin; start at (1, 1)."""

    flat: float = 1.0
    steep: float = 30.0

    def descend(self, rate: ArrayLike, momentum: ArrayLike, steps: int = PATIENCE) -> np.ndarray:
        """Return x and y after 0, 1, ... ``steps`` steps of Nesterov momentum as Muon has it, without Newton-Schulz.

        ``m <- mu m + g; u = g + mu m; x <- x - rate u``. ``rate`` and ``momentum`` broadcast to one shape S; returns
        float64 (steps + 1, 2, S).
        """
        rate, momentum = np.broadcast_arrays(np.asarray(rate, float), np.asarray(momentum, float))
        curvature = np.array([self.flat, self.steep]).reshape(2, *[1] * rate.ndim)
        x = np.ones((2, *rate.shape))
        mean, path = np.zeros_like(x), [x]
        for _ in range(steps):
            gradient = curvature * x
            mean = momentum * mean + gradient
            x = np.clip(x - rate * (gradient + momentum * mean), -1e6, 1e6)  # far away is as good as infinitely far
            path.append(x)
        return np.stack(path)

    def arrival(self, rate: ArrayLike, momentum: ArrayLike) -> np.ndarray:
        """Return the steps after which both directions stay within 1 % of the start; inf for more than 400."""
        far = (np.abs(self.descend(rate, momentum)) > ARRIVED).any(axis=1)  # (steps + 1, S)
        last = len(far) - np.argmax(far[::-1], axis=0)  # the step after the last one that was too far
        return np.where(far[-1], np.inf, last)


def direction_sizes(
    matrix: Tensor,
    steps: int,
    coefficients: muon.Coefficients = "quintic",
    dtype: torch.dtype = torch.float32,
    *,
    row_norm: bool = False,
) -> np.ndarray:
    """Return the size along each singular direction of ``matrix`` after 0, 1, ... ``steps`` Newton-Schulz steps.

    Returns float64 (steps + 1, n), n the shorter side, largest singular value first: ``u_i^T X_k v_i`` with the
    singular vectors of the matrix the iteration starts from, whose rows have unit norm with ``row_norm``. In exact
    arithmetic these are the singular values of X_k; in bfloat16 the difference is what rounding does.
    """
    start = matrix.detach().float().clone()
    if row_norm:
        muon.normalise_rows_(start)
    u, s, vh = torch.linalg.svd(start.double(), full_matrices=False)
    norm = torch.linalg.vector_norm(s).clamp_min(muon.NORM_EPS) * (1 if coefficients == "quintic" else muon.SAFETY)
    found = [s / norm]
    for count in range(1, steps + 1):
        x = muon.newton_schulz(start, count, dtype, coefficients).double()
        found.append(((u.mT @ x) * vh).sum(1))
    return torch.stack(found).numpy()


def share_in_band(sizes: ArrayLike) -> float:
    """Return which share of ``sizes`` (any shape) lies between 0.7 and 1.3 in absolute value."""
    values = np.abs(np.asarray(sizes, float))
    return float(((values > BAND[0]) & (values < BAND[1])).mean())
