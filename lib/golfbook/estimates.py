"""What a run will cost before it starts: seconds and bytes of memory, from earlier runs where there are some.

Arithmetic is counted as 6 operations a parameter and trained token, and 2 a parameter and scored token (Kaplan et al.
2020, section 2.1). Operations become seconds by the speed that finished runs on this machine had; where there are
none, by a stated rule. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golfbook.config import Config, DataConfig, ModelConfig, validate
from golfbook.errors import GolfbookError
from golfbook.files import resolve, runs_root
from golfbook.runs import STAGES, environment

CPU_SPEED = 4e10  # operations a second and thread of the quickstart on a server core; slower cores reach a third
GPU_SPEED = 5e13  # operations a second and GPU
NOTEBOOK_SECONDS = 20.0  # start of a kernel, imports, plots
PROCESS_BYTES = 700_000_000  # a kernel and a trainer that have imported torch and loaded the corpus
BYTES_PER_TOKEN = 2.4  # of English prose with 1,024 pieces


@dataclass(frozen=True)
class Estimate:
    """Cost of one run: seconds of each stage, bytes of memory at its peak, and where the numbers come from."""

    seconds: Mapping[str, float]
    memory_bytes: int
    source: str


@dataclass(frozen=True)
class History:
    """Speeds (operations a second) and peaks of finished runs on this machine, by number of parameters."""

    training: tuple[tuple[int, float], ...] = ()
    scoring: tuple[tuple[int, float], ...] = ()
    validation_tokens: tuple[tuple[DataConfig, int], ...] = ()


def visible_gpus() -> list[str]:
    """Names of the GPUs a trainer may use, as ``CUDA_VISIBLE_DEVICES`` spells them; empty on a machine without."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name.strip() for name in allowed.split(",") if name.strip() not in ("", "-1")]
    numbers = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return sorted((number for number in numbers if number.isdigit()), key=int)


def uses_gpu(config: Config) -> bool:
    """Whether the trainer of this config will run on a GPU here."""
    return config.train.device == "cuda" or (config.train.device == "auto" and bool(visible_gpus()))


def rough_parameters(model: ModelConfig) -> int:
    """Parameters of a model within a few per cent, without building it."""
    width, heads = model.model_dim, model.num_heads
    kv = width * model.num_kv_heads // heads
    block = 2 * width * width + 2 * width * kv + 2 * int(model.mlp_mult * width) * width + 5 * width
    total = model.num_layers * block + model.vocab_size * width * (1 if model.tie_embeddings else 2)
    if model.bigram.vocab_size:
        total += model.bigram.vocab_size * model.bigram.dim + model.bigram.dim * width
    if model.value_embedding.layers:
        total += model.vocab_size * model.value_embedding.dim + model.value_embedding.dim * kv
    if model.ttt_linear.enabled:
        total += 4 * width * width + width * width // model.ttt_linear.num_heads
    if model.flow.enabled:
        total += 2 * width * model.flow.latent_dim + 2 * model.flow.latent_dim * model.flow.hidden_dim
    return total


def read_history() -> History:
    """Gather the speeds of all finished runs under the runs folder that were made on this processor."""
    training, scoring, tokens = [], [], []
    here = environment()
    for folder in sorted({path.parent for path in runs_root().glob("*/*/result.training.json")}):
        machine = _read_json(folder / "env.json")
        if machine.get("processor") != here["processor"] or machine.get("cores") != here["cores"]:
            continue
        with contextlib.suppress(GolfbookError):
            config = validate(_read_json(folder / "config.json"))
            size = rough_parameters(config.model)
            trained = _read_json(folder / "result.training.json")
            seconds = _number(trained, "train_seconds")
            if trained.get("status") == "ok" and seconds:
                training.append((size, training_operations(config) / seconds))
            scored = _read_json(folder / "result.test_time_training.json")
            seconds, count = _number(scored, "score_seconds"), _number(scored, "tokens")
            if scored.get("status") == "ok" and seconds and count:
                scoring.append((size, scoring_operations(config, int(count)) / seconds))
                tokens.append((config.data, int(count)))
    return History(tuple(training), tuple(scoring), tuple(tokens))


def estimate(config: Config, stages: Iterable[str], history: History) -> Estimate:
    """Estimate one run; ``source`` says which numbers were measured and which follow the rule of thumb."""
    size = rough_parameters(config.model)
    rule = GPU_SPEED if uses_gpu(config) else CPU_SPEED * config.train.threads
    trained = _nearest_speed(history.training, size)
    scored = _nearest_speed(history.scoring, size)
    count = next((n for data, n in reversed(history.validation_tokens) if data == config.data), None)
    if count is None:
        count = _validation_tokens(config.data)
    seconds = {
        "training": training_operations(config) / (trained or rule * config.train.processes),
        "quantization": 2 * size * count / (scored or rule),
        "test_time_training": scoring_operations(config, count) / (scored or rule),
    }
    wanted = [stage for stage in STAGES if stage in set(stages)]
    known = [trained is not None, *([scored is not None] if len(wanted) > 1 else [])]
    origin = f"a rule of thumb ({rule / 1e9:.0f} billion operations a second)"
    if all(known):
        origin = "the speed of earlier runs here"
    elif any(known):
        origin = "partly the speed of earlier runs here, partly a rule of thumb"
    return Estimate({stage: NOTEBOOK_SECONDS + seconds[stage] for stage in wanted}, _memory(config, size), origin)


def training_operations(config: Config) -> float:
    """Arithmetic operations of the training stage."""
    return 6.0 * rough_parameters(config.model) * config.train.steps * config.train.batch_tokens


def scoring_operations(config: Config, tokens: int) -> float:
    """Arithmetic operations of the final score: sliding windows and one contiguous pass over ``tokens`` targets."""
    passes = 1 + (config.window / config.score.stride if tokens > config.window else 1)
    return 2.0 * rough_parameters(config.model) * tokens * passes


def _memory(config: Config, size: int) -> int:
    """Host bytes of a run: weights, gradient, two moments, average; activations kept for the backward pass."""
    model, train = config.model, config.train
    tokens = train.batch_tokens // train.processes
    widths = model.num_layers * model.model_dim * (12 + 4 * model.mlp_mult) + 3 * model.vocab_size
    return int(PROCESS_BYTES + train.processes * (5 * 4 * size + 4 * tokens * widths))


def _validation_tokens(data: DataConfig) -> int:
    if data.max_validation_tokens:
        return data.max_validation_tokens
    if data.source == "fineweb":
        return 62_021_632
    size = 8_000_000
    if data.path:
        path = resolve(data.path)
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        size = sum(p.stat().st_size for p in files if data.source == "text" or "_val_" in p.name)
    if data.source == "shards":
        return max(1, size // 2)
    return max(1, int(size * data.validation_fraction / BYTES_PER_TOKEN))


def _nearest_speed(known: Iterable[tuple[int, float]], size: int) -> float | None:
    """Median speed of the ten models nearest in size, as long as they are within a factor of ten."""
    close = sorted((abs(math.log(n / size)), speed) for n, speed in known if n / 10 <= size <= n * 10)
    return statistics.median([speed for _, speed in close[:10]]) if close else None


def _number(values: Mapping[str, Any], key: str) -> float | None:
    value = values.get(key)
    return float(value) if isinstance(value, int | float) and value > 0 else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
