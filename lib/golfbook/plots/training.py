"""Pictures of training: published trajectories, sweeps and conditions over seeds.

Tables of results are tidy: scores have one row a run, differences one row a comparison;
:mod:`golfbook.analysis.comparisons` makes both from a study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from golfbook.analysis.comparisons import RUN, SYSTEMS
from golfbook.analysis.statistics import describe
from golfbook.plots.style import BLACK, BLUE, CYCLE, GREEN, GREY, ORANGE, PURPLE, RED, Look, Picture, new, styled

METRICS = {
    "val_bpb": "validation (bits per byte)",
    "val_loss": "validation loss (nats a token)",
    "train_loss": "training loss (nats a token)",
}
SYSTEM_COLOURS = dict(zip(SYSTEMS, (BLUE, RED, GREEN, PURPLE, GREY), strict=True))
COUNTS = {"tokens_seen": "trained tokens", "step": "optimiser step", "seconds": "training time (s)"}


@styled
def trajectories(points: pd.DataFrame, events: pd.DataFrame, runs: pd.DataFrame, *, metric: str = "val_bpb") -> Picture:
    """Draw published curves against steps (left) and hours of training (right), and events (below).

    The tables are ``trajectories.csv``, ``events.csv`` and ``runs.csv`` of ``runs/published``; ``metric`` is a key of
    :data:`METRICS`. The first validation, before any step, is left out. Below, a line a run: thick from the start of
    the warmdown, with a bar where snapshots and a square where the late-QAT switch began.
    """
    points = points.assign(hours=points["train_time_ms"] / 3.6e6, seed=points["seed"].fillna(-1))
    events = events.assign(seed=events["seed"].fillna(-1))
    shown = points[(points["metric"] == metric) & (points["step"] > 0)]
    systems = [name for name in SYSTEM_COLOURS if name in set(shown["system"])]
    runs_shown = dict.fromkeys(shown[RUN].itertuples(index=False, name=None))
    lines = sorted(runs_shown, key=lambda run: systems.index(run[0]))
    figure = Picture(figsize=(10.5, 6.0), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(3.2, 1))
    late = shown[shown["step"] >= 0.06 * shown.groupby(RUN)["step"].transform("max")]["value"]
    dot = "" if metric == "train_loss" else "o"
    for column, x in enumerate(("step", "hours")):
        curves, strip = figure.add_subplot(grid[0, column]), figure.add_subplot(grid[1, column])
        for row, key in enumerate(lines):
            colour = SYSTEM_COLOURS[key[0]]
            mine = shown[(shown[RUN] == key).all(axis=1)].sort_values("step")
            curves.plot(mine[x], mine["value"], color=colour, linewidth=1.2, alpha=0.75, marker=dot, markersize=3)
            its_events, its_points = (table[(table[RUN] == key).all(axis=1)] for table in (events, points))
            _draw_events(strip, row, its_events, its_points, x, colour)
        margin = 0.04 * float(late.max() - late.min())
        curves.set(ylim=(float(late.min()) - margin, float(late.max()) + margin), ylabel=METRICS[metric])
        curves.set_xlim(left=0)
        strip.set(xlim=curves.get_xlim(), ylim=(len(lines), -1), yticks=[])
        strip.set_xlabel("optimiser step" if x == "step" else "hours of training")
        curves.tick_params(labelbottom=False)
        strip.grid(axis="y", visible=False)
        curves.set_title("Against steps of 786,432 tokens" if x == "step" else "Against time, each on its own hardware")
    for name in systems:
        hardware = runs.loc[(runs["system"] == name) & runs["hardware"].notna(), "hardware"]
        label = f"{SYSTEMS[name]}, {hardware.iloc[0]}, {sum(key[0] == name for key in lines)} runs"
        figure.axes[0].plot([], [], color=SYSTEM_COLOURS[name], linewidth=2.5, label=label)
    figure.axes[0].legend(fontsize=9)
    for marker, size, label in (("", 0, "warmdown"), ("|", 11, "snapshots begin"), ("s", 5, "late-QAT switch")):
        look: Look = {"marker": marker, "markersize": size, "linewidth": 0 if marker else 4}
        figure.axes[2].plot([], [], color=BLACK, label=label, **look)
    figure.axes[2].legend(title="below: each run", title_fontsize=9, fontsize=9)
    figure.suptitle("Published training runs (facts of the pull requests, not of this project)", x=0.01, ha="left")
    return figure


def _draw_events(axes: Axes, row: int, events: pd.DataFrame, points: pd.DataFrame, x: str, colour: str) -> None:
    """Draw one run of the strip below :func:`trajectories`; steps become hours by its own logged times."""
    clock = points.drop_duplicates("step").sort_values("step")

    def place(step: float) -> float:
        return step if x == "step" else float(np.interp(step, clock["step"], clock["hours"]))

    at = {event: place(step) for event, step in zip(events["event"], events["step"], strict=True)}
    end = at.get("train_end", place(float(clock["step"].max())))
    axes.plot([0, end], [row, row], color=colour, linewidth=0.8)
    if "warmdown_start" in at:
        axes.plot([at["warmdown_start"], end], [row, row], color=colour, linewidth=3.5, alpha=0.5)
    for event, marker, size in (("swa_start", "|", 8), ("late_qat", "s", 3.5)):
        if event in at:
            axes.plot(at[event], row, marker=marker, color=BLACK, markersize=size)


@styled
def sweep(
    scores: pd.DataFrame, differences: pd.DataFrame, *, xlabel: str, title: str, against: str, base: float = 10
) -> Picture:
    """Draw a score over a setting, one line a series, and paired differences beside it.

    ``scores`` has the columns ``series``, ``x``, ``seed`` and ``val_bpb``, one row a run; every run is a dot, a line
    joins the means, bars are their 95 % t-intervals, and a ring marks the best mean of each series among those of all
    seeds. ``differences`` has ``label``, ``mean``, ``low``, ``high`` and ``n`` a comparison. ``base`` is that of the
    logarithmic axis, ``against`` says what the differences are.
    """
    figure, (left, right) = new(2, width=10.5, height=4.2, width_ratios=(1.35, 1))
    _draw_sweep(left, scores, xlabel=xlabel, base=base)
    left.set_title(title)
    _draw_differences(right, differences)
    right.set_title(against)
    return figure


@styled
def curves(curves: pd.DataFrame, variants: Sequence[str], *, x: str) -> Picture:
    """Draw validation curves of some variants: thin a seed, thick the mean.

    ``curves`` has ``variant``, ``seed``, ``step``, ``val_bpb`` and the columns of :data:`COUNTS`, one row a validation;
    ``x`` is a key of :data:`COUNTS`. The points before the third are cut off where they are high above the rest.
    """
    figure, (axes,) = new(width=8.4, height=4.0)
    low, top = np.inf, -np.inf
    for variant, colour in zip(dict.fromkeys(variants), CYCLE, strict=False):
        mine = curves[curves["variant"] == variant]
        for _, one in mine.groupby("seed"):
            axes.plot(one[x], one["val_bpb"], color=colour, linewidth=0.8, alpha=0.5)
        mean = mine.groupby("step")[[x, "val_bpb"]].mean()
        label = f"{variant} (n = {mine['seed'].nunique()})"
        axes.plot(mean[x], mean["val_bpb"], color=colour, marker="o", label=label)
        low, top = min(low, mine["val_bpb"].min()), max(top, mean["val_bpb"].iloc[:3].iloc[-1])
    margin = 0.08 * (top - low) + 1e-3
    axes.set(xlabel=COUNTS[x], ylabel="bits per byte", title="On the way (last point: the weights handed on)")
    axes.set_ylim(low - margin, top + margin)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1e4 else f"{value:g}"))
    axes.legend()
    return figure


@styled
def conditions(scores: pd.DataFrame, differences: pd.DataFrame, *, title: str, against: str) -> Picture:
    """Draw rows of conditions: every seed as a dot, mean, 95 % interval, and the paired difference from a reference.

    ``scores`` has ``label``, ``seed``, ``val_bpb`` and may have ``group``, which parts the rows and sets the colour;
    ``differences`` has ``label``, ``mean``, ``low``, ``high``, ``n`` for the rows that are compared, and ``group`` too
    where ``scores`` has. ``against`` says from what.
    """
    scores, differences = (t if "group" in t else t.assign(group="") for t in (scores, differences))
    rows = list(dict.fromkeys(scores[["group", "label"]].itertuples(index=False, name=None)))
    groups = list(dict.fromkeys(group for group, _ in rows))
    place = {row: index + 0.7 * groups.index(row[0]) for index, row in enumerate(rows)}
    figure, (left, right) = new(2, width=10.5, height=1.5 + 0.42 * (len(rows) + len(groups)), sharey=True)
    for (group, label), y in place.items():
        colour = CYCLE[groups.index(group) % len(CYCLE)]
        values = scores.loc[(scores["group"] == group) & (scores["label"] == label), "val_bpb"].to_numpy(float)
        left.plot(values, [y - 0.14] * len(values), "o", color=colour, alpha=0.45, markersize=6)
        summary = describe(values)
        half = _half(summary.low, summary.high)
        left.errorbar(summary.mean, y + 0.14, xerr=half, color=colour, marker="D", capsize=4, markersize=6)
        found = differences[(differences["group"] == group) & (differences["label"] == label)]
        if found.empty:
            right.plot(0, y, "D", color=GREY, markersize=6)
        for one in found.to_dict("records"):
            _draw_difference(right, y, one)
    counts = scores.groupby(["group", "label"], sort=False)["seed"].count()
    left.set_yticks(list(place.values()), [f"{label}  (n = {counts[group, label]})" for group, label in rows])
    for group in groups if len(groups) > 1 else []:
        top = min(y for (g, _), y in place.items() if g == group)
        place_of_name: Look = {"xycoords": ("axes fraction", "data"), "va": "center"}
        left.annotate(group, (0.0, top - 0.62), fontsize=10, fontweight="bold", **place_of_name)
    left.set_ylim(max(place.values()) + 0.6, -1.1 if len(groups) > 1 else -0.8)
    left.set(xlabel="bits per byte", title=title)
    right.set_title(against)
    _finish_differences(right)
    left.grid(axis="y", visible=False)
    left.xaxis.set_major_locator(MaxNLocator(5))
    return figure


@styled
def two_by_two(scores: pd.DataFrame, differences: pd.DataFrame, *, title: str, against: str) -> Picture:
    """Draw two remedies, without, with one, with both: a line a ``group`` over the ``label``, and paired differences.

    ``scores`` has ``group``, ``label``, ``seed`` and ``val_bpb`` of four cells, ``differences`` is as in :func:`sweep`.
    The first group and the first label are those without. The hollow mark is where both together would lie if what
    each alone removes added up.
    """
    figure, (left, right) = new(2, width=10.5, height=4.0, width_ratios=(1.2, 1))
    labels, groups = (list(dict.fromkeys(scores[name])) for name in ("label", "group"))
    means = scores.groupby(["group", "label"])["val_bpb"].mean()
    for group, colour in zip(groups, (ORANGE, BLUE), strict=True):
        mine = [scores.loc[(scores["group"] == group) & (scores["label"] == label), "val_bpb"] for label in labels]
        found = [describe(values) for values in mine]
        halves = np.concatenate([_half(one.low, one.high) for one in found], axis=1)
        left.errorbar(range(len(found)), [one.mean for one in found], yerr=halves, color=colour, marker="D", capsize=4)
        for x, values in enumerate(mine):
            left.plot([x - 0.06] * len(values), values, "o", color=colour, alpha=0.45, markersize=6)
        left.plot([], [], color=colour, marker="D", label=f"{group} (n = {found[0].n})")
    first, second = (means[group] for group in groups)
    added = first[labels[1]] + second[labels[0]] - first[labels[0]]
    left.plot(1, added, "o", mfc="none", mec=GREY, mew=2, markersize=11, label="both, if they added up")
    left.set_xticks(range(len(labels)), labels)
    left.set(xlim=(-0.4, 1.4), ylabel="bits per byte", title=title)
    left.legend(fontsize=9)
    _draw_differences(right, differences)
    right.set_title(against)
    return figure


def _draw_sweep(axes: Axes, scores: pd.DataFrame, *, xlabel: str, base: float) -> None:
    means = scores.groupby(["series", "x"])["val_bpb"].mean()
    low, middle = float(scores["val_bpb"].min()), float(means.median())
    top = low + 6.0 * max(middle - low, 1e-3)  # a diverged run must not flatten all the others
    for name, colour in zip(dict.fromkeys(scores["series"]), CYCLE, strict=False):
        mine = scores[scores["series"] == name]
        points = {x: describe(rows["val_bpb"]) for x, rows in mine.groupby("x")}
        axes.plot(mine["x"], mine["val_bpb"], "o", color=colour, mec="white", mew=0.5, markersize=5, zorder=4)
        halves = np.array([_half(p.low, p.high)[:, 0] for p in points.values()]).T
        counts = sorted({p.n for p in points.values()})
        label = f"{name} (n = {counts[0]}{'' if len(counts) == 1 else f' to {counts[-1]}'})"
        look: Look = {"marker": "D", "markersize": 5, "capsize": 4, "color": colour, "label": label}
        axes.errorbar(list(points), [p.mean for p in points.values()], yerr=halves, **look)
        edge = axes.get_xaxis_transform()
        words: Look = {"textcoords": "offset points", "ha": "center", "fontsize": 9, "color": colour}
        for x, point in points.items():
            if point.mean > top:
                axes.plot(x, 0.97, "^", color=colour, transform=edge, markersize=8)
                axes.annotate(f"{point.mean:.2f}", (x, 0.97), (0, -14), xycoords=edge, **words)
        best = min((at for at in points if points[at].n == counts[-1]), key=lambda at: points[at].mean)
        axes.plot(best, points[best].mean, "o", markersize=15, mfc="none", mec=colour, mew=2)
    shown = scores.loc[scores["val_bpb"] <= top, "val_bpb"]
    reach = float(shown.max()) - low or 0.01
    axes.set(ylim=(low - 0.08 * reach, float(shown.max()) + 0.14 * reach), xlabel=xlabel, ylabel="bits per byte")
    axes.set_xscale("log", base=base)
    if base == 2:
        axes.set_xticks(sorted(set(scores["x"])))
    else:
        axes.xaxis.set_major_locator(LogLocator(base, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(fontsize=9)


def _draw_differences(axes: Axes, differences: pd.DataFrame) -> None:
    if differences.empty:
        axes.text(0.5, 0.5, "nothing to compare", transform=axes.transAxes, ha="center", color=GREY)
        axes.set_axis_off()
        return
    records = differences.to_dict("records")
    for y, one in enumerate(records):
        _draw_difference(axes, y, one)
    labels = [f"{one['label']}\n(n = {one['n']} pairs)" for one in records]
    axes.set_yticks(range(len(differences)), labels, fontsize=9)
    axes.set_ylim(len(differences) - 0.5, -0.5)
    _finish_differences(axes)


def _finish_differences(axes: Axes) -> None:
    axes.axvline(0, color=BLACK, linewidth=0.9)
    axes.margins(x=0.16)  # room for the numbers at the outermost ones
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("difference in bits per byte, 95 % interval")
    axes.grid(axis="y", visible=False)


def _draw_difference(axes: Axes, y: float, one: Mapping[Any, Any]) -> None:
    """Draw green below zero, red above it, grey where the interval holds zero or cannot be known."""
    mean, low, high = one["mean"], one["low"], one["high"]
    colour = GREEN if high < 0 else RED if low > 0 else GREY
    axes.errorbar(mean, y, xerr=_half(low, high), color=colour, marker="o", markersize=7, capsize=4, linewidth=2.2)
    words = axes.annotate(f"{mean:+.4f}", (mean, y), (0, 8), textcoords="offset points", ha="center")
    words.set(fontsize=8.5, color=colour, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})


def _half(low: float, high: float) -> np.ndarray:
    """Return half the interval [low, high], twice, as error bars take it; NaN, which draws none, for one value."""
    return np.full((2, 1), (high - low) / 2)
