"""What a run will cost before it starts: seconds and bytes of memory, from earlier runs where there are some.

Arithmetic is counted as 6 operations a parameter and trained token, and 2 a parameter and scored token (Kaplan et al.
2020, section 2.1). Operations become seconds by the speed that finished runs on this machine had; where there are
none, by a stated rule. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from golfbook.config.architecture import ModelConfig
from golfbook.config.load import validate
from golfbook.config.schema import Config, DataConfig
from golfbook.errors import GolfbookError
from golfbook.files import read_json, resolve, runs_root
from golfbook.machine import available_cores, visible_gpus
from golfbook.provenance import environment
from golfbook.run import STAGES

CPU_SPEED = 4e10  # operations a second and thread of the quickstart on a server core; slower cores reach a third
GPU_SPEED = 5e13  # operations a second and GPU
NOTEBOOK_SECONDS = 20.0  # start of a kernel, imports, plots
PROCESS_BYTES = 700_000_000  # a kernel and a trainer that have imported torch and loaded the corpus
BYTES_PER_TOKEN = 2.4  # of English prose with 1,024 pieces
LEAST_SECONDS = 2.0  # of work that says something about speed; below, what precedes the work decides


@dataclass(frozen=True)
class Work:
    """What a finished run did: parameters of its model, operations, seconds they took."""

    size: int
    operations: float
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """Cost of one run: seconds of each stage, bytes of memory at its peak, and where the numbers come from."""

    seconds: Mapping[str, float]
    memory_bytes: int
    source: str


@dataclass(frozen=True)
class History:
    """What finished runs on this machine did, and how many tokens their validation splits have."""

    training: tuple[Work, ...] = ()
    scoring: tuple[Work, ...] = ()
    validation_tokens: tuple[tuple[DataConfig, int], ...] = ()


def uses_gpu(config: Config) -> bool:
    """Return whether the trainer of this config will run on a GPU here."""
    return config.machine.device == "cuda" or (config.machine.device == "auto" and bool(visible_gpus()))


def rough_parameters(model: ModelConfig) -> int:
    """Estimate the parameters of a model within a few per cent, without building it."""
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
    """Gather the work of all finished runs under the runs folder that were made on this processor or these GPUs.

    Work of less than ``LEAST_SECONDS`` is left out.
    """
    training, scoring, tokens = [], [], []
    here = environment()
    for folder in sorted({path.parent for path in runs_root().glob("*/*/result.training.json")}):
        machine = read_json(folder / "env.json")
        if machine.get("processor") != here["processor"] or machine.get("cores") != here["cores"]:
            continue
        with contextlib.suppress(GolfbookError):
            config = validate(read_json(folder / "config.json"))
            size = rough_parameters(config.model)
            trained = read_json(folder / "result.training.json")
            if trained.get("status") != "ok" or trained.get("device", "cpu").startswith("cuda") != uses_gpu(config):
                continue
            seconds = _number(trained, "train_seconds")
            if seconds >= LEAST_SECONDS:
                share = _number(trained, "steps") / config.train.steps or 1.0  # the clock may have ended it earlier
                training.append(Work(size, share * training_operations(config), seconds))
            scored = read_json(folder / "result.test_time_training.json")
            seconds, count = _number(scored, "score_seconds"), int(_number(scored, "tokens"))
            if scored.get("status") == "ok" and count:
                tokens.append((config.data, count))
                if seconds >= LEAST_SECONDS:
                    scoring.append(Work(size, scoring_operations(config, count), seconds))
    return History(tuple(training), tuple(scoring), tuple(tokens))


def estimate(config: Config, stages: Iterable[str], history: History) -> Estimate:
    """Estimate one run; ``source`` says which numbers were measured and which follow the rule of thumb."""
    size = rough_parameters(config.model)
    rule, together = (_rule_of_thumb(config, processes) for processes in (1, config.machine.processes))
    trained = _nearest_speed(history.training, size)
    scored = _nearest_speed(history.scoring, size)
    count = next((n for data, n in reversed(history.validation_tokens) if data == config.data), None)
    if count is None:
        count = _validation_tokens(config.data)
    seconds = {
        "training": training_operations(config) / (trained or together),
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
    """Estimate the operations of the training stage."""
    return 6.0 * rough_parameters(config.model) * config.train.steps * config.train.batch_tokens


def scoring_operations(config: Config, tokens: int) -> float:
    """Estimate the operations of the final score: sliding windows and one contiguous pass over ``tokens`` targets."""
    passes = 1 + (config.window / config.score.stride if tokens > config.window else 1)
    return 2.0 * rough_parameters(config.model) * tokens * passes


def _memory(config: Config, size: int) -> int:
    """Estimate the host bytes of a run: weights, gradient, two moments, average; activations for the backward pass."""
    model, processes = config.model, config.machine.processes
    tokens = config.train.batch_tokens // processes
    widths = model.num_layers * model.model_dim * (12 + 4 * model.mlp_mult) + 3 * model.vocab_size
    return int(PROCESS_BYTES + processes * (5 * 4 * size + 4 * tokens * widths))


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


def _rule_of_thumb(config: Config, processes: int) -> float:
    if uses_gpu(config):
        return GPU_SPEED * processes
    return CPU_SPEED * min(config.machine.threads * processes, available_cores())


def _nearest_speed(known: Iterable[Work], size: int) -> float | None:
    """Return the operations a second of the ten runs nearest in size taken together, within a factor of ten.

    Taken together, long runs weigh more than short ones, as they will in what is estimated.
    """
    close = [work for work in known if work.size / 10 <= size <= work.size * 10]
    close.sort(key=lambda work: abs(math.log(work.size / size)))
    seconds = sum(work.seconds for work in close[:10])
    return sum(work.operations for work in close[:10]) / seconds if seconds else None


def _number(values: Mapping[str, Any], key: str) -> float:
    value = values.get(key)
    return float(value) if isinstance(value, int | float) and value > 0 else 0.0
