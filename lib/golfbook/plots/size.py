"""Pictures of weights and bytes: the quantisation grid, its error and entropy, and what fills the byte budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import ArrayLike, NDArray

from golfbook.analysis.sizes import entropy_bits, relative_error
from golfbook.analysis.statistics import describe
from golfbook.plots.style import BLUE, CYCLE, GREEN, GREY, LIGHT, ORANGE, RED, SKY, Look, Picture, new, styled

GROUPS = {  # what the first parts of the names of a model's tensors stand for
    "tok_emb": "token embedding",
    "blocks.attn": "attention",
    "blocks.mlp": "MLPs",
    "blocks.scales": "scales and gates",
    "bigram": "hashed token pairs",
    "ve_shared": "value embedding",
    "ve_layer_scales": "scales of the value embedding",
    "skip_weights": "skips",
    "smear": "smear gate",
    "ttt_refiner": "TTT-Linear",
    "flow_refiner": "FlowRefiner",
    "mtp_heads": "heads of multi-token prediction",
}


@styled
def parameters(counts: Mapping[str, int], *, title: str) -> Picture:
    """Draw parameters by group as horizontal bars, largest first."""
    rows = sorted(((GROUPS.get(name, name), n) for name, n in counts.items()), key=lambda item: -item[1])
    total = sum(counts.values())
    figure, (axes,) = new(width=8.0, height=0.9 + 0.34 * len(rows))
    bars = axes.barh([name for name, _ in rows], [n for _, n in rows], color=SKY)
    axes.bar_label(bars, [f"{n:,} ({n / max(total, 1):.1%})" for _, n in rows], padding=4, fontsize=10)
    axes.invert_yaxis()
    axes.margins(x=0.28)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    axes.set(xlabel="parameters", title=title)
    return figure


def _histogram(axes: Axes, weights: NDArray[np.float64], scale: float, qmax: int) -> None:
    clip = scale * qmax
    reach = max(float(np.abs(weights).max()), clip) * 1.08
    outside = float((np.abs(weights) > clip + scale / 2).mean())  # farther off than rounding alone would put them
    axes.hist(weights, bins=81, range=(-reach, reach), color=SKY)
    levels = np.arange(-qmax, qmax + 1) * scale
    inside = levels[np.abs(levels) <= reach]
    axes.vlines(inside, 0, 0.045, transform=axes.get_xaxis_transform(), color=RED, linewidth=1.0)
    for sign in (-1, 1):
        if outside:
            axes.axvline(sign * clip, color=ORANGE, linestyle="--")
    used = int(min(qmax, np.ceil(np.abs(weights).max() / scale - 0.5)) * 2 + 1)
    axes.set(xlabel="weight", ylabel="how many", xlim=(-reach, reach))
    levels_used = f"{used} of {2 * qmax + 1} levels (red) in use"
    axes.set_title(f"Row of {len(weights)} weights: {levels_used},\n{outside:.1%} clipped")


@styled
def quantization(
    weights: ArrayLike,
    integers: ArrayLike,
    decoded: ArrayLike,
    *,
    bits: int,
    scale: float,
    name: str,
) -> Picture:
    """Draw one quantised matrix: its first row on the grid, and all integers with error, entropy and bytes.

    ``weights``, ``integers`` and ``decoded`` have shape (rows, columns); ``scale`` is that of the first row.
    """
    w, q = np.asarray(weights, np.float64), np.asarray(integers, np.int64)
    qmax = 2 ** (bits - 1) - 1
    figure, (left, right) = new(2, width=10.0, height=3.9)
    _histogram(left, w[0], scale, qmax)
    values, counts = np.unique(q, return_counts=True)
    right.bar(values, counts / q.size * 100, width=0.9, color=BLUE)
    entropy, error = entropy_bits(q), relative_error(w, decoded)
    right.set(xlabel="stored integer", ylabel="share (%)", xlim=(-qmax - 1, qmax + 1))
    size = f"about {entropy * q.size / 8:,.0f} bytes"
    right.set_title(f"entropy {entropy:.2f} bits per weight, {size};\nerror {error:.2%} of RMS")
    figure.suptitle(f"{name} at {bits} bits", x=0.01, ha="left")
    return figure


@styled
def bits_curve(table: pd.DataFrame) -> Picture:
    """Draw error and size against bits. ``table``: ``bits``, ``clip`` (a label), ``error``, ``entropy_bits``."""
    figure, (left, right) = new(2, height=3.6)
    for (clip, rows), colour in zip(table.groupby("clip", sort=False), CYCLE, strict=False):
        rows = rows.sort_values("bits")
        # curves that lie on each other stay visible: the search is often one of the others
        look: dict[str, Any] = {"marker": "o", "color": colour, "label": str(clip)}
        if clip == "search":
            look |= {"markerfacecolor": "none", "markersize": 11, "linestyle": "--"}
        left.plot(rows["bits"], rows["error"] * 100, **look)
        right.plot(rows["bits"], rows["entropy_bits"], **look)
    bits = sorted(set(table["bits"]))
    right.plot(bits, bits, color=GREY, linestyle=":", label="bits = entropy")
    left.set(yscale="log", ylabel="error (% of RMS, log scale)")
    left.set_title("One bit more halves the error,\nunless clipping makes up most of it")
    left.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    left.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    right.set(ylabel="entropy (bits per weight)", title="... and costs about\none bit of entropy")
    for axes in (left, right):
        axes.set(xlabel="bits of the grid", xticks=bits)
        axes.legend(title="clip", fontsize=9)
    return figure


@styled
def bits_choice(table: pd.DataFrame, chosen: int) -> Picture:
    """Draw artifact size and score of whole models with matrices of 3, 4, ... bits, the ``chosen`` one in colour.

    ``table`` has the columns ``bits``, ``artifact_bytes`` and ``val_bpb``.
    """
    rows = table.sort_values("bits")
    one = rows[rows["bits"] == chosen].iloc[0]
    figure, (left, right) = new(2, width=9.0, height=3.6)
    colours = [BLUE if b == chosen else LIGHT for b in rows["bits"]]
    bars = left.bar(rows["bits"], rows["artifact_bytes"] / 1000, color=colours)
    left.bar_label(bars, [f"{size / 1000:.0f}" for size in rows["artifact_bytes"]], padding=2, fontsize=9)
    # dots: this axis does not begin at zero, so bars would exaggerate
    right.scatter(rows["bits"], rows["val_bpb"], color=colours, edgecolors=BLUE, s=60, zorder=3)
    for bits, score in zip(rows["bits"], rows["val_bpb"], strict=True):
        right.annotate(f"{score:.3f}", (bits, score), (0, 6), textcoords="offset points", ha="center", fontsize=9)
    left.set(ylabel="artifact (thousand bytes)")
    right.set(ylabel="bits per byte, reloaded")
    for axes in (left, right):
        axes.set(xlabel="bits of a matrix weight", xticks=list(rows["bits"]))
        axes.margins(x=0.08, y=0.15)
    words = f"artifact of {one['artifact_bytes']:,.0f} bytes, {one['val_bpb']:.3f} bits per byte"
    figure.suptitle(f"{chosen} bits: {words}", x=0.01, ha="left")
    return figure


@styled
def entropy_bytes(table: pd.DataFrame) -> Picture:
    """Draw bytes of each group of tensors: one byte an integer, their entropy, and what the coder really wrote.

    ``table`` has the columns ``group``, ``nominal_bytes``, ``entropy_bytes`` and ``coded_bytes``.
    """
    figure, (axes,) = new(width=8.5, height=3.6)
    x = np.arange(len(table))
    for shift, column, colour, label in (
        (-0.27, "nominal_bytes", LIGHT, "one byte per integer"),
        (0.0, "entropy_bytes", GREEN, "entropy of the integers"),
        (0.27, "coded_bytes", BLUE, "coded"),
    ):
        bars = axes.bar(x + shift, table[column] / 1000, width=0.26, color=colour, label=label)
        axes.bar_label(bars, [f"{v / 1000:.1f}" for v in table[column]], padding=1, fontsize=9)
    axes.set_xticks(x, list(table["group"]))
    axes.margins(y=0.12)
    axes.set(ylabel="size (thousand bytes)", title="What the coder writes, against the entropy of the integers")
    axes.legend()
    return figure


@styled
def floor(here: pd.DataFrame, study: pd.DataFrame, line: list[str], differences: Mapping[str, ArrayLike]) -> Picture:
    """Draw the scale floor against fewer bits: every way to store the models, and what the floor changes, paired.

    ``here`` (one model) and ``study`` (several seeds) have the columns ``name``, ``artifact_bytes`` and ``tax``, bits
    per byte that storing costs. The names ``line`` are joined. ``differences`` maps a label to one value a seed.
    """
    figure, (left, right) = new(2, width=10.5, height=4.0, width_ratios=(1.25, 1))
    for i, name in enumerate(dict.fromkeys(study["name"])):
        colour, marker = CYCLE[i % len(CYCLE)], "osD^vPX*"[i % 8]
        for table, size in ((study, 34), (here, 110)):
            mine = table[table["name"] == name]
            hollow = {"facecolors": "none"} if size > 100 else {"label": name}
            look: Look = {"edgecolors": colour, "color": colour, "marker": marker, "zorder": 3} | hollow
            left.scatter(mine["artifact_bytes"] / 1000, mine["tax"], s=size, **look)
    joined = study[study["name"].isin(line)].groupby("name")[["artifact_bytes", "tax"]].mean()
    joined = joined.sort_values("artifact_bytes")
    left.plot(joined["artifact_bytes"] / 1000, joined["tax"], color=GREY, linewidth=1.2, label="line without floor")
    left.scatter([], [], s=110, facecolors="none", edgecolors=GREY, label="this run")
    left.set(xlabel="artifact (thousand bytes)", ylabel="tax (bits per byte)", title="Down and left is better")
    left.legend(fontsize=9)
    for row, (values, colour) in enumerate(zip(differences.values(), CYCLE[1:], strict=False)):
        found = describe(values)
        given = np.asarray(values, float)
        right.scatter(given, np.full(len(given), row - 0.15), color=colour, s=40, edgecolor="white", zorder=3)
        half = (found.high - found.low) / 2
        right.errorbar(found.mean, row + 0.1, xerr=half, color=colour, marker="D", markersize=7, capsize=6)
    right.axvline(0, color=GREY, linewidth=1.2)
    right.set_yticks(range(len(differences)), [f"{k}\nn = {np.size(v)} seeds" for k, v in differences.items()])
    right.set(ylim=(len(differences) - 0.5, -0.5), xlabel="floor minus the other (bits per byte)")
    right.set_title("Left of 0 the floor is better;\ndiamonds: mean, 95 % interval")
    right.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    return figure


@styled
def sensitivity(table: pd.DataFrame, *, bits: int) -> Picture:
    """Draw bits per byte lost for each thousand bytes saved, one tensor at a time, dearest first, with 95 % intervals.

    ``table`` is that of :func:`golfbook.analysis.sizes.sensitivity`.
    """
    rows = table.assign(price=table["lost"] / table["saved_kb"]).sort_values("price", ascending=False)
    colours = dict(zip(dict.fromkeys(table["group"]), CYCLE, strict=False))
    figure, (axes,) = new(width=9.5, height=1.4 + 0.235 * len(rows))
    y = np.arange(len(rows))
    shade = [colours[group] for group in rows["group"]]
    axes.barh(y, rows["price"], color=shade, height=0.72)
    half = (rows["high"] - rows["low"]) / 2 / rows["saved_kb"]
    axes.errorbar(rows["price"], y, xerr=half, fmt="none", color=GREY, capsize=2, linewidth=1.0)
    names = rows["name"].str.removesuffix(".weight") + ", " + rows["saved_kb"].map("{:.1f}".format) + " kB"
    axes.set_yticks(y, names, fontsize=8.5)
    for group, colour in colours.items():
        axes.barh([0], [0], color=colour, label=group)
    axes.axvline(0, color=GREY, linewidth=1.0)
    axes.legend(loc="lower right")
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel="bits per byte lost for each thousand bytes saved")
    axes.set_title(f"One tensor at a time at {bits} bits (beside its name: what that saves)")
    axes.grid(axis="y", visible=False)
    return figure


@styled
def budget(sizes: Mapping[str, int], limit: int = 16_000_000) -> Picture:
    """Draw bytes against the limit: all of it in one bar on top, below what the used part is."""
    total = sum(sizes.values())
    figure = Picture(figsize=(9.0, 3.2 + 0.2 * ((len(sizes) - 1) // 3)), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(1, 1.25))
    colour = BLUE if total <= limit else RED
    top.barh([0], [limit], color=LIGHT, height=0.6)
    top.barh([0], [total], color=colour, height=0.6)
    top.axvline(limit, color=GREY, linewidth=2)
    over = f"{limit - total:,} bytes left" if total <= limit else f"{total - limit:,} bytes too many"
    top.set_title(f"{total:,} of {limit:,} bytes ({total / limit:.2%}): {over}")
    top.set(xlim=(0, max(limit, total) * 1.005), ylim=(-0.5, 0.5))
    left = 0
    for (name, size), shade in zip(sizes.items(), (ORANGE, BLUE, GREEN, SKY, RED, GREY, *CYCLE), strict=False):
        bottom.barh([0], [size], left=left, color=shade, height=0.6, label=f"{name}: {size:,}")
        left += size
    bottom.set(xlim=(0, max(total, 1) * 1.005), ylim=(-0.5, 0.5), xlabel="bytes")
    figure.legend(loc="outside lower left", ncols=min(len(sizes), 3))
    for axes in (top, bottom):
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,.0f}"))
    return figure
