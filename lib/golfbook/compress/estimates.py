"""What the entropy coder will spend: measured symbol by symbol, or predicted from counts without coding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy.special import gammaln

from golfbook.compress.coders import entry_of, matrix
from golfbook.compress.contexts import BOUNDS, CLASSES, HALVES, SHIFTS, prior
from golfbook.compress.counts import TOTAL, UNIT, Port, Table, folded
from golfbook.compress.entropy import described, through, vector_bits
from golfbook.compress.quantizer import QuantizedTensor
from golfbook.compress.trellis import points

STARTS = np.concatenate([[0], np.cumsum(2 * BOUNDS + HALVES + 2)])  # of the symbols of each context in one long vector


class Meter(Port):
    """Adds up what symbols cost under the tables of a walk; ``bits`` is their cross-entropy."""

    def __init__(self) -> None:
        self.bits = 0.0

    def _pass(self, table: Table, symbols: np.ndarray | None, count: int) -> np.ndarray:
        assert symbols is not None
        used = np.bincount(symbols, minlength=len(table.counts))
        self.bits += float(used @ (np.log2(TOTAL) - np.log2(table.frequencies)))
        return symbols

    def plain(self, bits: int, symbols: np.ndarray | None, count: int) -> np.ndarray:
        assert symbols is not None
        self.bits += bits * count
        return symbols


def cross_entropy_bits(tensors: Sequence[QuantizedTensor]) -> float:
    """Return the bits that the models of the coder give ``tensors``: what an ideal coder under them would spend."""
    meter = Meter()
    through(meter, tensors)
    return meter.bits


def estimate_bits(tensors: Sequence[QuantizedTensor]) -> dict[str, float]:
    """Return the bits that the integers of each tensor will take, their classes included, if stored together.

    Tensors of other kinds are left out. Tables learn at any order of the symbols alike, so the counts of all tensors
    tell the length of all; a tensor's share is its cross-entropy under what all of them have taught.
    """
    own: dict[str, np.ndarray] = {}
    side: dict[str, float] = {}
    for tensor in tensors:
        if tensor.q is not None:
            own[tensor.name], side[tensor.name] = _counts(tensor)
    cost = _costs(sum(own.values(), np.zeros(STARTS[-1], np.int64)))
    return {name: float(counts @ cost) + side[name] for name, counts in own.items()}


def _counts(tensor: QuantizedTensor) -> tuple[np.ndarray, float]:
    """Return how often each symbol of each context occurs, and the bits of what is sent besides."""
    assert tensor.q is not None
    states = entry_of(tensor).states
    shape = matrix(tensor.shape)
    q, alike, a, b = described(tensor.q.numpy().reshape(shape), states)
    contexts = 2 * np.clip(a[:, None] + b, 0, CLASSES - 1).astype(np.int32)
    if states > 1:
        contexts += points(tensor.q, states).numpy() - 2 * q
    bounds, halves, shifts = BOUNDS[contexts], HALVES[contexts], SHIFTS[contexts]
    symbols = (q >> shifts) + bounds + halves
    last = 2 * bounds + halves + 1
    far = (symbols < 0) | (symbols >= last)
    beyond = np.where(symbols < 0, -symbols, symbols - last + 1)[far]
    bits = vector_bits(a) + vector_bits(b) + vector_bits(alike) + float(shifts.sum())
    bits += float((4 + np.log2(beyond)).sum())
    symbols[far] = last[far]
    return np.bincount((symbols + STARTS[contexts]).ravel(), minlength=STARTS[-1]), bits


def _costs(counts: np.ndarray) -> np.ndarray:
    """Return bits a symbol, by context, such that the sum over ``counts`` is the length of an adaptive code.

    A table that starts from pseudo-counts and learns each symbol spends the logarithm of a ratio of Gamma functions.
    """
    out = np.zeros(len(counts))
    for context, (start, stop) in enumerate(pairwise(STARTS)):
        seen = counts[start:stop]
        if not seen.any():
            continue
        weights = folded(seen) / 2 + prior(context) / (2 * UNIT)
        cost = np.log2(weights.sum()) - np.log2(weights)
        # a symbol and its mirror image are learnt as one, and told apart by a bit
        middle = (len(seen) - 1) // 2
        pairs, first = (np.append(v[middle:-1], v[-1]) for v in (2 * weights, prior(context) / UNIT))
        if not HALVES[context]:
            pairs[0], first[0] = pairs[0] / 2, first[0] / 2
        pairs[-1], first[-1] = pairs[-1] / 2, first[-1] / 2
        signs = seen[:-1].sum() - (0 if HALVES[context] else seen[middle])
        length = gammaln(pairs.sum()) - gammaln(first.sum()) - (gammaln(pairs) - gammaln(first)).sum()
        out[start:stop] = cost * (length / np.log(2) + signs) / float(seen @ cost)
    return out
