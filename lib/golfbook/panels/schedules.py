"""The panel of schedules: rates, momentum, averaging, QAT and the clock of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from golfbook.config.schema import TrainConfig
from golfbook.config.section import Section
from golfbook.panels.base import Choice, Panel, Slider, Switch
from golfbook.plots import schedules
from golfbook.plots.style import Picture

S = TypeVar("S", bound=Section)


def schedule(train: TrainConfig) -> Panel:
    """Change the schedules of a training configuration and see them: rates, momentum, averaging, QAT, the clock.

    ``fits`` only matters by the clock: it is how many steps the time is enough for, so a smaller one is a slower
    machine. Where the configuration has no ``max_seconds``, the time is a second for each of its steps.
    """

    def draw(clock: bool, fits: float, qat_start: float, muon_momentum_warmup_steps: int, **changes: Any) -> Picture:
        seconds = (train.max_seconds or float(train.steps)) if clock else 0.0
        changed = {
            "max_seconds": seconds,
            "qat": train.qat.model_copy(update={"start": qat_start}),
            "optimizer": train.optimizer.model_copy(update={"muon_momentum_warmup_steps": muon_momentum_warmup_steps}),
            "schedule": _changed(train.schedule, changes),
            "averaging": _changed(train.averaging, changes),
        }
        return schedules.schedule(train.model_copy(update=changed), seconds / fits if clock else None)

    step = max(1, train.steps // 20)
    decays = {f"{d:g}" if d else "off": d for d in sorted({0.0, 0.9, 0.98, 0.99, 0.997, train.averaging.ema_decay})}
    every = {str(n): n for n in sorted({1, 2, 5, 10, 20, 50, train.averaging.swa_every})}
    return Panel(
        draw,
        {
            "warmdown_steps": Slider(
                "warmdown steps", min(train.schedule.warmdown_steps, train.steps), 0, train.steps, step
            ),
            "warmdown_shape": Choice("shape", train.schedule.warmdown_shape, {"linear": "linear", "cosine": "cosine"}),
            "min_lr_scale": Slider("ends at", train.schedule.min_lr_scale, 0.0, 0.95, 0.05),
            "lr_warmup_steps": Slider(
                "LR warm-up", min(train.schedule.lr_warmup_steps, train.steps), 0, train.steps, step
            ),
            "muon_momentum_warmup_steps": Slider(
                "momentum warm-up", min(train.optimizer.muon_momentum_warmup_steps, train.steps), 0, train.steps, step
            ),
            "method": Choice(
                "average",
                train.averaging.method,
                {"none": "none", "EMA": "ema", "SWA": "swa", "SWA of EMA": "swa_of_ema"},
            ),
            "ema_decay": Choice("EMA decay", train.averaging.ema_decay, decays),
            "swa_start": Slider("SWA below", train.averaging.swa_start, 0.0, 0.95, 0.05),
            "swa_every": Choice("snapshot every", train.averaging.swa_every, every),
            "qat_start": Slider("QAT below", train.qat.start, 0.0, 0.95, 0.05),
            "clock": Switch("stop by the clock", bool(train.max_seconds)),
            "fits": Slider("steps that fit", train.steps, max(1, train.steps // 4), train.steps, step),
        },
    )


def _changed(section: S, changes: Mapping[str, Any]) -> S:
    """Return ``section`` with those of ``changes`` that it has."""
    return section.model_copy(update={k: v for k, v in changes.items() if k in type(section).model_fields})
