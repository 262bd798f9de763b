"""Exercises of notebook 05: right answers pass, each named misconception is told apart, and `...` is open."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from golfbook.evaluate.windows import published_windows
from golfbook.exercises.check import exercises
from judged import right_and_open, wrong_because


def plan(targets: int, window: int, stride: int, *, tail: bool = True, clip: bool = True) -> list[tuple[int, int, int]]:
    rows = [(0, 0, min(window, targets) if clip else window)]
    while rows[-1][2] < targets and (tail or rows[-1][2] + stride <= targets):
        start, done = rows[-1][0] + stride, rows[-1][2]
        rows.append((start, done, min(start + window, targets) if clip else start + window))
    return rows


def published(targets: int, window: int, stride: int) -> list[tuple[int, ...]]:
    found = published_windows(targets, window, stride)
    return [tuple(row) for row in zip(found.starts, found.first, found.stop, strict=True)]


def by_division(targets: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """One window for every whole stride of the text: the last targets are forgotten."""
    rows = plan(targets, window, stride)
    return rows[: max(1, (targets - window) // stride + 1)]


def skips_the_first(targets: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    (start, _, stop), *rest = plan(targets, window, stride)
    return [(start, max(0, stop - stride), stop), *rest]


def interval(a: np.ndarray, b: np.ndarray, half: float) -> tuple[float, float]:
    return (a - b).mean() - half, (a - b).mean() + half


def t_half(values: np.ndarray) -> Any:
    return stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5


RIGHT = {"05.1": plan, "05.2": lambda a, b: interval(a, b, t_half(a - b))}
WRONG = {
    "lost tail": ("05.1", lambda n, w, s: plan(n, w, s, tail=False), "tail is never scored"),
    "division": ("05.1", by_division, "tail is never scored"),
    "published": ("05.1", published, "more than once"),
    "beyond the end": ("05.1", lambda n, w, s: plan(n, w, s, clip=False), "do not exist"),
    "first window": ("05.1", skips_the_first, "left out"),
    "other starts": ("05.1", lambda n, w, s: [(a + 1, b, c) for a, b, c in plan(n, w, s)], "starts or their number"),
    "unpaired": ("05.2", lambda a, b: tuple(stats.ttest_ind(a, b, equal_var=False).confidence_interval()), "luck of"),
    "bars": ("05.2", lambda a, b: interval(a, b, t_half(a) + t_half(b)), "overlapping bars"),
    "normal": ("05.2", lambda a, b: interval(a, b, 1.96 * (a - b).std(ddof=1) / len(a) ** 0.5), "1.96"),
    "sign": ("05.2", lambda a, b: interval(b, a, t_half(a - b)), "a minus b"),
    "a point": ("05.2", lambda a, b: interval(a, b, 0.0), "is not the interval"),
}


def test_every_exercise_has_a_right_answer_here() -> None:
    assert set(exercises("05")) == set(RIGHT) == {name for name, *_ in WRONG.values()}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("again", range(3))
def test_right_and_open(name: str, again: int) -> None:
    right_and_open(name, RIGHT[name])


@pytest.mark.parametrize("mistake", WRONG)
@pytest.mark.parametrize("again", range(3))
def test_misconceptions_are_named(mistake: str, again: int) -> None:
    wrong_because(*WRONG[mistake])
