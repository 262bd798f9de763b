"""Pictures as pure functions: data in, one matplotlib ``Figure`` out, nothing shown and no global state touched.

This module holds the style, the way figures are saved, and the pictures of training and of seeds. Pictures of text and
scoring are in :mod:`golfbook.text_figures`, those of weights and bytes in :mod:`golfbook.size_figures`.

A figure is returned as :class:`Picture`, which draws itself when it is the last value of a notebook cell, once, with or
without ``%matplotlib``. Colours are those of Okabe and Ito (2008), which people of any common colour vision can tell
apart.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from scipy import stats

from golfbook.config import TrainConfig
from golfbook.errors import GolfbookError
from golfbook.files import atomic_path, atomic_write_bytes, figures_root
from golfbook.schedules import schedule_table
from golfbook.statistics import describe

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, RED, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY, LIGHT = "#6B6B6B", "#DDDDDD"
CYCLE = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, BLACK, YELLOW)

STYLE: Any = {  # the type of matplotlib's settings differs between its versions
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 11,
    "axes.prop_cycle": cycler(color=CYCLE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.unicode_minus": True,
    "figure.constrained_layout.use": True,
    "figure.titlesize": 13,
    "figure.titleweight": "bold",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "grid.color": "#E8E8E8",
    "legend.fontsize": 10,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "golfbook",
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
}
DPI = 100

P = ParamSpec("P")


class Picture(Figure):
    """A matplotlib figure that shows itself in a notebook without pyplot."""

    def _repr_png_(self) -> bytes:
        return png(self)


def styled(draw: Callable[P, Picture]) -> Callable[P, Picture]:
    """Run a drawing function under the house style, whatever the caller's rcParams are."""

    @functools.wraps(draw)
    def inner(*args: P.args, **kwargs: P.kwargs) -> Picture:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            return draw(*args, **kwargs)

    return inner


def new(columns: int = 1, *, width: float = 9.0, height: float = 3.8, **grid: Any) -> tuple[Picture, list[Axes]]:
    """An empty picture of ``width`` x ``height`` inches with its axes in one row (more with ``nrows`` in ``grid``)."""
    figure = Picture(figsize=(width, height), layout="constrained")
    axes = figure.subplots(ncols=columns, squeeze=False, **grid)
    return figure, list(axes.flat)


def png(figure: Figure, dpi: int = DPI) -> bytes:
    """The figure as PNG bytes; equal data gives equal bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def save(figure: Figure, name: str, table: pd.DataFrame | None = None) -> list[Path]:
    """Write ``<name>.png``, ``<name>.svg`` and, with a ``table``, ``<name>.csv`` into the figures folder; return them.

    The files hold no dates, so that equal data gives equal bytes. Each is written atomically. Raises
    :class:`GolfbookError` for a name with a path in it, :class:`RunError` where the disk refuses.
    """
    if Path(name).name != name or name.startswith("."):
        raise GolfbookError(f"figure name '{name}' must be a plain file name without a folder or an extension")
    folder = figures_root()
    written = [folder / f"{name}.png", folder / f"{name}.svg"]
    atomic_write_bytes(written[0], png(figure, dpi=150))
    with atomic_path(written[1]) as path, matplotlib.rc_context(STYLE):
        figure.savefig(path, format="svg", metadata={"Date": None})
    if table is not None:
        written.append(folder / f"{name}.csv")
        atomic_write_bytes(written[2], table.to_csv(index=False, lineterminator="\n").encode())
    return written


@styled
def training_curve(
    metrics: Sequence[Mapping[str, Any]],
    *,
    steps: int = 0,
    unigram_bpb: float | None = None,
    title: str = "",
) -> Picture:
    """Loss of every logged step, bits per byte of every validation, and the learning-rate scale below.

    ``metrics`` are the points of ``metrics.jsonl``: ``kind`` "train" with ``step``, ``loss`` (nats a token) and
    ``lr_scale``, ``kind`` "validation" with ``step`` and ``val_bpb``. ``steps`` is the planned number of steps (0: up
    to the last point). ``unigram_bpb`` draws the score of a model that knows only how often each token occurs.
    """
    train = [p for p in metrics if p["kind"] == "train"]
    validation = [p for p in metrics if p["kind"] == "validation"]
    figure = Picture(figsize=(9.0, 4.4), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(4, 1))
    loss, scale, score = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0]), figure.add_subplot(grid[:, 1])
    last = max([steps, 1, *(p["step"] for p in metrics)])
    x = [p["step"] for p in train]
    loss.plot(x, [p["loss"] for p in train], color=BLUE, label="training batch", marker="." if len(x) < 30 else None)
    scales = [p["lr_scale"] for p in train]
    scale.fill_between([0, *x], [*scales[:1], *scales] or [0], color=ORANGE, alpha=0.5, linewidth=0)
    where = [p["step"] for p in validation]
    bpb = [p["val_bpb"] for p in validation]
    score.plot(where, bpb, color=GREEN, marker="o", label="validation text")
    if unigram_bpb is not None:
        score.axhline(unigram_bpb, color=GREY, linestyle="--", label=f"unigram entropy {unigram_bpb:.3f}")
    if bpb:
        score.annotate(f"{bpb[-1]:.3f}", (where[-1], bpb[-1]), (3, 7), textcoords="offset points")
    for axes in (loss, score):
        if not len(np.asarray(axes.lines[0].get_xdata())):
            axes.text(0.5, 0.5, "no point yet", transform=axes.transAxes, ha="center", color=GREY)
            axes.set_yticks([])
    loss.set(ylabel="loss (nats per token)", title="Training loss", xlim=(0, last))
    loss.tick_params(labelbottom=False)
    scale.set(xlabel="optimiser step", ylabel="LR scale", xlim=(0, last), ylim=(0, 1.1), yticks=(0, 1))
    score.set(xlabel="optimiser step", ylabel="bits per byte", title="Held-out text", xlim=(0, last * 1.12))
    if validation:
        score.legend()
    done = max((p["step"] for p in metrics), default=0)
    figure.suptitle(title or f"Training: step {done} of {last}", x=0.01, ha="left")
    return figure


@styled
def schedule(lr_scale: ArrayLike, momentum: ArrayLike, ema_decay: float) -> Picture:
    """Learning-rate scale and Muon momentum of every step, and what each step weighs in the averaged weights.

    ``lr_scale`` and ``momentum`` have one value a step, the steps 0, 1, ... in order.
    """
    scale, mu = np.asarray(lr_scale, float), np.asarray(momentum, float)
    steps = np.arange(len(scale))
    figure, (left, middle, right) = new(3, width=10.0, height=3.4)
    left.plot(steps, scale, color=ORANGE)
    left.fill_between(steps, scale, color=ORANGE, alpha=0.2, linewidth=0)
    falling = int(np.argmax(scale < 1)) if bool((scale < 1).any()) else len(scale)
    left.set(title=f"LR: flat for {falling} steps,\nthen linear to 0", ylabel="learning-rate scale", ylim=(0, 1.08))
    middle.plot(np.arange(len(mu)), mu, color=BLUE)
    middle.set(title=f"Muon momentum\n{mu[0]:.3g} to {mu[-1]:.3g}", ylabel="momentum", ylim=(min(mu) - 0.02, 1.0))
    if ema_decay:
        weight = (1 - ema_decay) * ema_decay ** np.arange(len(scale))[::-1]
        right.plot(steps, weight, color=GREEN)
        right.fill_between(steps, weight, color=GREEN, alpha=0.2, linewidth=0)
        start = ema_decay ** len(scale)
        part = f"{start:.1%}" if start >= 0.0005 else "under 0.1%"
        right.set_title(f"EMA {ema_decay:g}: initial weights\nmake up {part} of the result")
    else:
        right.set_title("EMA off: the last weights\nare the result")
    right.set(ylabel="weight in the average")
    for axes in (left, middle, right):
        axes.set(xlabel="optimiser step", xlim=(0, max(len(scale) - 1, 1)))
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    return figure


def schedule_of(train: TrainConfig) -> Picture:
    """:func:`schedule` of a training configuration, with the very functions the training loop uses."""
    table = schedule_table(train)
    return schedule(table["lr_scale"], table["muon_momentum"], train.ema_decay)


@styled
def singular_values(before: ArrayLike, after: Sequence[ArrayLike], *, name: str = "") -> Picture:
    """Singular values of a gradient and of what 1, 2, ... Newton-Schulz steps make of it, largest first."""
    first = np.asarray(before, float)
    figure, (left, right) = new(2, height=3.6)
    left.plot(np.arange(1, len(first) + 1), np.maximum(first / first[0], 1e-6), color=GREY, label="gradient")
    colours = matplotlib.colormaps["viridis"](np.linspace(0.15, 0.85, len(after)))
    for step, (values, colour) in enumerate(zip(after, colours, strict=True), start=1):
        one = np.maximum(np.asarray(values, float), 1e-6)
        left.plot(np.arange(1, len(one) + 1), one, color=colour, label=f"{step} step{'s' if step > 1 else ''}")
    final = np.asarray(after[-1], float)
    left.set(
        yscale="log", xlabel="singular value, largest first", ylabel="size", title="Newton-Schulz lifts the small ones"
    )
    left.legend(fontsize=9)
    edges = np.linspace(0, max(1.3, float(final.max()) * 1.02), 40)
    right.hist(final, bins=edges.tolist(), color=BLUE)
    right.axvline(1, color=RED, linestyle="--", label="exactly orthogonal")
    right.set(
        xlabel=f"singular value after {len(after)} steps",
        ylabel="how many",
        title=f"n = {len(final)}, median {np.median(final):.2f}",
    )
    right.legend()
    if name:
        figure.suptitle(f"Gradient of {name}", x=0.01, ha="left")
    return figure


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
