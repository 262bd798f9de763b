"""Panels of training: the steps of Newton-Schulz, sweeps of learning rates and batch sizes, published trajectories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from golfbook.analysis.comparisons import warmdown_gains
from golfbook.analysis.optimizers import Valley, direction_sizes, share_in_band
from golfbook.panels.base import Choice, Control, Panel, Slider, Switch, guessing, interactive
from golfbook.plots import optimizers as optimizer_plots
from golfbook.plots import training as training_plots
from golfbook.plots.style import Picture
from golfbook.train import muon

COEFFICIENTS: dict[str, muon.Coefficients] = {"quintic (published)": "quintic", "Polar Express": "polar_express"}
MOVES = (0.25, 0.5, 0.75)  # moments within a step of the animation that are drawn besides its end
MOST_STEPS = 8
SHOWN_STEPS = 80  # of a path down the valley


def momentum() -> Panel:
    """Show the way down a valley by rate and momentum, and how all other settings do once that is asked for."""
    valley = Valley()
    rates, momenta = np.linspace(0.001, 0.07, 70), np.linspace(0, 0.95, 39)
    steps = valley.arrival(rates, momenta[:, None])

    def draw(rate: float, momentum: float, truth: bool) -> Picture:
        return optimizer_plots.valley(
            valley.descend(rate, momentum, SHOWN_STEPS),
            (valley.flat, valley.steep),
            arrived=float(valley.arrival(rate, momentum)),
            at=(rate, momentum),
            tried=(rates, momenta, steps) if truth else None,
        )

    return Panel(
        draw,
        {
            "rate": Slider("learning rate", 0.03, 0.001, 0.07, 0.001),
            "momentum": Slider("momentum", 0.0, 0.0, 0.95, 0.05),
            "truth": Switch("show all settings", not interactive()),
        },
    )


def newton_schulz(matrix: Tensor, name: str, *, steps: int = 5, dtype: str = "float32") -> Panel:
    """Show Newton-Schulz on one gradient (rows, columns), step by step; choose coefficients, norms and arithmetic.

    To guess beforehand: the share of directions between 0.7 and 1.3 after 8 steps, in per cent.
    """

    def sizes_after(step: int, coefficients: muon.Coefficients, row_norm: bool, dtype: str) -> np.ndarray:
        return direction_sizes(matrix, step, coefficients, getattr(torch, dtype), row_norm=row_norm)

    def draw(step: int, coefficients: muon.Coefficients, **choices: Any) -> Picture:
        sizes = sizes_after(step, coefficients, **choices)
        table = muon.iteration_coefficients(max(step, 1), coefficients)
        return optimizer_plots.newton_schulz(sizes, table, step=step, title=f"Gradient of {name}")

    controls: dict[str, Control] = {
        "step": Slider("step", min(steps, MOST_STEPS), 0, MOST_STEPS),
        "coefficients": Choice("coefficients", "quintic", COEFFICIENTS),
        "row_norm": Switch("rows to unit norm first (MuonEq-R)", False),
        "dtype": Choice("arithmetic", dtype, {"float32": "float32", "bfloat16": "bfloat16"}),
    }
    question = Slider(f"my guess: % in 0.7 to 1.3 after {MOST_STEPS} steps", -1, -1, 100)
    return guessing(
        Panel(draw, controls),
        question,
        lambda step, **choices: round(100 * share_in_band(sizes_after(MOST_STEPS, **choices)[-1])),
    )


def newton_schulz_frames(matrix: Tensor, name: str, steps: int = 5) -> tuple[list[Callable[[], Picture]], list[int]]:
    """Return frames of both iterations at work on one gradient, and the milliseconds of each, for ``panels.play``."""
    series = {
        label: (direction_sizes(matrix, steps, kind), muon.iteration_coefficients(steps, kind))
        for label, kind in COEFFICIENTS.items()
    }
    moments = [0.0, *(k + part for k in range(steps) for part in (*MOVES, 1.0))]

    def frame(moment: float) -> Callable[[], Picture]:
        return lambda: optimizer_plots.newton_schulz_moment(series, moment, title=f"Gradient of {name}")

    return [frame(m) for m in moments], [2500 if m == steps else 900 if m.is_integer() else 220 for m in moments]


def curves(results: pd.DataFrame, curves: pd.DataFrame) -> Panel:
    """Show validation curves of two variants over tokens, steps or time; starts at base and best."""
    means = results.groupby("variant", sort=False)["val_bpb"].mean()
    names = {variant: variant for variant in means.index}

    def draw(first: str, second: str, x: str) -> Picture:
        return training_plots.curves(curves, (first, second), x=x)

    return Panel(
        draw,
        {
            "first": Choice("one", "base", names),
            "second": Choice("the other", means.drop("base").idxmin(), names),
            "x": Choice("over", "tokens_seen", {label: key for key, label in training_plots.COUNTS.items()}),
        },
    )


def trajectories(points: pd.DataFrame, events: pd.DataFrame, runs: pd.DataFrame) -> Panel:
    """Show the published curves; choose their metric, and whether the longer GEPA runs are among them.

    To guess beforehand: the bits per byte that the warmdown wins, as the mean over these runs.
    """

    def shown(gepa: bool) -> pd.DataFrame:
        return points if gepa else points[points["system"] != "GEPA"]

    def draw(metric: str, gepa: bool) -> Picture:
        return training_plots.trajectories(shown(gepa), events, runs, metric=metric)

    metrics = {label: key for key, label in training_plots.METRICS.items()}
    panel = Panel(draw, {"metric": Choice("metric", "val_bpb", metrics), "gepa": Switch("with GEPA", False)})
    question = Slider("my guess: bits per byte won in the warmdown", 0.0, 0.0, 0.3, 0.005)
    return guessing(panel, question, lambda metric, gepa: round(warmdown_gains(shown(gepa), events)["gain"].mean(), 3))
