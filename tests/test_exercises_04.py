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


def megabyte(
    weights: int, budget: int, before: float, tax: float, bits: float, power: float = 4
) -> tuple[float, float]:
    width = 8 * budget / weights
    return width, before + tax * power ** (bits - width)


RIGHT = {
    "04.1": row,
    "04.2": lambda scales: (scales**2).mean() / 12,
    "04.3": lambda weights, code, limit: 8 * (limit - code) / weights,
    "04.4": lambda g, factor, s0: s0 / (g.sqrt()[:, None] * factor.diagonal()),
    "04.5": megabyte,
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
    "no root": ("04.4", lambda g, f, s0: s0 / (g[:, None] * f.diagonal()), "four times the gradient halves"),
    "L for 1/L": ("04.4", lambda g, f, s0: s0 * f.diagonal() / g.sqrt()[:, None], "multiply by L"),
    "g for 1/g": ("04.4", lambda g, f, s0: s0 * g.sqrt()[:, None] / f.diagonal(), "multiply by the gradient"),
    "no feedback": ("04.4", lambda g, f, s0: s0 / (g.sqrt()[:, None] * (f.T @ f).diagonal().sqrt()), "cannot repair"),
    "L squared": ("04.4", lambda g, f, s0: s0 / (g.sqrt()[:, None] * f.diagonal() ** 2), "one power of L"),
    "no s0": ("04.4", lambda g, f, s0: 1 / (g.sqrt()[:, None] * f.diagonal()), "differ from the library's"),
    "one step a row": ("04.4", lambda g, f, s0: s0 / g.sqrt(), "has shape (16, 24)"),
    "bytes for bits": ("04.5", lambda w, b, *rest: (b / w, megabyte(w, b, *rest)[1]), "asked were bits"),
    "another width": ("04.5", lambda w, b, *rest: (4.0, 1.5), "are not 4 bits each"),
    "error for loss": ("04.5", lambda *given: megabyte(*given, power=2), "grows with its square"),
    "upside down": ("04.5", lambda *given: megabyte(*given, power=1 / 4), "does the opposite"),
    "tax alone": ("04.5", lambda w, b, f, t, n: (8 * b / w, megabyte(w, b, 0, t, n)[1]), "the tax alone"),
    "tax as measured": ("04.5", lambda w, b, f, t, n: (8 * b / w, f + t), "another width than"),
    "nothing added": ("04.5", lambda w, b, f, t, n: (8 * b / w, f), "does not lead to"),
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
