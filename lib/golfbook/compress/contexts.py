"""What the entropy coder knows of an integer before it sees it: the class of its deviation, and a table to start from.

Entry (i, j) of a matrix has class ``rows[i] + columns[j]``, kept within 0 to ``CLASSES - 1``: the deviation of
q + z0 / 2, in quarters of an octave above 2^-3, where z0 is the half-grid of the trellis (0 without one). The encoder
fits both vectors and sends them. All tensors of an artifact share one table a class and half-grid.
"""

from __future__ import annotations

import functools
from decimal import Context, Decimal

import numpy as np

from golfbook.compress.counts import UNIT

LOWEST = -12  # quarter octaves: 2^-3
WIDEST = 22  # classes from 2^5.5 on send their lowest bits as they are
CLASSES = 72  # up to 2^15
STRENGTH = 128  # symbols that a prior weighs
_exact = Context(prec=28)

# By context, 2 * class + z0: bits sent plain, 1 where the mirror image of k is -1-k and 0 where it is -k, and the
# largest k that has a symbol of its own.
SHIFTS = np.repeat(np.array([max(0, (LOWEST + c - WIDEST + 3) // 4) for c in range(CLASSES)], np.int32), 2)
HALVES = np.where(SHIFTS > 0, 1, np.arange(2 * CLASSES, dtype=np.int32) % 2)


def _deviation(context: int) -> Decimal:
    """Return the deviation of what the table of a context holds."""
    quarters = LOWEST + context // 2 - 4 * int(SHIFTS[context])
    return _exact.power(Decimal(2), Decimal(quarters) / 4)


BOUNDS = np.array([int(6 * _deviation(context)) + 2 for context in range(2 * CLASSES)], np.int32)


@functools.cache
def prior(context: int) -> np.ndarray:
    """Return the counts (n,) int64 that the table of a context starts from, the last one of its escape.

    The shape is three quarters Gaussian and one quarter two-sided geometric, of the class's deviation. ``decimal``
    rounds its exponential correctly, so the counts are the same everywhere.
    """
    half, bound, deviation = int(HALVES[context]), int(BOUNDS[context]), _deviation(context)
    spread = max(deviation, Decimal("0.3"))
    shapes = []
    for power, factor in ((2, Decimal("0.5")), (1, _exact.sqrt(Decimal(2)))):
        scaled = [abs(k + Decimal(half) / 2) / spread for k in range(-bound - half, bound + 1)]
        weights = [_exact.exp(-factor * x**power) for x in scaled]
        total = sum(weights)
        shapes.append([weight / total for weight in weights])
    mixed = [3 * gauss + tail for gauss, tail in zip(*shapes, strict=True)]
    counts = [int(weight * STRENGTH * UNIT / 4) + 1 for weight in mixed]
    return np.array([*counts, UNIT // 8], np.int64)


def fit(squares: np.ndarray, side_bits: float = 2.5) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the classes of rows and columns, int16, that code a matrix in the fewest bits, and about how many.

    ``squares`` (rows, columns) float64 are whole: of 2q + z0, so sums are exact in any order of adding. Tried are one
    class for all, one a row, one a column, and both; a vector that varies costs ``side_bits`` an entry.
    """
    rows, columns = squares.shape
    by_row, by_column = _classes(squares.mean(1)), _classes(squares.mean(0))
    one = _classes(squares.mean(keepdims=True))[0]
    tries = [(np.full(rows, one[0]), np.zeros(columns, int))]
    if columns > 1:
        tries.append((by_row, np.zeros(columns, int)))
    if rows > 1:
        tries.append((np.full(rows, one[0]), by_column - one[0]))
    if min(rows, columns) > 1:
        a, b = by_row, by_column - one[0]
        for _ in range(3):
            a = _classes(squares @ _shrink(b) / columns)
            b = _classes(_shrink(a) @ squares / rows, 1 - CLASSES)
        tries.append((a, b))
    costs = []
    for a, b in tries:
        spread = np.clip(a, 0, CLASSES - 1).mean() + b.mean()
        error = float(_shrink(a) @ squares @ _shrink(b)) / 2 / np.log(2) / 4 / 2.0 ** (LOWEST / 2)
        side = side_bits * sum(len(v) for v in (a, b) if v.min() != v.max())
        costs.append(squares.size * spread / 4 + error + side)
    a, b = tries[int(np.argmin(costs))]
    return a.astype(np.int16), b.astype(np.int16), min(costs)


def _classes(mean: np.ndarray, least: int = 0) -> np.ndarray:
    """Return the classes of mean squares of 2q + z0."""
    quarters = 2 * np.log2(np.maximum(mean / 4, 2.0**-24))
    return np.clip(np.rint(quarters).astype(int) - LOWEST, least, CLASSES - 1)


def _shrink(classes: np.ndarray) -> np.ndarray:
    """Return 2^(-class / 2), whole in units of 2^-20 so that sums of products stay exact."""
    return np.rint(np.exp2(20 - classes / 2)) / 2**20
