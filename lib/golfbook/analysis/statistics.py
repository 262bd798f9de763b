"""Means, intervals and paired comparisons over seeds. Pure functions; intervals are Student's t.

A spread cannot be known from one value: the standard deviation and the interval of a single seed are NaN, never 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from golfbook.errors import ConfigError, nearest

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Summary:
    """Hold ``n`` values' mean, sample standard deviation (n-1) and the 95 % interval [low, high] of the mean."""

    n: int
    mean: float
    std: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Summary):
    """Hold the mean difference a - b over ``n`` pairs (or the smaller group) and its two-sided p value."""

    p_value: float


def describe(values: ArrayLike) -> Summary:
    """Return the summary of values, leaving out NaN; what cannot be computed from them is NaN."""
    given = _finite(values)
    n, mean = len(given), float(given.mean()) if len(given) else math.nan
    if n < 2:
        return Summary(n, mean, *[math.nan] * 3)
    std = float(given.std(ddof=1))
    half = float(stats.t.ppf(0.975, n - 1)) * std / n**0.5
    return Summary(n, mean, std, mean - half, mean + half)


def paired_difference(a: ArrayLike, b: ArrayLike) -> Difference:
    """Return what two conditions differ by, seed by seed: ``a[i]`` and ``b[i]`` share a seed. NaN are left out.

    Raises ValueError when the lengths differ.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired values must be of equal number, got {first.size} and {second.size}")
    found = describe(first - second)
    if found.n < 2:
        p_value = math.nan
    elif found.std == 0:
        p_value = 1.0 if found.mean == 0 else 0.0
    else:
        p_value = float(2 * stats.t.sf(abs(found.mean) / (found.std / found.n**0.5), found.n - 1))
    return Difference(**vars(found), p_value=p_value)


def welch(a: ArrayLike, b: ArrayLike) -> Difference:
    """Compare two independent groups of unequal variance (Welch 1947). ``std`` is that of the difference of means."""
    first, second = describe(a), describe(b)
    n, mean = min(first.n, second.n), first.mean - second.mean
    if n < 2:
        return Difference(n, mean, *[math.nan] * 4)
    error = (first.std**2 / first.n + second.std**2 / second.n) ** 0.5
    if error == 0:
        return Difference(n, mean, 0.0, mean, mean, 1.0 if mean == 0 else 0.0)
    test = stats.ttest_ind(_finite(a), _finite(b), equal_var=False)
    low, high = test.confidence_interval()
    return Difference(n, mean, float(error), float(low), float(high), float(test.pvalue))


def summarize(frame: pd.DataFrame, value: str, by: str) -> pd.DataFrame:
    """Return one row a group of ``by`` in order of appearance: the group, then n, mean, std, low, high of ``value``."""
    import pandas as pd

    rows = [{by: group, **vars(describe(part[value]))} for group, part in frame.groupby(by, sort=False, dropna=False)]
    return pd.DataFrame(rows, columns=[by, "n", "mean", "std", "low", "high"])


def paired_by_seed(frame: pd.DataFrame, value: str, a: str, b: str) -> Difference:
    """Compare variants ``a`` and ``b`` of a table of results over the seeds that both have.

    Raises :class:`ConfigError` where one of them has no values.
    """
    wide = frame.pivot_table(index="seed", columns="variant", values=value)
    for variant in (a, b):
        if variant not in wide:
            raise ConfigError(f"no values of '{value}' for the variant '{variant}'{nearest(variant, wide.columns)}")
    return paired_difference(wide[a], wide[b])


def spread_interval(std: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of the true spread, given the standard deviation of ``n`` normal values."""
    low, high = (std * ((n - 1) / stats.chi2.ppf(share, n - 1)) ** 0.5 for share in (0.975, 0.025))
    return float(low), float(high)


def power(difference: float, std: float, n: ArrayLike) -> np.ndarray:
    """Return the chance that ``n`` paired seeds show a true ``difference``: that their 95 % t-interval leaves 0 out.

    ``std`` is the standard deviation of the differences between equal seeds, ``n`` one number or several. This is the
    power of the two-sided paired t-test, as a mean over the spread that n differences may happen to have (scipy's
    noncentral t gives NaN for large shifts).
    """
    count = np.atleast_1d(np.asarray(n))
    shift = abs(difference) / max(std, 1e-12) * np.sqrt(count)
    limit = stats.t.ppf(0.975, count - 1)
    spread = np.sqrt(stats.chi2.ppf(((np.arange(1000) + 0.5) / 1000)[:, None], count - 1) / (count - 1))
    chance = stats.norm.sf(limit * spread - shift) + stats.norm.cdf(-limit * spread - shift)
    return np.asarray(chance.mean(axis=0))


def seeds_for(difference: float, std: float, *, most: int = 400) -> int:
    """Return the least number of paired seeds whose :func:`power` is 80 %; ``most`` where more are needed."""
    n = np.arange(2, most + 1)
    enough = n[power(difference, std, n) >= 0.8]
    return int(enough[0]) if len(enough) else most


def null_intervals(n: int, studies: int, seed: int = 0, *, errors: float = 0.0) -> np.ndarray:
    """Return the 95 % intervals, (studies, 2), of repeated studies of ``n`` seeds whose true difference is 0.

    Differences are normal with spread 1. The half width is Student's t times the standard error, or ``errors`` times it
    where that is given.
    """
    draws = np.random.default_rng(seed).standard_normal((studies, n))
    half = (errors or stats.t.ppf(0.975, n - 1)) * draws.std(axis=1, ddof=1) / n**0.5
    return draws.mean(axis=1)[:, None] + half[:, None] * np.array([-1.0, 1.0])


def spread_text(n: int, mean: float, std: float) -> str:
    """Return ``mean ± std`` of ``n`` values for tables; the spread of a single value is shown as a dash."""
    if n == 0:
        return "–"
    return f"{mean:.4f} ± " + (f"{std:.4f}" if n > 1 else "–")


def _finite(values: ArrayLike) -> np.ndarray:
    given = np.asarray(values, dtype=np.float64).ravel()
    return given[~np.isnan(given)]
