"""Pictures of seeds: scores of variants with intervals, and how many seeds a difference needs."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
import numpy as np
import pandas as pd

from golfbook.analysis.statistics import describe, power
from golfbook.plots.style import BLUE, CYCLE, GREY, LIGHT, RED, SKY, Look, Picture, new, styled


@styled
def seeds(table: pd.DataFrame, *, unigram_bpb: float | None = None, title: str = "Score of every seed") -> Picture:
    """Draw every seed of every variant as a dot, the mean with its 95 % t-interval, and lines that join equal seeds.

    ``table`` has the columns ``variant``, ``seed`` and ``val_bpb``, one row a run.
    """
    variants = list(dict.fromkeys(table["variant"]))
    counts = [int((table["variant"] == v).sum()) for v in variants]
    figure, (axes,) = new(width=max(6.5, 2.4 + 1.7 * len(variants)), height=4.4)
    for _, rows in table.groupby("seed", sort=True):
        points = sorted((variants.index(v), x) for v, x in zip(rows["variant"], rows["val_bpb"], strict=True))
        axes.plot([p[0] - 0.12 for p in points], [p[1] for p in points], color=LIGHT, linewidth=1.2, zorder=1)
    for index, variant in enumerate(variants):
        values = table.loc[table["variant"] == variant, "val_bpb"].to_numpy(float)
        colour = CYCLE[index % len(CYCLE)]
        axes.scatter([index - 0.12] * len(values), values, color=colour, s=46, zorder=3, edgecolor="white")
        summary = describe(values)
        half = summary.high - summary.mean if summary.n > 1 else None
        look: Look = {"marker": "D", "markersize": 7, "capsize": 6, "zorder": 3, "color": colour}
        axes.errorbar(index + 0.12, summary.mean, yerr=half, **look)
        axes.annotate(f"{summary.mean:.4f}", (index + 0.12, summary.mean), (10, -4), textcoords="offset points")
    axes.set_xticks(range(len(variants)), [f"{v}\nn = {n}" for v, n in zip(variants, counts, strict=True)])
    axes.set(ylabel="bits per byte (lower is better)", xlim=(-0.5, len(variants) - 0.25), title=title)
    axes.plot([], [], "o", color=GREY, label="one seed")
    words = " with 95 % t-interval" if max(counts, default=0) > 1 else " (one seed: no interval)"
    axes.plot([], [], "D-", color=GREY, label=f"mean{words}")
    if len(variants) > 1:
        axes.plot([], [], color=LIGHT, label="same seed")
    values = table["val_bpb"].to_numpy(float)
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
def seeds_needed(difference: float, std: float) -> Picture:
    """Draw :func:`golfbook.analysis.statistics.power` against the number of paired seeds, up to 24."""
    n = np.arange(2, 25)
    chance = power(difference, std, n)
    figure, (axes,) = new(width=8.5, height=3.6)
    axes.plot(n, chance, marker="o", color=BLUE)
    axes.axhline(0.8, color=GREY, linestyle="--", label="80 %, a usual demand")
    enough = n[chance >= 0.8]
    found = f"{enough[0]} seeds of each" if len(enough) else "more than 24 seeds of each"
    if len(enough):
        axes.scatter([enough[0]], chance[enough[0] - 2], s=130, facecolor="none", edgecolor=RED, linewidth=2, zorder=3)
    axes.set(xlabel="paired seeds n", ylabel="chance to show it", ylim=(0, 1.03), xlim=(1.5, 24.5))
    axes.set_title(f"A difference of {difference:.4f} with std {std:.4f} needs {found}")
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
    axes.legend(loc="lower right")
    return figure


@styled
def coverage(intervals: Mapping[int, np.ndarray], shown: int, *, rule: str = "mean ± t standard errors") -> Picture:
    """Draw the first ``shown`` intervals of studies without an effect, a column for each number of seeds.

    ``intervals`` maps n to (studies, 2), low and high; those that miss 0 are red.
    """
    figure, columns = new(len(intervals), width=9.5, height=4.6, sharey=True)
    for axes, (n, found) in zip(columns, intervals.items(), strict=True):
        low, high = found[:shown].T
        miss = (low > 0) | (high < 0)
        for these, colour, width in ((~miss, SKY, 1.1), (miss, RED, 2.0)):
            axes.hlines(np.flatnonzero(these) + 1, low[these], high[these], color=colour, linewidth=width)
        axes.axvline(0, color=GREY, linewidth=1.2)
        axes.set(xlim=(-6, 6), ylim=(0, len(found) + 1), xlabel="difference (spreads)")
        axes.set_title(f"n = {n}: {miss.sum()} of {len(low)} miss 0")
        axes.grid(axis="y", visible=False)
    columns[0].set_ylabel("repeated study")
    figure.suptitle(f"Studies without an effect, {rule}", x=0.01, ha="left")
    return figure
