"""The panel of schedules: rates, momentum, averaging, QAT and the clock of a training run."""

from __future__ import annotations

from typing import Any

from golfbook.config.schema import TrainConfig
from golfbook.panels.base import Choice, Panel, Slider, Switch
from golfbook.plots import schedules
from golfbook.plots.style import Picture


def schedule(train: TrainConfig) -> Panel:
    """Change the schedules of a training configuration and see them: rates, momentum, averaging, QAT, the clock.

    ``fits`` only matters by the clock: it is how many steps the time is enough for, so a smaller one is a slower
    machine. Where the configuration has no ``max_seconds``, the time is a second for each of its steps.
    """

    def draw(clock: bool, fits: float, **changes: Any) -> Picture:
        seconds = (train.max_seconds or float(train.steps)) if clock else 0.0
        return schedules.schedule(
            train.model_copy(update={**changes, "max_seconds": seconds}), seconds / fits if clock else None
        )

    step = max(1, train.steps // 20)
    decays = {f"{d:g}" if d else "off": d for d in sorted({0.0, 0.9, 0.98, 0.99, 0.997, train.ema_decay})}
    every = {str(n): n for n in sorted({1, 2, 5, 10, 20, 50, train.swa_every})}
    return Panel(
        draw,
        {
            "warmdown_steps": Slider("warmdown steps", min(train.warmdown_steps, train.steps), 0, train.steps, step),
            "warmdown_shape": Choice("shape", train.warmdown_shape, {"linear": "linear", "cosine": "cosine"}),
            "min_lr_scale": Slider("ends at", train.min_lr_scale, 0.0, 0.95, 0.05),
            "lr_warmup_steps": Slider("LR warm-up", min(train.lr_warmup_steps, train.steps), 0, train.steps, step),
            "muon_momentum_warmup_steps": Slider(
                "momentum warm-up", min(train.muon_momentum_warmup_steps, train.steps), 0, train.steps, step
            ),
            "averaging": Choice(
                "average", train.averaging, {"none": "none", "EMA": "ema", "SWA": "swa", "SWA of EMA": "swa_of_ema"}
            ),
            "ema_decay": Choice("EMA decay", train.ema_decay, decays),
            "swa_start": Slider("SWA below", train.swa_start, 0.0, 0.95, 0.05),
            "swa_every": Choice("snapshot every", train.swa_every, every),
            "qat_start": Slider("QAT below", train.qat_start, 0.0, 0.95, 0.05),
            "clock": Switch("stop by the clock", bool(train.max_seconds)),
            "fits": Slider("steps that fit", train.steps, max(1, train.steps // 4), train.steps, step),
        },
    )
