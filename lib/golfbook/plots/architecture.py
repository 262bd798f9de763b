"""Pictures of architectures: how data flows, what attention and gates do, what components cost and what they bring."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from numpy.typing import ArrayLike

from golfbook.config.architecture import ModelConfig
from golfbook.plots.style import (
    BLACK,
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    LIGHT,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    Look,
    Picture,
    new,
    styled,
)

MARKS = (("xsa_layers", "X", "exclusive self-attention"), ("value_embedding_layers", "V", "value embedding"))
FROM_BASE = "difference from the base model in bits per byte, 95 % interval over paired seeds"


def _box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 1.9, height: float = 0.62) -> None:
    look: Look = {"facecolor": colour, "edgecolor": BLACK, "linewidth": 0.8, "alpha": 0.9, "zorder": 2}
    look["boxstyle"] = "round,pad=0.02,rounding_size=0.1"
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, **look))
    axes.text(x, y, text, ha="center", va="center", fontsize=9, zorder=3)


def _arrow(axes: Axes, x: float, y: float, to_x: float, to_y: float, colour: str = GREY, bend: float = 0.0) -> None:
    look: Look = {"arrowstyle": "-|>", "mutation_scale": 11, "color": colour, "linewidth": 1.4, "zorder": 1}
    look |= {"connectionstyle": f"arc3,rad={bend}", "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch((x, y), (to_x, to_y), **look))


@styled
def data_flow(model: ModelConfig) -> Picture:
    """Draw the way through a model: embedding, encoder down, decoder up, repeated blocks, refiners, head."""
    half = model.num_layers // 2
    decoder = model.num_layers - half
    again = model.recurrent_layers
    in_place = again if model.recurrence_place == "in_place" else ()
    after = again if model.recurrence_place == "after" else ()
    rows = max(half, decoder)
    on = model.ttt_linear.enabled, model.flow.enabled, model.native_flow.enabled
    tail = [*(f"block {i} again" for i in after), "RMS norm"]
    tail += itertools.compress(("+ TTT-Linear", "+ FlowRefiner", "+ NativeFlow"), on)
    tail += ["head (tied)" if model.tie_embeddings else "head (own table)", "soft cap"]
    figure, (axes,) = new(width=9.6, height=max(3.6, 0.62 * rows + 1.5))
    axes.axis("off")
    inputs = ["token embedding", *["+ bigram hash"] * bool(model.bigram.vocab_size), "RMS norm"]
    inputs += ["smear gate"] * model.smear

    def label(i: int) -> str:
        marks = "".join(mark for key, mark, _ in MARKS if i in getattr(model, key))
        times = f" x{1 + in_place.count(i)}" if i in in_place else ""
        return f"block {i}{times}" + (f"  {marks}" if marks else "")

    colours = [ORANGE if i in again else SKY for i in range(model.num_layers)]
    for row, text in enumerate(inputs):
        _box(axes, 0, rows - 1 - row * 0.95, text, LIGHT)
        if row:
            _arrow(axes, 0, rows - 1 - (row - 1) * 0.95 - 0.33, 0, rows - 1 - row * 0.95 + 0.33)
    bottom = rows - 1 - (len(inputs) - 1) * 0.95
    if half:
        _arrow(axes, 0.97, bottom, 2.7 - 0.97, rows - 1)
    for i in range(half):
        _box(axes, 2.7, rows - 1 - i, label(i), colours[i])
        if i:
            _arrow(axes, 2.7, rows - i - 0.33, 2.7, rows - 1 - i + 0.33)
    for j in range(decoder):
        y = rows - half + j if half else rows - 1 - j
        _box(axes, 6.0, y, label(half + j), colours[half + j])
        if j:
            _arrow(axes, 6.0, y - 0.67 if half else y + 0.67, 6.0, y - 0.33 if half else y + 0.33)
        if model.unet_skips and j < half:
            _arrow(axes, 3.67, y, 5.03, y, PURPLE)
    if half:
        _arrow(axes, 2.7, rows - half - 0.33, 6.0, rows - half - 0.33, bend=0.35)
    last = rows - half + decoder - 1 if half else 0
    _arrow(axes, 6.97, last, 8.03, rows - 1)
    step = min(0.95, (rows + 0.4) / max(len(tail), 1))
    for row, text in enumerate(tail):
        kind = ORANGE if "again" in text else GREEN if text.startswith("+") else LIGHT
        _box(axes, 9.0, rows - 1 - row * step, text, kind, height=min(0.62, step * 0.78))
        if row:
            _arrow(axes, 9.0, rows - 1 - (row - 1) * step - 0.3 * step, 9.0, rows - 1 - row * step + 0.38 * step)
    for x, text in ((0.0, "input"), (2.7, "encoder half"), (6.0, "decoder half"), (9.0, "output")):
        axes.text(x, max(last, rows - 1) + 0.62, text, ha="center", fontweight="bold", fontsize=10)
    notes = [f"{mark}: {text}" for key, mark, text in MARKS if getattr(model, key)]
    notes += ["purple: skip, added with a weight a channel"] if model.unet_skips and half else []
    notes += ["orange: runs twice or more"] if again else []
    notes += ["every block also mixes in the last input box (residual mix)"]
    lowest = min(0.0, bottom, rows - 1 - (len(tail) - 1) * step) - 1.1
    half_way = -(-len(notes) // 2)
    lines = "\n".join("      ".join(part) for part in (notes[:half_way], notes[half_way:]))
    axes.text(-1.0, lowest, lines, fontsize=9, color=GREY, va="top", in_layout=False)
    axes.set(xlim=(-1.1, 10.1), ylim=(lowest - 0.7, max(last, rows - 1) + 1.0))
    return figure


@styled
def attention(weights: ArrayLike, pieces: Sequence[str], *, layer: int) -> Picture:
    """Draw attention weights (heads, T, T) of one layer, a square a head; rows are queries."""
    given = np.asarray(weights, float)
    shown = given[:4]
    figure, all_axes = new(len(shown), width=3.3 * len(shown) + 0.6, height=4.0)
    for head, (axes, one) in enumerate(zip(all_axes, shown, strict=True)):
        image = axes.imshow(np.sqrt(one), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        axes.grid(visible=False)
        axes.set(title=f"head {head}", xlabel="looks at position", ylabel="token" if not head else "")
        ticks = list(range(0, len(pieces), 1 if len(pieces) <= 24 else 16))
        labels = [pieces[i].strip() or "·" for i in ticks] if len(pieces) <= 24 else [str(i) for i in ticks]
        axes.set_yticks(ticks, labels if not head else [""] * len(ticks), fontsize=6.5)
        axes.set_xticks(np.arange(0, len(pieces), max(1, len(pieces) // 4)))
    figure.colorbar(image, ax=all_axes, shrink=0.75, label="square root of the weight")
    figure.suptitle(f"Layer {layer}: where each token looks", x=0.01, ha="left")
    return figure


@styled
def own_value(own: Sequence[ArrayLike], other: Sequence[ArrayLike], exclusive: Sequence[int]) -> Picture:
    """Draw the cosine of each head's output with the token's own value, by layer, and with another token's.

    ``exclusive`` lists the layers that remove the part along the own value.
    """
    figure, (axes,) = new(width=9.0, height=3.5)
    for layer, pair in enumerate(zip(own, other, strict=True)):
        colours = (BLUE if layer in exclusive else SKY, GREY)
        for offset, values, colour in zip((-0.17, 0.17), pair, colours, strict=True):
            low, middle, high = np.quantile(np.asarray(values, float), (0.1, 0.5, 0.9))
            axes.vlines(layer + offset, low, high, color=colour, linewidth=5, alpha=0.6)
            axes.plot(layer + offset, middle, "o", color=colour, markersize=6)
    if exclusive:
        axes.plot([], [], "o", color=BLUE, label="own value, removed by XSA")
    if len(exclusive) < len(own):
        axes.plot([], [], "o", color=SKY, label="own value, plain layer")
    axes.plot([], [], "o", color=GREY, label="control: another token's value")
    axes.axhline(0, color=BLACK, linewidth=0.8)
    axes.set(xlabel="layer", ylabel="cosine with the output", title="Median and middle 80 % over tokens and heads")
    axes.set_xticks(range(len(own)))
    axes.set_ylim(top=max(1.0, axes.get_ylim()[1]))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


@styled
def gates(values: Mapping[str, ArrayLike], starts: Mapping[str, ArrayLike]) -> Picture:
    """Draw learned gates and scales, one small histogram each; a single number is a line.

    Dashed lines are the values they started from.
    """
    columns = 4
    rows = -(-len(values) // columns)
    figure, all_axes = new(columns, nrows=rows, width=10.5, height=1.8 * rows + 0.3)
    for axes, (name, given), colour in zip(all_axes, values.items(), CYCLE[:6] * 3, strict=False):
        one = np.asarray(given, float).ravel()
        first = np.unique(np.asarray(starts[name], float))
        if len(one) == 1:
            axes.axvline(one[0], color=colour, linewidth=3)
            axes.set_xlim(min(0.0, 1.5 * one[0]), 1.5 * max(one[0], *first))
            axes.locator_params(axis="x", nbins=4)
        else:
            axes.hist(one, bins=min(30, max(8, len(one) // 4)), color=colour)
        for start in first:
            axes.axvline(start, color=BLACK, linewidth=1.4, linestyle="--")
        shown = f"{one[0]:.5f}" if len(one) == 1 else f"n = {len(one)}, mean {one.mean():.3f}"
        axes.set_title(f"{name}\n{shown}, start {' and '.join(f'{x:.3g}' for x in first)}", fontsize=9)
        axes.set_yticks([])
        axes.tick_params(labelsize=8)
    for axes in all_axes[len(values) :]:
        axes.axis("off")
    return figure


@styled
def rope(tables: Mapping[int, ArrayLike], train_length: int) -> Picture:
    """Draw wavelengths of the rotated pairs in tokens; ``tables`` maps an input length to its frequencies."""
    figure, (left, right) = new(2, width=9.5, height=3.5)
    for (length, frequencies), colour in zip(tables.items(), CYCLE, strict=False):
        f = np.asarray(frequencies, float)
        stretched = " (rescaled)" if length > train_length else ""
        left.plot(np.arange(len(f)), 2 * np.pi / f, "o-", color=colour, label=f"input of {length}{stretched}")
        distance = np.arange(1, length)
        cosine = np.cos(np.outer(distance, f)).mean(1)
        group = np.floor(8 * np.log2(distance)).astype(int)  # eight averages an octave
        uses = np.bincount(group)
        filled = uses > 0
        centre, mean = (np.bincount(group, x)[filled] / uses[filled] for x in (distance, cosine))
        right.plot(centre, mean, color=colour)
    left.axhline(train_length, color=GREY, linestyle="--", linewidth=1.0, label=f"reference length {train_length}")
    left.set(yscale="log", xlabel="rotated pair", ylabel="tokens for a full turn")
    left.set_title("Slow pairs tell far distances")
    left.legend(fontsize=9)
    right.set(xscale="log", xlabel="distance of two tokens", ylabel="mean cosine of the pairs")
    right.set_title("Likeness of equal vectors, far apart")
    return figure


@styled
def collisions(pairs_in_row: ArrayLike, weight_in_row: ArrayLike) -> Picture:
    """Draw how many different pairs share a row of a hashed table, and the share of its commonest pair.

    ``pairs_in_row`` (rows,) counts different pairs of each row, ``weight_in_row`` (rows,) is the share of its uses that
    the commonest pair has (NaN for an unused row).
    """
    counts, share = np.asarray(pairs_in_row, int), np.asarray(weight_in_row, float)
    figure, (left, right) = new(2, width=9.5, height=3.5)
    reach = np.arange(counts.max() + 2)
    mean = counts.mean()
    left.bar(reach, np.bincount(counts, minlength=len(reach)), width=1.0, color=SKY, label="rows")
    logs = reach * np.log(max(mean, 1e-9)) - mean - np.cumsum(np.log(np.maximum(reach, 1)))
    left.plot(reach, len(counts) * np.exp(logs), color=RED, label="a perfectly even hash (Poisson)")
    left.set(xlabel="different pairs in a row", ylabel="rows", title=f"{mean:.1f} pairs share a row on average")
    left.set_ylim(top=left.get_ylim()[1] * 1.25)
    left.legend(fontsize=9)
    used = share[~np.isnan(share)]
    right.hist(used, bins=20, range=(0, 1), color=GREEN)
    right.set(xlabel="share of its commonest pair", ylabel="rows")
    right.set_title(f"median {np.median(used):.0%} of a row's uses")
    return figure


@styled
def guess(row: Mapping[Any, Any], guessed: str, reach: float) -> Picture:
    """Draw the effect of one switch, with its interval, over the guessed side; hidden while nothing is guessed.

    ``row`` has ``variant``, ``mean``, ``low``, ``high``; ``guessed`` is "better", "worse", "no difference" or empty.
    """
    figure, (axes,) = new(width=9.0, height=1.9)
    axes.axvline(0, color=BLACK, linewidth=0.9)
    sides = {"better": (-reach, 0, GREEN), "worse": (0, reach, RED), "no difference": (-reach / 8, reach / 8, GREY)}
    title = f"{row['variant']}: guess first"
    if guessed:
        left, right, colour = sides[guessed]
        axes.axvspan(left, right, color=colour, alpha=0.2, linewidth=0)
        axes.plot([row["low"], row["high"]], [0, 0], color=BLACK, linewidth=2.5, alpha=0.7)
        axes.plot(row["mean"], 0, "o", color=BLACK, markersize=7)
        truth = "better" if row["high"] < 0 else "worse" if row["low"] > 0 else "no difference"
        verdict = "as you guessed" if truth == guessed else f"you guessed '{guessed}'"
        title = f"{row['variant']}: {truth}, {verdict}"
    axes.set(xlim=(-reach, reach), yticks=[], title=title)
    axes.set_xlabel(FROM_BASE)
    return figure


@styled
def effects(table: pd.DataFrame) -> Picture:
    """Draw paired differences from the base model with their intervals; negative is better.

    ``table`` has the columns ``variant``, ``mean``, ``low``, ``high``, ``n`` and a row a switch.
    """
    rows = table.sort_values("mean", ascending=False).reset_index(drop=True)
    figure, (axes,) = new(width=9.0, height=1.3 + 0.3 * len(rows))
    for y, (mean, low, high) in enumerate(rows[["mean", "low", "high"]].to_numpy(float)):
        colour = (GREEN if mean < 0 else RED) if high < 0 or low > 0 else GREY
        axes.plot([low, high], [y, y], color=colour, linewidth=2.5, alpha=0.7)
        axes.plot(mean, y, "o", color=colour, markersize=6)
    axes.axvline(0, color=BLACK, linewidth=0.9)
    axes.set_yticks(range(len(rows)), [f"{v}  (n = {n})" for v, n in zip(rows["variant"], rows["n"], strict=True)])
    reach = max(float(rows[["low", "high"]].abs().max().max()) * 1.15, 1e-3)
    axes.set_xlim(-reach, reach)
    axes.set(xlabel=FROM_BASE, title="Left: better than the base model.  Grey: not to be told from zero")
    axes.grid(axis="y", visible=False)
    return figure


def _bars(axes: Axes, now: Mapping[str, float], before: Mapping[str, float], unit: float, title: str) -> None:
    names = list(dict.fromkeys((*before, *now)))
    y = np.arange(len(names))
    axes.barh(y, [before.get(n, 0) / unit for n in names], color=LIGHT, height=0.8)
    axes.barh(y, [now.get(n, 0) / unit for n in names], color=BLUE, height=0.4)
    axes.set_yticks(y, names, fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_title(title, fontsize=11)


@styled
def model_costs(now: Mapping[str, Mapping[str, float]], before: Mapping[str, Mapping[str, float]]) -> Picture:
    """Draw bars of a model (blue) over those of the one it started from (grey), and totals with their change.

    Both hold ``parameters`` and ``flops`` (by group) and ``totals`` (quantity with its unit -> value).
    """
    figure, (left, middle, right) = new(3, width=12.0, height=4.6, width_ratios=(1, 1, 1.15))
    _bars(left, now["parameters"], before["parameters"], 1e6, "Parameters (million)")
    _bars(middle, now["flops"], before["flops"], 1e6, "Forward operations a token (million)")
    right.axis("off")
    right.set_title("Totals, and change from the preset", fontsize=11)
    for row, (name, value) in enumerate(now["totals"].items()):
        y = 0.94 - 0.088 * row
        old = before["totals"].get(name, value)
        change = f"{value / old - 1:+.1%}" if old and abs(value / old - 1) > 5e-4 else "="
        text = f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"
        colour = GREY if change == "=" else RED if change[0] == "+" else GREEN
        cells = ((0.0, name, "left", BLACK), (0.8, text, "right", BLACK), (1.0, change, "right", colour))
        for x, words, side, ink in cells:
            right.text(x, y, words, transform=right.transAxes, fontsize=9.5, ha=side, color=ink)
    return figure


@styled
def step_times(table: pd.DataFrame) -> Picture:
    """Draw published step times against the estimate, by term: ``label``, ``published_ms``, ``<term>_share``."""
    figure, (axes,) = new(width=9.5, height=1.2 + 0.42 * len(table))
    y = np.arange(len(table))
    left = np.zeros(len(table))
    for name, colour in (("products", BLUE), ("traffic", ORANGE), ("launches", PURPLE)):
        axes.barh(y, table[f"{name}_share"], left=left, color=colour, label=name, height=0.6)
        left += table[f"{name}_share"].to_numpy(float)
    axes.axvline(1, color=BLACK, linewidth=1.2)
    for row, (total, measured) in enumerate(zip(left, table["published_ms"], strict=True)):
        axes.text(max(total, 1) + 0.01, row, f"{total - 1:+.1%} of {measured:,.0f} ms", va="center", fontsize=9)
    axes.set_yticks(y, table["label"])
    axes.invert_yaxis()
    axes.set(xlabel="share of the published step time", xlim=(0, 1.3), title="Estimated step time (1 = as published)")
    axes.grid(axis="y", visible=False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
