"""Pictures as pure functions: data in, one matplotlib ``Figure`` out, nothing shown and no global state touched.

This module holds the style, the way figures are saved, and the pictures of training and of seeds. Pictures of text and
scoring are in :mod:`golfbook.plots.text`, those of weights and bytes in :mod:`golfbook.plots.size`.

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
from PIL import Image
from scipy import stats

from golfbook.analysis.statistics import describe
from golfbook.config.schema import TrainConfig
from golfbook.errors import GolfbookError
from golfbook.files import atomic_path, atomic_write_bytes, figures_root
from golfbook.train.schedules import schedule_table, step_weights

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


def gif(frames: Sequence[Picture], milliseconds: Sequence[int], *, dpi: int = 80, colours: int = 48) -> bytes:
    """An endless animation as GIF bytes; ``milliseconds`` has how long each of ``frames`` is shown.

    All frames share one palette of ``colours``, made from the last one, which keeps files small and colours steady.
    Frames must be of one size. Written by Pillow, as matplotlib's own writer does, which knows neither palettes nor
    frames of different lengths.
    """
    images = [Image.open(io.BytesIO(png(frame, dpi))).convert("RGB") for frame in frames]
    palette = images[-1].quantize(colours, dither=Image.Dither.NONE)
    flat = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    buffer = io.BytesIO()
    flat[0].save(
        buffer, format="GIF", save_all=True, append_images=flat[1:], duration=list(milliseconds), loop=0, optimize=True
    )
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
    ``lr_scale`` (and what :func:`speed_line` shows), ``kind`` "validation" with ``step`` and ``val_bpb``. ``steps`` is
    the planned number of steps (0: up to the last point). ``unigram_bpb`` draws the score of a model that knows only
    how often each token occurs.
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
    if train:
        figure.text(0.99, 0.985, speed_line(train[-1]), ha="right", va="top", color=GREY, fontsize=10)
    return figure


def speed_line(point: Mapping[str, Any]) -> str:
    """Speed, memory and time left of the last training point; what a point does not hold is left out."""
    parts = []
    if "tokens_per_second" in point:
        parts.append(f"{point['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in point:
        parts.append(f"{point['mfu']:.0%} of what products allow (MFU)")
    if "memory_bytes" in point:
        parts.append(f"{point['memory_bytes'] / 1e9:.2f} GB")
    if point.get("seconds_left"):
        parts.append(f"{point['seconds_left']:.0f} s left")
    return ", ".join(parts)


@styled
def schedule(train: TrainConfig, step_seconds: float | None = None) -> Picture:
    """All that changes from step to step in a training configuration, by the functions the training loop itself uses.

    Left the learning-rate scale with warm-up, warmdown, snapshots and fake quantisation; right Muon's momentum and what
    each step's weights make up of those handed on. With ``train.max_seconds`` a step is taken to last ``step_seconds``
    (default: so long that time and steps end together), and an upper axis shows the clock.
    """
    table = schedule_table(train, step_seconds)
    steps = table["step"]
    figure = Picture(figsize=(10.0, 4.8), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.7, 1))
    rate, momentum = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[0, 1])
    average = figure.add_subplot(grid[1, 1])
    _draw_rate(rate, train, table)
    if train.max_seconds:
        seconds = step_seconds if step_seconds is not None else train.max_seconds / train.steps
        clock = rate.secondary_xaxis(
            "top", functions=(lambda x: np.asarray(x) * seconds, lambda x: np.asarray(x) / max(seconds, 1e-9))
        )
        clock.set_xlabel("training time (s)")
    mu = table["muon_momentum"]
    if train.matrix_optimizer == "muon":
        momentum.plot(steps, mu, color=BLUE, marker="o" if len(steps) < 3 else None)
        momentum.set_title(f"Muon momentum {mu[0]:.3g} to {mu[-1]:.3g}", fontsize=11)
        momentum.set(ylabel="momentum", ylim=(min(mu) - 0.02, 1.0))
    else:
        momentum.text(0.5, 0.5, "no Muon: AdamW's two decays\nare constant", transform=momentum.transAxes, ha="center")
        momentum.set_title("Momentum", fontsize=11)
        momentum.set_yticks([])
    _draw_average(average, train, table)
    for axes in (rate, momentum, average):
        axes.set(xlabel="optimiser step", xlim=(-0.01 * len(steps), 1.01 * max(len(steps) - 1, 1)))
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    figure.suptitle(_schedule_words(train, len(steps)), x=0.01, ha="left", fontsize=12)
    return figure


def _draw_rate(axes: Axes, train: TrainConfig, table: Mapping[str, np.ndarray]) -> None:
    """Learning-rate scale, with spans and marks for what starts when."""
    steps, scale = table["step"], table["lr_scale"]
    axes.plot(steps, scale, color=ORANGE, marker="o" if len(steps) < 3 else None, label="learning-rate scale")
    axes.fill_between(steps, scale, color=ORANGE, alpha=0.15, linewidth=0)
    if train.lr_warmup_steps:
        axes.axvspan(0, min(train.lr_warmup_steps, len(steps)), color=SKY, alpha=0.25, linewidth=0, label="warm-up")
    falling = np.flatnonzero((scale < 1) & (steps >= train.lr_warmup_steps))
    if len(falling):
        start = max(int(falling[0]) - 1, 0)  # the last step at the full rate: the warmdown's share left is just 1
        label = f"{train.warmdown_shape} warmdown from step {start}"
        axes.axvline(start, color=BLACK, linewidth=1.2, linestyle="--", label=label)
    if train.min_lr_scale and len(falling):
        label = f"ends at {train.min_lr_scale:g} of the base rates"
        axes.axhline(train.min_lr_scale, color=GREY, linewidth=1.2, linestyle=":", label=label)
    if train.averaging in ("swa", "swa_of_ema"):
        taken = steps[table["snapshot"]]
        label = f"{len(taken)} SWA snapshots below {train.swa_start:g}" if len(taken) else "SWA: no snapshot is taken"
        axes.plot(taken, scale[table["snapshot"]], "D", color=GREEN, markersize=4.5, label=label)
    if train.qat_start:
        on = steps[table["qat"]]
        label = (
            f"fake-quantised below {train.qat_start:g}: from step {on[0]}"
            if len(on)
            else "fake quantisation never starts"
        )
        if len(on):
            axes.axvspan(on[0], on[-1] + 1, color=PURPLE, alpha=0.3, linewidth=0, label=label)
        else:
            axes.plot([], [], " ", label=label)
    axes.set(ylabel="share of the base rates", ylim=(0, 1.05), title="Learning rate")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=9)


def _draw_average(axes: Axes, train: TrainConfig, table: Mapping[str, np.ndarray]) -> None:
    """What each step weighs in the weights that are handed on."""
    weight, start = step_weights(train, table)
    solid = bool((weight[1:] > 0).sum() > len(weight) / 2)
    if solid:
        axes.fill_between(table["step"], weight, color=GREEN, alpha=0.7, linewidth=0)
    else:
        axes.vlines(table["step"], 0, weight, color=GREEN, linewidth=1.0)
    where, style = weight > 0, {"linestyle": "-"} if solid else {"linestyle": "", "marker": "o", "markersize": 3}
    axes.plot(table["step"][where], weight[where], color=GREEN, **style)
    kind = {
        "none": "No average: the last weights",
        "ema": f"EMA, decay {train.ema_decay:g}",
        "swa": "SWA",
        "swa_of_ema": f"SWA of EMA, decay {train.ema_decay:g}",
    }[train.averaging]
    if train.averaging in ("ema", "swa_of_ema"):
        kind += f"\n{f'{start:.1%}' if start >= 0.0005 else 'under 0.1%'} is initial weights"
    elif train.averaging == "swa":
        count = int(table["snapshot"].sum())
        kind += f" of {count} snapshots" if count else " without a snapshot: the last weights"
    axes.set_title(kind, fontsize=11)
    axes.set(ylabel="share of result", ylim=(0, float(weight.max()) * 1.12))


def _schedule_words(train: TrainConfig, steps: int) -> str:
    """What ends the run, in a line."""
    if not train.max_seconds:
        return "1 step" if steps == 1 else f"{steps} steps"
    cut = f" of {train.steps}" if steps < train.steps else ""
    return f"By the clock: {train.max_seconds:g} s of training are {steps}{cut} steps, and the warmdown ends with them"


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
