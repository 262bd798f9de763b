"""Models that only count: probabilities add up, pairs are those of the text, and vocabularies share one text."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from golfbook.analysis import counts
from golfbook.data.dataset import unigram_bits_per_byte

TOKENS = np.array([1, 4, 2, 4, 2, 1, 4, 0, 1, 4, 2], np.uint16)


def test_frequencies_count_targets_and_one_more() -> None:
    assert counts.frequencies(TOKENS, 6).tolist() == [2 / 16, 3 / 16, 4 / 16, 1 / 16, 5 / 16, 1 / 16]


def test_pairs_are_counted_and_nothing_is_impossible() -> None:
    pairs = counts.Pairs(TOKENS, 6)
    share = counts.frequencies(TOKENS, 6)
    after = pairs.after(4)  # 2, 2, 0, 2 follow it
    expected = (np.array([1, 0, 3, 0, 0, 0]) + counts.PRIOR * share) / (4 + counts.PRIOR)
    np.testing.assert_allclose(after, expected)
    np.testing.assert_allclose(pairs.after(5), share)  # never seen: as likely as everywhere
    table = np.array([pairs.after(token) for token in range(6)])
    np.testing.assert_allclose(table.sum(axis=1), 1.0)
    text = np.array([1, 4, 3, 5, 5], np.uint16)
    bits = -sum(math.log2(table[a, b]) for a, b in itertools.pairwise(text))
    assert pairs.bits_per_byte(text, 7) == pytest.approx(bits / 7)


def test_pairs_of_a_repeated_text_cost_almost_nothing() -> None:
    stream = np.tile(np.arange(5, 25, dtype=np.uint16), 2000)
    assert counts.Pairs(stream, 30).bits_per_byte(stream, len(stream)) < 0.02
    assert unigram_bits_per_byte(stream, len(stream)) == pytest.approx(math.log2(20), abs=1e-3)


def test_vocabularies_score_one_text() -> None:
    luck = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "array", "vector", "matrix"]
    texts = [" ".join(luck.choice(words, 30)) for _ in range(40)]
    table = counts.vocabularies(texts[:30], texts[30:], [290, 300])
    assert table["pieces"].tolist() == [290, 300]
    np.testing.assert_allclose(table["bits_per_byte"] * table["bytes_per_token"], table["bits_per_token"])
    assert table["bytes_per_token"].is_monotonic_increasing
