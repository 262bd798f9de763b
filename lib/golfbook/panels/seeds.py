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
    """Choose a difference and a spread, see how many paired seeds would show it. Both start at measured values.

    To guess beforehand: the seeds that show it with a chance of 80 %.
    """
    unit = 10 ** np.floor(np.log10(max(std, difference, 1e-4)))  # so that the sliders reach from fine to coarse
    step, high = float(unit / 20), float(unit * 10)

    def on_scale(value: float) -> float:
        return float(min(max(round(value / step), 1) * step, high))

    panel = Panel(
        lambda difference, std: seed_plots.seeds_needed(difference, std),
        {
            "difference": Slider("difference (BPB)", on_scale(difference), step, high, step),
            "std": Slider("std of differences (BPB)", on_scale(std), step, high, step),
        },
    )
    return guessing(panel, Slider("my guess: seeds", 0, 0, 50), lambda difference, std: seeds_for(difference, std))


def coverage(*, studies: int = 100) -> Panel:
    """Choose a rule for intervals, draw studies without an effect anew, see how many miss 0; guess that for n = 2."""

    def draw(rule: str, shown: int, seed: int) -> Picture:
        found = {n: null_intervals(n, studies, int(seed), errors=RULES[rule]) for n in SEEDS}
        return seed_plots.coverage(found, int(shown), rule=rule)

    def missing(rule: str, shown: int, seed: int) -> float:
        low, high = null_intervals(SEEDS[0], studies, int(seed), errors=RULES[rule])[: int(shown)].T
        return float(((low > 0) | (high < 0)).sum())

    controls: dict[str, Control] = {
        "rule": Choice("interval", "mean ± 2 standard errors", {name: name for name in RULES}),
        "shown": Slider("studies", studies, 1, studies),
        "seed": Slider("draw", 1, 1, 50),
    }
    return guessing(Panel(draw, controls), Slider(f"my guess: red ones at n = {SEEDS[0]}", -1, -1, studies), missing)
