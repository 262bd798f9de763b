"""Panels of seeds: how often an interval misses the truth, and how many seeds a difference needs."""

from __future__ import annotations

import numpy as np

from golfbook.analysis.statistics import null_intervals, seeds_for
from golfbook.panels.base import Choice, Control, Panel, Slider, guessing
from golfbook.plots import seeds as seed_plots
from golfbook.plots.style import Picture

SEEDS = (2, 4, 8)
RULES = {"mean ± t standard errors": 0.0, "mean ± 2 standard errors": 2.0}


def seeds_needed(difference: float, std: float) -> Panel:
    """Show, for a difference and a spread to choose, how many paired seeds show it; both start at measured values.

    To guess beforehand: the seeds that show it with a chance of 80 %.
    """
    unit = 10 ** np.floor(np.log10(max(std, difference, 1e-4)))  # so that the sliders reach from fine to coarse
    step, high = float(unit / 20), float(unit * 10)

    def on_scale(value: float) -> float:
        return float(min(max(round(value / step), 1) * step, high))

    panel = Panel(
        seed_plots.seeds_needed,
        {
            "difference": Slider("difference (BPB)", on_scale(difference), step, high, step),
            "std": Slider("std of differences (BPB)", on_scale(std), step, high, step),
        },
    )
    return guessing(panel, Slider("my guess: seeds", 0, 0, 50), seeds_for)


def coverage(*, studies: int = 100) -> Panel:
    """Show how many intervals of studies without an effect miss 0, by a rule to choose; to guess: that for n = 2."""

    def drawn(n: int, rule: str, seed: int) -> np.ndarray:
        return null_intervals(n, studies, seed, errors=RULES[rule])

    def draw(rule: str, shown: int, seed: int) -> Picture:
        return seed_plots.coverage({n: drawn(n, rule, seed) for n in SEEDS}, shown, rule=rule)

    def missing(rule: str, shown: int, seed: int) -> float:
        low, high = drawn(SEEDS[0], rule, seed)[:shown].T
        return float(((low > 0) | (high < 0)).sum())

    controls: dict[str, Control] = {
        "rule": Choice("interval", "mean ± 2 standard errors", {name: name for name in RULES}),
        "shown": Slider("studies", studies, 1, studies),
        "seed": Slider("draw", 1, 1, 50),
    }
    return guessing(Panel(draw, controls), Slider(f"my guess: red ones at n = {SEEDS[0]}", -1, -1, studies), missing)
