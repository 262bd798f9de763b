"""Exercises of 00: the right answer is told to be right, and each likely mistake is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from golfbook.exercises.tour import EXERCISES
from judged import right_and_open, wrong_because

LN2 = np.log(2)


def bits(nats: Any, sizes: Any) -> float:
    return float(nats.sum() / LN2 / sizes.sum())


def better(nats_a: float, bytes_a: float, nats_b: float, bytes_b: float) -> str:
    return "A" if nats_a / bytes_a < nats_b / bytes_b else "B"


RIGHT: dict[str, Any] = {"00.1": bits, "00.2": better}
WRONG: list[tuple[str, Any, str]] = [
    ("00.1", lambda nats, sizes: nats.mean() / LN2, "mean over tokens"),
    ("00.1", lambda nats, sizes: nats.mean(), "mean over tokens"),
    ("00.1", lambda nats, sizes: nats.sum() * LN2 / sizes.sum(), "ln 2 is multiplied"),
    ("00.1", lambda nats, sizes: nats.sum() / sizes.sum(), "nats per byte"),
    ("00.1", lambda nats, sizes: (nats / sizes).mean() / LN2, "ratio of each token"),
    ("00.1", lambda nats, sizes: 1 / bits(nats, sizes), "upside down"),
    ("00.1", lambda nats, sizes: nats.sum() / LN2, "the sum alone"),
    ("00.1", lambda nats, sizes: bits(nats[sizes > 0], sizes), "a token of 0 bytes"),
    ("00.1", lambda nats, sizes: 2 * bits(nats, sizes), "where scoring.bits_per_byte gives"),
    ("00.1", lambda nats: 1.0, "your answer stops with TypeError"),
    ("00.2", lambda na, ba, nb, bb: "A" if na < nb else "B", "the lower loss per token wins"),
    ("00.2", lambda na, ba, nb, bb: "A" if ba > bb else "B", "the longer tokens win"),
    ("00.2", lambda *given: {"A": "B", "B": "A"}[better(*given)], "the higher score wins"),
    ("00.2", lambda na, ba, nb, bb: "A" if na * ba < nb * bb else "B", "more bytes must share the cost"),
    ("00.2", lambda *given: "B", "the worse model in"),
    ("00.2", lambda *given: 1.64, 'return "A" or "B"'),
]


@pytest.mark.parametrize("name", EXERCISES)
def test_the_right_answer_is_right_and_no_answer_is_open(name: str) -> None:
    right_and_open(name, RIGHT[name], times=5)


@pytest.mark.parametrize(("name", "answer", "reason"), WRONG)
def test_a_likely_mistake_is_named(name: str, answer: Any, reason: str) -> None:
    wrong_because(name, answer, reason, times=5)
