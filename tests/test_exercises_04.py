"""Exercises of notebook 04: right answers pass, each named misconception is told apart, and `...` is open."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from golfbook.exercises.check import exercises, judge
from judged import right_and_open, wrong_because


def row(values: np.ndarray, bits: int, *, half: bool = True, levels: int = -1, zero: bool = True) -> tuple[Any, Any]:
    qmax = 2 ** (bits - 1) + levels
    scale = np.float32(np.abs(values).max()) / np.float32(qmax)
    if zero:
        scale = max(scale, np.float32(2.0**-24))
    scale = np.float32(np.float16(scale)) if half else np.float32(scale)
    return np.clip(np.round(values / scale), -qmax, qmax), scale


RIGHT = {
    "04.1": row,
    "04.2": lambda scales: (scales**2).mean() / 12,
    "04.3": lambda weights, code, limit: 8 * (limit - code) / weights,
}
WRONG = {
    "float32 scale": ("04.1", lambda w, b: row(w, b, half=False), "finer scale than the file holds"),
    "one level too many": ("04.1", lambda w, b: row(w, b, levels=0), "stays unused"),
    "zero row": ("04.1", lambda w, b: row(w, b, zero=False), "row of zeros"),
    "truncated": ("04.1", lambda w, b: (np.trunc(row(w, b)[0] * 0.99), row(w, b)[1]), "round to nearest"),
    "half the scale": ("04.1", lambda w, b: (row(w, b)[0], row(w, b)[1] / 3), "last level"),
    "one integer": ("04.1", lambda w, b: (1, row(w, b)[1]), "one integer a weight"),
    "largest error": ("04.2", lambda s: (s**2).mean() / 4, "largest possible error"),
    "root": ("04.2", lambda s: np.sqrt((s**2).mean() / 12), "root of the mean square"),
    "another law": ("04.2", lambda s: (s**2).mean(), "you predict"),
    "nominal bytes": ("04.3", lambda w, c, limit: 6 * w / 8, "stored as they are"),
    "bytes": ("04.3", lambda w, c, limit: (limit - c) / w, "bytes a weight"),
    "no code": ("04.3", lambda w, c, limit: 8 * limit / w, "code counts too"),
    "memorised": ("04.3", lambda w, c, limit: 4.94, "is not it"),
    "no function": ("04.3", 4.94, "TypeError"),
}


def test_every_exercise_has_a_right_answer_here() -> None:
    assert set(exercises("04")) == set(RIGHT) == {name for name, *_ in WRONG.values()}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("again", range(3))
def test_right_and_open(name: str, again: int) -> None:
    right_and_open(name, RIGHT[name])


@pytest.mark.parametrize("mistake", WRONG)
def test_misconceptions_are_named(mistake: str) -> None:
    wrong_because(*WRONG[mistake])


def test_the_reasons_state_what_was_found() -> None:
    assert "4.94 bits a weight" in judge("04.3", RIGHT["04.3"]).reason
    assert "19.3 MB; coded they take 4.69" in judge("04.3", RIGHT["04.3"]).reason
    times = int(judge("04.2", RIGHT["04.2"]).reason.split("err ")[1].split(" times")[0])
    assert times > 3
