"""Exercises of 00: bits per byte from losses, and which of two models is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from golfbook.evaluate import scoring
from golfbook.exercises.check import Misconception, compare

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
        units = np.array([1, 1 / np.log(2)])  # in nats, in bits
        mistakes = {
            "that is the mean over tokens; the score is a sum over tokens, divided by something else": nats.mean(),
            "it averages the ratio of each token, so that a token of one byte weighs as much as one of six": (
                (nats / sizes).mean()
            ),
            "that is the sum alone, in bits; a text twice as long would get twice as much": nats.sum(),
        }
        mistakes = {reason: units * value for reason, value in mistakes.items()} | {
            "ln 2 is multiplied where it must divide: a nat is more than a bit": right * np.log(2) ** 2,
            "these are nats per byte; what is a bit in nats?": right * np.log(2),
            "that is upside down: bytes per bit": 1 / right,
        }
        otherwise = f"it gives {given:.4g} where scoring.bits_per_byte gives {right:.4g}"
        compare(given, right, otherwise, mistakes, rtol=1e-5)
        more, nothing = np.append(nats, 3.0), np.append(sizes, 0)  # BOS stands for no text, and its loss counts
        right, words = scoring.bits_per_byte(more, int(sizes.sum())), "its loss belongs into the sum as any other"
        compare(float(answer(more, nothing)), right, f"a token of 0 bytes upsets it; {words}", rtol=1e-5)
    return "scoring.bits_per_byte gives the same for texts drawn just now"


def better_model(answer: Callable[[float, float, float, float], str]) -> str:
    """Judge ``answer(nats_a, bytes_a, nats_b, bytes_b)``, "A" or "B", by the library's bits per byte of both."""
    luck = np.random.default_rng()
    drawn = [tuple(zip(luck.uniform(2, 5, 2), luck.uniform(1.5, 5, 2), strict=True)) for _ in range(60)]
    pairs = [EXAMPLE, *drawn]
    scores = np.array([[scoring.bits_per_byte(np.full(10_000, n), round(10_000 * b)) for n, b in p] for p in pairs])
    given = [str(answer(*a, *b)) for a, b in pairs]
    if not set(given) <= {"A", "B"}:
        raise Misconception('return "A" or "B", whichever model is better')
    right = np.where(scores[:, 0] < scores[:, 1], "A", "B")
    if (right == given).all():
        first, second = scores[0]
        return f"per byte A costs {first:.2f} bits and B {second:.2f}: B says more with each token"
    nats, sizes = np.array(pairs).transpose(2, 0, 1)  # (pairs, 2) each
    costs = {  # what a rule holds against a model
        "the lower loss per token wins there; one model's tokens may be shorter than the other's": nats,
        "the longer tokens win there, whatever they cost": -sizes,
        "the higher score wins there; bits per byte are a cost": -scores,
        "the lower product of loss and bytes wins there; more bytes must share the cost, not add to it": nats * sizes,
    }
    for reason, cost in costs.items():
        if (np.where(cost[:, 0] < cost[:, 1], "A", "B") == given).all():
            raise Misconception(reason)
    raise Misconception(f"it chooses the worse model in {(right != given).sum()} of {len(pairs)} pairs")


EXERCISES: dict[str, Callable[[Any], str]] = {"00.1": bits_from_nats, "00.2": better_model}
