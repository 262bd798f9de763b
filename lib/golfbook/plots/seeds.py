"""Pictures of seeds: scores of variants with intervals, and how many seeds a difference needs."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
from scipy import stats

from golfbook.analysis.statistics import describe
from golfbook.plots.style import BLUE, CYCLE, GREY, LIGHT, RED, Picture, new, styled


@styled
def seeds(
    table: pd.DataFrame,
    *,
    value: str = "val_bpb",
    label: str = "bits per byte (lower is better)",
    unigram_bpb: float | None = None,
    title: str = "",
) -> Picture:
    """Every seed of every variant as a dot, the mean with its 95 % t-interval, and lines that join equal seeds.

    ``table`` has the columns ``variant``, ``seed`` and ``value``, one row a run.
    """
    variants = list(dict.fromkeys(table["variant"]))
    counts = [int((table["variant"] == v).sum()) for v in variants]
    figure, (axes,) = new(width=max(6.5, 2.4 + 1.7 * len(variants)), height=4.4)
    for _, rows in table.groupby("seed", sort=True):
        points = sorted((variants.index(v), x) for v, x in zip(rows["variant"], rows[value], strict=True))
        axes.plot([p[0] - 0.12 for p in points], [p[1] for p in points], color=LIGHT, linewidth=1.2, zorder=1)
    for index, variant in enumerate(variants):
        values = table.loc[table["variant"] == variant, value].to_numpy(float)
        colour = CYCLE[index % len(CYCLE)]
        axes.scatter([index - 0.12] * len(values), values, color=colour, s=46, zorder=3, edgecolor="white")
        summary = describe(values)
        axes.errorbar(
            index + 0.12,
            summary.mean,
            yerr=summary.high - summary.mean if summary.n > 1 else None,
            color=colour,
            marker="D",
            markersize=7,
            capsize=6,
            zorder=3,
        )
        axes.annotate(f"{summary.mean:.4f}", (index + 0.12, summary.mean), (10, -4), textcoords="offset points")
    axes.set_xticks(range(len(variants)), [f"{v}\nn = {n}" for v, n in zip(variants, counts, strict=True)])
    axes.set(ylabel=label, xlim=(-0.5, len(variants) - 0.25), title=title or "Score of every seed")
    axes.plot([], [], "o", color=GREY, label="one seed")
    many = max(counts, default=0) > 1
    axes.plot(
        [], [], "D-", color=GREY, label="mean" + (" with 95 % t-interval" if many else " (one seed: no interval)")
    )
    if len(variants) > 1:
        axes.plot([], [], color=LIGHT, label="same seed")
    values = table[value].to_numpy(float)
    if len(values) and np.ptp(values) == 0:
        axes.set_ylim(values[0] - 0.01, values[0] + 0.01)
    if unigram_bpb is not None:
        low, high = axes.get_ylim()
        if low < unigram_bpb < high:
            axes.axhline(unigram_bpb, color=GREY, linestyle="--", label=f"unigram entropy {unigram_bpb:.3f}")
        else:
            axes.plot([], [], " ", label=f"unigram entropy {unigram_bpb:.3f}: off the scale")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.set_figwidth(figure.get_figwidth() + 2.2)
    return figure


@styled
def seeds_needed(difference: float, std: float, *, most: int = 24) -> Picture:
    """Chance that n paired seeds show a true ``difference``: that their 95 % t-interval leaves 0 out.

    ``std`` is the standard deviation of the differences between equal seeds; this is the power of the two-sided
    paired t-test.
    """
    n = np.arange(2, most + 1)
    shift = abs(difference) / max(std, 1e-12) * np.sqrt(n)
    limit = stats.t.ppf(0.975, n - 1)
    # mean over the spread s that the n differences may happen to have; scipy's noncentral t gives NaN for large shifts
    spread = np.sqrt(stats.chi2.ppf(((np.arange(1000) + 0.5) / 1000)[:, None], n - 1) / (n - 1))
    chance = (stats.norm.sf(limit * spread - shift) + stats.norm.cdf(-limit * spread - shift)).mean(axis=0)
    figure, (axes,) = new(width=8.5, height=3.6)
    axes.plot(n, chance, marker="o", color=BLUE)
    axes.axhline(0.8, color=GREY, linestyle="--", label="80 %, a usual demand")
    enough = n[chance >= 0.8]
    found = f"{enough[0]} seeds of each" if len(enough) else f"more than {most} seeds of each"
    if len(enough):
        axes.scatter([enough[0]], chance[enough[0] - 2], s=130, facecolor="none", edgecolor=RED, linewidth=2, zorder=3)
    axes.set(xlabel="paired seeds n", ylabel="chance to show it", ylim=(0, 1.03), xlim=(1.5, most + 0.5))
    axes.set_title(f"A difference of {difference:.4f} with std {std:.4f} needs {found}")
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    axes.legend(loc="lower right")
    return figure
