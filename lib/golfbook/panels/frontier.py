"""Panel of size against quality: a budget, and the best recipe and rate that fit it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from golfbook.panels.base import Panel, Slider, guessing
from golfbook.plots import frontier as frontier_plots

if TYPE_CHECKING:
    import pandas as pd


def budget(table: pd.DataFrame, names: Mapping[str, str], kinds: tuple[str, ...], *, start: float) -> Panel:
    """Show which artifacts of one model fit a budget to choose, in thousand bytes with code; starts at ``start``.

    ``table`` is that of :func:`golfbook.plots.frontier.within`. To guess beforehand: the rate, in bits, of the best.
    """
    total = table[list(kinds)].sum(axis=1) / 1000
    low, high = int(total.min() // 10 * 10), int(total.max() // 10 * 10 + 10)

    def best(budget: float) -> float:
        return float(table[total <= budget].nsmallest(1, "divergence_bpb")["bits"].sum())  # 0 where nothing fits

    panel = Panel(
        lambda budget: frontier_plots.within(table, names, kinds, budget),
        {"budget": Slider("budget (thousand bytes)", round(start / 10) * 10, low, high, 10)},
    )
    return guessing(panel, Slider("my guess: bits of the best", 0.0, 0.0, 8.0, 0.5), best)
