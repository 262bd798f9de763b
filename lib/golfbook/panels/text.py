"""Panels of text: pieces and bytes of a typed text, what it costs a model, which window scores what, and guesses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from golfbook.evaluate import scoring
from golfbook.evaluate.windows import plan_windows
from golfbook.panels.base import Choice, Panel, Slider, Text, guessing, interactive
from golfbook.plots import text as text_plots
from golfbook.plots.style import Picture

if TYPE_CHECKING:
    from golfbook.data.tokenizer import Tokenizer
    from golfbook.model.gpt import GPT


def tokens(tokenizer: Tokenizer, text: str) -> Panel:
    """Show a text to type, its pieces and the bytes of each."""

    def draw(text: str) -> Picture:
        ids = tokenizer.encode_document(text)
        return text_plots.tokens([tokenizer.piece(i) for i in ids[1:]], tokenizer.token_bytes(ids).tolist())

    return Panel(draw, {"text": Text("text", text)}, height=320)


def losses(model: GPT, tokenizer: Tokenizer, text: str) -> Panel:
    """Show, for a text to type, what predicting each token costs the model in nats."""

    def draw(text: str) -> Picture:
        ids = tokenizer.encode_document(text)
        pieces, sizes = [tokenizer.piece(i) for i in ids[1:]], tokenizer.token_bytes(ids).tolist()
        if not pieces:
            return text_plots.tokens([], [], [])
        nats = scoring.score(model, ids, window=len(pieces), stride=len(pieces))
        return text_plots.tokens(pieces, sizes, nats.tolist())

    return Panel(draw, {"text": Text("text", text)}, height=320)


def ladder(values: Mapping[str, float], *, unit: str, title: str, number: str = "{:,.0f}") -> Panel:
    """Show ``values``, the last one only after a guess, or where nobody can guess."""
    *known, last = values.values()
    step = 10.0 ** (len(f"{max(known):.0f}") - 3)  # three digits are enough for a guess

    def draw(guess: float) -> Picture:
        shown = guess > 0 or not interactive()
        return text_plots.ladder(values, unit=unit, title=title, number=number, guess=guess or None, shown=shown)

    high = float(np.ceil(max(*known, last) / step) * step)
    return Panel(draw, {"guess": Slider(f"my guess ({unit})", 0, 0, high, step)})


def windows(targets: int, window: int, stride: int = 0) -> Panel:
    """Show which window scores which target with how much context, by stride; guess the forward passes."""
    strides = [window >> k for k in range(7) if window >> k]

    def draw(stride: int) -> Picture:
        plan = plan_windows(targets, window, stride)
        return text_plots.windows(plan.starts, plan.first, plan.stop, window=window, targets=targets)

    choices = sorted({*strides, stride or strides[0]})
    start = stride or strides[min(2, len(strides) - 1)]
    panel = Panel(draw, {"stride": Choice("stride", start, {str(s): s for s in choices})}, height=400)
    passes = Slider("my guess: forward passes", 0, 0, 2 * len(plan_windows(targets, window, choices[0])))
    return guessing(panel, passes, lambda stride: len(plan_windows(targets, window, stride)))
