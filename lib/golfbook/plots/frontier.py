"""Pictures of size against quality: fronts, what each change saves, what the bytes are, and what fits a budget."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from golfbook.plots.style import BLACK, BLUE, GREEN, GREY, LIGHT, ORANGE, PURPLE, RED, SKY, Look, Picture, new, styled

COLOURS = (RED, ORANGE, GREEN, BLUE, PURPLE, SKY, BLACK)
MARKERS = "osD^vPX"
PARTS = (BLUE, SKY, GREEN, ORANGE, RED, GREY, LIGHT)


@styled
def front(
    table: pd.DataFrame, names: Mapping[str, str], memoryless: pd.DataFrame | None = None, *, title: str = ""
) -> Picture:
    """Draw artifact bytes against divergence, a line a recipe: means with 95 % intervals, dominated points grey.

    ``table`` is that of :func:`golfbook.analysis.frontier.front`; ``names`` are the recipes to draw, in order, with
    their labels. ``memoryless`` (recipe, kilobytes, mean) is drawn dashed: bytes that no file here has.
    """
    figure, (axes,) = new(width=9.0, height=5.0)
    for i, (recipe, label) in enumerate(names.items()):
        rows = table[table["recipe"] == recipe].sort_values("kilobytes")
        if rows.empty:
            continue
        colour, marker = COLOURS[i], MARKERS[i]
        axes.plot(rows["kilobytes"], rows["mean"], color=colour, linewidth=1.6)
        for dominated, mine in rows.groupby("dominated"):
            _points(axes, mine, LIGHT if dominated else colour, marker, colour)
        axes.plot([], [], color=colour, marker=marker, markersize=7, label=label)
        ideal = memoryless[memoryless["recipe"] == recipe] if memoryless is not None else rows.iloc[:0]
        if len(ideal):
            look: Look = {"color": colour, "linestyle": "--", "linewidth": 1.2}
            axes.plot(ideal["kilobytes"], ideal["mean"], **look, label="the same, ideal memoryless coder (computed)")
    _points(axes, table.iloc[:0], LIGHT, "o", GREY, label="dominated: another is smaller and better")
    axes.set(yscale="log", xlabel="artifact (thousand bytes)", ylabel="divergence from the float model (bits per byte)")
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.set_title(title)
    axes.legend(loc="upper right")
    return figure


def _points(axes: Axes, rows: pd.DataFrame, face: str, marker: str, edge: str, label: str = "") -> None:
    look: Look = {"fmt": marker, "color": edge, "markerfacecolor": face, "markersize": 7, "capsize": 3, "zorder": 3}
    across = [rows["kilobytes"] - rows["kb_low"], rows["kb_high"] - rows["kilobytes"]]
    up = [rows["mean"] - rows["low"], rows["high"] - rows["mean"]]
    axes.errorbar(rows["kilobytes"], rows["mean"], xerr=across, yerr=up, elinewidth=1.0, label=label, **look)


@styled
def steps(table: pd.DataFrame, *, title: str = "") -> Picture:
    """Draw what each change does to the bytes at equal quality, in percent, a bar each with interval and n.

    ``table`` is that of :func:`golfbook.analysis.frontier.steps_apart`; those beside the way are grey, the last row is
    the whole way.
    """
    figure, (axes,) = new(width=9.0, height=1.3 + 0.36 * len(table))
    y = np.arange(len(table)) + 0.4 * (np.arange(len(table)) == len(table) - 1)
    change, half = (table["mean"] - 1) * 100, (table["high"] - table["mean"]) * 100
    colours = [BLUE if stays else LIGHT for stays in table["stays"]]
    colours[-1] = GREEN
    axes.barh(y, change, color=colours, edgecolor=[GREY if c == LIGHT else c for c in colours], height=0.7)
    axes.errorbar(change, y, xerr=half, fmt="none", color=BLACK, capsize=3, linewidth=1.2)
    ends = np.maximum(change + half.fillna(0), 0)
    for place, end, value, error in zip(y, ends, change, half, strict=True):
        words = f"{value:+.1f} %" + (f" ± {error:.1f}" if np.isfinite(error) else "")
        axes.annotate(words, (end, place), (6, -4), textcoords="offset points", fontsize=9.5)
    axes.axvline(0, color=GREY, linewidth=1.2)
    axes.set_yticks(y, [f"{name} (n = {n})" for name, n in zip(table["change"], table["n"], strict=True)])
    low, high = float((change - half.fillna(0)).min()), float(ends.max())
    axes.set(ylim=(y[-1] + 0.6, -0.6), xlim=(low * 1.05, high + 0.3 * (high - low)))
    axes.set_xlabel("change of the artifact's bytes at equal divergence (%)")
    for colour, label in ((BLUE, "on the way"), (LIGHT, "beside the way"), (GREEN, "the whole way")):
        axes.barh([0], [0], color=colour, edgecolor=GREY if colour == LIGHT else colour, label=label)
    figure.legend(loc="outside lower right", ncols=3)
    axes.grid(axis="y", visible=False)
    axes.set_title(title)
    return figure


@styled
def lengths(table: pd.DataFrame, names: Mapping[tuple[str, str], str]) -> Picture:
    """Draw the bytes of ours over those of others against training length, with 95 % intervals.

    ``table`` is that of :func:`golfbook.analysis.frontier.by_length`; ``names`` maps (reference, size) to a label.
    """
    figure, (axes,) = new(width=8.0, height=4.0)
    found = sorted(set(table["steps"]))
    for i, ((reference, size), label) in enumerate(names.items()):
        rows = table[(table["reference"] == reference) & (table["size"] == size)].sort_values("steps")
        x = [found.index(steps) + 0.06 * (i - (len(names) - 1) / 2) for steps in rows["steps"]]
        look: Look = {"color": COLOURS[i], "marker": MARKERS[i], "markersize": 7, "capsize": 4}
        axes.errorbar(x, rows["mean"], yerr=(rows["high"] - rows["mean"]), label=label, **look)
    axes.axhline(1, color=GREY, linestyle=":")
    axes.set_xticks(range(len(found)), [f"{steps:,}" for steps in found])
    axes.set(xlabel="training steps", ylabel="bytes, ours over theirs", xlim=(-0.4, len(found) - 0.6))
    axes.set_title("Bytes at equal divergence: below 1 ours is smaller")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), title="compared with")
    figure.set_figwidth(10.0)
    return figure


@styled
def slopes(table: pd.DataFrame, fits: pd.DataFrame, names: Mapping[str, str], weights: int) -> Picture:
    """Draw divergence against bits a weight, every model's artifacts and a dotted line that falls as 4^-bits.

    ``table`` has a row an artifact, ``fits`` is that of :func:`golfbook.analysis.frontier.slopes`.
    """
    figure, (axes,) = new(width=9.5, height=4.4)
    fitted = fits.set_index("recipe")
    for i, (recipe, label) in enumerate(names.items()):
        rows = table[(table["recipe"] == recipe) & (table["divergence_bpb"] > 0)]
        if rows.empty:
            continue
        bits = 8 * rows["artifact_bytes"] / weights
        axes.scatter(bits, rows["divergence_bpb"], color=COLOURS[i], marker=MARKERS[i], s=26)
        logs = np.log2(rows["divergence_bpb"])
        mean = fitted.loc[recipe]
        ends = np.array([bits.min(), bits.max()])
        axes.plot(ends, 2 ** (logs.mean() - mean["mean"] * (ends - bits.mean())), color=COLOURS[i], linewidth=1.4)
        words = f"{label}:\n{mean['mean']:.2f} octaves a bit"
        if mean["n"] > 1:
            words += f" [{mean['low']:.2f}, {mean['high']:.2f}], n = {mean['n']:.0f}"
        axes.plot([], [], color=COLOURS[i], marker=MARKERS[i], label=words)
    low, high = axes.get_xlim()
    bottom, top = axes.get_ylim()
    axes.plot([low, high], [top, top * 4 ** (low - high)], color=GREY, linestyle=":", label="4^-bits: 2 octaves a bit")
    axes.set(yscale="log", ylim=(max(bottom, table["divergence_bpb"].clip(lower=1e-7).min() / 2), top * 1.5))
    axes.set_title("Each dot is an artifact; lines are fitted")
    axes.set(xlabel="bits a weight, whole artifact", ylabel="divergence (bits per byte)", xlim=(low, high))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9.5)
    return figure


@styled
def parts(table: pd.DataFrame, names: Mapping[str, str], kinds: tuple[str, ...]) -> Picture:
    """Draw what the bytes of artifacts are, a stacked bar each. ``table``: recipe and a column of bytes a kind."""
    rows = table.set_index("recipe").reindex([name for name in names if name in set(table["recipe"])]).reset_index()
    figure, (axes,) = new(width=9.5, height=1.6 + 0.62 * len(rows))
    _stacked(axes, rows, kinds)
    for i, total in enumerate(rows[list(kinds)].sum(axis=1) / 1000):
        axes.annotate(f"{total:.0f}", (total, i), (5, -4), textcoords="offset points", fontweight="bold")
    axes.set_yticks(np.arange(len(rows)), [names[recipe] for recipe in rows["recipe"]])
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel="thousand bytes", title="What the bytes of artifact and code are")
    axes.margins(x=0.08)
    figure.legend(loc="outside lower left", ncols=len(kinds), fontsize=9, columnspacing=1.0, handlelength=1.2)
    return figure


def _stacked(axes: Axes, rows: pd.DataFrame, kinds: tuple[str, ...], height: float = 0.65) -> None:
    """Draw a bar a row at its number, with the thousand bytes of each kind that has room for them."""
    left, room = np.zeros(len(rows)), 0.05 * float(rows[list(kinds)].sum(axis=1).max()) / 1000
    for kind, colour in zip(kinds, PARTS, strict=False):
        size = rows[kind].to_numpy(float) / 1000
        axes.barh(rows.index, size, left=left, color=colour, edgecolor="white", height=height, label=kind)
        for place, start, width in zip(rows.index, left, size, strict=True):
            if width > room:
                shade = "white" if colour in (BLUE, RED, GREY, GREEN) else BLACK
                look: Look = {"ha": "center", "va": "center", "fontsize": 9, "color": shade}
                axes.text(start + width / 2, place, f"{width:.0f}", **look)
        left += size
    axes.grid(axis="y", visible=False)


@styled
def within(table: pd.DataFrame, names: Mapping[str, str], kinds: tuple[str, ...], budget: float) -> Picture:
    """Draw which artifacts of one model fit a budget (thousand bytes, code included), and what the best are made of.

    ``table`` has recipe, bits, divergence_bpb and a column of bytes a kind. The best that fits is circled.
    """
    table = table.assign(total=table[list(kinds)].sum(axis=1) / 1000)
    fits = table["total"] <= budget
    best = table[fits].nsmallest(1, "divergence_bpb")
    chosen = []
    figure, (left, right) = new(2, width=11.0, height=4.6, width_ratios=(1, 1.15))
    for i, recipe in enumerate(names):
        mine = table["recipe"] == recipe
        for rows, colour in ((table[mine & fits], COLOURS[i]), (table[mine & ~fits], LIGHT)):
            left.scatter(rows["total"], rows["divergence_bpb"], color=colour, marker=MARKERS[i], s=40, zorder=2)
        own = table[mine & fits].nsmallest(1, "divergence_bpb")
        chosen.append(own.set_axis([i] * len(own)))
        words, look = "nothing fits", Look(color=GREY)
        for row in own.itertuples():
            words = f"{names[recipe]}: {row.bits:g} bits, {row.total:.0f} kB, divergence {row.divergence_bpb:.2g}"
            look = {"fontweight": "bold" if row.Index in best.index else "normal"}
        right.text(0, i - 0.4, words if len(own) else f"{names[recipe]}: {words}", fontsize=9, va="center", **look)
    _stacked(right, pd.concat(chosen), kinds, height=0.5)
    left.scatter(best["total"], best["divergence_bpb"], s=240, facecolors="none", edgecolors=RED, linewidths=2)
    for axes in (left, right):
        axes.axvline(budget, color=GREY, linestyle="--")
        axes.set_xlabel("artifact and code (thousand bytes)")
    left.set(yscale="log", ylabel="divergence (bits per byte)", title="In colour: what fits; circled: the best")
    left.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    right.set(ylim=(len(names) - 0.6, -0.7), xlim=(0, float(table["total"].max()) * 1.03), yticks=[])
    right.set_title(f"The best of each below {budget:,.0f} kB")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower left", ncols=len(kinds), fontsize=9)
    return figure
