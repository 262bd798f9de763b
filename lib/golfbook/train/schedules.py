"""What changes from step to step: learning-rate scale, Muon momentum, and when snapshots and fake quantisation start.

Pure functions of the configuration, the step and, where ``train.max_seconds`` is set, the clock. Steps count from 0 and
mean the step about to run. Published rules: PR 1166 sections 14.2 and 15.1, PR 1406 sections 11.7 and 11.8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from golfbook.config.schema import TrainConfig


def lr_scale(
    step: int, config: TrainConfig, elapsed_seconds: float | None = None, mean_step_seconds: float | None = None
) -> float:
    """Return the multiplier of every base rate, between 0 and 1: the smaller one of warm-up and warmdown.

    Warm-up: ``(step + 1) / lr_warmup_steps``. Warmdown: the share f of it that is left, 1 before it starts, becomes
    ``min + (1 - min) h`` with h = f (linear) or ``(1 - cos(pi f)) / 2`` (cosine), and min = ``min_lr_scale``. By steps,
    ``f = (steps - step) / warmdown_steps``. With ``max_seconds``, by the clock, as published: the warmdown lasts
    ``warmdown_steps`` times the mean seconds of a step, f is the part of it that the time left still covers, and
    ``elapsed_seconds`` is the training time so far without validation. ``mean_step_seconds`` is ``elapsed_seconds``
    over ``step`` unless given. Raises ValueError where the clock is needed and missing.
    """
    warmup = min(1.0, (step + 1) / config.schedule.lr_warmup_steps) if config.schedule.lr_warmup_steps else 1.0
    left = _warmdown_left(step, config, elapsed_seconds, mean_step_seconds)
    shaped = left if config.schedule.warmdown_shape == "linear" else (1 - math.cos(math.pi * left)) / 2
    return min(warmup, config.schedule.min_lr_scale + (1 - config.schedule.min_lr_scale) * shaped)


def _warmdown_left(step: int, config: TrainConfig, elapsed: float | None, mean_step: float | None) -> float:
    if not config.schedule.warmdown_steps:
        return 1.0
    if not config.max_seconds:
        return min(1.0, max(config.steps - step, 0) / config.schedule.warmdown_steps)
    if elapsed is None:
        raise ValueError("train.max_seconds is set: the learning rate follows the clock and needs elapsed_seconds")
    warmdown = config.schedule.warmdown_steps * (elapsed / max(step, 1) if mean_step is None else mean_step)
    remaining = max(config.max_seconds - elapsed, 0.0)
    return remaining / max(warmdown, 1e-9) if remaining <= warmdown else 1.0


def muon_momentum(step: int, config: TrainConfig) -> float:
    """Return Muon's momentum: linear from ``muon_momentum_start`` to ``muon_momentum`` at warm-up (section 14.2)."""
    warmup = config.optimizer.muon_momentum_warmup_steps
    done = min(step / warmup, 1.0) if warmup else 1.0
    return (1 - done) * config.optimizer.muon_momentum_start + done * config.optimizer.muon_momentum


def snapshot_due(step: int, scale: float, config: TrainConfig) -> bool:
    """Return whether SWA takes a snapshot after ``step`` at learning-rate scale ``scale`` (PR 1166 section 16).

    Every ``swa_every`` steps while the scale is below ``swa_start``; the low scales of a warm-up do not count.
    """
    return (
        step >= config.schedule.lr_warmup_steps
        and scale < config.averaging.swa_start
        and (step + 1) % config.averaging.swa_every == 0
    )


def qat_active(step: int, scale: float, config: TrainConfig) -> bool:
    """Return whether ``step`` at rate scale ``scale`` fake-quantises: below ``qat_start`` and past the warm-up."""
    return step >= config.schedule.lr_warmup_steps and scale < config.qat.start


def schedule_table(config: TrainConfig, step_seconds: float | None = None) -> dict[str, np.ndarray]:
    """Tabulate all steps: ``step`` int64, ``lr_scale`` and ``muon_momentum`` float64, ``snapshot`` and ``qat`` bool.

    With ``train.max_seconds`` each step is taken to last ``step_seconds``, and the table ends when the time is used up
    or the steps are; the default is the duration at which both happen together.
    """
    seconds = step_seconds if step_seconds is not None else config.max_seconds / config.steps
    steps, clock = config.steps, config.max_seconds > 0
    if clock and seconds > 0:
        steps = min(steps, max(1, math.ceil(config.max_seconds / seconds - 1e-9)))
    scales = [lr_scale(k, config, k * seconds, seconds) if clock else lr_scale(k, config) for k in range(steps)]
    return {
        "step": np.arange(steps),
        "lr_scale": np.array(scales),
        "muon_momentum": np.array([muon_momentum(k, config) for k in range(steps)]),
        "snapshot": np.array([snapshot_due(k, s, config) for k, s in enumerate(scales)]),
        "qat": np.array([qat_active(k, s, config) for k, s in enumerate(scales)]),
    }


def step_weights(config: TrainConfig, table: Mapping[str, np.ndarray]) -> tuple[np.ndarray, float]:
    """Return what the weights after each step of ``table`` make up of those handed on, and what the initial ones do.

    ``table`` is that of :func:`schedule_table`. Returns float64 shares (steps,) and the share of the initial weights;
    together they are 1. :class:`golfbook.train.averaging.WeightAverage` is linear in the weights, so these shares
    are all of it: none, the last step; EMA, ``(1 - d) d^(n-1-k)``; SWA, 1/m for each of m snapshots, or the last step
    where there is none; SWA of the EMA, the mean of the EMA's shares at the snapshots.
    """
    count, decay = len(table["step"]), config.averaging.ema_decay
    shares = np.zeros(count)
    snapshots = table["step"][table["snapshot"]] if config.averaging.method in ("swa", "swa_of_ema") else []
    if config.averaging.method in ("none", "swa"):
        shares[snapshots if len(snapshots) else [count - 1]] = 1 / max(len(snapshots), 1)
        return shares, 0.0
    ends = list(snapshots) if len(snapshots) else [count - 1]
    for end in ends:
        shares[: end + 1] += (1 - decay) * decay ** np.arange(end, -1, -1) / len(ends)
    return shares, float(np.mean([decay ** (end + 1) for end in ends]))
