"""GPTQ as its formulas, one column at a time, with the inverse of H that the published code takes (PR 1406 section 15).

Rounding column j with an error e leaves the outputs closest to what they were if ``e U_jk / U_jj`` is taken from every
later column k, where U is the upper triangular factor of the inverse, ``U^T U = H^-1``. Everything is float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from golfbook.plain.quantize import PERCENTILES, SMALLEST, Stored

DAMPING = 0.005  # share of the mean diagonal of H that is added to it, twice


def feedback(weight: Tensor, scale: Tensor, hessian: Tensor, qmax: int) -> Tensor:
    """Return the integers of a float64 weight (rows, columns) for row scales (rows,), columns from first to last."""
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    left, q = weight.clone(), torch.zeros_like(weight)
    for j in range(weight.size(1)):
        q[:, j] = (left[:, j] / scale).round().clamp(-qmax, qmax)
        error = (left[:, j] - q[:, j] * scale) / upper[j, j]  # (rows,)
        left[:, j + 1 :] -= torch.outer(error, upper[j, j + 1 :])
    return q


def output_loss(error: Tensor, hessian: Tensor) -> float:
    """Return ``tr(E H E^T)`` of the error E (rows, columns) of a matrix."""
    return float(torch.einsum("ri,ij,rj->", error, hessian, error))


def damped(hessian: Tensor) -> Tensor:
    """Return H with a share of its mean diagonal added to the diagonal."""
    return hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def quantize_matrix(weight: Tensor, gram: Tensor, bits: int, scale_floor: bool) -> Stored:
    """Return int8 integers and float16 scales of a matrix: five clips, the smallest plain squared error wins."""
    qmax, hessian = 2 ** (bits - 1) - 1, damped(damped(gram.double()))
    order = hessian.diagonal().argsort(descending=True, stable=True)
    ordered = weight[:, order].double()
    best, least = None, float("inf")
    for percentile in PERCENTILES:
        clip = torch.quantile(weight.abs(), percentile, dim=1)  # (rows,)
        scale = (clip / qmax).clamp_min(1 / qmax if scale_floor else SMALLEST).half()
        q = feedback(ordered, scale.double(), hessian[order][:, order], qmax)
        error = (ordered - q * scale.double()[:, None]).square().mean().item()
        if error < least:
            best, least = (q[:, order.argsort()].to(torch.int8), scale), error
    assert best is not None
    return best
