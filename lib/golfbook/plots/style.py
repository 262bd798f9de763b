"""Pictures as pure functions: data in, one matplotlib ``Figure`` out, nothing shown and no global state touched.

This module holds the style and the way figures are saved; the pictures are in one module a subject.

A figure is returned as :class:`Picture`, which draws itself when it is the last value of a notebook cell, once, with or
without ``%matplotlib``. Colours are those of Okabe and Ito (2008), which people of any common colour vision can tell
apart.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from golfbook.errors import GolfbookError
from golfbook.files import atomic_path, atomic_write_bytes, figures_root

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
Look = dict[str, Any]  # settings of a drawing function that several calls share

P = ParamSpec("P")


class Picture(Figure):
    """Draw itself in a notebook without pyplot: a matplotlib figure."""

    def _repr_png_(self) -> bytes:
        return png(self)


def styled(draw: Callable[P, Picture]) -> Callable[P, Picture]:
    """Draw under the house style, whatever the caller's rcParams are."""

    @functools.wraps(draw)
    def inner(*args: P.args, **kwargs: P.kwargs) -> Picture:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            return draw(*args, **kwargs)

    return inner


def new(columns: int = 1, *, width: float = 9.0, height: float = 3.8, **grid: Any) -> tuple[Picture, list[Axes]]:
    """Return an empty picture of ``width`` x ``height`` inches and its axes in one row (more: ``nrows``)."""
    figure = Picture(figsize=(width, height), layout="constrained")
    axes = figure.subplots(ncols=columns, squeeze=False, **grid)
    return figure, list(axes.flat)


def png(figure: Figure, dpi: int = DPI) -> bytes:
    """Return the figure as PNG bytes; equal data gives equal bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def gif(frames: Sequence[Picture], milliseconds: Sequence[int], *, dpi: int = 80, colours: int = 48) -> bytes:
    """Return an endless animation as GIF bytes; ``milliseconds`` says how long each frame is shown.

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
    """Return the files written: ``<name>.png``, ``<name>.svg`` and, with a ``table``, ``<name>.csv``.

    They lie in the figures folder and hold no dates: equal data gives equal bytes. Each is written atomically. Raises
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
