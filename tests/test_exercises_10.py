"""Exercises of notebook 10: right answers pass, each named misconception is told apart, and `...` is open."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from scipy import stats

from golfbook.analysis.statistics import describe, power
from golfbook.exercises.check import exercises, judge
from judged import right_and_open, wrong_because


def paired(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    found = describe(a - b)
    return found.low, found.high


def unpaired(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    return tuple(stats.ttest_ind(a, b, equal_var=False).confidence_interval())


def overlap(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    one, two = describe(a), describe(b)
    return one.low - two.high, one.high - two.low


def seeds(difference: float, spreads: Mapping[str, float], score: str = "tax") -> int:
    return next(n for n in range(2, 500) if power(difference, spreads[score], n)[0] >= 0.8)


def normal(difference: float, spreads: Mapping[str, float]) -> int:
    return math.ceil((2.8 * spreads["tax"] / difference) ** 2)


RIGHT = {"10.1": lambda a, b: (paired(a, b), unpaired(a, b)), "10.2": lambda k: 1 - 0.95**k, "10.3": seeds}
WRONG = {
    "overlap": ("10.1", lambda a, b: (paired(a, b), overlap(a, b)), "bars overlap"),
    "never paired": ("10.1", lambda a, b: (unpaired(a, b), unpaired(a, b)), "share a seed"),
    "sign": ("10.1", lambda a, b: (paired(b, a), unpaired(b, a)), "a minus b"),
    "twice paired": ("10.1", lambda a, b: (paired(a, b), paired(a, b)), "not Welch's"),
    "no width": ("10.1", lambda a, b: ((0.0, 0.0), unpaired(a, b)), "is not"),
    "one look": ("10.2", lambda k: 0.05, "one look"),
    "sum": ("10.2", lambda k: 0.05 * k, "adding gives"),
    "none": ("10.2", lambda k: 0.95**k, "none looks real"),
    "memorised": ("10.2", lambda k: 0.6926, "it is not"),
    "wrong spread": ("10.3", lambda d, s: seeds(d, s, "final score"), "cannot change what training drew"),
    "normal": ("10.3", normal, "too few"),
    "too many": ("10.3", lambda d, s: seeds(d, s) + 1, "are enough"),
}


def test_every_exercise_has_a_right_answer_here() -> None:
    assert set(exercises("10")) == set(RIGHT) == {name for name, *_ in WRONG.values()}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("again", range(3))
def test_right_and_open(name: str, again: int) -> None:
    right_and_open(name, RIGHT[name])


@pytest.mark.parametrize("mistake", WRONG)
@pytest.mark.parametrize("again", range(3))
def test_misconceptions_are_named(mistake: str, again: int) -> None:
    wrong_because(*WRONG[mistake])


def test_the_simulation_agrees_with_the_formula() -> None:
    share = float(judge("10.2", RIGHT["10.2"]).reason.split("each, ")[1].split("%")[0])
    assert share == pytest.approx(69.3, abs=3)
