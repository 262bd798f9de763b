"""Pictures of text: which token carries how many bytes, what it cost, which window scored it with how much context."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font
from matplotlib.patches import FancyBboxPatch, Rectangle
from numpy.typing import ArrayLike

from golfbook.plots.style import BLUE, GREY, LIGHT, ORANGE, RED, SKY, Look, Picture, new, styled

LINE = 92.0  # width of a line of tokens, in letters


@functools.cache
def _fonts() -> tuple[FT2Font, ...]:
    return tuple(FT2Font(findfont(name)) for name in ("DejaVu Sans", "DejaVu Sans Mono"))


def printable(text: str) -> str:
    """Return ``text`` with spaces made visible and characters that the font lacks as code points."""
    text = text.replace("\u2581", "\u2423").replace(" ", "\u2423")  # open box: the usual sign for a space

    def known(c: str) -> bool:
        return c.isprintable() and all(font.get_char_index(ord(c)) for font in _fonts())

    return "".join(c if known(c) else f"U+{ord(c):04X}" for c in text)


@styled
def bytes_per_token(token_bytes: ArrayLike) -> Picture:
    """Draw how many tokens stand for 0, 1, 2, ... bytes, and what share of all bytes they carry."""
    sizes = np.asarray(token_bytes, np.int64)
    counts = np.bincount(sizes)
    lengths = np.arange(len(counts))
    total = max(int(sizes.sum()), 1)
    figure, (left, right) = new(2, height=3.5)
    left.bar(lengths, counts / len(sizes) * 100, color=SKY)
    left.set(ylabel="tokens (%)", title=f"n = {len(sizes):,} tokens, {sizes.mean():.2f} bytes each")
    right.bar(lengths, counts * lengths / total * 100, color=BLUE)
    right.set(ylabel="share of all bytes (%)", title=f"{total:,} bytes of validation text")
    for axes in (left, right):
        axes.set(xlabel="UTF-8 bytes of one token")
        axes.set_xticks(lengths[:: max(1, len(lengths) // 12)])
    return figure


@styled
def top_pieces(pieces: Sequence[str], counts: ArrayLike, token_bytes: ArrayLike) -> Picture:
    """Draw the 20 pieces that carry most bytes; ``counts`` and ``token_bytes`` (all bytes of a piece) go with them."""
    carried, n = np.asarray(token_bytes, np.int64), np.asarray(counts, np.int64)
    order = np.argsort(-carried, kind="stable")[:20]
    share = carried[order] / max(int(carried.sum()), 1) * 100
    figure, (axes,) = new(width=8.0, height=0.6 + 0.27 * len(order))
    axes.barh(np.arange(len(order)), share, color=BLUE)
    axes.set_yticks(np.arange(len(order)), [printable(pieces[i]) for i in order], parse_math=False)
    for row, i in enumerate(order):
        axes.annotate(f"{n[i]:,} times", (share[row], row), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.grid(axis="y", visible=False)
    used = int((n > 0).sum())
    axes.set(xlabel="share of all bytes (%)")
    axes.set_title(f"The {len(order)} pieces that carry {share.sum():.0f} % of the bytes ({used:,} pieces occur)")
    return figure


@styled
def tokens(
    pieces: Sequence[str],
    token_bytes: Sequence[int],
    nats: Sequence[float] | None = None,
    *,
    title: str = "",
) -> Picture:
    """Draw a box a token with its bytes below; with ``nats``, colour and number say what predicting it cost."""
    texts = [printable(p) for p in pieces]
    below = [str(int(b)) for b in token_bytes] if nats is None else [f"{x:.1f}" for x in nats]
    boxes: list[tuple[float, int, float]] = []
    x, row = 0.0, 0
    for text, number in zip(texts, below, strict=True):
        width = max(1.35 * len(text), 1.1 * len(number)) + 1.4
        if x + width > LINE and x > 0:
            x, row = 0.0, row + 1
        boxes.append((x, row, width))
        x += width + 0.5
    rows = row + 1 if texts else 1
    figure, (axes,) = new(width=10.0, height=0.75 + 0.62 * rows + (0.25 if nats is not None else 0))
    axes.set(xlim=(-0.5, LINE + 0.5), ylim=(rows - 0.02, -0.12))
    axes.axis("off")
    worst = max([*(nats or []), 1e-9])
    colours = matplotlib.colormaps["YlOrRd"]
    for i, (left, level, width) in enumerate(boxes):
        if nats is None:
            face = (SKY, LIGHT)[i % 2] if token_bytes[i] else "white"
        else:
            face = matplotlib.colors.to_hex(colours(0.05 + 0.75 * min(nats[i] / worst, 1.0)))
        look: Look = {"boxstyle": "round,pad=0,rounding_size=0.15", "edgecolor": GREY, "linewidth": 0.6}
        axes.add_patch(FancyBboxPatch((left, level + 0.04), width, 0.5, facecolor=face, **look))
        middle: Look = {"ha": "center", "va": "center"}
        centre = left + width / 2
        font: Look = {"family": "DejaVu Sans Mono", "fontsize": 11, "parse_math": False}
        axes.text(centre, level + 0.29, texts[i], **middle, **font)
        axes.text(centre, level + 0.74, below[i], fontsize=9, color=GREY, **middle)
    size = int(sum(token_bytes))
    text = f"{len(texts)} tokens, {size} bytes"
    if nats is None:
        text += "; below each token its bytes"
    elif size:
        text += f"; below each token its nats; together {sum(nats) / np.log(2) / size:.2f} bits per byte"
    axes.set_title(f"{title}: {text}" if title else text)
    return figure


@styled
def ladder(
    values: Mapping[str, float],
    *,
    unit: str,
    title: str,
    number: str = "{:,.0f}",
    guess: float | None = None,
    shown: bool = True,
) -> Picture:
    """Draw one bar a rung, top to bottom, with ``guess`` as a line; the last rung stays empty unless ``shown``."""
    names, lengths = list(values), [*values.values()]
    figure, (axes,) = new(width=9.0, height=0.9 + 0.45 * len(names))
    drawn = lengths if shown else [*lengths[:-1], 0.0]
    bars = axes.barh(names, drawn, color=[*[SKY] * (len(names) - 1), BLUE])
    labels = [f"{number.format(v)} ({v / max(lengths[0], 1e-9):.0%})" for v in drawn]
    axes.bar_label(bars, labels if shown else [*labels[:-1], "?"], padding=4, fontsize=10)
    if guess is not None:
        axes.axvline(guess, color=RED, linestyle="--", label=f"your guess: {number.format(guess)}")
        axes.legend(loc="lower right")
    axes.invert_yaxis()
    axes.set_xlim(0, max(lengths) * 1.22)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:,g}"))
    axes.set(xlabel=unit, title=title)
    return figure


@styled
def vocabularies(table: pd.DataFrame) -> Picture:
    """Draw unigram entropy a token and a byte for several vocabulary sizes: one grows, one falls.

    ``table`` has the columns ``pieces``, ``bits_per_token``, ``bytes_per_token`` and ``bits_per_byte``.
    """
    figure, (left, right) = new(2, height=3.5)
    x = np.arange(len(table))
    for axes, label, colour in ((left, "bits per token", ORANGE), (right, "bits per byte", BLUE)):
        values = table[label.replace(" ", "_")]
        bars = axes.bar(x, values, color=colour, width=0.6)
        axes.bar_label(bars, [f"{v:.2f}" for v in values], padding=2, fontsize=10)
        axes.set_xticks(x, [f"{int(n):,}" for n in table["pieces"]])
        axes.margins(y=0.15)
        axes.set(xlabel="pieces of the vocabulary", ylabel=label)
    left.set_title("Loss per token: depends on how\nmuch text one token stands for")
    right.set_title("Bits per byte: same text, same bytes,\nso the values can be compared")
    return figure


@styled
def windows(starts: ArrayLike, first: ArrayLike, stop: ArrayLike, *, window: int, targets: int) -> Picture:
    """Draw the first windows of a scoring plan: context in grey, scored targets in colour, a row each.

    Window w covers targets [starts, min(starts + window, targets)) and scores [first, stop).
    """
    begin, score, end = (np.asarray(a, np.int64)[:8] for a in (starts, first, stop))
    total = len(np.asarray(starts))
    figure, (axes,) = new(width=9.0, height=1.5 + 0.3 * len(begin))
    for row, (b, s, e) in enumerate(zip(begin, score, end, strict=True)):
        covered = min(int(b) + window, targets)
        axes.add_patch(Rectangle((b, row - 0.36), covered - b, 0.72, facecolor=LIGHT, edgecolor="none"))
        axes.add_patch(Rectangle((s, row - 0.36), e - s, 0.72, facecolor=BLUE if row % 2 else ORANGE, edgecolor="none"))
        if s > b:
            axes.text(b + (s - b) / 2, row, f"{s - b} targets of context", ha="center", va="center", fontsize=9)
    right = min(targets, int(begin[-1]) + window) if len(begin) else window
    axes.set(xlim=(0, right * 1.01), ylim=(len(begin) - 0.4, -0.6), xlabel="target in the text")
    axes.set_yticks(range(len(begin)), [f"window {i}" for i in range(len(begin))])
    axes.grid(visible=False)
    stride = int(end[1] - score[1]) if len(end) > 1 else int(end[0] - score[0]) if len(end) else 0
    least = int((score - begin)[1:].min()) if len(begin) > 1 else 0
    axes.set_title(
        f"Windows of {window}, {stride} scored in each (colour): {total:,} forward passes,\n"
        f"at least {least} tokens of context for every target after the first window"
    )
    return figure


@styled
def times_scored(ours: ArrayLike, published: ArrayLike, *, first_target: int) -> Picture:
    """Draw how often each of the last targets is scored, here and by the published scripts."""
    a, b = np.asarray(ours, np.int64), np.asarray(published, np.int64)
    x = first_target + np.arange(len(a))
    figure, (axes,) = new(width=9.0, height=3.2)
    axes.step(x, b, where="mid", color=RED, label=f"published scripts: {int(b.sum()):,} scores for {len(b):,} targets")
    axes.step(x, a, where="mid", color=BLUE, label=f"here: {int(a.sum()):,} scores for {len(a):,} targets")
    axes.set(xlabel="target in the text (end of the validation set)", ylabel="times scored", ylim=(0, None))
    axes.set_title("The published loop scores its last stride again in every truncated window")
    axes.legend(loc="upper left")
    return figure


@styled
def gain_by_position(table: pd.DataFrame, *, sliding: str) -> Picture:
    """Draw what sliding windows change for the same targets, against the context that contiguous windows leave them.

    ``table`` is that of :func:`golfbook.analysis.context.gain_by_position`; ``sliding`` names the windows compared.
    """
    figure, panels = new(2, width=10.0, height=3.7)
    far = table[table["context"] >= table["context"].max() / 12]
    start = far["context"].min()
    for axes, rows in zip(panels, (table, far), strict=True):
        half = ((rows["high"] - rows["low"]) / 2).fillna(0)
        axes.errorbar(rows["context"], rows["mean"], yerr=half, marker="o", capsize=4, color=BLUE)
        axes.axhline(0, color=GREY, linewidth=1.2)
        axes.set(xscale="log", xlabel="tokens of context in a contiguous window (log)")
        axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    ticks = [2**k for k in range(12) if 0.8 * start < 2**k < 1.2 * far["context"].max()]
    panels[1].set_xticks(ticks, [str(x) for x in ticks])
    panels[0].set_ylabel("paired difference (nats per token)")
    panels[0].set_title(f"{sliding} minus contiguous, same targets;\n95 % intervals, n = {table['n'].max():,} windows")
    panels[1].set_title(f"The same from {start:g} tokens on, enlarged:\nabove 0 more context harms")
    return figure


@styled
def stride_ladder(table: pd.DataFrame, *, targets: int) -> Picture:
    """Draw paired differences of the score and the work against the stride.

    ``table`` is that of :func:`golfbook.analysis.context.stride_ladder`, from ``targets`` targets.
    """
    rows = table.sort_values("stride", ascending=False)
    x = np.arange(len(rows))
    figure, (left, right) = new(2, height=3.7)
    half = ((rows["high"] - rows["low"]) / 2).fillna(0)
    left.errorbar(x, rows["difference"], yerr=half, marker="o", capsize=5, color=BLUE)
    for i, (value, gap, bar) in enumerate(zip(rows["val_bpb"], rows["difference"], half, strict=True)):
        left.annotate(f"{value:.4f}", (i, gap + bar), (0, 5), textcoords="offset points", ha="center", fontsize=9)
    left.axhline(0, color=GREY, linewidth=1.2)
    left.margins(x=0.14, y=0.2)
    left.set(ylabel="difference from contiguous (BPB)")
    left.set_title(f"Paired difference, n = {targets:,} targets,\n95 % intervals; numbers: the scores")
    bars = right.bar(x, rows["work"], color=ORANGE, width=0.6)
    right.bar_label(bars, [f"{work:.1f}×" for work in rows["work"]], padding=2, fontsize=10)
    right.margins(y=0.15)
    right.set(ylabel="tokens computed per target", title="Work: half the stride,\nnearly twice the passes")
    for axes in (left, right):
        axes.set_xticks(x, [str(int(s)) for s in rows["stride"]])
        axes.set(xlabel="stride (targets scored per window)")
    return figure
