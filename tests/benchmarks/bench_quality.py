"""Does faster training cost bits per byte? The quickstart model trained by the library and by the straightforward code.

    python tests/benchmarks/bench_quality.py [--seeds 1 2 ... 10] [--steps 300]

Both sides start from the same weights, read the same batches under the same schedule, and keep the same moving average;
the averaged weights are scored by the library on the whole validation split. The straightforward side is
``golfbook.plain`` in float32, ours takes the precision of this machine ("auto") unless ``--precision`` says
otherwise. Printed: every seed, the paired differences with their 95 % t-interval, and the seconds of training of both
sides with the ratio of medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from bench_optimizer import plain_products
from plain_training import PlainStep
from torch import Tensor

from golfbook import compute
from golfbook.analysis.statistics import paired_difference
from golfbook.config.load import load_config
from golfbook.config.schema import Config
from golfbook.data import dataset
from golfbook.data.batches import make_loader
from golfbook.evaluate import scoring
from golfbook.model.gpt import GPT, initialise
from golfbook.train import choices
from golfbook.train.averaging import WeightAverage
from golfbook.train.schedules import lr_scale, muon_momentum
from golfbook.train.step import TrainingStep

CPU = torch.device("cpu")


def train(config: Config, data: dataset.Dataset, take: Callable[[int, Tensor, Tensor], None],
          weights: Callable[[], Mapping[str, Tensor]]) -> tuple[float, float]:  # fmt: skip
    """Train with ``take(step, inputs, targets)``; returns bits per byte of the average, and seconds of the steps."""
    average = WeightAverage(config.train, weights())
    loader = make_loader(data.train_shards, config.train, config.seed)
    seconds = 0.0
    for step in range(config.train.steps):
        inputs, targets = (torch.from_numpy(part) for part in loader.next())
        started = time.perf_counter()
        take(step, inputs, targets)
        average.update(step, lr_scale(step, config.train), weights())
        seconds += time.perf_counter() - started
    model = GPT(config.model)
    model.load_state_dict(average.result(weights()))
    choices.set_up(config.machine.threads, CPU)  # one scorer for both
    nll = scoring.score(model.eval(), data.val_tokens, window=config.window, stride=config.window)
    return scoring.summarize(nll, data.val_bytes)["val_bpb"], seconds


def library_side(config: Config, data: dataset.Dataset) -> tuple[float, float]:
    """The library's own step."""
    choices.set_up(config.machine.threads, CPU)
    step_ = TrainingStep(initialise(GPT(config.model), config.seed), config, CPU)

    def take(step: int, inputs: Tensor, targets: Tensor) -> None:
        step_(inputs, targets, lr_scale=lr_scale(step, config.train), momentum=muon_momentum(step, config.train))

    return train(config, data, take, step_.model.state_dict)


def plain_side(config: Config, data: dataset.Dataset) -> tuple[float, float]:
    """The straightforward step in float32."""
    torch.set_num_threads(config.machine.threads)
    plain_products()
    plain = PlainStep(initialise(GPT(config.model), config.seed), config, CPU, banks=False)

    def take(step: int, inputs: Tensor, targets: Tensor) -> None:
        plain.schedule(lr_scale(step, config.train), muon_momentum(step, config.train))
        plain(inputs, targets)

    return train(config, data, take, plain.state)


def main() -> None:
    """Train both sides from every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(1, 11)))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    options = parser.parse_args()
    print(choices.title(CPU))
    changes = {"train.steps": options.steps, "train.schedule.warmdown_steps": options.steps // 2}
    found: dict[str, list[tuple[float, float]]] = {"straightforward": [], "golfbook": []}
    for seed in options.seeds:
        configs = {
            name: load_config(options.preset, seed=seed, overrides={**changes, "machine.precision": precision})
            for name, precision in (("straightforward", "float32"), ("golfbook", options.precision))
        }
        data = dataset.prepare(configs["golfbook"])
        sides = {"straightforward": plain_side, "golfbook": library_side}
        for name in list(sides)[:: 1 if seed % 2 else -1]:  # neither side always runs on the warmer machine
            found[name].append(sides[name](configs[name], data))
        shown = ", ".join(f"{name} {values[-1][0]:.4f} BPB in {values[-1][1]:.1f} s" for name, values in found.items())
        print(f"seed {seed}: {shown}", flush=True)
    precision, reason = compute.choose_precision(configs["golfbook"])
    scores = {name: [value for value, _ in values] for name, values in found.items()}
    times = {name: statistics.median([seconds for _, seconds in values]) for name, values in found.items()}
    print(f"{options.preset}, {options.steps} steps, golfbook in {precision} ({reason}), straightforward in float32")
    print(f"  training time, ratio of medians: {times['straightforward'] / times['golfbook']:.2f}")
    if len(options.seeds) > 1:
        d = paired_difference(scores["golfbook"], scores["straightforward"])
        print(
            f"  golfbook - straightforward: {d.mean:+.5f} BPB, 95 % interval [{d.low:+.5f}, {d.high:+.5f}], n = {d.n}"
        )


if __name__ == "__main__":
    main()
