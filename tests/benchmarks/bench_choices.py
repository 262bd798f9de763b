"""What was chosen for this machine against what is best: every candidate of every choice, timed again at real sizes.

    python tests/benchmarks/bench_choices.py [--rounds 9] [--threads 1] [--device cpu]

The choices are measured afresh, then each candidate is timed in turn in one process, at the sizes of the quickstart and
of the published systems: whole training steps for the precision, whole sets of products of one layer for the library,
attention in training and in inference at 256 and 2048 positions. The table shows the median of each candidate, the
chosen one and what it loses against the best one; a default is kept where nothing is clearly faster, so up to a tenth
can be lost.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from bench_training import SIZES, batch, ready, unlike_zero

from golfbook import compute
from golfbook.model import attention
from golfbook.model.gpt import GPT, initialise
from golfbook.train import choices
from golfbook.train.step import TrainingStep

Call = Callable[[], object]
HEADS = {256: (8, 4, 2, 32), 2048: (1, 8, 4, 64)}  # rows, heads, heads of keys, width, by length
AIM = 0.03
LAYERS = {"short": (2048, 128, 256), "long": (2048, 512, 1536)}  # tokens, width, hidden width


def medians(candidates: Mapping[str, Call], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median time of each candidate, all in turn, after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, call in candidates.items():
            started = clock()
            call()
            if number:
                times[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def products(length: str) -> dict[str, Call]:
    """Products of one MLP forward and backward by each library."""
    tokens, width, hidden = LAYERS[length]
    x, up, down = torch.randn(tokens, width), torch.randn(hidden, width), torch.randn(width, hidden)

    def multiply(library: compute.Products) -> None:
        compute.use_products(library)
        h = F.linear(x, up)
        y = F.linear(h, down)
        (y.T @ h, y @ down, h.T @ x, h @ up)

    libraries: list[compute.Products] = ["torch", "onednn"] if compute.products_are_exact("onednn") else ["torch"]
    return {library: functools.partial(multiply, library) for library in libraries}


def attentions(training: bool, dtype: torch.dtype, time_: int, device: torch.device) -> dict[str, Call]:
    """One call of each backend, with its backward pass in training."""
    rows, heads, keys, width = HEADS[time_]

    def values(count: int) -> torch.Tensor:
        x = torch.randn(rows, time_, count, width, device=device).to(dtype)
        return x.transpose(1, 2).requires_grad_(training)

    q, k, v, gradient = values(heads), values(keys), values(keys), values(heads).detach()

    def call(backend: attention.Backend) -> None:
        out = attention.causal_attention(q, k, v, backend)
        if training:
            torch.autograd.grad(out, (q, k, v), gradient)

    return {b: functools.partial(call, b) for b in attention.candidates(device, dtype, training)}


def steps(length: str, device: torch.device) -> dict[str, Call]:
    """A whole step in each precision: of the quickstart, and of PR 1166 with 1 x 2048 tokens."""
    preset, rows, _ = SIZES["tiny" if length == "short" else "pr1166"]
    calls: dict[str, Call] = {}
    for precision in ("float32", "bfloat16"):
        config = ready(preset, precision, False)
        step = TrainingStep(unlike_zero(initialise(GPT(config.model), 0)), config, device)
        calls[precision] = functools.partial(step, *batch(config, rows, 0, str(device)))
    return calls


def show(name: str, times: Mapping[str, float], taken: str) -> float:
    """Print one row; returns what the chosen candidate loses against the best."""
    loss = times[taken] / min(times.values()) - 1
    row = "  ".join(f"{candidate} {1000 * seconds:9.2f}" for candidate, seconds in times.items())
    print(f"{name:38s} {row:44s} {taken:9s} {loss:6.1%}", flush=True)
    return loss


def main() -> None:
    """Measure, then check every choice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    clock = time.process_time if device.type == "cpu" and options.threads == 1 else time.perf_counter
    started = time.perf_counter()
    chosen = choices.measure(device)
    print(f"{choices.title(device)}, {options.threads} threads")
    print(f"measured in {time.perf_counter() - started:.1f} s; medians of {options.rounds} in milliseconds\n")
    print(f"{'choice':38s} {'candidates':44s} {'chosen':9s} loss")
    compute.prepare(options.threads, device, chosen)
    losses = []
    if device.type == "cpu":
        for length in LAYERS:
            losses.append(
                show(f"products, {length}", medians(products(length), options.rounds, clock), chosen.products)
            )
        compute.use_products(chosen.products)
    for case, taken in chosen.attention.items():
        use, dtype, length = case.split(", ")
        calls = attentions(use == "training", getattr(torch, dtype), 256 if length == "short" else 2048, device)
        losses.append(show(f"attention, {case}", medians(calls, options.rounds, clock), taken))
    for length, taken in chosen.precision.items():
        rounds = options.rounds if length == "short" else 2
        losses.append(show(f"precision, {length}", medians(steps(length, device), rounds, clock), taken))
    print(f"\nlargest loss: {max(losses):.1%}; {'at' if max(losses) <= AIM else 'NOT at'} most the {AIM:.0%} aimed at")


if __name__ == "__main__":
    main()
