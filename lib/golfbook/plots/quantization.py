"""Pictures of quantisers: feedback, where bits go, a walk on a trellis, ways to store, spectra, a cap in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from golfbook.plots.style import BLACK, BLUE, CYCLE, GREEN, GREY, LIGHT, ORANGE, RED, SKY, Look, Picture, new, styled

Edge = tuple[int, int]  # the register before a weight, and the point that the weight takes
Survivors = Sequence[Mapping[int, tuple[float, Sequence[Edge]]]]  # after each weight: register -> (cost, walk)
ROUND: Look = {"marker": "o", "linestyle": "none", "zorder": 3}


def _names(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [name.removesuffix(".weight") for name in names], fontsize=8.5)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def _plain_log(axes: Axes, which: str) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(matplotlib.ticker.NullFormatter())


@styled
def feedback(table: pd.DataFrame, *, bits: int) -> Picture:
    """Draw what GPTQ does to two errors; ``table``: ``name``, ``plain``, ``weighted``, each over that of rounding."""
    figure, (axes,) = new(width=9.0, height=1.5 + 0.2 * len(table))
    y = np.arange(len(table))
    axes.hlines(y, table["weighted"], table["plain"], color=LIGHT, linewidth=3)
    axes.plot(table["weighted"], y, color=BLUE, label="error of the outputs, weighted by H", **ROUND)
    axes.plot(table["plain"], y, color=ORANGE, label="plain error of the weights", **ROUND | {"marker": "D"})
    axes.axvline(1, color=GREY, linewidth=1.2)
    axes.set(xscale="log", xlabel="squared error of GPTQ over that of rounding (log scale)")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    _plain_log(axes, "x")
    _names(axes, list(table["name"]))
    axes.set_title(f"{bits} bits, the same scales: the weights get worse, the outputs better")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def allocation(table: pd.DataFrame) -> Picture:
    """Draw bits a weight and slope of each tensor, before and after.

    ``table``: ``recipe`` (two, the one before first), ``name``, ``bits``, ``slope`` (millionths of a nat a kilobyte).
    """
    before, after = (rows.set_index("name") for _, rows in table.groupby("recipe", sort=False))
    labels = list(dict.fromkeys(table["recipe"]))
    names = list(before.index)
    figure, (left, right) = new(2, width=10.5, height=1.7 + 0.2 * len(names), sharey=True)
    y = np.arange(len(names))
    for axes, column in ((left, "bits"), (right, "slope")):
        axes.hlines(y, before[column], after.loc[names, column], color=LIGHT, linewidth=3)
        label = labels if axes is left else ("", "")
        axes.plot(before[column], y, color=ORANGE, label=label[0], **ROUND | {"marker": "D"})
        axes.plot(after.loc[names, column], y, color=BLUE, label=label[1], **ROUND)
        _names(axes, names)
    left.set(xlabel="entropy (bits a weight)", title="Where the bits go")
    spread = [float(rows["slope"].quantile(0.9) / rows["slope"].quantile(0.1)) for rows in (before, after)]
    right.set(xscale="log", xlabel="predicted loss that 1 kB more would save\n(millionths of a nat a token, log scale)")
    right.set_title(
        f"What a bit is worth there: 80 % of tensors\nwithin {spread[0]:,.0f}x before, {spread[1]:.1f}x after"
    )
    _plain_log(right, "x")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def trellis(weights: ArrayLike, history: Survivors, states: int) -> Picture:
    """Draw a Viterbi search: registers over weights with all survivors, and the points that the best walk takes.

    ``weights`` are in half steps; ``history`` holds after each of them the best walk into each register. A walk is a
    list of the register before a weight and the point taken.
    """
    w = np.asarray(weights, float)
    figure = Picture(figsize=(10.0, 6.0), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.3))
    for j, found in enumerate(history):
        for end, (_, walk) in found.items():
            top.plot([j, j + 1], [walk[-1][0], end], color=SKY, linewidth=1.2, zorder=1)
    cost, best = min(history[-1].values())
    last = next(end for end, (c, _) in history[-1].items() if c == cost)
    registers = [register for register, _ in best] + [last]
    for state in range(states):
        top.scatter(range(len(w) + 1), [state] * (len(w) + 1), s=18, color=LIGHT, zorder=2)
    top.plot(range(len(w) + 1), registers, color=BLUE, linewidth=3.2, zorder=3, label="the best walk")
    top.plot([], [], color=SKY, linewidth=1.2, label="survivors: the best way into each register")
    top.set(yticks=range(states), ylabel="register", ylim=(states - 0.5, -0.5))
    top.grid(visible=False)
    top.legend(loc="upper left", bbox_to_anchor=(0, 1.24), ncols=2)
    at, taken, rounded = np.arange(len(w)) + 0.5, np.array([p for _, p in best]), 2 * np.round(w / 2)
    low, high = int(min(w.min(), taken.min())) - 2, int(max(w.max(), taken.max())) + 3
    for j, (register, _) in enumerate(best):
        grid = np.arange(low, high)
        half = grid[grid % 2 == register % 2]
        bottom.hlines(half, j + 0.12, j + 0.88, color=GREEN if register % 2 else GREY, linewidth=1.0)
    bottom.plot(at, w, color=BLACK, **ROUND | {"marker": "x", "markersize": 8}, label="weight")
    hollow: Look = {"marker": "s", "markerfacecolor": "none", "markersize": 9}
    bottom.plot(at, rounded, color=ORANGE, **ROUND | hollow, label="rounded to even points")
    bottom.plot(at, taken, color=BLUE, **ROUND, label="point of the walk")
    for colour, words in ((GREY, "even points: register even"), (GREEN, "odd points: register odd")):
        bottom.plot([], [], color=colour, linewidth=1.0, label=words)
    bottom.set(xticks=at, ylabel="half steps", xlabel="weight")
    bottom.set_xticklabels([str(j + 1) for j in range(len(w))])
    bottom.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    bottom.grid(visible=False)
    bottom.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, fontsize=9)
    figure.suptitle(
        f"Squared error {cost:.2f} along the best walk, {((w - rounded) ** 2).sum():.2f} by rounding (half steps)",
        x=0.01, ha="left",
    )  # fmt: skip
    return figure


@styled
def gains(table: pd.DataFrame) -> Picture:
    """Draw the gain of trellises over rounding, in dB; ``table``: ``states``, ``gain``."""
    figure, (axes,) = new(width=7.5, height=2.9)
    bars = axes.bar([str(n) for n in table["states"]], table["gain"], width=0.55, color=BLUE)
    labels = [f"{gain:.2f} dB\n{gain / 6.02:.2f} bit" for gain in table["gain"]]
    axes.bar_label(bars, labels, label_type="center", color="white")
    axes.axhline(1.53, color=RED, linestyle="--", label="1.53 dB = 0.25 bit: all there is")
    axes.set(xlabel="states of the trellis", ylabel="gain (dB)", ylim=(0, 2.1))
    axes.set_title("Error saved at equal entropy, normal weights")
    axes.legend(loc="upper left", ncols=2)
    return figure


@styled
def ways(table: pd.DataFrame, rule: str, bits: float, coder: str) -> Picture:
    """Draw loss against bytes under one coder, a line a rule, one point in focus with all its coders.

    ``table``: ``rule``, ``bits``, ``coder``, ``bytes``, ``tax_bpb``, ``val_bpb``, ``divergence_bpb``.
    """
    figure, (left, right) = new(2, width=10.5, height=4.2, width_ratios=(1.7, 1))
    colours = dict(zip(dict.fromkeys(table["rule"]), CYCLE, strict=False))
    for (name, rows), marker in zip(
        table[table["coder"] == coder].groupby("rule", sort=False), "osD^vPX*", strict=False
    ):
        label = str(name).removesuffix(", xz")
        left.plot(rows["bytes"] / 1000, rows["divergence_bpb"], color=colours[name], marker=marker, label=label)
    mine = table[(table["rule"] == rule) & (table["bits"] == bits)].set_index("coder")
    one = mine.loc[coder]
    left.scatter([one["bytes"] / 1000], [one["divergence_bpb"]], s=190, facecolors="none", edgecolors=BLACK, zorder=4)
    left.set(yscale="log", xlabel=f"tensors coded by {coder} (kB)", ylabel="divergence (bits per byte, log scale)")
    left.set_title("Down and left is better; ring: this way")
    left.legend(fontsize=9)
    _plain_log(left, "y")
    shade = [BLUE if name == coder else LIGHT for name in mine.index]
    bars = right.barh(list(mine.index), mine["bytes"] / 1000, color=shade)
    right.bar_label(bars, [f"{size / 1000:.1f}" for size in mine["bytes"]], padding=3, fontsize=9)
    right.invert_yaxis()
    right.margins(x=0.18)
    right.grid(axis="y", visible=False)
    right.set(xlabel="kB", title="The same integers, other coders")
    figure.suptitle(
        f"{rule.removesuffix(', xz')}, {bits:g} bits, {coder}: {one['bytes']:,.0f} bytes, tax {one['tax_bpb']:+.4f}, "
        f"{one['val_bpb']:.4f} bits per byte", x=0.01, ha="left", fontsize=12,
    )  # fmt: skip
    return figure


@styled
def spectrum(curves: Mapping[str, ArrayLike], *, rank: int, name: str) -> Picture:
    """Draw singular values of matrices of one shape, of energy 1 each, and tell the share of the first ``rank``."""
    figure, (axes,) = new(width=8.5, height=3.8)
    looks = zip(curves.items(), (ORANGE, BLUE, BLACK), ("-", "-", "--"), strict=False)
    for (label, values), colour, line in looks:
        squares = np.asarray(values, float) ** 2 / (np.asarray(values, float) ** 2).sum()
        words = f"{label}: first {rank} hold {squares[:rank].sum():.1%}"
        axes.plot(np.arange(1, len(squares) + 1), squares**0.5, color=colour, linestyle=line, label=words)
    axes.axvline(rank + 0.5, color=GREY, linewidth=1.0)
    axes.set(xlabel="singular value, largest first", ylabel="size (share of the whole)", ylim=(0, None))
    axes.set_title(f"What quantising {name.removesuffix('.weight')} left")
    axes.legend(title="share of the squared error")
    return figure


@styled
def sources(table: pd.DataFrame) -> Picture:
    """Draw loss by calibration text, a dot a drawing; ``table``: ``source``, ``tax_bpb``, ``divergence_bpb``."""
    figure, panels = new(2, width=9.0, height=3.0, sharey=True)
    names = list(dict.fromkeys(table["source"]))
    for axes, column, words in zip(panels, ("divergence_bpb", "tax_bpb"), ("divergence", "tax"), strict=True):
        for index, name in enumerate(names):
            values = table.loc[table["source"] == name, column] * 1000
            axes.scatter(values, [index] * len(values), s=55, color=CYCLE[index], edgecolor="white", zorder=3)
        axes.set(xlabel=f"{words} (thousandths of a bit per byte)", ylim=(len(names) - 0.5, -0.5))
        axes.set_yticks(range(len(names)), names)
    panels[0].set_title("What the model's predictions move")
    panels[1].set_title("... and what that costs on this text")
    return figure


@styled
def meter(spent: Mapping[str, int], cap: int, *, bits: float, tax: float) -> Picture:
    """Draw expected bytes by kind against a cap; ``bits`` a weight and predicted ``tax`` are told in the title."""
    total = sum(spent.values())
    figure, (axes,) = new(width=9.5, height=2.8)
    start = 0
    for (name, size), colour in zip(spent.items(), (ORANGE, BLUE, GREEN, SKY, GREY), strict=True):
        axes.barh([0], [size / 1000], left=start / 1000, color=colour, height=0.5, label=f"{name}: {size:,}")
        start += size
    axes.axvline(cap / 1000, color=RED, linewidth=2.5)
    axes.annotate("cap", (cap / 1000, 0.42), (4, 0), textcoords="offset points", color=RED)
    axes.set(xlim=(0, 1.06 * max(total, cap) / 1000), ylim=(-0.4, 1.25), yticks=[], xlabel="kB")
    axes.grid(axis="y", visible=False)
    fits = f"fits, {cap - total:,} bytes left" if total <= cap else f"does NOT fit: {total - cap:,} bytes too many"
    axes.set_title(f"Cap {cap:,} bytes: {fits}\n{bits:.2f} bits a weight, predicted tax {tax:.4f} bits per byte")
    axes.legend(loc="upper left", ncols=3)
    return figure
