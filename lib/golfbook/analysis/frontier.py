"""Size against quality: one trained model stored in many ways, and what each way costs at equal quality.

Quality is measured twice on the same targets: as the *tax*, bits per byte after minus before quantisation, and as the
divergence of the quantised model's distributions from the float model's, in bits per byte too. The second one has far
less noise, because it does not ask which token came; for small errors both have the same mean.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from golfbook.analysis.sizes import GROUPS, constant, entropy_bits, group_of
from golfbook.analysis.statistics import describe
from golfbook.compress.budget import artifact_bytes, code_bytes
from golfbook.compress.coders import Coder
from golfbook.compress.container import Artifact, read_artifact
from golfbook.compress.estimates import estimate_bits
from golfbook.compress.export import export
from golfbook.compress.quantizer import QuantizedTensor, Statistics
from golfbook.config.architecture import ModelConfig
from golfbook.config.load import load_config
from golfbook.config.schema import Config
from golfbook.config.tables import CODERS, named
from golfbook.data.dataset import Dataset
from golfbook.errors import ConfigError, GolfbookError, nearest
from golfbook.files import project_root
from golfbook.model.gpt import GPT

FOLDER = "runs/reference/size_quality"
COLUMNS = ("steps", "seed", "recipe", "bits", "artifact_bytes", "memoryless_bytes", "val_bpb", "tax_bpb",
           "divergence_bpb", "float_bpb", "quantize_seconds")  # fmt: skip
PUBLISHED: dict[str, Any] = {"quantizer": "percentiles"}
RATE: dict[str, Any] = {"quantizer": "rate_distortion", "coder": "entropy"}
# Ways to store a model: settings of `quantize` by name. The names say what each has; the rate is asked for apart.
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
    "equal slope, trellis 8, rate term": RATE | {"rate.rule": "all", "rate.states": 8, "rate.rate_weight": 1.0},
}
FLOOR, NO_FLOOR, RECORDS = "PR 1166, xz", "no floor, xz", "records: k sigma, GPTQ"
OURS = "equal slope, trellis 8, small matrices too"
ANCHOR = (FLOOR, 6)  # as published: 6 bits for matrices
REFERENCES = (  # what ours is compared with: recipe, bits, and the column of its bytes
    (FLOOR, 6, "artifact_bytes"),
    (NO_FLOOR, 6, "artifact_bytes"),
    (RECORDS, 4.0, "artifact_bytes"),
    (RECORDS, 4.0, "memoryless_bytes"),
)
MAIN = {  # recipes that are measured at every training length, and what pictures call them
    FLOOR: "published (PR 1166), xz",
    NO_FLOOR: "published without its scale floor, xz",
    RECORDS: "the records' recipe: k sigma, GPTQ",
    OURS: "ours: equal slope, trellis, all matrices",
}
# From the published recipe to ours, one change after the other: what changes, from which recipe, to which.
STEPS = (
    ("entropy coder for xz", FLOOR, "PR 1166, entropy coder"),
    ("no floor", "PR 1166, entropy coder", "no floor, entropy coder"),
    ("step: k sigma of the row", "no floor, entropy coder", "k sigma, rounded"),
    ("feedback (GPTQ)", "k sigma, rounded", RECORDS),
    ("one step for all", RECORDS, "one step, GPTQ"),
    ("steps by tensor", "one step, GPTQ", "steps by tensor"),
    ("steps by row", "steps by tensor", "by tensor and row"),
    ("steps by column", "by tensor and row", "equal slope"),
    ("trellis of 8 states", "equal slope", "equal slope, trellis 8"),
    ("small matrices too", "equal slope, trellis 8", OURS),
)
SIDEWAYS = (  # changes that did not stay, or that the others contain
    ("steps by column alone", "steps by tensor", "by tensor and column"),
    ("rate term", "equal slope, trellis 8", "equal slope, trellis 8, rate term"),
)
PARTS = ("attention", "MLP", "embedding tables", "step sizes", "float16 tensors", "header", "code")


def settings(config: Config, recipe: str, bits: float) -> Config:
    """Return a run's configuration with another way to quantise: a name of :data:`RECIPES` and its rate in bits.

    The published quantiser takes whole ``bits`` for matrices and two more for tables, 8 at most; the others spend
    ``bits`` of entropy on a weight. Raises :class:`golfbook.errors.ConfigError` for a recipe that is not there.
    """
    if recipe not in RECIPES:
        raise ConfigError(f"unknown recipe '{recipe}'{nearest(recipe, RECIPES)}")
    chosen = {"passthrough_numel": config.quantize.passthrough_numel} | RECIPES[recipe]
    if chosen["quantizer"] == "percentiles":
        chosen |= {"matrix_bits": round(bits), "other_bits": min(8, round(bits) + 2)}
    else:
        chosen["rate.bits"] = bits
    found = load_config({"quantize": {}}, overrides={f"quantize.{key}": value for key, value in chosen.items()})
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
    tensor's histogram and nothing else; 0 where another coder than the entropy coder wrote), val_bpb, tax_bpb,
    divergence_bpb, float_bpb, quantize_seconds.
    """
    yardstick, rows = Yardstick(model, config, data, targets), []
    for recipe, asked in rates.items():
        for bits in asked:
            started = time.perf_counter()
            loaded = stored(model, config, data, statistics, recipe, bits)
            seconds = time.perf_counter() - started
            rows.append(
                {
                    "recipe": recipe,
                    "bits": bits,
                    "artifact_bytes": loaded.bytes,
                    "memoryless_bytes": _memoryless(loaded) if loaded.quantize_config.coder == "entropy" else 0,
                    **yardstick.measure(loaded.build()),
                    "float_bpb": yardstick.float_bpb,
                    "quantize_seconds": round(seconds, 3),
                }
            )
    return pd.DataFrame(rows)


def stored(model: GPT, config: Config, data: Dataset, statistics: Statistics, recipe: str, bits: float) -> Artifact:
    """Return the artifact of ``model`` by a recipe at a rate, written and read back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.golf"
        export(path, model, settings(config, recipe, bits), data.tokenizer.sha256, statistics)
        return read_artifact(path)


def _memoryless(artifact: Artifact) -> int:
    """Return the bytes of an artifact, were its integers coded one by one by each tensor's histogram."""
    integers = [tensor for tensor in artifact.quantized.values() if tensor.q is not None]
    ideal = sum(entropy_bits(tensor.q) * tensor.q.numel() for tensor in integers if tensor.q is not None)
    return round(artifact.bytes + (ideal - sum(estimate_bits(integers).values())) / 8)


def parts(artifact: Artifact) -> dict[str, int]:
    """Return what the bytes of an artifact and its code are, by :data:`PARTS`; they add up to all of it.

    A part is what the coder writes more once it is there: tables that the coder learns are shared.
    """
    coder: Coder = named(CODERS, artifact.quantize_config.coder)
    level = artifact.quantize_config.coder_level
    integers = [tensor for tensor in artifact.quantized.values() if tensor.q is not None]
    plain = [constant(tensor) for tensor in integers]
    found, before, so_far = dict.fromkeys(PARTS, 0), 0, list[QuantizedTensor]()
    for group in GROUPS:
        so_far += [tensor for tensor in plain if group_of(tensor.name) == group]
        size = len(coder.encode(so_far, level)) if so_far else 0
        found[group], before = size - before, size
    with_steps = len(coder.encode(integers, level)) if integers else 0
    everything = len(coder.encode(list(artifact.quantized.values()), level))
    found |= {"step sizes": with_steps - before, "float16 tensors": everything - with_steps}
    return found | {"header": artifact.bytes - everything, "code": code_bytes()}


def read_table(path: str | Path = "", name: str = "results.csv", columns: Sequence[str] = COLUMNS) -> pd.DataFrame:
    """Return a table that ``tests/benchmarks/bench_sizes.py`` wrote: of artifacts, a row each, as :func:`measure`.

    ``path`` is a CSV or parquet file; empty: the committed one of this ``name``. Raises
    :class:`golfbook.errors.GolfbookError` where it is not there or lacks one of ``columns``.
    """
    found = Path(path) if path else project_root() / FOLDER / name
    if not found.is_file():
        raise GolfbookError(f"there is no table {found}: tests/benchmarks/bench_sizes.py makes it")
    table = pd.read_parquet(found) if found.suffix == ".parquet" else pd.read_csv(found)
    if missing := [name for name in columns if name not in table]:
        raise GolfbookError(f"{found} is no table of sizes: it lacks {', '.join(missing)}")
    return table


def read_parts(path: str | Path = "") -> pd.DataFrame:
    """Return what artifacts of one model are made of, a row each; raises what :func:`read_table` raises.

    Columns: steps, seed, recipe, bits, at_anchor (at the divergence of :data:`ANCHOR`, not at a rate of the other
    table), divergence_bpb, and bytes by :data:`PARTS`.
    """
    return read_table(path, "parts.csv", ("recipe", "bits", "at_anchor", "divergence_bpb", *PARTS))


def bytes_at(
    frame: pd.DataFrame, quality: float, column: str = "divergence_bpb", size: str = "artifact_bytes"
) -> float:
    """Return the bytes at which a recipe reaches a tax, between its measured rates: log tax is linear in bytes there.

    ``frame`` holds the rows of one recipe and one model; ``size`` may be any column that grows as the tax falls
    (``bits``). NaN where the tax lies outside what was measured.
    """
    rows = frame[frame[column] > 0].sort_values(size)
    rows = rows[rows[column].cummin().diff().fillna(-1) < 0]  # what more bytes made no better is noise
    logs = np.log(rows[column].to_numpy(float))
    if len(logs) < 2 or not quality > 0 or not logs[-1] <= math.log(quality) <= logs[0]:
        return math.nan
    return float(np.interp(-math.log(quality), -logs, rows[size].to_numpy(float)))


def needed(table: pd.DataFrame, recipe: str, at: tuple[str, float], size: str = "artifact_bytes") -> pd.Series:
    """Return, by seed, what a recipe needs for the divergence that another has at its rate: ``at`` is (recipe, bits).

    ``table`` has one training length. ``size`` is a column of it, as in :func:`bytes_at`; NaN where a seed lacks
    either, or the divergence lies outside what was measured.
    """
    goal = table[(table["recipe"] == at[0]) & (table["bits"] == at[1])].set_index("seed")["divergence_bpb"]
    own = dict(list(table[table["recipe"] == recipe].groupby("seed")))
    seeds = sorted(set(table["seed"]))
    found = [bytes_at(own[s], goal[s], size=size) if s in own and s in goal else math.nan for s in seeds]
    return pd.Series(found, index=pd.Index(seeds, name="seed"))


def steps_apart(table: pd.DataFrame, at: tuple[str, float]) -> pd.DataFrame:
    """Return what each change of :data:`STEPS` and :data:`SIDEWAYS` does to the bytes at one divergence.

    Columns: change, before, after, stays (whether it is on the way to ours), then n, mean, std, low and high of the
    ratio of bytes after to bytes before, seed by seed; the last row is the whole way. Changes whose recipes ``table``
    (one training length) lacks are left out.
    """
    there, rows = set(table["recipe"]), []
    for change, before, after in (*STEPS, *SIDEWAYS, ("all together", FLOOR, OURS)):
        if {before, after} <= there:
            found = describe(needed(table, after, at) / needed(table, before, at))
            stays = (change, before, after) not in SIDEWAYS
            rows.append({"change": change, "before": before, "after": after, "stays": stays, **vars(found)})
    return pd.DataFrame(rows)


def by_length(table: pd.DataFrame, anchors: Sequence[tuple[str, float, str]], recipe: str = OURS) -> pd.DataFrame:
    """Return the ratio of a recipe's bytes to those of others, at the others' divergence, for each training length.

    ``anchors`` are (recipe, bits, column of its bytes). Columns: steps, reference, bits, size, n, mean, std, low, high.
    """
    rows = []
    for (steps, group), (reference, bits, size) in itertools.product(table.groupby("steps"), anchors):
        ratio = needed(group, recipe, (reference, bits)) / needed(group, reference, (reference, bits), size)
        what = {"steps": steps, "reference": reference, "bits": bits, "size": size}
        rows.append({**what, **vars(describe(ratio))})
    return pd.DataFrame(rows)


def trend(table: pd.DataFrame, reference: tuple[str, float, str], recipe: str = OURS) -> str:
    """Return in words whether a recipe's ratio of bytes grows with training, from the shortest to the longest, by seed.

    A smaller gain is a larger ratio. ``reference`` is one of those of :func:`by_length`.
    """
    found = by_length(table, [reference], recipe)
    found = found[found["n"] > 0]
    listed = ", ".join(f"{row.mean:.3f} at {row.steps:,} steps" for row in found.itertuples())
    if len(found) < 2:
        return f"{listed or 'nothing measured'}; other lengths were not measured"
    short, long = (table[table["steps"] == found["steps"].iloc[place]] for place in (0, -1))
    name, bits, size = reference
    first, last = (needed(t, recipe, (name, bits)) / needed(t, name, (name, bits), size) for t in (short, long))
    d = describe(last - first)
    if d.n < 2:
        return f"bytes over theirs {listed}; n = {d.n} seeds of both lengths say nothing about a trend"
    word = "shrinks" if d.low > 0 else "grows" if d.high < 0 else "does not clearly change"
    interval = f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}], n = {d.n}"
    return f"the gain {word} with training: bytes over theirs {listed}; longest minus shortest {interval}"


def front(table: pd.DataFrame, size: str = "artifact_bytes", quality: str = "divergence_bpb") -> pd.DataFrame:
    """Return means over seeds of ``size`` and ``quality``, a row a recipe and rate, and which are dominated.

    Columns: recipe, bits, n, kilobytes, kb_low, kb_high, and of ``quality``: mean, low, high (its geometric mean, with
    the interval of the mean of logs, where all values are positive); ``dominated``: another has no more bytes and
    is no worse, and is better in one of both. ``table`` has one training length.
    """
    rows = []
    for (recipe, bits), group in table.groupby(["recipe", "bits"], sort=False):
        kilobytes = describe(group[size] / 1000)
        found = describe(np.log(group[quality])) if (group[quality] > 0).all() else None
        mean, low, high = np.exp([found.mean, found.low, found.high]) if found else [math.nan] * 3
        sizes = {"kilobytes": kilobytes.mean, "kb_low": kilobytes.low, "kb_high": kilobytes.high}
        rows.append({"recipe": recipe, "bits": bits, "n": kilobytes.n, **sizes, "mean": mean, "low": low, "high": high})
    found_table = pd.DataFrame(rows).dropna(subset="mean")
    return found_table.assign(dominated=~pareto(found_table["kilobytes"], found_table["mean"]))


def pareto(sizes: ArrayLike, taxes: ArrayLike) -> NDArray[np.bool_]:
    """Return which points no other dominates: with no more size and no more tax, and less of one of both."""
    size, tax = np.asarray(sizes, float), np.asarray(taxes, float)
    no_worse = (size[:, None] <= size) & (tax[:, None] <= tax)  # (n, n): i is no worse than j
    better = (size[:, None] < size) | (tax[:, None] < tax)
    return np.logical_not((no_worse & better).any(axis=0))


def slopes(table: pd.DataFrame, weights: int, quality: str = "divergence_bpb") -> pd.DataFrame:
    """Return by how many octaves the tax falls for one more bit a weight, a row a recipe; 4^-bits would be 2.

    Bits a weight are those of the whole artifact. A line is fitted to each model's points, so that ``n`` and the
    interval are those of models. Columns: recipe, n, mean, std, low, high.
    """
    rows = []
    for recipe, group in table.groupby("recipe", sort=False):
        fits = [
            -np.polyfit(8 * one["artifact_bytes"] / weights, np.log2(one[quality]), 1)[0]
            for _, one in group[group[quality] > 0].groupby(["steps", "seed"])
            if len(one) > 1
        ]
        rows.append({"recipe": recipe, **vars(describe(fits))})
    return pd.DataFrame(rows)


def fitting(preset: str, published_bytes: int, published_code: int, ratio: float) -> dict[str, int]:
    """Return how large a published model may be if its artifact shrinks to ``ratio`` of its bytes.

    Keys: total_bytes and left_bytes (below the preset's limit, code included) at its own size, then the most layers at
    its width and the largest width at its layers that still fit, with the bytes they would have. Other sizes have the
    bytes that :func:`golfbook.compress.budget.artifact_bytes` gives them, times what the published file has of its own.
    """
    config = load_config(preset)
    model, limit = config.model, config.budget.limit_bytes - published_code
    share = ratio * published_bytes / artifact_bytes(model, config.quantize)

    def size(**change: int) -> int:
        return round(share * artifact_bytes(ModelConfig(**(model.model_dump() | change)), config.quantize))

    found = {"total_bytes": size() + published_code, "left_bytes": limit - size()}
    for name, step in (("num_layers", 1), ("model_dim", 2 * model.num_heads)):
        largest = getattr(model, name)
        while size(**{name: largest + step}) <= limit:
            largest += step
        found |= {name: largest, f"{name}_bytes": size(**{name: largest}) + published_code}
    return found
