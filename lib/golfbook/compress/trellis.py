"""Trellis-coded quantisation: a shift register decides which half of a grid twice as fine each weight may use.

The values of a row are ``step / 2 * p`` with whole ``p``. A register of ``log2(states)`` bits, zero at the start of a
row, walks along it: its lowest bit z0 says whether ``p`` is even or odd, so that ``p = 2 q + z0`` and q alone is
stored; the lowest bit z1 of q is what the register takes in. Neighbouring points of the fine grid belong to different
walks, and a search over walks finds rows that lie closer to the weights than rounding does, at the entropy of the
coarse grid (Marcellin and Fischer 1990; Ungerboeck's parity-check polynomials).
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

# States -> the polynomials h0 and h1, in octal as in the literature.
POLYNOMIALS = {
    4: (0o5, 0o2), 8: (0o13, 0o4), 16: (0o23, 0o4), 32: (0o45, 0o10), 64: (0o103, 0o24), 128: (0o235, 0o126),
    256: (0o515, 0o362),
}  # fmt: skip


@functools.cache
def transitions(states: int) -> Tensor:
    """Return the register after each state and input bit z1, (states, 2) int64.

    With bits counted from the lowest, bit j of the next register is bit j+1 of this one, plus ``h1_j+1 z1 + h0_j+1 z0``
    modulo 2, where z0 is bit 0 of this one: systematic feedback encoding.
    """
    if states == 1:
        return torch.zeros((1, 2), dtype=torch.int64)
    h0, h1 = POLYNOMIALS[states]
    state = torch.arange(states)
    free = torch.where(state % 2 == 1, h0 >> 1, 0)
    return torch.stack([state >> 1 ^ free, state >> 1 ^ free ^ (h1 >> 1)], dim=1)


def points(q: Tensor, states: int) -> Tensor:
    """Return ``p = 2 q + z0`` of stored integers q (rows, columns), int32; walks each row from its first column."""
    if states == 1:
        return 2 * q.int()
    following = transitions(states).numpy().astype(np.int32).ravel()  # at 2 * state + z1
    state = np.zeros(q.size(0), np.int32)
    columns = q.T.contiguous().numpy().astype(np.int32)  # whole columns: the walk reads and writes runs of memory
    for column in columns:
        free = column & 1
        column *= 2
        column += state & 1
        state = following[2 * state + free]
    return torch.from_numpy(columns).T.contiguous()
