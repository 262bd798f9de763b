"""Windows over a token stream: which one reads what and scores which targets.

Window w reads ``tokens[start : start + window]`` and scores the targets that no earlier window has scored, so all but
the first ``window`` targets have at least ``window - stride`` tokens of left context. ``stride == window`` is
contiguous scoring. The published scripts (PR 1166 section 18.3) score their last ``stride`` targets once for every
window that reaches the end, 32 times at their settings; :func:`published_windows` reproduces that for comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from golfbook.errors import ConfigError, DataError


@dataclass(frozen=True)
class Windows:
    """Which targets each window reads and scores; three int64 arrays of one length, in scoring order.

    Target i is ``tokens[i + 1]``, predicted at position i. Window w reads positions from ``starts[w]`` on and scores
    targets ``first[w] <= i < stop[w]``.
    """

    starts: NDArray[np.int64]
    first: NDArray[np.int64]
    stop: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    def batches(self, most: int) -> Iterator[Windows]:
        """Cut into equal batches of at most ``most`` windows, in order; only the last may be shorter."""
        count = -(-len(self) // max(1, -(-len(self) // most)))
        for low in range(0, len(self), count):
            part = slice(low, low + count)
            yield Windows(self.starts[part], self.first[part], self.stop[part])

    @property
    def targets(self) -> NDArray[np.int64]:
        """Return the index of every scored target, window after window."""
        counts = self.stop - self.first
        before = np.cumsum(counts) - counts
        return np.repeat(self.first - before, counts) + np.arange(counts.sum())


def plan_windows(targets: int, window: int, stride: int) -> Windows:
    """Cover ``targets`` targets with windows a ``stride`` apart, each target scored exactly once, the tail included.

    The first window scores all its targets, each later one its last ``stride``; the last window holds what is left.
    Raises :class:`ConfigError` for an impossible window or stride and :class:`DataError` where there is no target.
    """
    _check_plan(targets, window, stride)
    count = 1 + max(0, -(-(targets - window) // stride))
    starts = np.arange(count, dtype=np.int64) * stride
    first = starts + window - stride
    first[0] = 0
    return Windows(starts, first, np.minimum(starts + window, targets))


def published_windows(targets: int, window: int, stride: int) -> Windows:
    """Return the windows of the published scripts (PR 1166 section 18.2), which score the last targets again and again.

    One window starts at every multiple of ``stride`` below ``targets``; those that the end cuts short score their last
    ``stride`` targets too, which are always the same. Only for showing the difference; raises as plan_windows does.
    """
    _check_plan(targets, window, stride)
    starts = np.arange(0, targets, stride, dtype=np.int64)
    stop = np.minimum(starts + window, targets)
    first = np.maximum(stop - stride, starts)
    first[0] = 0
    return Windows(starts, first, stop)


def _check_plan(targets: int, window: int, stride: int) -> None:
    if window < 1:
        raise ConfigError(f"score.window must be at least 1 token, got {window}")
    if not 1 <= stride <= window:
        raise ConfigError(f"score.stride must be from 1 to the window of {window} tokens, got {stride}")
    if targets < 1:
        raise DataError("there is nothing to score: the text has fewer than two tokens")
