"""What more context is worth: losses of the same targets, with windows that slide by different strides."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from golfbook.analysis.statistics import describe
from golfbook.evaluate.scoring import bits_per_byte
from golfbook.evaluate.windows import plan_windows


def gain_by_position(sliding: NDArray, contiguous: NDArray, window: int, bins: int = 10) -> pd.DataFrame:
    """Return what sliding changes for a target, by its position in its contiguous window, with 95 % intervals.

    Both arrays (n,) hold the losses of the same targets in nats; targets after the last whole window are left out. The
    losses of one window are no independent draws, so a bin of positions is averaged in each window first, and the
    interval is over windows. Columns ``context`` (mean tokens of left context that contiguous windows leave), ``mean``
    (sliding minus contiguous, nats), ``low``, ``high``, ``n`` windows.
    """
    whole = len(sliding) // window * window
    gaps = (np.asarray(sliding, float) - np.asarray(contiguous, float))[:whole].reshape(-1, window)
    edges = np.unique(np.geomspace(1, window + 1, bins + 1).astype(np.int64))
    rows = []
    for first, stop in itertools.pairwise(edges):
        found = describe(gaps[:, first - 1 : stop - 1].mean(axis=1))
        rows.append(((first + stop - 1) / 2, found.mean, found.low, found.high, found.n))
    return pd.DataFrame(rows, columns=["context", "mean", "low", "high", "n"])


def stride_ladder(losses: Mapping[int, NDArray], window: int, total_bytes: int) -> pd.DataFrame:
    """Return score, paired difference and work for every stride of ``losses`` (nats of the same targets).

    Longest stride first; ``difference`` is from it, in bits per byte, with its paired 95 % interval ``low``, ``high``
    over windows; ``work`` is tokens computed per target.
    """
    strides = sorted(losses, reverse=True)
    count = len(losses[strides[0]])
    to_bpb = count / (math.log(2) * total_bytes)
    rows = []
    for stride in strides:
        gaps = window_means(losses[stride] - losses[strides[0]], window)
        gap = describe(gaps * to_bpb)
        starts = plan_windows(count, window, stride).starts
        work = float((np.minimum(starts + window, count) - starts).sum()) / count
        rows.append((stride, bits_per_byte(losses[stride], total_bytes), gap.mean, gap.low, gap.high, work))
    return pd.DataFrame(rows, columns=["stride", "val_bpb", "difference", "low", "high", "work"])


def window_means(losses: NDArray, window: int) -> NDArray:
    """Return the mean of every whole window of ``losses`` (n,); of all of them where there is not one."""
    window = min(window, len(losses))
    return np.asarray(losses, float)[: len(losses) // window * window].reshape(-1, window).mean(axis=1)
