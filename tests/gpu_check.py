"""What only a GPU can show: ``make gpu-check`` runs it on the CUDA device that is there and writes one JSON file.

    python tests/gpu_check.py [--device cuda] [--steps 200] [--out runs/gpu_check/NAME.json]

Four parts, each caught and noted when it fails, so that one failure does not hide the rest:

* ``attention``: every backend that can run, forward and backward, against the masked formula in float64;
* ``compile``: losses of compiled and eager steps at published size, and graphs compiled after the warm-up (none);
* ``benchmarks``: ``bench_training`` at all sizes and ``bench_optimizer``, eager, and compiled at published size;
* ``run``: ``--steps`` steps of the published system through the launcher, like any other run, on the built-in corpus.

Without a CUDA device it says so and ends with status 0; with failures it ends with status 1. ``--device cpu --quick``
is for its own test: the same code at a size that a CPU can do.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import bench_optimizer
import bench_training

from golfbook import attention, costs, devices, runs, stages, steps
from golfbook.config import load_config
from golfbook.errors import GolfbookError
from golfbook.files import atomic_write_json, runs_root
from golfbook.model import GPT, initialise
from reference import masked_attention

PRESET = "pr1166_e2e_ttt_flow"
ATTENTION_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 4e-2}  # float32 products may use TF32 on a GPU
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}


def machine(device: torch.device) -> dict[str, Any]:
    """Name and versions of what is checked."""
    found = {**runs.environment(), "machine": platform.node(), "device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory_bytes": properties.total_memory,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "cuda": torch.version.cuda,
        }
    found["ceilings_flops"] = {p: devices.product_ceiling(device, p) for p in ("float32", "bfloat16")}
    return found


def check_attention(device: torch.device, quick: bool) -> dict[str, Any]:
    """Largest error of outputs and gradients of each backend and dtype; raises where one is too large."""
    length, found, wrong = 128 if quick else 2048, {}, []
    for backend in ("blocked", "sdpa", "flex", "flash3"):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{backend}, {str(dtype).removeprefix('torch.')}"
            reason = attention.why_not(backend, device, dtype)
            if reason:
                found[name] = f"not run: {reason}"
                continue
            generator = torch.Generator().manual_seed(0)
            inputs = [torch.randn(2, n, length, 64, generator=generator) for n in (8, 4, 4, 8)]
            exact = [x.to(device, torch.float64) for x in inputs]
            given = [x.to(device, dtype) for x in inputs]
            values = []
            for (q, k, v, seed), compute in (
                (exact, masked_attention),
                (given, lambda q, k, v, backend=backend: attention.causal_attention(q, k, v, backend)),
            ):
                for x in (q, k, v):
                    x.requires_grad_()
                out = compute(q, k, v)
                values.append([out.detach(), *torch.autograd.grad(out, (q, k, v), seed)])
            errors = [(a.double() - b).norm() / b.norm() for b, a in zip(*values, strict=True)]
            found[name] = max(errors).item()
            if not found[name] < ATTENTION_TOLERANCE[dtype]:
                wrong.append(f"{name}: {found[name]:.2g}")
    if wrong:
        raise GolfbookError(f"attention differs from the masked formula: {', '.join(wrong)}")
    return found


def check_compile(device: torch.device, quick: bool) -> dict[str, Any]:
    """Losses of compiled and eager steps on the same batches, and seconds of compilation."""
    found: dict[str, Any] = {}
    scale = "tiny" if quick else "published"
    for precision in ("float32", "bfloat16"):
        base = {"train.precision": precision, "train.device": device.type, **({"model.num_layers": 4} if quick else {})}
        configs = [load_config(PRESET, scale=scale, overrides={**base, "train.compile": on}) for on in (True, False)]
        compiled, eager = (steps.TrainingStep(initialise(GPT(c.model), 0), c, device) for c in configs)
        seconds, graphs = compiled.warm_up(1), steps.compiled_graphs()
        losses = []
        for seed in range(3):
            batch = bench_training.batch(configs[0], 1, seed, str(device))
            losses.append([step(*batch, lr_scale=0.1).item() for step in (compiled, eager)])
        found[precision] = {
            "notes": compiled.notes,
            "compile_seconds": seconds,
            "losses_compiled_eager": losses,
            "graphs_after_warmup": steps.compiled_graphs() - graphs,
        }
        apart = max(abs(a - b) for a, b in losses)
        if not apart < LOSS_TOLERANCE[precision] or found[precision]["graphs_after_warmup"]:
            raise GolfbookError(f"compiled and eager differ by {apart:.2g}, or a graph was compiled late: {found}")
    return found


def check_benchmarks(device: torch.device, quick: bool) -> dict[str, Any]:
    """The training benchmark of each size and precision, and the optimiser's."""
    found: dict[str, Any] = {}
    for compiled in (False, True):
        options = SimpleNamespace(
            repeats=1 if quick else 10, threads=1, device=str(device), compile=compiled, profile=False
        )
        for size in ["tiny"] if quick else ["pr1166", "pr1232"] if compiled else list(bench_training.SIZES):
            for precision in ("float32", "bfloat16"):
                label = f"{size}, {precision}{', compiled' if compiled else ''}"
                found[label] = bench_training.measure(size, precision, options)
    for precision in ("float32", "bfloat16"):
        preset = "quickstart" if quick else PRESET
        found[f"optimizer, {preset}, {precision}"] = bench_optimizer.measure(
            preset, precision, 1 if quick else 10, str(device), 1
        )
    return found


def pieces(device: torch.device) -> int:
    """Into how many micro-batches a published step must be cut so that activations take half of the memory at most."""
    config = load_config(PRESET)
    rows = config.train.batch_tokens // config.train.sequence_length
    room = torch.cuda.get_device_properties(device).total_memory / 2
    fits = [
        n for n in range(1, rows + 1)
        if rows % n == 0 and costs.activation_bytes(config.model, config.train.batch_tokens // n) < room
    ]  # fmt: skip
    return fits[0] if fits else rows


def check_run(device: torch.device, quick: bool, count: int) -> dict[str, Any]:
    """Train through the launcher; raises where the loss does not fall or a graph is compiled late."""
    overrides: dict[str, Any] = {
        "data.source": "pydocs",
        "data.fineweb_train_shards": 1,
        "data.max_validation_tokens": 4096 if quick else 65536,
        "train.steps": count,
        "train.warmdown_steps": count // 2,
        "train.device": device.type,
        "train.compile": device.type == "cuda",
        "train.micro_batches": 1 if quick else pieces(device),
        "train.validate_every": 0,
        "train.checkpoint_every": 0,
    }
    config = load_config(PRESET, scale="tiny" if quick else "published", seed=1, overrides=overrides)
    run = runs.create_run("gpu_check", f"check_{time.strftime('%Y%m%d_%H%M%S')}", config)
    result = stages.run_training(run)
    points = [p for p in run.read_metrics() if p["kind"] == "train"]
    if not points[-1]["loss"] < points[0]["loss"] - 0.2 or result["recompilations"]:
        raise GolfbookError(f"the loss went from {points[0]['loss']} to {points[-1]['loss']}; see {run.path}")
    return {**result, "losses": [(p["step"], p["loss"]) for p in points], "run": run.name}


def main(arguments: list[str]) -> int:
    """Run all parts; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="small sizes, for the test of this script")
    parser.add_argument("--out", type=Path, help="default: runs/gpu_check/MACHINE.json")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device here, so there is nothing to check (skipped)")
        return 0
    device = torch.device(options.device)
    devices.prepare(1, device)
    report: dict[str, Any] = {
        "machine": machine(device),
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "attention": lambda: check_attention(device, options.quick),
        "compile": lambda: check_compile(device, options.quick),
        "benchmarks": lambda: check_benchmarks(device, options.quick),
        "run": lambda: check_run(device, options.quick, options.steps),
    }
    out = options.out or runs_root() / "gpu_check" / f"{platform.node()}.json"
    failed = []
    for name, part in parts.items():
        print(f"== {name}", flush=True)
        started = time.perf_counter()
        try:
            report[name] = {"status": "ok", **part()}
        except (Exception, SystemExit) as error:  # a report of what failed is the purpose
            traceback.print_exc()
            report[name] = {"status": "failed", "message": f"{type(error).__name__}: {error}"}
            failed.append(name)
        report[name]["seconds"] = time.perf_counter() - started
        atomic_write_json(out, report)
    print(f"written: {out}" + (f"; FAILED: {', '.join(failed)}" if failed else "; all parts are fine"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
