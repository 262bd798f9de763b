"""Trellis-coded quantisation and the rule of equal slope as their formulas, one walk and one weight at a time.

A row's values are ``step / 2 * p`` with whole p. A register, zero at the start, walks along the row: its lowest bit z0
says whether p is even or odd, ``p = 2 q + z0``, and takes in the lowest bit z1 of q.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

# Ungerboeck's parity checks h0 and h1 by the number of states, bits from the highest to the lowest.
CHECKS = {
    4: ("101", "010"),
    8: ("1011", "0100"),
    16: ("10011", "00100"),
    32: ("100101", "001000"),
    64: ("1000011", "0010100"),
    128: ("10011101", "01010110"),
    256: ("101001101", "011110010"),
}


def decode(q: Iterable[int], states: int) -> list[int]:
    """Return the points p of a row of integers q."""
    if states == 1:
        return [2 * value for value in q]
    h0, h1 = ([int(bit) for bit in reversed(check)] for check in CHECKS[states])  # from the lowest bit
    register, points = [0] * (len(h0) - 1), []
    for value in q:
        z0, z1 = register[0], value % 2
        points.append(2 * value + z0)
        shifted = [*register[1:], 0]
        register = [(bit + h0[j + 1] * z0 + h1[j + 1] * z1) % 2 for j, bit in enumerate(shifted)]
    return points


def best_walk(cost: Callable[[list[int]], float], choices: Sequence[Iterable[int]], states: int) -> list[int]:
    """Return the integers, one of each column's ``choices``, whose points cost least, by trying all of them."""
    return list(min(itertools.product(*choices), key=lambda q: cost(decode(q, states))))


def equal_slope(gradient: Tensor, gram: Tensor, common: float) -> Tensor:
    """Return the step ``s0 / (sqrt(g_i) L_jj)`` of each weight (rows, columns), float64, of a Gram matrix ``L^T L``.

    ``L_jj^2`` is what of input j no combination of later inputs tells: one over the first entry of the inverse of H
    from row and column j on.
    """
    rows, columns = len(gradient), len(gram)
    steps = torch.empty((rows, columns), dtype=torch.float64)
    for j in range(columns):
        alone = 1 / float(torch.linalg.inv(gram.double()[j:, j:])[0, 0])  # L_jj^2
        for i in range(rows):
            steps[i, j] = common / math.sqrt(float(gradient[i]) * alone)
    return steps
