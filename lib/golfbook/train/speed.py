"""Estimated seconds of a training step on named GPUs, and all figures of a preset in one table.

>>> from golfbook.config.load import load_config
>>> from golfbook.train import speed
>>> speed.step_time(load_config("pr1232_base"), speed.GPUS["H100 SXM 80GB"], gpus=8).seconds
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from golfbook.compress.budget import artifact_bytes
from golfbook.config.architecture import ModelConfig
from golfbook.config.schema import Config
from golfbook.model.costs import activation_bytes, per_token, scoring
from golfbook.model.gpt import GPT, model_facts

MICRO_BATCH_TOKENS = 98_304  # 48 rows of 2048: what the published runs keep in memory at a time
ITERATIONS = 5  # of Newton-Schulz in Muon
# The estimate of a step's time has two terms, added because kernels run one after the other: products at a share of
# the peak rate, and memory traffic at the full bandwidth. Traffic is each saved activation times a factor (written,
# read again, and the same for gradients and what fusing does not save). The two numbers were chosen so that two
# published runs come out: PR 1232's base on an A100 and PR 1406 on eight H100.
MATMUL_SHARE = 0.4251
TRAFFIC_FACTOR = 4.236
# TTT-Linear is a sequence of small kernels, whose launches count more than their work.
SCAN_KERNELS = 34  # launched for a mini-batch, forward, recomputation and backward together
LAUNCH_SECONDS = 5e-6


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet: dense bfloat16 operations a second, bytes a second, bytes."""

    name: str
    flops: float
    bandwidth: float
    memory_bytes: float
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100 PCIe 40GB", 312e12, 1.555e12, 40e9, "NVIDIA A100 data sheet, 2020"),
        Gpu("A100 SXM 80GB", 312e12, 2.039e12, 80e9, "NVIDIA A100 data sheet, 2021"),
        Gpu("H100 SXM 80GB", 989e12, 3.35e12, 80e9, "NVIDIA H100 data sheet, 2023 (without sparsity)"),
        Gpu("H200 SXM 141GB", 989e12, 4.8e12, 141e9, "NVIDIA H200 data sheet, 2024 (without sparsity)"),
    )
}


def optimizer_flops(model: ModelConfig) -> int:
    """Return the operations of Muon's Newton-Schulz iterations in one step."""
    facts = model_facts(model)
    with torch.device("meta"):
        sides = [sorted(p.shape) for name, p in GPT(model).named_parameters() if facts[name].group == "matrix"]
    return ITERATIONS * sum(4 * small * small * large + 2 * small**3 for small, large in sides)


@dataclass(frozen=True)
class StepTime:
    """Estimated seconds of one optimiser step on each of the GPUs, and what they are made of."""

    products: float
    traffic: float
    launches: float

    @property
    def seconds(self) -> float:
        """Return the sum of all terms, which follow each other."""
        return self.products + self.traffic + self.launches


def step_time(config: Config, gpu: Gpu, gpus: int = 1) -> StepTime:
    """Estimate one training step of ``train.batch_tokens`` tokens spread over ``gpus`` GPUs, in bfloat16.

    Two constants stand for everything that differs between machines and programs; communication is left out.
    """
    model, tokens = config.model, config.train.batch_tokens / gpus
    work = tokens * per_token(model, config.train.sequence_length, causal=True).training + optimizer_flops(model)
    bytes_moved = TRAFFIC_FACTOR * activation_bytes(model, math.ceil(tokens))
    launches = 0.0
    if model.ttt_linear.enabled:
        mini_batches = config.train.sequence_length // model.ttt_linear.mini_batch
        launches = math.ceil(tokens / MICRO_BATCH_TOKENS) * mini_batches * SCAN_KERNELS * LAUNCH_SECONDS
    return StepTime(work / (MATMUL_SHARE * gpu.flops), bytes_moved / gpu.bandwidth, launches)


def totals(config: Config) -> dict[str, float]:
    """Return a preset's figures by name, each with its unit; steps are those of one GPU, whatever was published."""
    model, length = config.model, config.train.sequence_length
    found = {
        "forward, MFLOP a token": per_token(model, length, training=False).inference / 1e6,
        "training, MFLOP a token": per_token(model, length).training / 1e6,
        "  with causal attention": per_token(model, length, causal=True).training / 1e6,
        f"scoring at stride {config.score.stride}, MFLOP": scoring(model, config.window, config.score.stride) / 1e6,
        "artifact, bytes (estimate)": artifact_bytes(model, config.quantize),
        "activations, KB a token, bf16": activation_bytes(model, MICRO_BATCH_TOKENS) / MICRO_BATCH_TOKENS / 1e3,
    }
    for name, gpu in GPUS.items():
        found[f"step on {name}, ms"] = 1000 * step_time(config, gpu).seconds
    return found
