"""Speed of writing text with a cache, against a forward pass over all tokens so far for each further one.

    python tests/benchmarks/bench_generate.py [--sizes tiny pr1166 pr1406] [--repeats 3] [--threads 1] [--device cpu]

Both sides start from the same real tokens, in a window they do not leave, and write the likeliest token every time, in
float32 on the same random weights. The pass over everything is filled up to whole mini-batches of TTT-Linear. Texts
must be equal and logits close. The ratios are of medians, by the clock and by CPU time; the second one is steadier on a
machine that does other work.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from golfbook import compute
from golfbook.config.load import load_config
from golfbook.evaluate.generate import next_logits
from golfbook.model.cache import Cache
from golfbook.model.gpt import GPT, initialise
from golfbook.train import choices

TOKENS = Path(__file__).parents[1] / "golden" / "bytes_first50docs.npz"
SIZES = {  # preset, window, tokens given, tokens written
    "tiny": ("quickstart", 256, 16, 240),
    "pr1166": ("pr1166_e2e_ttt_flow", 2048, 1024, 16),
    "pr1406": ("pr1406", 2048, 1024, 16),
}
TOLERANCE = 1e-3  # of a logit: sums in another order


def everything_again(model: GPT, given: Tensor, count: int, window: int) -> tuple[list[int], Tensor]:
    """Write ``count`` tokens after ``given`` (1, n) by passes over all of them; returns these and the last logits."""
    refiner, text, logits = model.config.ttt_linear, given, torch.empty(0)
    for _ in range(count):
        padding = -text.size(1) % (refiner.mini_batch if refiner.enabled else 1)
        with torch.inference_mode():
            hidden = model.hidden(F.pad(text, (0, padding)), length=window)
            logits = model.logits(hidden[:, text.size(1) - 1])
        text = torch.cat((text, logits.argmax(-1, keepdim=True)), dim=1)
    return text[0, given.size(1) :].tolist(), logits


def cached(model: GPT, given: Tensor, count: int, window: int) -> tuple[list[int], Tensor]:
    """Do the same with a cache."""
    cache, text, logits = Cache(window), given, torch.empty(0)
    for _ in range(count):
        logits = next_logits(model, text[:, cache.position :], cache)
        text = torch.cat((text, logits.argmax(-1, keepdim=True).to(text.device)), dim=1)
    return text[0, given.size(1) :].tolist(), logits


def measure(size: str, repeats: int, threads: int, device: torch.device) -> None:
    """Time both sides and print them. Ends the program where the sides disagree."""
    preset, window, prompt, count = SIZES[size]
    model = initialise(GPT(load_config(preset).model), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # zero projections would make the two sides agree by themselves
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    model.to(device).eval()
    given = torch.from_numpy(np.load(TOKENS)["stream"][:prompt].astype(np.int64))[None].to(device)
    sides: dict[str, Callable[[], tuple[list[int], Tensor]]] = {
        "all tokens again": lambda: everything_again(model, given, count, window),
        "cache": lambda: cached(model, given, count, window),
    }
    wall: dict[str, list[float]] = {name: [] for name in sides}
    busy: dict[str, list[float]] = {name: [] for name in sides}
    results: dict[str, tuple[list[int], Tensor]] = {}
    compute.prepare(threads, device, choices.of_machine(device))
    for repeat in range(repeats + 1):  # the first round warms up
        for name, side in sides.items():
            started, started_busy = time.perf_counter(), time.process_time()
            results[name] = side()
            if repeat:
                wall[name].append(time.perf_counter() - started)
                busy[name].append(time.process_time() - started_busy)
    print(f"\n{size} ({preset}), {count} tokens after {prompt} in a window of {window}")
    for name, times in wall.items():
        median = statistics.median(times)
        print(
            f"  {name:16s} median {median:8.3f} s  range {min(times):.3f}-{max(times):.3f} s  "
            f"CPU {statistics.median(busy[name]):8.3f} s  {count / median:8.1f} tokens/s"
        )
    ratio, busy_ratio = (
        statistics.median(times["all tokens again"]) / statistics.median(times["cache"]) for times in (wall, busy)
    )
    (slow, expected), (fast, found) = results.values()
    apart = float((expected.cpu() - found.cpu()).abs().max())
    print(
        f"  ratio of medians: {ratio:.2f} by the clock, {busy_ratio:.2f} in CPU time; "
        f"largest difference of the last logits {apart:.1e}"
    )
    if slow != fast or not apart < TOLERANCE:
        raise SystemExit(f"the sides disagree: texts {slow} and {fast}, logits {apart:.2g} apart")


def main() -> None:
    """Measure all sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"{choices.title(device)}, {options.threads} threads")
    for size in options.sizes:
        measure(size, options.repeats, options.threads, device)


if __name__ == "__main__":
    main()
