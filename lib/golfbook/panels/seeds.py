"""The panel of seeds: how many a difference needs, given the spread."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from golfbook.panels.base import Panel, Slider
from golfbook.plots import seeds as seed_plots

if TYPE_CHECKING:
    pass


def seeds_needed(difference: float, std: float) -> Panel:
    """Choose a difference and a spread, see how many paired seeds would show it. Both start at measured values."""
    unit = 10 ** np.floor(np.log10(max(std, difference, 1e-4)))  # so that the sliders reach from fine to coarse
    step, high = float(unit / 20), float(unit * 10)

    def on_scale(value: float) -> float:
        return float(min(max(round(value / step), 1) * step, high))

    return Panel(
        lambda difference, std: seed_plots.seeds_needed(difference, std),
        {
            "difference": Slider("difference (BPB)", on_scale(difference), step, high, step),
            "std": Slider("std of differences (BPB)", on_scale(std), step, high, step),
        },
    )
