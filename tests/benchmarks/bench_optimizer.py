"""Speed of one optimiser step, Muon and AdamW, against one matrix at a time and torch's plain AdamW loop.

    python tests/benchmarks/bench_optimizer.py [--sizes quickstart pr1166_e2e_ttt_flow] [--repeats 7] [--device cpu]

Both sides update a model of the same size with the same random gradients, in turn, in one process, with momentum and
Newton-Schulz in the same precision. The plain side is ``golfbook.plain.muon``, a Newton-Schulz iteration for each
matrix, and AdamW with neither ``foreach`` nor ``fused``. The last line of each size is the ratio of medians, by the
clock and by CPU time; the second is steadier on a machine that does other work.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch

from golfbook import compute
from golfbook.config.load import load_config
from golfbook.config.schema import TrainConfig
from golfbook.model.gpt import GPT, initialise
from golfbook.plain.muon import PlainMuon
from golfbook.train import choices
from golfbook.train.muon import make_optimizers, parameter_groups

PARTS = ("Muon", "AdamW")
Side = dict[str, Callable[[], None]]  # a step of each part


def plain_products() -> None:
    """torch as it is by default; the library's side runs under what the trainer sets (:func:`compute.prepare`)."""
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    torch.use_deterministic_algorithms(False)


def plain_side(model: GPT, config: TrainConfig) -> Side:
    """One matrix at a time, and torch's AdamW as a loop over parameters."""
    named, names = dict(model.named_parameters()), parameter_groups(model, config)
    rates = {"embed": config.optimizer.embed_lr, "scalar": config.optimizer.scalar_lr, "head": config.optimizer.head_lr}
    adam = torch.optim.AdamW(
        [{"params": [named[n] for n in names[g]], "lr": lr} for g, lr in rates.items() if names[g]],
        betas=(config.optimizer.adam_beta1, config.optimizer.adam_beta2),
        eps=config.optimizer.adam_eps,
        weight_decay=config.optimizer.adam_weight_decay,
        foreach=False,
        fused=False,
    )
    return {"Muon": PlainMuon([named[n] for n in names["matrix"]], config).step, "AdamW": adam.step}


def our_side(model: GPT, config: TrainConfig) -> Side:
    """The optimisers that training uses."""
    muon, adam = make_optimizers(model, config).values()
    return {"Muon": muon.step, "AdamW": adam.step}


def measure(preset: str, precision: str, repeats: int, device: str, threads: int) -> dict[str, float]:
    """Time both sides at the size of ``preset``, iteration and momentum in ``precision``; print and return medians."""
    config = load_config(
        preset, overrides={"train.optimizer.muon_dtype": precision, "train.optimizer.muon_momentum_dtype": precision}
    )
    models = [initialise(GPT(config.model), seed=0).to(device)]
    models.append(copy.deepcopy(models[0]))
    sides = {
        "one matrix at a time": plain_side(models[0], config.train),
        "golfbook.train.muon": our_side(models[1], config.train),
    }
    generator = torch.Generator().manual_seed(1)
    for pair in zip(models[0].parameters(), models[1].parameters(), strict=True):
        gradient = 1e-3 * torch.randn(pair[0].shape, generator=generator)
        for parameter in pair:
            parameter.grad = gradient.to(device, copy=True)
    chosen = choices.of_machine(torch.device(device))
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wall: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in sides}
    busy: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 2):  # two rounds warm up
        for name, side in sides.items():
            compute.prepare(
                threads, torch.device(device), chosen
            ) if name == "golfbook.train.muon" else plain_products()
            started_busy = time.process_time()
            for part in PARTS:
                started = time.perf_counter()
                side[part]()
                wait()
                if repeat >= 2:
                    wall[name][part].append(time.perf_counter() - started)
            if repeat >= 2:
                busy[name].append(time.process_time() - started_busy)
    apart = max(
        ((a - b).norm() / b.norm().clamp_min(1e-12)).item()
        for a, b in zip(models[1].state_dict().values(), models[0].state_dict().values(), strict=True)
    )
    matrices = len(parameter_groups(models[0], config.train)["matrix"])
    count = sum(p.numel() for p in models[0].parameters())
    print(
        f"{preset} in {precision}: {count:,} parameters, {matrices} matrices, {device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {repeats} repeats"
    )
    total = {name: [sum(times) for times in zip(*parts.values(), strict=True)] for name, parts in wall.items()}
    for name, parts in wall.items():
        detail = ", ".join(f"{part} {1000 * statistics.median(times):.2f}" for part, times in parts.items())
        print(
            f"  {name:22s} median {1000 * statistics.median(total[name]):9.2f} ms ({detail})  range "
            f"{1000 * min(total[name]):.2f}-{1000 * max(total[name]):.2f}  "
            f"CPU {1000 * statistics.median(busy[name]):.2f}"
        )
    plain, ours = (statistics.median(times) for times in total.values())
    plain_busy, our_busy = (statistics.median(times) for times in busy.values())
    print(
        f"  ratio of medians: {plain / ours:.2f} by the clock, {plain_busy / our_busy:.2f} by CPU time; weights differ "
        f"by at most {apart:.1e} of their norm after {repeats + 2} steps"
    )
    return {"plain": plain, "ours": ours}


def main() -> None:
    """Time both sizes in both precisions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["quickstart", "pr1166_e2e_ttt_flow"], metavar="PRESET")
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print(choices.title(torch.device(options.device)))
    torch.set_num_threads(options.threads)
    for preset in options.sizes:
        for precision in options.precisions:
            measure(preset, precision, options.repeats, options.device, options.threads)


if __name__ == "__main__":
    main()
