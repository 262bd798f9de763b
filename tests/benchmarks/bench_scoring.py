"""Speed of the scorer against a plain per-window loop that computes the logits of every position.

    python tests/benchmarks/bench_scoring.py [--preset quickstart] [--window 256] [--stride 64] [--targets 8192]

Both sides run in turn in one process on the same random model and real tokens. The last lines are the ratios of
medians, by the clock and by CPU time; the second one is steadier on a machine that does other work.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from golfbook.config import load_config
from golfbook.model import GPT, initialise
from golfbook.scoring import plan_windows, score

TOKENS = Path(__file__).parents[1] / "golden" / "bytes_first50docs.npz"


@torch.inference_mode()
def plain_loop(model: GPT, tokens: np.ndarray, window: int, stride: int) -> np.ndarray:
    """One window at a time, padded to full length, logits and losses of all positions, the scored ones kept."""
    device = next(model.parameters()).device
    plan = plan_windows(len(tokens) - 1, window, stride)
    result = np.empty(len(tokens) - 1, dtype=np.float32)
    for start, first, stop in zip(plan.starts, plan.first, plan.stop, strict=True):
        part = np.zeros(window + 1, dtype=np.int64)
        known = tokens[start : start + window + 1]
        part[: len(known)] = known
        ids = torch.from_numpy(part).to(device)
        nll = F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="none")
        result[first:stop] = nll[first - start : stop - start].cpu().numpy()
    return result


def main() -> None:
    """Time both sides and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="quickstart")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--stride", type=int, default=64)
    parser.add_argument("--targets", type=int, default=8192)
    parser.add_argument("--batch-windows", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = initialise(GPT(load_config(options.preset).model), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # zero projections would make the two sides agree by themselves
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.to(options.device).eval()
    tokens = np.load(TOKENS)["stream"][: options.targets + 1]
    size = {"window": options.window, "stride": options.stride}
    sides = {
        "plain per-window loop": lambda: plain_loop(model, tokens, **size),
        "golfbook.scoring.score": lambda: score(model, tokens, **size, batch_windows=options.batch_windows),
    }
    wall: dict[str, list[float]] = {name: [] for name in sides}
    busy: dict[str, list[float]] = {name: [] for name in sides}
    values: dict[str, np.ndarray] = {name: side() for name, side in sides.items()}  # also the warm-up
    for _ in range(options.repeats):
        for name, side in sides.items():
            started, started_busy = time.perf_counter(), time.process_time()
            side()
            wall[name].append(time.perf_counter() - started)
            busy[name].append(time.process_time() - started_busy)
    plain, ours = values.values()
    print(
        f"{options.preset}, {len(tokens) - 1} targets, window {options.window}, stride {options.stride}, "
        f"{options.device}, {options.threads} threads, torch {torch.__version__}"
    )
    for name, times in wall.items():
        median = statistics.median(times)
        print(
            f"{name:24s} median {median:8.3f} s  range {min(times):.3f}-{max(times):.3f} s  "
            f"CPU {statistics.median(busy[name]):8.3f} s  {(len(tokens) - 1) / median:10,.0f} targets/s"
        )
    for kind, times_of in (("wall", wall), ("CPU", busy)):
        plain_median, our_median = (statistics.median(times) for times in times_of.values())
        print(f"ratio of medians, {kind} time: {plain_median / our_median:.2f}")
    print(f"largest difference {np.abs(plain - ours).max():.1e} nats a target, {options.repeats} repeats")


if __name__ == "__main__":
    main()
