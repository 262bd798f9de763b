"""Speed and peak memory of TTT-Linear, forward and backward, against the published loop written plainly.

    python tests/benchmarks/bench_ttt_linear.py [--rows 8] [--length 2048] [--width 512] [--heads 8] [--repeats 3]

The plain loop is that of ``golfbook.plain.ttt_linear``: it cuts each mini-batch out of K, V and Q inside the loop and
lets autograd keep everything, as the published code does (PR 1166, section 8). Each side runs in a process of its own
on the same weights and inputs, after a warm-up; peak memory is the largest resident size above what the process held
once its inputs were made. The benchmark fails when outputs or gradients differ by more than 1e-5 of their scale. The
last lines are the ratios; that of CPU time is the steadier one on a machine that does other work.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from golfbook.config.architecture import TTTLinearConfig
from golfbook.config.load import load_config
from golfbook.model.refiners import TTTLinear
from golfbook.plain import ttt_linear
from golfbook.train import choices

TOLERANCE = 1e-5


def plain_loop(module: TTTLinear, x: Tensor) -> Tensor:
    """The plain refiner with the weights of ``module``; (B, T, D) to (B, T, D)."""
    settings = TTTLinearConfig(num_heads=module.heads, mini_batch=module.mini_batch, base_lr=module.eta * module.width)
    return ttt_linear.refine(dict(module.named_parameters()), x, settings)


def make(options: argparse.Namespace) -> tuple[TTTLinear, Tensor, Tensor]:
    """The module with every gate open, an input and the gradient of its output; equal for equal options."""
    model = {"model_dim": options.width, "num_heads": options.heads, "num_kv_heads": options.heads, "rope_dims": 0}
    config = load_config({"model": {**model, "ttt_linear": {"enabled": True, "num_heads": options.heads}}}).model
    generator = torch.Generator().manual_seed(0)
    module = TTTLinear(config)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.2
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        module.W1.mul_(0.2)
        module.ttt_ln_w.add_(1)
    x, seed = torch.randn(2, options.rows, options.length, options.width, generator=generator)
    return module, x.requires_grad_(), seed


def measure(side: str, options: argparse.Namespace, folder: Path) -> None:
    """Body of one process: time one side, save its output and gradients, print a line of JSON."""
    torch.set_num_threads(options.threads)
    module, x, seed = make(options)

    def once(x: Tensor, seed: Tensor) -> Tensor:
        y = module(x) if side == "scan" else plain_loop(module, x)
        y.backward(seed)
        return y.detach()

    part = slice(0, min(options.length, 4 * module.mini_batch))
    once(x[:1, part].detach().requires_grad_(), seed[:1, part])  # warm-up
    held, seconds, work = psutil.Process().memory_info().rss, [], []
    for _ in range(options.repeats):
        x.grad = None
        module.zero_grad()
        begin, used = time.perf_counter(), time.process_time()
        y = once(x, seed)
        seconds.append(time.perf_counter() - begin)
        work.append(time.process_time() - used)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - held
    gradients = {"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}}
    save_file({"output": y, **{f"grad {k}": v for k, v in gradients.items()}}, folder / f"{side}.safetensors")
    print(json.dumps({"seconds": seconds, "work": work, "peak": peak}))


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, str]:
    """Largest absolute difference of any tensor relative to the largest value of that tensor, and its name."""
    return max((float((a[n] - b[n]).abs().max() / b[n].abs().max()), n) for n in a)


def main() -> None:
    """Run both sides, compare their results and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"rows": 8, "length": 2048, "width": 512, "heads": 8, "repeats": 3, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--side", choices=("scan", "loop"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        measure(options.side, options, options.folder)
        return
    print(choices.title(torch.device("cpu")))
    print(
        f"TTT-Linear, forward + backward, float32, {options.rows} x {options.length} tokens, width {options.width}, "
        f"{options.heads} heads, {options.threads} thread(s), median of {options.repeats}"
    )
    seconds, work, peaks, results = {}, {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for side, label in (("loop", "plain loop"), ("scan", "golfbook")):
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", folder]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            seconds[side], work[side] = statistics.median(found["seconds"]), statistics.median(found["work"])
            peaks[side] = found["peak"]
            results[side] = load_file(Path(folder) / f"{side}.safetensors")
            print(
                f"{label:>12}: {seconds[side]:8.3f} s, of which CPU {work[side]:8.3f} s, "
                f"peak {peaks[side] / 2**20:6.0f} MiB above the inputs"
            )
    difference, name = largest_difference(results["scan"], results["loop"])
    print(f"largest difference: {difference:.1e} of the scale, in {name}")
    print(
        f"speed ratio:  {seconds['loop'] / seconds['scan']:.2f} by the clock, {work['loop'] / work['scan']:.2f} in CPU"
    )
    print(f"memory ratio: {peaks['scan'] / peaks['loop']:.3f}")
    if difference > TOLERANCE:
        sys.exit(f"outputs or gradients differ by more than {TOLERANCE}")


if __name__ == "__main__":
    main()
