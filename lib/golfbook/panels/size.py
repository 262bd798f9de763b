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
    """Choose bits, clip and floor for one matrix; see its grid, its integers, and error, entropy and bytes.

    To guess beforehand: the entropy, in bits a weight.
    """
    weight = weight.detach().float()

    def draw(bits: int, clip: float, scale_floor: bool) -> Picture:
        q, scale = clip_quantize(weight, int(bits), clip, scale_floor)
        decoded = q.float() * scale.float()[:, None]
        return size_plots.quantization(
            weight.numpy(), q.numpy(), decoded.numpy(), bits=int(bits), scale=float(scale[0]), name=name
        )

    clips = {"published search": 0.0, "row maximum": 1.0, "0.999 quantile": 0.999, "0.99 quantile": 0.99}
    controls: dict[str, Control] = {
        "bits": Slider("bits", bits, 3, 8),
        "clip": Choice("clip", 1.0, clips),
        "scale_floor": Switch("published scale floor", False),
    }

    def needed(bits: int, clip: float, scale_floor: bool) -> float:
        return entropy_bits(clip_quantize(weight, int(bits), clip, scale_floor)[0].numpy())

    return guessing(Panel(draw, controls), Slider("my guess: bits needed", 0.0, 0.0, 8.0, 0.1), needed)


def bits_choice(table: pd.DataFrame, *, bits: int = 6, lost: float = 0.01) -> Panel:
    """Move through whole models with 3, 4, ... bits: bytes and score; guess the fewest that lose < ``lost``."""
    low, high = int(table["bits"].min()), int(table["bits"].max())
    best = float(table.loc[table["bits"] == high, "val_bpb"].iloc[0])
    enough = float(table.loc[table["val_bpb"] < best + lost, "bits"].min())
    panel = Panel(lambda bits: size_plots.bits_choice(table, int(bits)), {"bits": Slider("bits", bits, low, high)})
    question = Slider(f"my guess: bits that lose < {lost:g}", low - 1, low - 1, high)
    return guessing(panel, question, lambda bits: enough)
