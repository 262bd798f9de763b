"""Exercises of notebook 13: right answers pass, each named misconception is told apart, and `...` is open."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from golfbook.analysis import frontier
from golfbook.exercises.check import exercises, judge
from judged import right_and_open, wrong_because


def pareto(sizes: np.ndarray, taxes: np.ndarray) -> list[bool]:
    points = list(zip(sizes, taxes, strict=True))
    return [not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points) for x, y in points]


def strict(sizes: np.ndarray, taxes: np.ndarray) -> list[bool]:
    points = list(zip(sizes, taxes, strict=True))
    return [not any(a < x and b < y for a, b in points) for x, y in points]


def neighbours(sizes: np.ndarray, taxes: np.ndarray) -> np.ndarray:
    order = np.lexsort((taxes, sizes))
    kept = np.ones(len(sizes), bool)
    for before, after in itertools.pairwise(order):
        kept[after] = taxes[after] <= taxes[before]
    return kept


def twinless(sizes: np.ndarray, taxes: np.ndarray) -> list[bool]:
    points = list(zip(sizes, taxes, strict=True))
    return [sum(a <= x and b <= y for a, b in points) == 1 for x, y in points]


def width(bits: np.ndarray, sizes: np.ndarray, taxes: np.ndarray, floor_size: float, floor_tax: float) -> Any:
    return np.interp(-np.log(floor_tax), -np.log(taxes), bits)


RIGHT = {"13.1": pareto, "13.2": width, "13.3": lambda size, weights: 8 * size / weights}
WRONG = {
    "ties kept": ("13.1", strict, "equal size and more tax"),
    "neighbours": ("13.1", neighbours, "its neighbour in size"),
    "itself": ("13.1", lambda s, t: np.zeros(len(s), bool), "does not dominate itself"),
    "twins": ("13.1", twinless, "both stay"),
    "all": ("13.1", lambda s, t: np.ones(len(s), bool), "dominated points are kept"),
    "one for all": ("13.1", lambda s, t: True, "one each"),
    "nominal": ("13.2", lambda b, s, t, size, tax: 6, "equal nominal bits"),
    "same size": ("13.2", lambda b, s, t, size, tax: np.interp(size, s, b), "of the same size"),
    "linear": ("13.2", lambda b, s, t, size, tax: np.interp(-tax, -t, b), "the tax is not"),
    "nearest": ("13.2", lambda b, s, t, size, tax: b[np.abs(np.log(t / tax)).argmin()], "interpolate"),
    "memorised": ("13.2", lambda b, s, t, size, tax: 4.2345, "is not reached"),
    "bytes": ("13.3", lambda size, weights: size / weights, "bytes a weight"),
    "mebibytes": ("13.3", lambda size, weights: 8 * size * 2**20 / 1e6 / weights, "1,000,000 bytes"),
    "upside down": ("13.3", lambda size, weights: weights / size / 8, "upside down"),
    "memorised bits": ("13.3", lambda size, weights: 0.2228, "bits a weight"),
}


def test_every_exercise_has_a_right_answer_here() -> None:
    assert set(exercises("13")) == set(RIGHT) == {name for name, *_ in WRONG.values()}


@pytest.mark.parametrize("name", RIGHT)
def test_right_and_open(name: str) -> None:
    right_and_open(name, RIGHT[name], times=3)


@pytest.mark.parametrize("mistake", WRONG)
def test_misconceptions_are_named(mistake: str) -> None:
    wrong_because(*WRONG[mistake], times=3)


def test_the_reasons_state_what_was_found() -> None:
    assert "1 MB is 0.223 bits" in judge("13.3", RIGHT["13.3"]).reason
    table = frontier.read_table()
    one = table[table["steps"] == 1600]
    worth = frontier.needed(one, frontier.NO_FLOOR, frontier.ANCHOR, size="bits").mean()
    assert f"has the divergence of {worth:.2f} bits" in judge("13.2", RIGHT["13.2"]).reason
