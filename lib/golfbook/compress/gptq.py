"""GPTQ: round one column after the other, and let later columns make up for the error of earlier ones (PR 1406).

With x the inputs of a linear map and H the mean of ``x x^T`` (its Gram matrix), an error E of the weights changes the
outputs by ``tr(E H E^T)`` on average. With ``H = L^T L``, L lower triangular, that is ``||E L^T||^2``, a sum over
columns i of ``(L_ii e_i + sum_j<i L_ij e_j)^2``: if columns are rounded from first to last, the best value for column i
is its weight plus ``sum_j<i (L_ij / L_ii) e_j``. Rows do not touch each other, so any number of them, and any number of
scales for each, are rounded together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from golfbook.compress.quantizer import QuantizedTensor, Statistics, check_range, finite, stored_as, unquantized
from golfbook.compress.rowwise import quantize_matrix, quantize_other, row_scales
from golfbook.config.schema import QuantizeConfig
from golfbook.errors import RunError
from golfbook.model.component import Storage

DAMPING = 1.005**2 - 1  # PR 1406 damps by 0.005 of the mean diagonal when it has gathered H, and once more (14.3, 15.1)
BLOCK = 8  # columns that are rounded between two products with the errors of columns before them
LEAST_MEAN = 1e-6  # of a diagonal: a layer whose inputs are all zero has a factor too (section 14.3)


def gptq(
    state: Mapping[str, Tensor], storage: Mapping[str, Storage], config: QuantizeConfig, statistics: Statistics
) -> dict[str, QuantizedTensor]:
    """Quantise as PR 1406 does (section 15): matrices with error feedback, everything else as PR 1166.

    A matrix needs ``statistics[name]["gram"]``, (columns, columns) float32; without it, its five clips are tried by
    rounding alone (section 15.5). Raises :class:`RunError` naming a Gram matrix that does not fit or has no factor.
    """
    stored: dict[str, QuantizedTensor] = {}
    for name, tensor in state.items():
        weight = finite(name, tensor)
        kind, bits = stored_as(storage[name], weight.numel(), config)
        if kind != "int":
            stored[name] = unquantized(name, weight, kind)
            continue
        gram = statistics.get(name, {}).get("gram")
        if storage[name] == "other":
            q, scale = quantize_other(weight, bits, scale_floor=config.scale_floor)
        elif gram is None or weight.ndim != 2:
            q, scale = quantize_matrix(weight, bits, scale_floor=config.scale_floor)
        else:
            q, scale = gptq_matrix(weight, gram, bits, scale_floor=config.scale_floor, name=name)
        check_range(name, weight, scale)
        stored[name] = QuantizedTensor(name, "int", bits, q=q, scale=scale)
    return stored


def gptq_matrix(
    weight: Tensor, gram: Tensor, bits: int, *, scale_floor: bool = True, name: str = "weight"
) -> tuple[Tensor, Tensor]:
    """Quantise a float32 matrix to (int8 integers, float16 row scales) by GPTQ, in the best of five clips.

    Columns go from the largest to the smallest mean square of their input. The clip is one for the whole matrix, and
    chosen by its plain squared error and not by that of the outputs, as published (section 15.2). The published rule
    that sets columns of dead inputs to zero is not here: its first damping leaves none. All arithmetic is in float64,
    so that integers do not depend on the processor, but for a value within some 1e-13 of a tie. Raises
    :class:`RunError` as :func:`gptq` does.
    """
    qmax, columns = 2 ** (bits - 1) - 1, weight.size(1)
    if gram.shape != (columns, columns) or not torch.isfinite(gram).all():
        raise RunError(
            f"cannot quantise tensor '{name}': its Gram matrix must be {columns} x {columns} finite numbers, found "
            f"shape {tuple(gram.shape)}"
        )
    gram = gram.to(weight.device)
    order = gram.diagonal().argsort(descending=True, stable=True)
    factor = reverse_factor(gram[order][:, order], DAMPING, name=name, dtype=torch.float64)
    scales = row_scales(weight, qmax, scale_floor).T  # (rows, clips) float16
    # clips often round to the same scale of a row, the floor above all: each scale of a row is tried once
    fresh = torch.ones_like(scales, dtype=torch.bool)
    fresh[:, 1:] = scales[:, 1:] != scales[:, :-1]
    row = fresh.nonzero()[:, 0]
    # (tries, columns), (tries, 1)
    q, error = feedback(weight[:, order][row], scales[fresh][:, None], factor, qmax)
    errors = error.square().mean(dim=1)  # (tries,)
    tried = (fresh.flatten().cumsum(0) - 1).view_as(fresh)  # (rows, clips) -> the try that has this row and scale
    best = int(errors[tried].mean(dim=0).argmin())  # the first of equals
    return q[tried[:, best]][:, order.argsort()].to(torch.int8), scales[:, best].contiguous()


def reverse_factor(gram: Tensor, damping: float, *, name: str = "weight", dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the lower triangular L with ``L^T L = H``, computed in float64 and rounded to ``dtype``.

    H is ``gram`` (columns, columns) plus ``damping`` times its mean diagonal on the diagonal, which gives inputs that
    are always zero a place too. ``U = L^-T`` is the upper factor of the inverse of H that the published code gets by
    two factorisations and an inversion. Raises :class:`RunError` naming the tensor whose H is not positive definite.
    """
    damped = gram.to(torch.float64, copy=True)
    damped.diagonal().add_(damping * damped.diagonal().mean().clamp_min(LEAST_MEAN))
    factor, failed = torch.linalg.cholesky_ex(damped.flip((0, 1)), upper=True)
    if failed.any() or not torch.isfinite(factor).all():
        raise RunError(
            f"cannot quantise tensor '{name}': its Gram matrix is not positive definite, although {damping:.3g} of its "
            "mean diagonal was added to the diagonal (broken statistics, or too few positions for so little damping)"
        )
    return factor.flip((0, 1)).to(dtype)


def feedback(weight: Tensor, steps: Tensor, factor: Tensor, qmax: int, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Round columns from first to last with error feedback; return int16 integers from -qmax to qmax, and the error.

    ``weight`` (rows, columns); ``steps`` broadcasts to it: (rows, 1), (1, columns) or all; ``factor`` is the lower
    triangular (columns, columns) of :func:`reverse_factor` in the same order of columns. Its dtype is that of the
    arithmetic and of the error ``weight - q * steps``. ``block`` changes speed alone: the columns that are rounded
    between two products with the errors before them.
    """
    ratio = factor / factor.diagonal()[:, None]
    # a column of the matrix is a row here, contiguous in memory
    target = weight.T.to(factor.dtype).contiguous()  # (columns, rows)
    step = steps.to(factor.dtype).expand(weight.shape).T
    wanted, error = target.clone(), torch.empty_like(target)
    q = torch.empty(target.shape, dtype=torch.int16, device=weight.device)

    def columns(first: int, last: int) -> None:
        if last - first > block:  # the first half, what its errors ask of the second in one product, the second half
            middle = (first + last) // 2
            columns(first, middle)
            wanted[middle:last].addmm_(ratio[middle:last, first:middle], error[first:middle])
            columns(middle, last)
            return
        for i in range(first, last):
            best = torch.addmv(wanted[i], error[first:i].T, ratio[i, first:i])
            rounded = best.div_(step[i]).round_().clamp_(-qmax, qmax)
            torch.addcmul(target[i], rounded, step[i], value=-1, out=error[i])
            q[i] = rounded

    columns(0, len(target))
    return q.T.contiguous(), error.T


def output_loss(error: Tensor, factor: Tensor) -> float:
    """Return ``tr(E H E^T) = ||E L^T||^2``: what the error E (rows, columns) of a matrix changes its outputs by."""
    return float((error.to(factor.dtype) @ factor.T).square().sum())
