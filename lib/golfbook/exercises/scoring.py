"""Exercises of notebook 05: plan the windows, and tell a paired interval from an unpaired one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from golfbook.analysis.statistics import paired_difference, welch
from golfbook.evaluate.windows import Windows, plan_windows, published_windows
from golfbook.exercises.check import Misconception, compare

Floats = NDArray[np.float64]


def plan(answer: Callable[[int, int, int], Any]) -> str:
    """Judge ``answer(targets, window, stride) -> [(start, first, stop), ...]`` on 200 random plans."""
    rng = np.random.default_rng()
    for _ in range(200):
        window = int(rng.integers(1, 40))
        targets, stride = int(rng.integers(1, 160)), int(rng.integers(1, window + 1))
        where = f"{targets} targets, window {window}, stride {stride}"
        found = [tuple(int(x) for x in row) for row in answer(targets, window, stride)]
        if found == _rows(plan_windows(targets, window, stride)):
            continue
        scored = [i for _, first, stop in found for i in range(first, stop)]
        if found == _rows(published_windows(targets, window, stride)) or len(set(scored)) < len(scored):
            raise Misconception(f"some targets are scored more than once ({where}), as in the published scripts")
        if max(scored, default=-1) < targets - 1:
            raise Misconception(f"the tail is never scored ({where}): the last window may hold less than a stride")
        if max(scored) >= targets:
            raise Misconception(f"it scores targets that do not exist ({where}); text may end inside a window")
        if sorted(scored) != list(range(targets)):
            raise Misconception(f"some target is left out ({where}); who scores the first window's?")
        raise Misconception(f"each target is scored once, but starts or their number differ from the library ({where})")
    return "200 random plans, some shorter than a window, score every target once, with the windows of plan_windows"


def gap(answer: Callable[[Floats, Floats], Any]) -> str:
    """Judge ``answer(a, b) -> (low, high)``, the 95 % interval of the gap of losses of the same windows."""
    rng = np.random.default_rng()
    for n in rng.integers(5, 12, size=5):
        text = rng.normal(3, 0.5, n)  # windows differ much more than the two ways to score them
        a, b = text + rng.normal(-0.02, 0.008, n), text + rng.normal(0, 0.008, n)
        found = tuple(float(x) for x in answer(a.copy(), b.copy()))
        right, apart = paired_difference(a, b), welch(a, b)
        half = (right.high - right.low) / 2
        normal = half * stats.norm.ppf(0.975) / stats.t.ppf(0.975, n - 1)
        mistakes = {
            "the sign is turned round: asked is a minus b": (-right.high, -right.low),
            f"1.96 belongs to a known spread; yours comes from {n} windows": (right.mean - normal, right.mean + normal),
        }
        otherwise = f"{found[0]:.4f} to {found[1]:.4f} is not the interval of these {n} windows"
        if found[1] - found[0] > 0.6 * (apart.high - apart.low):
            otherwise = (
                "your interval holds the luck of the texts twice, as if a and b were scored on different windows; "
                "overlapping bars say nothing about a paired gap"
            )
        compare(found, (right.low, right.high), otherwise, mistakes, near=0.02)
    return (
        f"the windows' own spread cancels: in the last draw the paired interval is {2 * half:.3f} nats wide, the "
        f"unpaired one {apart.high - apart.low:.3f}"
    )


def _rows(windows: Windows) -> list[tuple[int, ...]]:
    return [tuple(map(int, row)) for row in zip(windows.starts, windows.first, windows.stop, strict=True)]


EXERCISES: dict[str, Callable[[Any], str]] = {"05.1": plan, "05.2": gap}
