"""Exercises of 00: bits per byte from losses, and which of two models is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from golfbook.evaluate import scoring
from golfbook.exercises.check import Misconception

Array = np.ndarray[Any, Any]
EXAMPLE = ((3.1, 2.4), (4.2, 3.7))  # nats a token, bytes a token


def bits_from_nats(answer: Callable[[Array, Array], float]) -> str:
    """Judge ``answer(nats, sizes)``, one value a token, by :func:`golfbook.evaluate.scoring.bits_per_byte`."""
    luck = np.random.default_rng()
    for _ in range(5):
        nats = luck.uniform(0.1, 8.0, int(luck.integers(5, 40)))
        sizes = luck.integers(1, 7, len(nats))
        given = float(answer(nats.copy(), sizes.copy()))
        right = scoring.bits_per_byte(nats, int(sizes.sum()))
        if not np.isclose(given, right):
            raise Misconception(_why_not_bits(given, right, nats, sizes))
        nothing = np.append(sizes, 0)  # a BOS token stands for no text, and its loss counts all the same
        given = float(answer(np.append(nats, 3.0), nothing))
        if not np.isclose(given, scoring.bits_per_byte(np.append(nats, 3.0), int(sizes.sum()))):
            raise Misconception("a token of 0 bytes upsets it; its loss belongs into the sum as any other")
    return "scoring.bits_per_byte gives the same for texts drawn just now"


def _why_not_bits(given: float, right: float, nats: Array, sizes: Array) -> str:
    mistakes = {
        "that is the mean over tokens; the score is a sum over tokens, divided by something else": (
            np.mean(nats),
            np.mean(nats) / np.log(2),
        ),
        "ln 2 is multiplied where it must divide: a nat is more than a bit": (right * np.log(2) ** 2,),
        "these are nats per byte; what is a bit in nats?": (right * np.log(2),),
        "it averages the ratio of each token, so that a token of one byte weighs as much as one of six": (
            np.mean(nats / sizes),
            np.mean(nats / sizes) / np.log(2),
        ),
        "that is upside down: bytes per bit": (1 / right,),
        "that is the sum alone, in bits; a text twice as long would get twice as much": (
            right * sizes.sum(),
            nats.sum(),
        ),
    }
    for reason, values in mistakes.items():
        if any(np.isclose(given, value) for value in values):
            return reason
    return f"it gives {given:.4g} where scoring.bits_per_byte gives {right:.4g}"


def better_model(answer: Callable[[float, float, float, float], str]) -> str:
    """Judge ``answer(nats_a, bytes_a, nats_b, bytes_b)``, "A" or "B", by the library's bits per byte of both."""
    luck = np.random.default_rng()
    drawn = [tuple(zip(luck.uniform(2, 5, 2), luck.uniform(1.5, 5, 2), strict=True)) for _ in range(60)]
    pairs = [EXAMPLE, *drawn]
    scores = np.array([[_score(*one) for one in pair] for pair in pairs])
    given = [str(answer(*a, *b)) for a, b in pairs]
    if not set(given) <= {"A", "B"}:
        raise Misconception('return "A" or "B", whichever model is better')
    right = np.where(scores[:, 0] < scores[:, 1], "A", "B")
    if (right == given).all():
        first, second = scores[0]
        return f"per byte A costs {first:.2f} bits and B {second:.2f}: B says more with each token"
    rules = {
        "the lower loss per token wins there; one model's tokens may be shorter than the other's": [
            "A" if a[0] < b[0] else "B" for a, b in pairs
        ],
        "the longer tokens win there, whatever they cost": ["A" if a[1] > b[1] else "B" for a, b in pairs],
        "the higher score wins there; bits per byte are a cost": ["B" if side == "A" else "A" for side in right],
        "the lower product of loss and bytes wins there; more bytes must share the cost, not add to it": [
            "A" if a[0] * a[1] < b[0] * b[1] else "B" for a, b in pairs
        ],
    }
    for reason, sides in rules.items():
        if given == sides:
            raise Misconception(reason)
    wrong = int((right != given).sum())
    raise Misconception(f"it chooses the worse model in {wrong} of {len(pairs)} pairs")


def _score(nats: float, size: float) -> float:
    tokens = 10_000
    return scoring.bits_per_byte(np.full(tokens, nats), round(tokens * size))


EXERCISES: dict[str, Callable[[Any], str]] = {"00.1": bits_from_nats, "00.2": better_model}
