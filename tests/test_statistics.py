"""Statistics over seeds against hand values and scipy."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from golfbook.analysis.statistics import (
    describe,
    null_intervals,
    paired_by_seed,
    paired_difference,
    power,
    seeds_for,
    spread_interval,
    spread_text,
    summarize,
    welch,
)
from golfbook.errors import ConfigError

A = [2.10, 2.14, 2.09, 2.17]
B = [2.20, 2.18, 2.19, 2.30]


def test_describe_by_hand() -> None:
    summary = describe([1.0, 2.0, 3.0])
    assert (summary.n, summary.mean, summary.std) == (3, 2.0, 1.0)
    # t(0.975, 2) = 4.302653 from a printed table, standard error 1/sqrt(3)
    assert summary.high - 2.0 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert 2.0 - summary.low == pytest.approx(summary.high - 2.0)


def test_one_value_has_no_spread() -> None:
    summary = describe([2.5])
    assert (summary.n, summary.mean) == (1, 2.5)
    assert all(math.isnan(x) for x in (summary.std, summary.low, summary.high))
    assert spread_text(1, 2.5, math.nan) == "2.5000 ± –"
    assert spread_text(0, math.nan, math.nan) == "–"
    assert spread_text(2, 2.5, 0.0) == "2.5000 ± 0.0000"


def test_nan_is_left_out() -> None:
    assert describe([1.0, math.nan, 3.0]) == describe([1.0, 3.0])


def test_paired_difference_is_scipys() -> None:
    ours, theirs = paired_difference(A, B), stats.ttest_rel(A, B)
    interval = theirs.confidence_interval(0.95)
    assert ours.p_value == pytest.approx(theirs.pvalue)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high))
    assert ours.mean == pytest.approx(np.mean(A) - np.mean(B))


def test_paired_difference_without_spread() -> None:
    same = paired_difference([1.0, 2.0], [1.0, 2.0])
    assert (same.mean, same.p_value) == (0.0, 1.0)
    assert paired_difference([1.5, 2.5], [1.0, 2.0]).p_value == 0.0
    assert math.isnan(paired_difference([1.0], [2.0]).p_value)
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_difference([1.0, 2.0], [1.0])


def test_welch_by_its_formula() -> None:
    ours = welch(A, B)
    va, vb = np.var(A, ddof=1) / 4, np.var(B, ddof=1) / 4
    freedom = (va + vb) ** 2 / (va**2 / 3 + vb**2 / 3)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(va + vb)
    assert (ours.low, ours.high) == pytest.approx((ours.mean - half, ours.mean + half))
    assert ours.p_value == pytest.approx(2 * stats.t.sf(abs(ours.mean) / math.sqrt(va + vb), freedom))
    assert math.isnan(welch([1.0], B).low)


def test_summarize_and_pairing_by_seed() -> None:
    frame = pd.DataFrame(
        {
            "variant": ["b", "b", "a", "a", "a"],
            "seed": [2, 1, 1, 2, 3],
            "bpb": [2.4, 2.2, 2.1, 2.2, 9.0],
        }
    )
    table = summarize(frame, "bpb", "variant")
    assert list(table.columns) == ["variant", "n", "mean", "std", "low", "high"]
    assert list(table["variant"]) == ["b", "a"] and list(table["n"]) == [2, 3]
    assert table["mean"][0] == pytest.approx(2.3)
    difference = paired_by_seed(frame, "bpb", "a", "b")  # seed 3 has no partner
    assert (difference.n, difference.mean) == (2, pytest.approx(-0.15))
    with pytest.raises(ConfigError, match="variant 'c'"):
        paired_by_seed(frame, "bpb", "a", "c")


def test_spread_interval_of_two_seeds_is_wide() -> None:
    low, high = spread_interval(0.0015, 2)
    # chi-square with one degree of freedom, printed table: 5.0239 and 0.000982
    assert (low, high) == pytest.approx((0.0015 / 5.0239**0.5, 0.0015 / 0.000982**0.5), rel=1e-3)
    draws = np.random.default_rng(0).normal(0, 2.0, (2000, 5)).std(axis=1, ddof=1)
    inside = [low <= 2.0 <= high for low, high in (spread_interval(s, 5) for s in draws)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.02)


def test_power_is_that_of_scipys_noncentral_t() -> None:
    n = np.array([2, 3, 5, 9])
    shift, limit = 1.5 * np.sqrt(n), stats.t.ppf(0.975, n - 1)
    exact = stats.nct.sf(limit, n - 1, shift) + stats.nct.cdf(-limit, n - 1, shift)
    assert power(0.003, 0.002, n) == pytest.approx(exact, abs=2e-3)
    assert power(0.0, 0.002, 4)[0] == pytest.approx(0.05, abs=1e-3)
    needed = seeds_for(0.001, 0.001)
    assert power(0.001, 0.001, [needed - 1, needed]).round(2).tolist() == [0.75, 0.8]
    assert seeds_for(0.0001, 0.01, most=20) == 20


@pytest.mark.parametrize("n", [2, 4, 8])
def test_null_intervals_miss_as_often_as_they_promise(n: int) -> None:
    low, high = null_intervals(n, 20_000, seed=n).T
    assert ((low > 0) | (high < 0)).mean() == pytest.approx(0.05, abs=0.006)
    draws = np.random.default_rng(n).standard_normal((20_000, n))
    assert (low[0], high[0]) == pytest.approx((describe(draws[0]).low, describe(draws[0]).high))
    short, long = null_intervals(n, 20_000, seed=n, errors=2.0).T
    assert ((short > 0) | (long < 0)).mean() == pytest.approx(2 * stats.t.sf(2, n - 1), abs=0.01)
