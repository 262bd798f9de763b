"""Row-wise integers as their formulas, one row at a time (PR 1166 section 17).

A row w becomes ``q = clamp(round(w / s), -qmax, qmax)`` with ``qmax = 2^(bits-1) - 1`` and one float16 scale s; the
decoder returns ``q s``. What differs between the rules is the clip c behind ``s = c / qmax``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from golfbook.config.schema import QuantizeConfig

PERCENTILES = (0.9990, 0.9995, 0.9999, 0.99999, 1.0)  # clips that are tried for matrices, of |w| in a row
OTHER_PERCENTILE = 0.9999984  # the clip of embedding tables
SMALLEST = 2.0**-24  # smallest positive float16
CONTROL_NAMES = (
    *("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weight", "smear", "ve_layer_scales", "ve_shared.scale"),
    *("attn_gate", "vr_lambda"),
)
Stored = tuple[Tensor, Tensor | None]  # int8 integers and their scales, or float values and None


def rounded(w: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """Return ``w / scale`` as int8 integers from -qmax to qmax; halves go to the even neighbour."""
    return (w / scale).round().clamp(-qmax, qmax).to(torch.int8)


def quantize_matrix(weight: Tensor, bits: int, clip_search: bool, scale_floor: bool) -> Stored:
    """Return int8 integers and float16 scales of attention and MLP matrices (section 17.3).

    Every percentile is tried for the whole matrix, and the one with the smallest mean squared error is taken, the first
    of equals; without ``clip_search`` c is the row's maximum (PR 1170). ``scale_floor``: s is at least 1 / qmax. What
    is no matrix gets one scale, its largest magnitude over qmax.
    """
    qmax = 2 ** (bits - 1) - 1
    if weight.ndim != 2:
        largest = weight.abs().max()
        scale = (largest / qmax if largest > 0 else torch.ones(())).half().clamp_min(SMALLEST)
        return rounded(weight, scale.float(), qmax), scale
    floor = 1 / qmax if scale_floor else SMALLEST
    best, least = None, float("inf")
    for percentile in PERCENTILES if clip_search else (1.0,):
        integers, scales = [], []
        for row in weight:  # (columns,)
            scale = (torch.quantile(row.abs(), percentile) / qmax).clamp_min(floor).half()
            integers.append(rounded(row, scale.float(), qmax))
            scales.append(scale)
        stored = torch.stack(integers), torch.stack(scales)  # (rows, columns), (rows,)
        error = (weight - decode(stored)).square().mean().item()
        if error < least:
            best, least = stored, error
    assert best is not None
    return best


def quantize_other(weight: Tensor, bits: int, scale_floor: bool) -> Stored:
    """Return int8 integers and float16 scales of embedding tables (section 17.2).

    With ``scale_floor`` integers are rounded with the float32 scale ``max(c, 1) / qmax`` and not with the float16 one
    that the decoder has, as published. What is no matrix gets one float32 scale.
    """
    qmax = 2 ** (bits - 1) - 1
    if weight.ndim != 2:
        clip = torch.quantile(weight.abs().flatten(), OTHER_PERCENTILE)
        scale = (clip / qmax if clip > 0 else torch.ones(())).clamp_min(torch.finfo(torch.float32).tiny)
        return rounded(weight.clamp(-clip, clip), scale, qmax), scale
    floor = 1 / qmax if scale_floor else SMALLEST
    integers, scales = [], []
    for row in weight:  # (columns,)
        clip = torch.quantile(row.abs(), OTHER_PERCENTILE)
        scale = (clip / qmax).clamp_min(floor)
        integers.append(rounded(row.clamp(-clip, clip), scale if scale_floor else scale.half().float(), qmax))
        scales.append(scale.half())
    return torch.stack(integers), torch.stack(scales)  # (rows, columns), (rows,)


def decode(stored: Stored) -> Tensor:
    """Return the float32 values that stand for stored ones."""
    values, scale = stored
    if scale is None:
        return values.float()
    return values.float() * (scale.float()[:, None] if scale.ndim else scale.float())


def quantize_state(state: Mapping[str, Tensor], config: QuantizeConfig) -> dict[str, Stored]:
    """Return what is stored for every float32 tensor of a state dict, in its order (section 17.1)."""
    stored: dict[str, Stored] = {}
    for name, weight in state.items():
        projection = any(part in name for part in (".attn.", ".mlp.", ".proj."))
        if weight.numel() <= config.passthrough_numel:
            stored[name] = weight.half(), None
        elif any(part in name for part in CONTROL_NAMES):
            stored[name] = weight, None
        elif projection and "tok_emb" not in name and "lm_head" not in name:
            bits = config.mlp_bits if ".mlp." in name and config.mlp_bits else config.matrix_bits
            stored[name] = quantize_matrix(weight, bits, config.quantizer == "percentiles", config.scale_floor)
        else:
            stored[name] = quantize_other(weight, config.other_bits, config.scale_floor)
    return stored
