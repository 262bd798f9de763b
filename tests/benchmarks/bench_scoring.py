"""Speed of the scorer against the plain model in a plain loop over windows, as the published scripts score.

    python tests/benchmarks/bench_scoring.py [--sizes tiny pr1166 pr1232] [--repeats 5] [--threads 1]

The plain side is ``golfbook.plain``, its model and its score, eager, under torch's own defaults: one window at a time,
padded to full length, logits and losses of all positions. Both sides run in turn in one process on the same random
weights and real tokens, in float32 as all scores here, and must agree. The ratios are of medians, by the clock and by
CPU time; the second one is steadier on a machine that does other work.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from bench_optimizer import plain_products
from plain_training import plain_model

from golfbook import compute
from golfbook.config.load import load_config
from golfbook.evaluate.scoring import score
from golfbook.model.gpt import GPT, initialise
from golfbook.plain import score as plain_score
from golfbook.plain.model import PlainGPT
from golfbook.train import choices

TOKENS = Path(__file__).parents[1] / "golden" / "bytes_first50docs.npz"
SIZES = {  # preset, window, stride, targets
    "tiny": ("quickstart", 256, 64, 8192),
    "pr1166": ("pr1166_e2e_ttt_flow", 2048, 64, 2048 + 128),
    "pr1232": ("pr1232_flow", 2048, 64, 2048 + 128),
}
TOLERANCE = 1e-4  # nats a target: sums in another order


def one_window_at_a_time(
    model: PlainGPT, device: torch.device, tokens: np.ndarray, window: int, stride: int
) -> np.ndarray:
    """The plain score of a plain model on a device: logits and losses of all positions, the newest kept."""
    return plain_score.score(lambda ids: model.logits(ids.to(device)).cpu(), tokens, window, stride)


def measure(size: str, repeats: int, threads: int, device: torch.device) -> dict[str, float]:
    """Time both sides and print them; returns the medians. Ends the program where the sides disagree."""
    preset, window, stride, targets = SIZES[size]
    model = initialise(GPT(load_config(preset).model), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # zero projections would make the two sides agree by themselves
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.to(device).eval()
    plain = plain_model(model.config, model.state_dict())
    tokens = np.load(TOKENS)["stream"][: targets + 1]
    chosen = choices.of_machine(device)
    sides: dict[str, Callable[[], np.ndarray]] = {
        "straightforward": lambda: one_window_at_a_time(plain, device, tokens, window, stride),
        "golfbook": lambda: score(model, tokens, window=window, stride=stride),
    }
    wall: dict[str, list[float]] = {name: [] for name in sides}
    busy: dict[str, list[float]] = {name: [] for name in sides}
    values: dict[str, np.ndarray] = {}
    for repeat in range(repeats + 1):  # the first round warms up
        for name, side in sides.items():
            compute.prepare(threads, device, chosen) if name == "golfbook" else plain_products()
            started, started_busy = time.perf_counter(), time.process_time()
            values[name] = side()
            if repeat:
                wall[name].append(time.perf_counter() - started)
                busy[name].append(time.process_time() - started_busy)
    print(f"\n{size} ({preset}), {targets} targets, window {window}, stride {stride}")
    for name, times in wall.items():
        median = statistics.median(times)
        print(
            f"  {name:16s} median {median:8.3f} s  range {min(times):.3f}-{max(times):.3f} s  "
            f"CPU {statistics.median(busy[name]):8.3f} s  {targets / median:10,.0f} targets/s"
        )
    ratio, busy_ratio = (
        statistics.median(times["straightforward"]) / statistics.median(times["golfbook"]) for times in (wall, busy)
    )
    apart = float(np.abs(np.subtract(*values.values())).max())
    print(
        f"  ratio of medians: {ratio:.2f} by the clock, {busy_ratio:.2f} in CPU time; "
        f"largest difference {apart:.1e} nats a target"
    )
    if not apart < TOLERANCE:
        raise SystemExit(f"the scores differ by {apart:.2g} nats")
    return {name: statistics.median(times) for name, times in wall.items()}


def main() -> None:
    """Measure all sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"{choices.title(device)}, {options.threads} threads")
    for size in options.sizes:
        measure(size, options.repeats, options.threads, device)


if __name__ == "__main__":
    main()
