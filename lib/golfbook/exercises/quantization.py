"""Exercises of notebook 04: quantise a row, predict its error, count the bits that fit, and place them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from golfbook.compress.gptq import reverse_factor
from golfbook.compress.rate_distortion import relief
from golfbook.compress.rowwise import clip_quantize, quantize_matrix
from golfbook.config.schema import RateConfig
from golfbook.exercises.check import Misconception, compare
from golfbook.files import project_root

Row = NDArray[np.float32]


def quantize_row(answer: Callable[[Row, int], tuple[Any, Any]]) -> str:
    """Judge ``answer(row, bits) -> (integers, scale)`` on random rows and on a row of zeros, against the library."""
    rng = np.random.default_rng()
    for bits in range(3, 9):
        qmax = 2 ** (bits - 1) - 1
        row, right, scale = _telling_row(rng, qmax, bits)
        q, s = _given(answer(row.copy(), bits), row)
        if np.allclose(s, np.abs(row).max() / (qmax + 1), rtol=1e-3) or np.abs(q).max() > qmax:
            raise Misconception(f"your grid has {qmax + 1} steps a side: one of the 2^{bits} codes stays unused")
        if not np.allclose(s, scale, rtol=1e-3):
            raise Misconception(f"at {bits} bits your scale is {s:.5g}; the largest weight must land on the last level")
        if np.array_equal(q, _round(row, np.abs(row).max() / qmax, qmax)):
            raise Misconception("you round with a finer scale than the file holds: the decoder only has it in float16")
        if s != scale or not np.array_equal(q, right):
            raise Misconception("scale or integers differ from the library's; round to nearest, then clamp")
    zeros = np.zeros(64, np.float32)
    with np.errstate(all="ignore"):
        q, s = _given(answer(zeros, 6), zeros)
    if not (np.isfinite(s) and np.all(q * s == 0)):
        raise Misconception("a row of zeros must decode to zeros; something divides by its scale")
    return "integers and float16 scale are those of quantize_matrix at 3 to 8 bits, and a row of zeros stays zero"


def error_law(answer: Callable[[NDArray[np.float64]], float]) -> str:
    """Judge ``answer(scales) -> mean squared error`` of a matrix with these row scales, at 5 to 8 bits."""
    weight = torch.from_numpy(np.random.default_rng().normal(0, 0.05, (64, 512)).astype(np.float32))
    for bits in (5, 6, 7, 8):
        scales, measured = _error(weight, bits, 1.0)
        predicted = float(answer(scales.copy()))
        square = (scales**2).mean()
        mistakes = {
            "that is the square of the largest possible error; most weights lie nearer to a level": square / 4,
            "that is the root of the mean square, asked was the mean square": (square / 12) ** 0.5,
        }
        otherwise = f"at {bits} bits you predict {predicted:.3g}, measured is {measured:.3g}"
        compare(predicted, measured, otherwise, mistakes, rtol=0.1)
    scales, measured = _error(weight, 8, 0.99)
    times = measured / float(answer(scales))
    return (
        "it is within a tenth of the measured error at 5 to 8 bits. Clipped at the 0.99 quantile, 8 bits err "
        f"{times:.0f} times as much: there the weights that are cut off make up the error, and more bits do not help"
    )


def bits_that_fit(answer: Callable[[int, int, int], float]) -> str:
    """Judge ``answer(weights, code_bytes, limit_bytes) -> bits a weight`` on random models and the published one."""
    rng = np.random.default_rng()
    runs = pd.read_csv(project_root() / "runs/published/runs.csv")
    one = runs[(runs["variant"] == "varB_10L") & (runs["seed"] == 42)].iloc[0]
    published = (int(one["params"]), int(one["code_bytes"]), 16_000_000)
    drawn = tuple(int(rng.integers(low, 20 * low)) for low in (2_000_000, 50_000, 4_000_000))
    for weights, code, limit in (drawn, published):
        found, right = float(answer(weights, code, limit)), 8 * (limit - code) / weights
        mistakes = {
            "those are bytes a weight, asked were bits": right / 8,
            "the code counts too, and takes its share of the limit first": 8 * limit / weights,
            "that is the size at 6 bits stored as they are; asked is what coding may leave of them": 6 * weights / 8,
        }
        otherwise = f"{weights:,} weights, {code:,} bytes of code, limit {limit:,}: {found:.4g} is not it"
        compare(found, right, otherwise, mistakes)
    needs = 8 * one["model_bytes"] / one["params"]
    return (
        f"the published model may spend {right:.2f} bits a weight. Its grid has 6, which stored as they are make "
        f"{6 * one['params'] / 8e6:.1f} MB; coded they take {needs:.2f}, scales and all, and it fits"
    )


def equal_slope(answer: Callable[[torch.Tensor, torch.Tensor, float], Any]) -> str:
    """Judge ``answer(g, L, s0) -> steps`` (rows, columns) by :func:`golfbook.compress.rate_distortion.relief`."""
    rate = RateConfig(damping=1e-9)
    inputs = torch.randn(400, 24) * torch.rand(24).add(0.2) + torch.randn(400, 1)  # columns that are alike
    g, gram, s0 = torch.rand(16).square() + 0.01, inputs.T @ inputs / 400, float(torch.rand(())) + 0.5
    known = {"gradient": g, "gram": gram}
    fine, factor = relief("exercise", torch.randn(16, 24), "matrix", known, rate), reverse_factor(gram, rate.damping)
    assert fine.rows is not None and fine.columns is not None
    right = s0 * fine.overall * fine.rows[:, None] * fine.columns  # (rows, columns)
    found = np.asarray(answer(g.clone(), factor.clone(), s0), float)
    if found.shape != (16, 24):
        raise Misconception(f"a step for each weight has shape (16, 24), yours has {found.shape}")
    diagonal, root = factor.diagonal(), g.sqrt()[:, None]
    mistakes = {
        "an error costs g times its *square*: four times the gradient halves the step, not a quarter": s0
        / (g[:, None] * diagonal),
        "you multiply by L: a column whose error does more harm would get a coarser step": s0 * diagonal / root,
        "you multiply by the gradient: a row that the loss cares about more would get coarser steps": s0
        * root
        / diagonal,
        "you divide by the columns' whole share of H; with feedback only what later columns cannot repair counts": s0
        / (root * gram.diagonal().sqrt()),
        "L is squared in the cost of a step, and so is the step: one power of L is left": s0 / (root * diagonal**2),
    }
    otherwise = f"the steps differ from the library's by up to {np.abs(found / right.numpy()).max():.3g} times"
    compare(found, right, otherwise, {reason: value.numpy() for reason, value in mistakes.items()}, rtol=1e-4)
    return "the steps are those of the library before it rounds their logs: every weight costs the loss the same"


def one_megabyte(answer: Callable[[int, int, float, float, float], tuple[Any, Any]]) -> str:
    """Judge ``answer(weights, budget_bytes, float_bpb, tax, bits) -> (bits a weight, expected BPB)``."""
    rng = np.random.default_rng()
    for budget in (1_000_000, int(rng.integers(500_000, 2_000_000))):
        weights, bits = int(rng.integers(1_500_000, 3_000_000)), float(rng.uniform(3, 6))
        before, tax = float(rng.uniform(1.2, 2)), float(rng.uniform(0.001, 0.01))
        width, score = (float(x) for x in answer(weights, budget, before, tax, bits))
        allowed = 8 * budget / weights
        otherwise = f"{budget:,} bytes for {weights:,} weights are not {width:.4g} bits each"
        compare(width, allowed, otherwise, {"those are bytes a weight, asked were bits": allowed / 8})
        added = {power: tax * power ** (bits - allowed) for power in (4, 2, 1 / 4)}
        mistakes = {
            "half the step is half the error, and the loss grows with its square": before + added[2],
            "the tax grows with fewer bits and falls with more; yours does the opposite": before + added[1 / 4],
            "that is the tax alone; the model scores the float model's bits and the tax": added[4],
            "the budget gives another width than the one that was measured, so the tax changes": before + tax,
        }
        otherwise = (
            f"from {bits:.2f} to {allowed:.2f} bits a tax of {tax:.4f} does not lead to {score:.5f} bits per byte"
        )
        compare(
            score - before, added[4], otherwise, {why: value - before for why, value in mistakes.items()}, rtol=1e-3
        )
    weight = torch.from_numpy(rng.normal(0, 0.05, (64, 512)).astype(np.float32))
    ratio = _error(weight, 6, 1.0)[1] / _error(weight, 5, 1.0)[1]
    return (
        f"{allowed:.2f} bits a weight are {budget:,} bytes, and a bit more leaves a quarter of the error: {ratio:.3f}, "
        "measured on normal weights at 5 and 6 bits"
    )


def _telling_row(rng: np.random.Generator, qmax: int, bits: int) -> tuple[Row, NDArray[np.int64], float]:
    """Draw a row on which a float32 scale gives other integers than a float16 one, with the library's answer."""
    while True:
        row = rng.normal(0, 0.05, 2048).astype(np.float32)
        q, scale = quantize_matrix(torch.from_numpy(row)[None], bits, clip_search=False, scale_floor=False)
        right = q[0].numpy().astype(np.int64)
        if not np.array_equal(right, _round(row, np.abs(row).max() / qmax, qmax)):
            return row, right, float(scale[0])


def _round(row: Row, scale: float, qmax: int) -> NDArray[np.int64]:
    return np.clip(np.round(row / np.float32(scale)), -qmax, qmax).astype(np.int64)


def _given(found: Any, row: Row) -> tuple[NDArray[np.float64], float]:
    """Return what an answer gave as numbers."""
    q, s = found
    integers = np.asarray(q, np.float64).ravel()
    if integers.shape != row.shape:
        raise Misconception(f"there should be one integer a weight, {len(row)} of them, not {len(integers)}")
    return integers, float(np.asarray(s, np.float64).ravel()[0])


def _error(weight: torch.Tensor, bits: int, clip: float) -> tuple[NDArray[np.float64], float]:
    q, scale = clip_quantize(weight, bits, clip)
    error = weight - q.float() * scale.float()[:, None]
    return scale.double().numpy(), float(error.double().square().mean())


EXERCISES: dict[str, Callable[[Any], str]] = {
    **{"04.1": quantize_row, "04.2": error_law, "04.3": bits_that_fit, "04.4": equal_slope, "04.5": one_megabyte}
}
