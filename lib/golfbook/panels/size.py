"""Panels of weights and bytes: bits, clip and floor of one matrix; whole models; a cap in bytes."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from golfbook.analysis import rates
from golfbook.analysis.sizes import entropy_bits
from golfbook.compress.budget import code_bytes
from golfbook.compress.rowwise import clip_quantize
from golfbook.model.gpt import exported_state
from golfbook.panels.base import Choice, Control, Panel, Slider, Switch, guessing
from golfbook.plots import quantization as quantization_plots
from golfbook.plots import size as size_plots
from golfbook.plots.style import Picture

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from golfbook.compress.quantizer import Statistics
    from golfbook.config.schema import Config
    from golfbook.data.dataset import Dataset
    from golfbook.model.gpt import GPT


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


def ways_to_store(table: pd.DataFrame) -> Panel:
    """Show loss against bytes for rule, bits and coder, from the table of :func:`golfbook.analysis.rates.ways`.

    A rule that was not measured at the chosen bits is shown at its nearest ones. To guess beforehand: the thousand
    bytes that the chosen way takes.
    """
    rules, coders = (list(dict.fromkeys(table[column])) for column in ("rule", "coder"))
    rates = sorted(set(table["bits"]))
    controls: dict[str, Control] = {
        "rule": Choice("steps", rules[-1], {rule.removesuffix(", xz"): rule for rule in rules}),
        "bits": Choice("bits", rates[len(rates) // 2], {f"{rate:g}": rate for rate in rates}),
        "coder": Choice("coder", coders[-1], {name: name for name in coders}),
    }

    def nearest(rule: str, bits: float) -> float:
        measured = table.loc[table["rule"] == rule, "bits"]
        return float(measured.iloc[int((measured - bits).abs().to_numpy().argmin())])

    def draw(rule: str, bits: float, coder: str) -> Picture:
        return quantization_plots.ways(table, rule, nearest(rule, bits), coder)

    def kilobytes(rule: str, bits: float, coder: str) -> float:
        row = table[(table["rule"] == rule) & (table["bits"] == nearest(rule, bits)) & (table["coder"] == coder)]
        return float(row["bytes"].iloc[0]) / 1000

    question = Slider("my guess: kB", 0, 0, math.ceil(table["bytes"].max() / 1000))
    return guessing(Panel(draw, controls), question, kilobytes)


def budget_meter(model: GPT, config: Config, data: Dataset, known: Statistics) -> Panel:
    """Show what the budget solver would store under a cap in bytes, code included, and what that should cost.

    To guess beforehand: the bits a weight that the cap leaves.
    """
    weights, code = sum(t.numel() for t in exported_state(model).values()), code_bytes()
    lowest, highest = (round((code + weights * bits / 8) / 1000) for bits in (1, 5))
    tokens_a_byte = (len(data.val_tokens) - 1) / data.val_bytes
    plan = functools.cache(lambda kilobytes: rates.plan(model, config, data, known, 1000 * kilobytes))

    def draw(cap: int) -> Picture:
        found = plan(cap)
        tax = found.loss * tokens_a_byte / math.log(2)
        return quantization_plots.meter(rates.parts(found), 1000 * cap, bits=found.config.rate.bits, tax=tax)

    panel = Panel(draw, {"cap": Slider("cap (kB)", (lowest + highest) // 2, lowest, highest, 1)})
    question = Slider("my guess: bits a weight", 0.0, 0.0, 8.0, 0.1)
    return guessing(panel, question, lambda cap: plan(cap).config.rate.bits)
