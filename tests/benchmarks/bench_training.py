"""Training speed: a whole optimiser step of the library against the straightforward version, in turn in one process.

    python tests/benchmarks/bench_training.py [--sizes tiny pr1166 pr1232] [--repeats 5] [--threads 1] [--compile]

Both sides start from the same weights and take the same batches: forward, backward, clipping, Muon and AdamW. The plain
side is what a reader would write from the formulas, ``golfbook.plain``; at published sizes it keeps its matrices as the
published code does, in banks for PR 1166, and orthogonalises bank by bank there, matrix by matrix elsewhere. Its
Newton-Schulz runs in the dtype of the preset, as ours. Losses of both sides must agree, or the benchmark fails.

Printed for each size and precision: medians, ratios by the clock and by CPU time (the second is steadier on a machine
that does other work), tokens a second, and the share of the ceiling of matrix products that was measured on this
machine just before. Our side makes glibc keep freed memory, which in one process helps the plain side too: with
``--plain-memory`` neither has it. ``--profile`` adds what bounds the rest: CPU time by kind of operation.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from bench_optimizer import plain_products
from plain_training import PlainStep
from torch import Tensor

from golfbook import compute
from golfbook.config.load import load_config
from golfbook.config.schema import Config
from golfbook.model import costs
from golfbook.model.gpt import GPT, initialise
from golfbook.train import choices
from golfbook.train.step import TrainingStep

SIZES = {  # preset, rows of a step, banks
    "tiny": ("quickstart", 8, False),
    "pr1166": ("pr1166_e2e_ttt_flow", 1, True),
    "pr1232": ("pr1232_flow", 1, False),
}
KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "softmax and attention kernels": ("aten::_softmax", "aten::_softmax_backward_data", "attention"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::fill_"),
}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the first loss; Muon in bfloat16 carries rounding on from there


def ready(preset: str, precision: str, compiled: bool) -> Config:
    """The preset with one row a step, activations in ``precision``."""
    return load_config(preset, overrides={"machine.precision": precision, "machine.compile": compiled})


def batch(config: Config, rows: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Random tokens: speed does not depend on them."""
    shape, generator = (rows, config.train.sequence_length + 1), torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@torch.no_grad()
def unlike_zero(model: GPT) -> GPT:
    """Give matrices that start at zero small random values: else whole components would not show in the first loss."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.normal_(0.0, 0.02, generator=generator)
    return model


def profiled(run: Callable[[], object]) -> dict[str, float]:
    """Share of the CPU time of ``run`` by kind of operation."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    times = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    total = sum(times.values())
    shares = {
        kind: sum(t for key, t in times.items() if any(key == n or n in key for n in names)) / total
        for kind, names in KINDS.items()
    }
    return {**shares, "other element-wise work and overhead": 1 - sum(shares.values())}


def measure(size: str, precision: str, options: argparse.Namespace) -> dict[str, float]:
    """Time both sides and print them; returns the numbers."""
    preset, rows, banks = SIZES[size]
    config, device = ready(preset, precision, options.compile), torch.device(options.device)
    chosen = choices.set_up(options.threads, device)
    model = unlike_zero(initialise(GPT(config.model), 0))
    plain = PlainStep(model, config, device, banks=banks)
    ours = TrainingStep(model, config, device)
    ceiling = compute.product_ceiling(device, precision)
    seconds = ours.warm_up(rows)
    sides: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"straightforward": plain, "golfbook": ours}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    busy: dict[str, list[float]] = {name: [] for name in sides}
    losses: dict[str, list[float]] = {name: [] for name in sides}

    def switch(name: str) -> None:  # each side under its own settings: torch's defaults, and what the trainer sets
        compute.prepare(options.threads, device, chosen) if name == "golfbook" else plain_products()

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for repeat in range(options.repeats + 1):  # the first round warms up
        inputs, targets = batch(config, rows, repeat, options.device)
        for name, step in sides.items():
            switch(name)
            started, started_busy = time.perf_counter(), time.process_time()
            losses[name].append(step(inputs, targets).item())
            wait()
            if repeat:
                wall[name].append(time.perf_counter() - started)
                busy[name].append(time.process_time() - started_busy)
    tokens = inputs.numel()
    work = costs.per_token(config.model, config.train.sequence_length, causal=True).training
    print(f"\n{size} ({preset}), {rows} x {config.train.sequence_length} tokens, activations in {precision}")
    if ours.compiled:
        print(f"  compiled in {seconds:.1f} s (not part of the times below)")
    for name in sides:
        median = statistics.median(wall[name])
        print(
            f"  {name:16s} median {1000 * median:9.1f} ms  range {1000 * min(wall[name]):.1f}-"
            f"{1000 * max(wall[name]):.1f}  CPU {1000 * statistics.median(busy[name]):.1f}  "
            f"{tokens / median:9,.0f} tokens/s  {tokens / median * work / ceiling:6.1%} of {ceiling / 1e9:.0f} GFLOP/s"
        )
    apart = [abs(a - b) for a, b in zip(*losses.values(), strict=True)]
    ratio, busy_ratio = (
        statistics.median(times["straightforward"]) / statistics.median(times["golfbook"]) for times in (wall, busy)
    )
    print(
        f"  ratio of medians: {ratio:.2f} by the clock, {busy_ratio:.2f} in CPU time; first loss within {apart[0]:.1e},"
        f" loss after {options.repeats} steps within {apart[-1]:.1e}"
    )
    if options.profile:
        for name, step in sides.items():
            switch(name)
            shares = profiled(lambda step=step: step(inputs, targets))
            print(f"  {name:16s} " + ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items()))
    if apart[0] > TOLERANCE[precision]:
        raise SystemExit(f"the first losses differ by {apart[0]:.2g}")
    return {"plain": statistics.median(wall["straightforward"]), "ours": statistics.median(wall["golfbook"])}


def main() -> None:
    """Measure all sizes in both precisions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile our side")
    parser.add_argument("--profile", action="store_true", help="show what bounds each side")
    parser.add_argument("--plain-memory", action="store_true", help="hand freed memory back as glibc does by itself")
    options = parser.parse_args()
    if options.plain_memory:  # a setting of the whole process, so that both sides have it or neither
        compute._keep_freed_memory = lambda: None
    print(choices.title(torch.device(options.device)))
    print(f"{options.threads} threads, {options.device}, {options.repeats} repeats")
    for size in options.sizes:
        found = {p: measure(size, p, options) for p in options.precisions}
        if len(found) == 2:
            default = compute.choose_precision(load_config(SIZES[size][0]))[0]
            ratio = found["float32"]["plain"] / found[default]["ours"]
            print(f"  {size}, precision of this machine ({default}) against straightforward float32: {ratio:.2f}")


if __name__ == "__main__":
    main()
