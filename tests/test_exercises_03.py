"""Exercises of 03: the right answer is told to be right, and each likely mistake is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from golfbook.exercises.check import judge
from golfbook.exercises.training import EXERCISES
from golfbook.train.muon import QUINTIC
from judged import right_and_open, wrong_because


def iterate(x: Tensor) -> Tensor:
    a, b, c = QUINTIC
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def right_newton_schulz(matrix: Tensor) -> Tensor:
    return iterate(matrix / (matrix.norm() + 1e-7))


def in_place(matrix: Tensor) -> Tensor:
    return iterate(matrix.div_(matrix.norm() + 1e-7))


def right_straight_through(weight: Tensor, quantise: Callable[[Tensor], Tensor]) -> Tensor:
    return weight + (quantise(weight) - weight).detach()


RIGHT: dict[str, list[Any]] = {
    "03.1": [right_newton_schulz, lambda m: right_newton_schulz(m.mT).mT],
    "03.2": [lambda steps, share: share ** (1 / steps), lambda steps, share: math.exp(math.log(share) / steps)],
    "03.3": [right_straight_through, lambda w, quantise: quantise(w).detach() + w - w.detach()],
}
WRONG: list[tuple[str, Any, str]] = [
    ("03.1", iterate, "run away along the polynomial"),
    ("03.1", lambda m: iterate(m / m.norm()), "0/0"),
    ("03.1", lambda m: iterate(m / (torch.linalg.matrix_norm(m, 2) + 1e-7)), "largest singular value"),
    ("03.1", lambda m: right_newton_schulz(m).mT if m.size(0) > m.size(1) else right_newton_schulz(m), "wide or tall"),
    ("03.1", lambda m: iterate(m / (m.norm() + 0.0015)) if m.norm() < 99 else iterate(m / 100), "thousand times"),
    ("03.1", lambda m: right_newton_schulz(m) * 0.5, "singular values end between"),
    ("03.1", in_place, "changes the gradient"),
    ("03.2", lambda steps, share: 1 - 1 / steps, "exp(-1)"),
    ("03.2", lambda steps, share: 1 - share ** (1 / steps), "a larger decay would do"),
    ("03.2", lambda steps, share: 1 - math.log(1 / share) / steps, "a larger decay would do"),
    ("03.2", lambda steps, share: 1 - share / steps, "shrinks by the factor beta"),
    ("03.2", lambda steps, share: 1.5, "between 0 and 1"),
    ("03.3", lambda w, quantise: quantise(w), "round is flat"),
    ("03.3", lambda w, quantise: w + quantise(w) - w, "round is flat"),
    ("03.3", lambda w, quantise: quantise(w).detach(), "everything on the way is detached"),
    ("03.3", lambda w, quantise: w, "still sees the exact weights"),
    ("03.3", lambda w, quantise: (w + quantise(w)) / 2, "neither"),
    ("03.3", lambda w, quantise: 2 * w + (quantise(w) - 2 * w).detach(), "not the one at the stored weights"),
]


@pytest.mark.parametrize("name", EXERCISES)
def test_open_until_answered(name: str) -> None:
    assert judge(name, ...).state == "open"


@pytest.mark.parametrize(("name", "answer"), [(name, answer) for name in RIGHT for answer in RIGHT[name]])
def test_right_answers_are_right(name: str, answer: Any) -> None:
    right_and_open(name, answer)


@pytest.mark.parametrize(("name", "answer", "words"), WRONG, ids=[f"{name}-{words}" for name, _, words in WRONG])
def test_wrong_answers_name_the_mistake(name: str, answer: Any, words: str) -> None:
    wrong_because(name, answer, words)
