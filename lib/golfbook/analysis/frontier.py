"""Size against quality: one trained model stored in many ways, and what each way costs at equal quality.

Quality is measured twice on the same targets: as the *tax*, bits per byte after minus before quantisation, and as the
divergence of the quantised model's distributions from the float model's, in bits per byte too. The second one has far
less noise, because it does not ask which token came; for small errors both have the same mean.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from golfbook.analysis.sizes import entropy_bits
from golfbook.compress.container import read_artifact
from golfbook.compress.estimates import estimate_bits
from golfbook.compress.export import export
from golfbook.compress.quantizer import Statistics
from golfbook.config.load import load_config
from golfbook.config.schema import Config
from golfbook.data.dataset import Dataset
from golfbook.model.gpt import GPT

# Overrides of quantize settings by name; "{bits}" stands for the rate that is asked for. The names say what each has.
PUBLISHED: dict[str, Any] = {"quantizer": "percentiles", "matrix_bits": "{bits}", "other_bits": "{other_bits}"}
RATE: dict[str, Any] = {"quantizer": "rate_distortion", "scale_floor": True, "coder": "entropy", "rate.bits": "{bits}"}
RECIPES: dict[str, dict[str, Any]] = {
    "PR 1166, xz": PUBLISHED | {"scale_floor": True, "coder": "xz"},
    "PR 1166, entropy coder": PUBLISHED | {"scale_floor": True, "coder": "entropy"},
    "no floor, xz": PUBLISHED | {"scale_floor": False, "coder": "xz"},
    "no floor, entropy coder": PUBLISHED | {"scale_floor": False, "coder": "entropy"},
    "k sigma, rounded": RATE | {"rate.rule": "k_sigma", "rate.states": 1, "rate.feedback": "none"},
    "records: k sigma, GPTQ": RATE | {"rate.rule": "k_sigma", "rate.states": 1},
    "one step, GPTQ": RATE | {"rate.rule": "equal", "rate.states": 1},
    "steps by tensor": RATE | {"rate.rule": "tensor", "rate.states": 1},
    "by tensor and row": RATE | {"rate.rule": "tensor+row", "rate.states": 1},
    "by tensor and column": RATE | {"rate.rule": "tensor+column", "rate.states": 1},
    "equal slope": RATE | {"rate.rule": "all", "rate.states": 1},
    "equal slope, trellis 8": RATE | {"rate.rule": "all", "rate.states": 8},
    "equal slope, trellis 8, small matrices too": RATE
    | {"rate.rule": "all", "rate.states": 8, "passthrough_numel": 256},
}


def settings(config: Config, recipe: str, bits: float) -> Config:
    """Return a run's configuration with another way to quantise: a name of :data:`RECIPES` and its rate in bits."""
    filled: dict[str, Any] = {}
    for key, value in RECIPES[recipe].items():
        rates = {"{bits}": bits, "{other_bits}": min(8, round(bits) + 2)}
        filled[f"quantize.{key}"] = rates.get(value, value) if isinstance(value, str) else value
    if "quantize.matrix_bits" in filled:
        filled["quantize.matrix_bits"] = round(bits)
    kept = {"quantize.passthrough_numel": config.quantize.passthrough_numel}
    found = load_config({"quantize": {}}, overrides=kept | filled)
    return config.model_copy(update={"quantize": found.quantize})


class Yardstick:
    """A float model's predictions on the first validation windows, to compare quantised models with."""

    def __init__(self, model: GPT, config: Config, data: Dataset, targets: int, rows: int = 8) -> None:
        self.length, self.rows = config.train.sequence_length, rows
        count = min(targets, len(data.val_tokens) - 1) // self.length * self.length
        stream = torch.from_numpy(data.val_tokens[: count + 1].astype(np.int64))
        self.tokens = stream[:-1].view(-1, self.length)  # (windows, T)
        self.targets = stream[1:].view(-1, self.length)
        self.bytes = int(data.val_token_bytes[:count].sum(dtype=np.int64))
        self.float_logits = torch.cat(list(self._logits(model)))  # (windows, T, V) float32
        self.float_bpb = self._bits(self.float_logits)

    @torch.inference_mode()
    def _logits(self, model: GPT) -> Iterator[Tensor]:
        for tokens in self.tokens.split(self.rows):
            yield model(tokens).float()

    def _bits(self, logits: Tensor) -> float:
        loss = sum(
            float(torch.nn.functional.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum"))
            for z, y in zip(logits.split(self.rows), self.targets.split(self.rows), strict=True)
        )
        return loss / math.log(2) / self.bytes

    def measure(self, model: GPT) -> dict[str, float]:
        """Return ``val_bpb``, ``tax_bpb`` and ``divergence_bpb`` of a quantised model."""
        loss = divergence = 0.0
        pieces = zip(
            self._logits(model), self.float_logits.split(self.rows), self.targets.split(self.rows), strict=True
        )
        for logits, before, targets in pieces:
            log_q, log_p = logits.log_softmax(-1), before.log_softmax(-1)  # (rows, T, V)
            loss -= float(log_q.gather(2, targets[..., None]).sum())
            divergence += float((log_p.exp() * (log_p - log_q)).sum())
        bits = math.log(2) * self.bytes
        return {
            "val_bpb": loss / bits,
            "tax_bpb": loss / bits - self.float_bpb,
            "divergence_bpb": divergence / bits,
        }


def measure(
    model: GPT,
    config: Config,
    data: Dataset,
    statistics: Statistics,
    rates: Mapping[str, Sequence[float]],
    targets: int,
) -> pd.DataFrame:
    """Store ``model`` by each recipe at each rate, read every artifact back and score it on ``targets`` targets.

    Columns: recipe, bits (what was asked for), artifact_bytes, memoryless_bytes (with an ideal coder that knows each
    tensor's histogram and nothing else), val_bpb, tax_bpb, divergence_bpb, float_bpb, quantize_seconds.
    """
    yardstick, rows = Yardstick(model, config, data, targets), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.golf"
        for recipe, asked in rates.items():
            for bits in asked:
                started = time.perf_counter()
                chosen = settings(config, recipe, bits)
                fitted = export(path, model, chosen, data.tokenizer.sha256, statistics)
                seconds = time.perf_counter() - started
                integers = [tensor for tensor in fitted.quantized.values() if tensor.q is not None]
                loaded, memoryless = read_artifact(path), 0
                if chosen.quantize.coder == "entropy":
                    coded = sum(estimate_bits(integers).values())
                    ideal = sum(entropy_bits(t.q) * t.q.numel() for t in integers if t.q is not None)
                    memoryless = round(loaded.bytes + (ideal - coded) / 8)
                rows.append(
                    {
                        "recipe": recipe,
                        "bits": bits,
                        "artifact_bytes": loaded.bytes,
                        "memoryless_bytes": memoryless,
                        **yardstick.measure(loaded.build()),
                        "float_bpb": yardstick.float_bpb,
                        "quantize_seconds": round(seconds, 3),
                    }
                )
    return pd.DataFrame(rows)


def bytes_at(
    frame: pd.DataFrame, quality: float, column: str = "divergence_bpb", size: str = "artifact_bytes"
) -> float:
    """Return the bytes at which a recipe reaches a tax, between its measured rates: log tax is linear in bytes there.

    ``frame`` holds the rows of one recipe and one model. NaN where the tax lies outside what was measured.
    """
    sizes, taxes = frame[size].to_numpy(float), frame[column].to_numpy(float)
    order = np.argsort(sizes)
    sizes, taxes = sizes[order], np.minimum.accumulate(taxes[order])
    usable = taxes > 0
    sizes, logs = sizes[usable], np.log(taxes[usable])
    if len(sizes) < 2 or not logs.min() <= math.log(quality) <= logs.max():
        return math.nan
    return float(np.interp(-math.log(quality), -logs, sizes))
