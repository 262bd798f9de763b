"""Exercises of 02 Architecture: right answers are right, and each likely mistake is called by its name."""

from __future__ import annotations

import math
import random

import pytest
import torch

from judged import right_and_open, wrong_because


def first_moved(f, x, t, tolerance=None):
    changed = x.clone()
    changed[:, t:] += 1
    before, after = f(x), f(changed)
    equal = before == after if tolerance is None else torch.isclose(before, after, rtol=tolerance, atol=tolerance)
    moved = (~equal).any(-1)[0].nonzero()
    return int(moved[0]) if len(moved) else x.size(1)


def leaks(f, x):
    return any(first_moved(f, x, t) < t for t in range(1, x.size(1)))


def largest(gain, width, keys):
    logit = gain * math.sqrt(width)
    return 1 / (1 + (keys - 1) * math.exp(-2 * logit))


def softmax_of(top, rest, keys):
    return 1 / (1 + (keys - 1) * math.exp(rest - top))


def source(layers, block):
    stored = 2 * (layers // 2) - 1 - block
    return stored if block >= layers // 2 and stored >= 0 else None


def in_second_half(layers, block, found):
    return found if block >= layers // 2 else None


@pytest.mark.parametrize(("name", "answer"), [("02.1", leaks), ("02.2", largest), ("02.3", source)])
def test_right_and_open(name, answer):
    torch.set_num_threads(1)
    right_and_open(name, answer, times=5)


@pytest.mark.parametrize(
    ("name", "answer", "words"),
    [
        ("02.1", lambda f, x: any(first_moved(f, x, t) < t for t in (16, 32)), "inside a mini-batch of 16"),
        ("02.1", lambda f, x: first_moved(f, x, 47) < 47 or first_moved(f, x, 21) < 21, "at a single position"),
        ("02.1", lambda f, x: any(first_moved(f, x, t, 1e-5) < t for t in range(1, 48)), "a tolerance forgives"),
        ("02.1", lambda f, x: first_moved(f, x, 20) < 48, "looks back only"),
        ("02.1", lambda f, x: False, "inside a mini-batch"),
        ("02.2", lambda g, d, n: softmax_of(g, -g, n), "is not a cosine"),
        ("02.2", lambda g, d, n: softmax_of(g, 0, n), "longer than one"),
        ("02.2", lambda g, d, n: softmax_of(g * d**0.5, 0, n), "right angles"),
        ("02.2", lambda g, d, n: softmax_of(g * d, -g * d, n), "divides its logits"),
        ("02.2", lambda g, d, n: 1.0, "another weight"),
        ("02.2", 0.9999, "TypeError"),
        ("02.3", lambda n, b: in_second_half(n, b, b - n // 2), "does not come back first"),
        ("02.3", lambda n, b: in_second_half(n, b, n - 1 - b), "even number of blocks only"),
        ("02.3", lambda n, b: in_second_half(n, b, max(2 * (n // 2) - 1 - b, 0)), "nothing left on the stack"),
        ("02.3", lambda n, b: source(n, max(b, n // 2)), "gives and does not take"),
        ("02.3", lambda n, b: 3, "stored last"),
    ],
)
def test_mistakes_are_named(name, answer, words):
    torch.set_num_threads(1)
    random.seed(0)  # where the leak at one position lies
    wrong_because(name, answer, words)
