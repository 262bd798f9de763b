"""The search of trellis-coded quantisation: for each row the walk whose values lie closest to the weights (Viterbi).

Plain rounding is the case of one state. With error feedback each survivor of the search carries the errors of its own
past, so that GPTQ and the trellis work together.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from golfbook.compress.entropy import described
from golfbook.compress.trellis import points, transitions

BLOCK = 32  # columns whose errors reach the later ones together
MOST_PRICED = 255  # integers beyond cost as much as this one
MOST_SURVIVORS = 2**15  # rows times states of one search, to bound memory


@functools.cache
def predecessors(states: int) -> Tensor:
    """Return the two edges that lead to each state, (states, 2) int64; edge ``2 s + b`` leaves s with z1 = b."""
    return transitions(states).flatten().argsort(stable=True).view(states, 2)


@dataclass(frozen=True)
class Prices:
    """What integers cost in bits: ``table[class, z0, q + (width - 1) / 2]`` float32, with a class (rows, columns)."""

    classes: Tensor
    table: Tensor

    def of(self, column: int, p: Tensor) -> Tensor:
        """Return the price of points p (rows, any) int of one column, float32 alike."""
        q, z0 = p >> 1, p & 1
        most = self.table.size(2) // 2
        return self.table[self.classes[:, column, None], z0, q.clamp(-most, most) + most]

    def part(self, rows: slice) -> Prices:
        """Return the prices of some rows."""
        return Prices(self.classes[rows], self.table)


def prices(q: Tensor, states: int) -> Prices:
    """Return what the entropy coder would ask for the integers q (rows, columns) int16 and others like them.

    Each class of deviations, and each half-grid in it, is priced by how often an integer occurs there.
    """
    _, _, by_row, by_column = described(q.numpy(), states)
    classes = torch.from_numpy(by_row)[:, None].long() + torch.from_numpy(by_column)
    classes = classes.unique(return_inverse=True)[1]  # (rows, columns), from 0
    most = min(int(q.int().abs().max()) + 1, MOST_PRICED)
    half, width = points(q, states).long() & 1, 2 * most + 1
    places = (2 * classes + half) * width + q.long().clamp(-most, most) + most
    counts = torch.bincount(places.flatten(), minlength=2 * width * (int(classes.max()) + 1)) + 0.25
    counts = counts.view(-1, 2, width)  # a quarter more each: nothing is impossible
    return Prices(classes, (counts.sum(dim=2, keepdim=True) / counts).log2())


def search(
    weight: Tensor,
    steps: Tensor,
    states: int,
    factor: Tensor | None = None,
    offset: Tensor | None = None,
    prices: Prices | None = None,
    rate: float = 0.0,
) -> Tensor:
    """Return the integers q (rows, columns) int16 of the walk that costs each row least; see :func:`points`.

    ``weight`` is float32 (rows, columns), ``steps`` broadcasts to it. With the lower triangular ``factor`` L (columns,
    columns) of the inputs' Gram matrix ``H = L^T L``, the cost of a row's error e is ``e H e^T``, and column j aims at
    ``w_j + sum_k<j L_jk / L_jj (w_k - decoded_k)``: every survivor of the search feeds its own errors forward (GPTQ by
    per-survivor processing). Without it the search is exact, with it nearly. ``offset`` (rows, columns) is added to
    what is aimed at. ``prices`` add ``rate`` times their bits to the cost, which counts in squares of half a step.
    """
    steps = steps.expand_as(weight)
    pull = None if factor is None else factor.tril(-1) / factor.diagonal()[:, None]
    stress = torch.ones(weight.size(1)) if factor is None else factor.diagonal()
    rows = max(1, MOST_SURVIVORS // states)
    pieces = []
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        aims = weight[part] if offset is None else weight[part] + offset[part]
        fees = prices and prices.part(part)
        pieces.append(_search(weight[part], aims, steps[part], states, stress, pull, fees, rate))
    return torch.cat(pieces)


def _search(
    weight: Tensor,
    aims: Tensor,
    steps: Tensor,
    states: int,
    stress: Tensor,
    pull: Tensor | None,
    prices: Prices | None,
    rate: float,
) -> Tensor:
    rows, columns = weight.shape
    half = steps / 2
    weights = (half * stress).square()
    weights = weights / weights.mean(dim=1, keepdim=True)  # (rows, columns), 1 where steps follow the stress
    before, lattice = predecessors(states), _cosets(states)
    everyone = torch.arange(rows)[:, None]
    aims = aims[:, None, :].repeat(1, states if pull is not None else 1, 1)  # (rows, survivors, columns)
    cost = torch.full((rows, states), torch.inf)
    cost[:, 0] = 0
    came_from = torch.empty((columns, rows, states), dtype=torch.int16)
    taken = torch.empty((columns, rows, states), dtype=torch.int32)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block = aims[:, :, start:stop].clone()  # (rows, survivors, width)
        errors = torch.zeros((rows, states, stop - start))
        origin = torch.arange(states).expand(rows, -1)
        for j in range(start, stop):
            k = j - start
            aim = block[:, :, k]  # (rows, survivors)
            # an edge may use every second, or every fourth point of the fine grid: (rows, states, 2)
            y = (aim / half[:, j, None])[:, :, None]
            spacing = 2 if states == 1 else 4
            p = spacing * ((y - lattice) / spacing).round() + lattice
            if states == 1 and prices is not None:
                p[:, :, 1] -= 2 * p[:, :, 1].sign()  # both edges are the only one: the second is an integer nearer zero
            paid = weights[:, j, None, None] * (y - p).square()
            p = p.int().expand(rows, states, 2).flatten(1)
            if prices is not None:
                paid = paid + rate * prices.of(j, p).view(rows, states, 2)
            total = (cost[:, :, None] + paid).flatten(1)  # (rows, edges)
            cost, which = total[:, before].min(dim=2)  # the better of the two edges into each state
            edge = torch.where(which == 0, before[:, 0], before[:, 1])  # (rows, states)
            source = edge >> 1
            taken[j], came_from[j] = p.gather(1, edge), source.short()
            if pull is None:
                continue
            error = weight[:, j, None] - taken[j] * half[:, j, None]  # of the weight, not of the aim
            if states > 1:
                block, errors, origin = block[everyone, source], errors[everyone, source], origin.gather(1, source)
            errors[:, :, k] = error
            block[:, :, k + 1 :] += error[:, :, None] * pull[j + 1 : stop, j]
        if pull is not None and stop < columns:
            rest = aims[:, :, stop:]
            if states > 1:
                rest = rest[everyone, origin]
            aims[:, :, stop:] = rest + errors @ pull[stop:, start:stop].T
    return _trace(cost.argmin(dim=1), came_from, taken)


def _cosets(states: int) -> Tensor:
    """Return the smallest point, 0 to 3, that each edge (states, 2) may use; float32."""
    state, free = torch.arange(states)[:, None], torch.tensor([0, 1])
    return (2 * free + state % 2).float() if states > 1 else torch.zeros((1, 2))


def _trace(state: Tensor, came_from: Tensor, taken: Tensor) -> Tensor:
    """Return the integers of the walks that end in ``state`` (rows,)."""
    q = torch.empty((len(state), len(taken)), dtype=torch.int16)
    for j in reversed(range(len(taken))):
        here = state[:, None]
        q[:, j] = (taken[j].gather(1, here)[:, 0] >> 1).short()
        state = came_from[j].gather(1, here)[:, 0].long() if len(taken[j][0]) > 1 else state
    return q
