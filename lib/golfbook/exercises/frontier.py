"""Exercises of notebook 13: the front, what the scale floor is worth, and bytes as bits a weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from golfbook.analysis import frontier
from golfbook.exercises.check import Misconception, compare

Floats = NDArray[np.float64]
WEIGHTS = 35_900_000  # of the records' models


def write_pareto(answer: Callable[[Floats, Floats], Any]) -> str:
    """Judge ``answer(sizes, taxes) -> bools``: which points no other dominates, on random points with ties."""
    rng = np.random.default_rng()
    for count in rng.integers(12, 40, size=5):
        sizes, taxes = _points(rng, int(count))
        found, right = np.asarray(answer(sizes.copy(), taxes.copy())), frontier.pareto(sizes, taxes)
        if found.shape != right.shape:
            raise Misconception(f"{len(sizes)} points need {len(sizes)} booleans, one each, in the order given")
        by_size = np.lexsort((taxes, sizes))
        neighbours = np.ones(len(sizes), bool)
        neighbours[by_size[1:]] = taxes[by_size[1:]] <= taxes[by_size[:-1]]
        strict = ~((sizes[:, None] < sizes) & (taxes[:, None] < taxes)).any(axis=0)
        weak = (sizes[:, None] <= sizes) & (taxes[:, None] <= taxes)
        mistakes = {
            "dominated points are kept: one of equal size and more tax, or of equal tax and more size": strict,
            "dominated points are kept: each is compared with its neighbour in size, not with all that are smaller": (
                neighbours
            ),
            "a point does not dominate itself, nor its twin: it must be better in one of both": weak.sum(axis=0) == 0,
            "twins do not dominate each other: both stay": weak.sum(axis=0) == 1,
        }
        kept = int((found.astype(bool) & ~right).sum())
        otherwise = f"{kept} dominated points are kept" if kept else "points that nothing dominates are left out"
        compare(found, right, otherwise, mistakes)
    return (
        f"it agrees with frontier.pareto on five random sets; {right.sum()} of {len(right)} points stayed in the last"
    )


def _points(rng: np.random.Generator, count: int) -> tuple[Floats, Floats]:
    """Return sizes and taxes of a front and of what lies behind it, with ties in one of both and twins."""
    front = np.sort(rng.choice(np.arange(10.0, 60.0), count, replace=False))
    taxes = np.sort(rng.choice(np.arange(1.0, 60.0), count, replace=False))[::-1]
    behind = rng.integers(0, count, size=3)
    sizes = np.concatenate(
        [front, front[[0]], front[[1]] + 7, front[[-1]], front[behind] + 1.5, front[[2, 2]] + (60, 61)]
    )
    more = np.concatenate([taxes, taxes[[0]] + 2, taxes[[1]], taxes[[-1]], taxes[behind] + 1.5, taxes[[2, 2]] + (2, 1)])
    order = rng.permutation(len(sizes))
    return sizes[order], more[order]


def worth_of_floor(answer: Callable[[Floats, Floats, Floats, float, float], float]) -> str:
    """Judge ``answer(bits, sizes, taxes, floor_size, floor_tax) -> bits``: the width whose tax the floor has."""
    rng = np.random.default_rng()
    for _ in range(4):
        bits = np.arange(3.0, 9.0)
        share, start = rng.uniform(0.6, 0.8), rng.uniform(0.2, 0.6)
        sizes, taxes = 1000 * share * bits, start * rng.uniform(3.4, 4.4) ** -(bits - 3)
        floor_tax = float(np.exp(np.interp(rng.choice([3.3, 3.6, 4.4, 4.7]), bits, np.log(taxes))))
        floor_size = float(np.interp(rng.uniform(4.8, 5.4), bits, sizes))
        found = float(answer(bits.copy(), sizes.copy(), taxes.copy(), floor_size, floor_tax))
        rows = pd.DataFrame({"bits": bits, "tax": taxes})
        right = frontier.bytes_at(rows, floor_tax, column="tax", size="bits")
        mistakes = {
            "equal nominal bits are not equal quality: find the width without floor that has the floor's tax": 6.0,
            "you found the width of the same size; asked is that of the same tax": np.interp(floor_size, sizes, bits),
            "the log of the tax is linear in bits, the tax is not": np.interp(-floor_tax, -taxes, bits),
            "that is the nearest measured width: interpolate": bits[np.abs(np.log(taxes / floor_tax)).argmin()],
        }
        compare(found, right, f"a tax of {floor_tax:.4f} is not reached at {found:.3f} bits", mistakes, rtol=1e-3)
    table = frontier.read_table()
    worth = frontier.needed(table[table["steps"] == 1600], frontier.NO_FLOOR, frontier.ANCHOR, size="bits")
    return f"on the committed models the floor at 6 bits has the divergence of {worth.mean():.2f} bits without it"


def bytes_as_bits(answer: Callable[[float, float], float]) -> str:
    """Judge ``answer(size, weights) -> bits a weight`` that ``size`` bytes buy, on random models and the records'."""
    rng = np.random.default_rng()
    for size, weights in ((rng.uniform(2e5, 9e6), rng.uniform(5e6, 6e7)), (1_000_000, WEIGHTS)):
        mistakes = {
            "those are bytes a weight, asked are bits": size / weights,
            "a megabyte has 1,000,000 bytes here, as the limit of 16,000,000 has": 8 * size * 1.048576 / weights,
            "that is upside down: weights a bit": weights / (8 * size),
        }
        found = float(answer(size, weights))
        compare(found, 8 * size / weights, f"{size:,.0f} bytes are not {found:.3g} bits a weight", mistakes)
    return (
        f"1 MB is {found:.3f} bits for each of {WEIGHTS / 1e6:.1f} million weights, and where the tax falls as 4^-bits "
        f"that multiplies it by {4**-found:.2f}"
    )


EXERCISES: dict[str, Callable[[Any], str]] = {"13.1": write_pareto, "13.2": worth_of_floor, "13.3": bytes_as_bits}
