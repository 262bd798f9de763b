"""Row-wise integer quantisation after training, by the published rule of PR 1166 and with its two doubtful parts off.

A matrix row w becomes integers ``q = clamp(round(w / s), -qmax, qmax)`` with ``qmax = 2^(bits-1) - 1`` and one scale s,
stored as float16; the decoder returns ``q * s``. Rounding is half to even. Attention, MLP and other projection matrices
follow :func:`quantize_matrix`, everything else (the embedding tables above all) :func:`quantize_other`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from golfbook.compress.quantizer import QuantizedTensor, Statistics, check_range, finite, stored_as, unquantized
from golfbook.config.schema import QuantizeConfig
from golfbook.model.component import Storage

CLIP_PERCENTILES = (0.9990, 0.9995, 0.9999, 0.99999, 1.0)  # tried for matrices (PR 1166 section 17.3)
OTHER_PERCENTILE = 0.9999984  # clip of the published int8 rule (section 17.2)
SMALLEST_SCALE = 2.0**-24  # smallest positive float16


def percentiles(
    state: Mapping[str, Tensor], storage: Mapping[str, Storage], config: QuantizeConfig, statistics: Statistics
) -> dict[str, QuantizedTensor]:
    """Quantise with five clips tried for each matrix, as PR 1166 does; needs no statistics."""
    return {name: _tensor(name, tensor, storage[name], config, search=True) for name, tensor in state.items()}


def row_maximum(
    state: Mapping[str, Tensor], storage: Mapping[str, Storage], config: QuantizeConfig, statistics: Statistics
) -> dict[str, QuantizedTensor]:
    """Quantise matrices without a clip, as PR 1170 and 1232 do; needs no statistics."""
    return {name: _tensor(name, tensor, storage[name], config, search=False) for name, tensor in state.items()}


def _tensor(name: str, tensor: Tensor, storage: Storage, config: QuantizeConfig, search: bool) -> QuantizedTensor:
    weight = finite(name, tensor)
    kind, bits = stored_as(storage, weight.numel(), config)
    if kind != "int":
        return unquantized(name, weight, kind)
    if storage == "other":
        q, scale = quantize_other(weight, bits, scale_floor=config.scale_floor)
    else:
        q, scale = quantize_matrix(weight, bits, clip_search=search, scale_floor=config.scale_floor)
    check_range(name, weight, scale)
    return QuantizedTensor(name, "int", bits, q=q, scale=scale)


def quantize_matrix(
    weight: Tensor, bits: int, *, clip_search: bool = True, scale_floor: bool = True
) -> tuple[Tensor, Tensor]:
    """Quantise a float32 weight to (int8 integers, float16 scales) by the published matrix rule.

    ``clip_search`` (PR 1166 section 17.3): row clips c at five quantiles of ``|w|``, ``s = float16(c / qmax)``, one
    quantile for the whole matrix, chosen by its mean squared error, ties to the earlier one. Off (PR 1170, section
    17.4): c is the row maximum. ``scale_floor``: the published ``s >= 1/qmax``, which gives every row below 1 in
    magnitude the same coarse grid; off, only float16's smallest number bounds s, so that a zero row decodes to zeros.
    A tensor that is not a matrix gets one scale, its largest magnitude over qmax (1 for zeros), never a floor.
    """
    qmax = 2 ** (bits - 1) - 1
    if weight.ndim != 2:
        largest = weight.abs().max()
        scale = torch.where(largest > 0, largest / qmax, torch.ones_like(largest)).half()
        scale = scale.clamp_min(SMALLEST_SCALE)
        return _round(weight / scale.float(), qmax), scale
    scales = row_scales(weight, qmax, scale_floor, CLIP_PERCENTILES if clip_search else (1.0,))
    found: tuple[Tensor, Tensor] | None = None
    least, previous = float("inf"), None
    for scale in scales:
        if previous is not None and torch.equal(scale, previous):
            continue  # the same candidate again: a tie, which the earlier one wins
        previous = scale
        q = _round(weight / scale.float()[:, None], qmax)
        error = (weight - q.float() * scale.float()[:, None]).square().mean().item()
        if found is None or error < least:
            found, least = (q, scale), error
    assert found is not None
    return found


def row_scales(weight: Tensor, qmax: int, scale_floor: bool, percentiles: Sequence[float] = CLIP_PERCENTILES) -> Tensor:
    """Return float16 scales that reach the quantiles of ``|w|`` of each row, (percentiles, rows)."""
    return (row_quantiles(weight.abs(), percentiles) / qmax).clamp_min(_floor(qmax, scale_floor)).half()


def quantize_other(weight: Tensor, bits: int, *, scale_floor: bool = True) -> tuple[Tensor, Tensor]:
    """Quantise a float32 weight to (int8 integers, scales) by the published rule for embedding tables.

    PR 1166 section 17.2: rows are clipped at the 0.9999984 quantile c of ``|w|``; with ``scale_floor``, s is
    ``max(c, 1) / qmax`` in float32 while rounding and float16 when stored, as published (the decoder's s differs a
    little). Off, both sides use the float16 scale, since there is nothing to reproduce. The published scripts without
    a clip search use this rule too, so ``clip_search`` does not concern it. A tensor that is not a matrix gets one
    float32 scale ``c / qmax`` (1 for zeros), never a floor.
    """
    qmax = 2 ** (bits - 1) - 1
    if weight.ndim != 2:
        clip = torch.quantile(weight.abs().flatten(), OTHER_PERCENTILE)
        scale = torch.where(clip > 0, clip / qmax, torch.ones_like(clip)).clamp_min(torch.finfo(torch.float32).tiny)
        return _round(weight.clamp(-clip, clip) / scale, qmax), scale
    clip = row_quantiles(weight.abs(), (OTHER_PERCENTILE,))[0]
    scale = (clip / qmax).clamp_min(_floor(qmax, scale_floor))
    stored = scale.half()
    if not scale_floor:
        scale = stored.float()
    clipped = weight.clamp(-clip[:, None], clip[:, None])
    return _round(clipped / scale[:, None], qmax), stored


def row_quantiles(matrix: Tensor, quantiles: Sequence[float]) -> Tensor:
    """Return ``torch.quantile`` of a float32 matrix's rows to the bit, shape (quantiles, rows); fast near quantile 1.

    Only the largest values of a row are sorted, two or three of them for the published percentiles.
    """
    last = matrix.size(1) - 1
    ranks = torch.tensor(quantiles, dtype=torch.float32, device=matrix.device) * last
    below = ranks.floor().long()
    largest = matrix.topk(last + 1 - int(below.min()), dim=1).values
    low, high = largest[:, last - below], largest[:, last - ranks.ceil().long()]
    return low.lerp(high, ranks - below).T


def _floor(qmax: int, scale_floor: bool) -> float:
    return 1.0 / qmax if scale_floor else SMALLEST_SCALE


def _round(values: Tensor, qmax: int) -> Tensor:
    return values.round().clamp(-qmax, qmax).to(torch.int8)


def clip_quantize(weight: Tensor, bits: int, clip: float, scale_floor: bool = False) -> tuple[Tensor, Tensor]:
    """Quantise a float32 matrix with rows clipped at the quantile ``clip`` of ``|w|`` (1: row maximum; 0: the search).

    Returns int8 integers (rows, columns) and float16 scales (rows,), by :func:`quantize_matrix`.
    """
    if not clip:
        return quantize_matrix(weight, bits, clip_search=True, scale_floor=scale_floor)
    bound = weight.abs().quantile(clip, dim=1, keepdim=True)
    clipped = weight.clamp(-bound, bound)  # the row maximum of a clipped row is its bound
    return quantize_matrix(clipped, bits, clip_search=False, scale_floor=scale_floor)
