"""Pictures of one training run: its curve, and what its schedules do from step to step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from golfbook.config.schema import TrainConfig
from golfbook.plots.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, Picture, styled
from golfbook.train.schedules import schedule_table, step_weights


@styled
def training_curve(
    metrics: Sequence[Mapping[str, Any]], *, steps: int, unigram_bpb: float | None = None, title: str = ""
) -> Picture:
    """Draw the loss of every logged step, every validation, and the learning-rate scale below.

    ``metrics`` are the points of ``metrics.jsonl``: ``kind`` "train" with ``step``, ``loss`` (nats a token) and
    ``lr_scale`` (and what :func:`speed_line` shows), ``kind`` "validation" with ``step`` and ``val_bpb``. ``steps`` is
    the planned number of steps. ``unigram_bpb`` draws the score of a model that knows only
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
    """Return speed, memory and time left of a training point; what it does not hold is left out."""
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
    """Draw all that changes from step to step in a training configuration, by the functions that the loop uses.

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
        to_time = (lambda x: np.asarray(x) * seconds, lambda x: np.asarray(x) / max(seconds, 1e-9))
        rate.secondary_xaxis("top", functions=to_time).set_xlabel("training time (s)")
    mu = table["muon_momentum"]
    if train.optimizer.matrix_optimizer == "muon":
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
    """Draw the learning-rate scale, with spans and marks for what starts when."""
    steps, scale = table["step"], table["lr_scale"]
    axes.plot(steps, scale, color=ORANGE, marker="o" if len(steps) < 3 else None, label="learning-rate scale")
    axes.fill_between(steps, scale, color=ORANGE, alpha=0.15, linewidth=0)
    if train.schedule.lr_warmup_steps:
        end = min(train.schedule.lr_warmup_steps, len(steps))
        axes.axvspan(0, end, color=SKY, alpha=0.25, linewidth=0, label="warm-up")
    falling = np.flatnonzero((scale < 1) & (steps >= train.schedule.lr_warmup_steps))
    if len(falling):
        start = max(int(falling[0]) - 1, 0)  # the last step at the full rate: the warmdown's share left is just 1
        label = f"{train.schedule.warmdown_shape} warmdown from step {start}"
        axes.axvline(start, color=BLACK, linewidth=1.2, linestyle="--", label=label)
    if train.schedule.min_lr_scale and len(falling):
        label = f"ends at {train.schedule.min_lr_scale:g} of the base rates"
        axes.axhline(train.schedule.min_lr_scale, color=GREY, linewidth=1.2, linestyle=":", label=label)
    if train.averaging.method in ("swa", "swa_of_ema"):
        taken = steps[table["snapshot"]]
        label = f"{len(taken)} SWA snapshots below {train.averaging.swa_start:g}"
        label = label if len(taken) else "SWA: no snapshot is taken"
        axes.plot(taken, scale[table["snapshot"]], "D", color=GREEN, markersize=4.5, label=label)
    if train.qat.start:
        on = steps[table["qat"]]
        if len(on):
            label = f"fake-quantised below {train.qat.start:g}: from step {on[0]}"
            axes.axvspan(on[0], on[-1] + 1, color=PURPLE, alpha=0.3, linewidth=0, label=label)
        else:
            axes.plot([], [], " ", label="fake quantisation never starts")
    axes.set(ylabel="share of the base rates", ylim=(0, 1.05), title="Learning rate")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=9)


def _draw_average(axes: Axes, train: TrainConfig, table: Mapping[str, np.ndarray]) -> None:
    """Draw what each step weighs in the weights that are handed on."""
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
        "ema": f"EMA, decay {train.averaging.ema_decay:g}",
        "swa": "SWA",
        "swa_of_ema": f"SWA of EMA, decay {train.averaging.ema_decay:g}",
    }[train.averaging.method]
    if train.averaging.method in ("ema", "swa_of_ema"):
        kind += f"\n{f'{start:.1%}' if start >= 0.0005 else 'under 0.1%'} is initial weights"
    elif train.averaging.method == "swa":
        count = int(table["snapshot"].sum())
        kind += f" of {count} snapshots" if count else " without a snapshot: the last weights"
    axes.set_title(kind, fontsize=11)
    axes.set(ylabel="share of result", ylim=(0, float(weight.max()) * 1.12))


def _schedule_words(train: TrainConfig, steps: int) -> str:
    """Return what ends the run, in a line."""
    if not train.max_seconds:
        return "1 step" if steps == 1 else f"{steps} steps"
    cut = f" of {train.steps}" if steps < train.steps else ""
    return f"By the clock: {train.max_seconds:g} s of training are {steps}{cut} steps, and the warmdown ends with them"
