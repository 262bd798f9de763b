"""The live picture of a training run, or lines of text where nobody watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from golfbook.panels.base import display_widget, image_layout, interactive, png_size
from golfbook.plots import schedules, style
from golfbook.plots.style import Picture
from golfbook.run import Run

REDRAW_SECONDS = 1.0
Monitor = Callable[[Sequence[Mapping[str, Any]]], None]


def training_monitor(run: Run, *, unigram_bpb: float | None = None, seconds: float = 10.0) -> Monitor:
    """Return a callback for ``training.follow``: one live picture, or where nobody watches, a line every ``seconds``.

    It takes the metric points of the run so far, and must be called from the main thread of the kernel, as ``follow``
    does: output from other threads ends up under the wrong cell.
    """
    if interactive():
        return _live_picture(run, unigram_bpb)
    return _log_lines(run, seconds)


def attach(run: Run, *, unigram_bpb: float | None = None) -> Picture:
    """Draw the training curve of a running or finished run, from what is on the disk now."""
    result = run.read_result("training") or {}
    return schedules.training_curve(
        run.read_metrics(),
        steps=run.config.train.steps,
        unigram_bpb=unigram_bpb if unigram_bpb is not None else result.get("unigram_bpb"),
        title=f"{run.variant}, seed {run.config.seed}",
    )


def _live_picture(run: Run, unigram_bpb: float | None) -> Monitor:
    import ipywidgets

    first = style.png(attach(run, unigram_bpb=unigram_bpb))
    image = ipywidgets.Image(value=first, format="png", layout=image_layout(*png_size(first)))
    display_widget(image, None)
    drawn = {"at": time.monotonic(), "points": 0}

    def update(metrics: Sequence[Mapping[str, Any]]) -> None:
        last = max((p["step"] for p in metrics), default=0) >= run.config.train.steps
        if len(metrics) == drawn["points"] or (time.monotonic() - drawn["at"] < REDRAW_SECONDS and not last):
            return
        image.value = style.png(attach(run, unigram_bpb=unigram_bpb))
        drawn.update(at=time.monotonic(), points=len(metrics))

    return update


def _log_lines(run: Run, seconds: float) -> Monitor:
    said = {"at": -np.inf, "step": -1.0}

    def update(metrics: Sequence[Mapping[str, Any]]) -> None:
        if not metrics or time.monotonic() - said["at"] < seconds or metrics[-1]["step"] == said["step"]:
            return
        said.update(at=time.monotonic(), step=metrics[-1]["step"])
        print(progress_line(metrics, run.config.train.steps), flush=True)

    return update


def progress_line(metrics: Sequence[Mapping[str, Any]], steps: int) -> str:
    """Return one line that says how far a training run is, from its metric points."""
    train, validation = ([p for p in metrics if p["kind"] == kind] for kind in ("train", "validation"))
    parts = [f"step {metrics[-1]['step']}/{steps}"]
    if train:
        parts += [f"loss {train[-1]['loss']:.3f} nats/token", schedules.speed_line(train[-1])]
    if validation:
        parts.append(f"validation {validation[-1]['val_bpb']:.3f} bits/byte at step {validation[-1]['step']}")
    return ", ".join(parts)
