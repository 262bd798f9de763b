"""Exercises of 01: the right answer is told to be right, and each likely mistake is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from golfbook.exercises.data import EXERCISES
from judged import right_and_open, wrong_because

SPACE = "\u2581"
CONTROL = ("<pad>", "<s>", "</s>", "<unk>")


def count(before: str, piece: str, boundaries: set[str]) -> int:
    if piece in CONTROL:
        return 0
    if piece.startswith("<0x"):
        return 1
    swallowed = piece.startswith(SPACE) and before in boundaries
    return len(piece.replace(SPACE, " ").encode()) - swallowed


def unigram(training: Any, scored: Any, pieces: int, size: int) -> float:
    share = (np.bincount(training, minlength=pieces) + 1) / (len(training) + pieces)
    return float(-np.log2(share[scored[1:]]).sum() / size)


def without_one(training: Any, scored: Any, pieces: int, size: int) -> float:
    return float(-np.log2((np.bincount(training, minlength=pieces) / len(training))[scored[1:]]).sum() / size)


def table(training: Any, pieces: int, more: float = 0.1) -> Any:
    counts = np.full((pieces, pieces), more)
    np.add.at(counts, (training[:-1], training[1:]), 1)
    return counts


def pairs(training: Any, pieces: int) -> Any:
    counts = table(training, pieces)
    return counts / counts.sum(axis=1, keepdims=True)


def pairs_before(training: Any, pieces: int) -> Any:
    return pairs(training[::-1], pieces)


def seen_pairs(training: Any, pieces: int) -> Any:
    counts = table(training, pieces, 0.0)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) + np.diag(counts.sum(axis=1) == 0)


RIGHT: dict[str, list[Any]] = {"01.1": [count], "01.2": [unigram], "01.3": [pairs]}
WRONG: list[tuple[str, Any, str]] = [
    ("01.1", lambda a, b, c: count("", b, set()), "the decoder swallows it"),
    ("01.1", lambda a, b, c: len(b.encode()), "is a spelling"),
    ("01.1", lambda a, b, c: 0 if b in CONTROL else len(b.encode()), "is a spelling"),
    ("01.1", lambda a, b, c: count(a, b.replace(SPACE, ""), c), "is not counted"),
    (
        "01.1",
        lambda a, b, c: 1 if b.startswith("<0x") else len(b) * (b not in CONTROL),
        "characters; the text is counted",
    ),
    ("01.1", lambda a, b, c: 1 if b == "<s>" else count(a, b, c), "BOS stands between"),
    ("01.1", lambda a, b, c: 99, "does not have 99 bytes"),
    ("01.2", without_one, "has no end"),
    ("01.2", lambda t, s, p, n: without_one(s[1:], s, p, n), "counted in the scored text itself"),
    ("01.2", lambda t, s, p, n: without_one(s, s, p, n), "counted in the scored text itself"),
    ("01.2", lambda t, s, p, n: unigram(s, s, p, n), "counted in the scored text itself"),
    ("01.2", lambda t, s, p, n: unigram(t, s, p, n) * np.log(2), "that is in nats"),
    ("01.2", lambda t, s, p, n: unigram(t, s, p, len(s) - 1), "that is per token"),
    ("01.2", lambda t, s, p, n: unigram(t, s, p, 1), "that is the sum"),
    ("01.2", lambda t, s, p, n: unigram(np.append(t, np.zeros(90_000, int)), s, p, n), "as dear as a uniform guess"),
    (
        "01.2",
        lambda t, s, p, n: unigram(np.append(t, np.tile(np.arange(p), 99)), s, p, n),
        "differs from counts.frequencies",
    ),
    ("01.3", lambda t, p: table(t, p) / table(t, p).sum(axis=0), "the columns add up to 1"),
    ("01.3", lambda t, p: table(t, p, 0.0) / table(t, p, 0.0).sum(axis=1, keepdims=True), "became 0/0"),
    ("01.3", lambda t, p: table(t, p) / table(t, p).sum(), "the whole matrix adds up to 1"),
    ("01.3", table, "row sums lie between"),
    ("01.3", seen_pairs, "is impossible there"),
    ("01.3", pairs_before, "rows and columns are exchanged"),
    ("01.3", lambda t, p: np.full((p, p), 1 / p), "do they count pairs"),
    ("01.3", lambda t, p: np.full(p, 1 / p), "a row and a column"),
]


@pytest.mark.parametrize("name", EXERCISES)
def test_the_right_answer_is_right_and_no_answer_is_open(name: str) -> None:
    for answer in RIGHT[name]:
        right_and_open(name, answer, times=5)


@pytest.mark.parametrize(("name", "answer", "reason"), WRONG)
def test_a_likely_mistake_is_named(name: str, answer: Any, reason: str) -> None:
    wrong_because(name, answer, reason, times=5)
