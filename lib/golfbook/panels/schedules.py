"""The panel of schedules: rates, momentum, averaging, QAT and the clock of a training run."""

from __future__ import annotations

from typing import Any

from golfbook.config.schema import TrainConfig
from golfbook.panels.base import Choice, Control, Panel, Slider, Switch, guessing
from golfbook.plots import schedules
from golfbook.plots.style import Picture
from golfbook.train.schedules import schedule_table, step_weights

PUBLISHED_DECAY = 0.997  # of the EMA, in all four systems


def schedule(train: TrainConfig) -> Panel:
    """Show schedules of a training configuration that can be changed: rates, momentum, averaging, QAT, the clock.

    ``fits`` only matters by the clock: it is how many steps the time is enough for, so a smaller one is a slower
    machine. Where the configuration has no ``max_seconds``, the time is a second for each of its steps.

    To guess beforehand: how many per cent of an EMA with the published decay would be initial weights.
    """

    def changed(clock: bool, fits: float, qat_start: float, **changes: Any) -> tuple[TrainConfig, float | None]:
        seconds = (train.max_seconds or float(train.steps)) if clock else 0.0
        update: dict[str, Any] = {"max_seconds": seconds, "qat": train.qat.model_copy(update={"start": qat_start})}
        for section in ("optimizer", "schedule", "averaging"):
            old = getattr(train, section)
            mine = {key: value for key, value in changes.items() if key in type(old).model_fields}
            update[section] = old.model_copy(update=mine)
        return train.model_copy(update=update), seconds / fits if clock else None

    def draw(**state: Any) -> Picture:
        return schedules.schedule(*changed(**state))

    def initial_weights(**state: Any) -> float:
        config, seconds = changed(**state | {"method": "ema", "ema_decay": PUBLISHED_DECAY})
        return round(100 * step_weights(config, schedule_table(config, seconds))[1])

    rates, average, steps = train.schedule, train.averaging, train.steps
    step = max(1, steps // 20)
    decays = {f"{d:g}" if d else "off": d for d in sorted({0.0, 0.9, 0.98, 0.99, PUBLISHED_DECAY, average.ema_decay})}
    every = {str(n): n for n in sorted({1, 2, 5, 10, 20, 50, average.swa_every})}
    methods = {"none": "none", "EMA": "ema", "SWA": "swa", "SWA of EMA": "swa_of_ema"}

    def some_steps(label: str, default: int) -> Slider:
        return Slider(label, min(default, steps), 0, steps, step)

    controls: dict[str, Control] = {
        "warmdown_steps": some_steps("warmdown steps", rates.warmdown_steps),
        "warmdown_shape": Choice("shape", rates.warmdown_shape, {"linear": "linear", "cosine": "cosine"}),
        "min_lr_scale": Slider("ends at", rates.min_lr_scale, 0.0, 0.95, 0.05),
        "lr_warmup_steps": some_steps("LR warm-up", rates.lr_warmup_steps),
        "muon_momentum_warmup_steps": some_steps("momentum warm-up", train.optimizer.muon_momentum_warmup_steps),
        "method": Choice("average", average.method, methods),
        "ema_decay": Choice("EMA decay", average.ema_decay, decays),
        "swa_start": Slider("SWA below", average.swa_start, 0.0, 0.95, 0.05),
        "swa_every": Choice("snapshot every", average.swa_every, every),
        "qat_start": Slider("QAT below", train.qat.start, 0.0, 0.95, 0.05),
        "clock": Switch("stop by the clock", bool(train.max_seconds)),
        "fits": Slider("steps that fit", steps, max(1, steps // 4), steps, step),
    }
    question = Slider(f"my guess: % initial weights at EMA decay {PUBLISHED_DECAY}", -1, -1, 100)
    return guessing(Panel(draw, controls), question, initial_weights)
