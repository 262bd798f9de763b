"""Panels of weights and bytes: bits, clip and floor of one matrix, and of whole models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from golfbook.analysis.sizes import entropy_bits
from golfbook.compress.rowwise import clip_quantize
from golfbook.panels.base import Choice, Control, Panel, Slider, Switch, guessing
from golfbook.plots import size as size_plots
from golfbook.plots.style import Picture

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor


def bits_and_clip(weight: Tensor, name: str, *, bits: int = 6) -> Panel:
    """Show the grid of one matrix, its integers, and error, entropy and bytes; choose bits, clip and floor.

    To guess beforehand: the entropy, in bits a weight.
    """
    weight = weight.detach().float()

    def draw(bits: int, clip: float, scale_floor: bool) -> Picture:
        q, scale = clip_quantize(weight, bits, clip, scale_floor)
        decoded = q.float() * scale.float()[:, None]
        return size_plots.quantization(weight, q, decoded, bits=bits, scale=float(scale[0]), name=name)

    clips = {"published search": 0.0, "row maximum": 1.0, "0.999 quantile": 0.999, "0.99 quantile": 0.99}
    controls: dict[str, Control] = {
        "bits": Slider("bits", bits, 3, 8),
        "clip": Choice("clip", 1.0, clips),
        "scale_floor": Switch("published scale floor", False),
    }

    def needed(bits: int, clip: float, scale_floor: bool) -> float:
        return entropy_bits(clip_quantize(weight, bits, clip, scale_floor)[0])

    return guessing(Panel(draw, controls), Slider("my guess: bits needed", 0.0, 0.0, 8.0, 0.1), needed)


def bits_choice(table: pd.DataFrame, *, bits: int = 6) -> Panel:
    """Show bytes and score of whole models with 3, 4, ... bits; guess the fewest bits that lose less than 0.01."""
    low, high = int(table["bits"].min()), int(table["bits"].max())
    best = float(table.loc[table["bits"] == high, "val_bpb"].iloc[0])
    enough = float(table.loc[table["val_bpb"] < best + 0.01, "bits"].min())
    panel = Panel(lambda bits: size_plots.bits_choice(table, bits), {"bits": Slider("bits", bits, low, high)})
    question = Slider("my guess: bits that lose < 0.01", low - 1, low - 1, high)
    return guessing(panel, question, lambda bits: enough)
