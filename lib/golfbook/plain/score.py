"""The sliding-window score as its definition: one window at a time, of whose losses the newest are kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


@torch.inference_mode()
def score(logits: Callable[[Tensor], Tensor], tokens: NDArray[Any], window: int, stride: int) -> NDArray[np.float64]:
    """Return the negative log-probability in nats of every target, (n,) float64, for ``tokens`` (n + 1,).

    ``logits`` maps token ids (1, window) int64 to (1, window, V) and is causal. Target i is ``tokens[i + 1]``, read at
    position i. Windows start ``stride`` apart; the last ones are filled up with zeros, whose losses are left out.
    """
    targets = len(tokens) - 1
    padded = torch.zeros(len(tokens) + window, dtype=torch.int64)
    padded[: len(tokens)] = torch.as_tensor(tokens.astype(np.int64))
    losses: list[float] = []
    start = 0
    while len(losses) < targets:
        ids = padded[start : start + window + 1]
        nll = F.cross_entropy(logits(ids[None, :-1])[0], ids[1:], reduction="none")  # (window,)
        losses += nll[len(losses) - start : targets - start].tolist()
        start += stride
    return np.array(losses)


def bits_per_byte(nll: NDArray[Any], total_bytes: int) -> float:
    """Return the sum of ``nll`` in bits over the bytes of the text that was scored."""
    return sum(float(loss) for loss in nll) / math.log(2) / total_bytes
