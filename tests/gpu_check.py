"""What only a GPU can show: ``make gpu-check`` runs it on the CUDA device that is there and writes one JSON file.

    python tests/gpu_check.py [--device cuda] [--minutes 8] [--parts attention run] [--steps 200] [--out FILE.json]

Parts, in this order, each written to the file as soon as it ends, and caught and noted where it fails:

* ``attention``: every backend that can run, forward and backward, against the masked formula in float64;
* ``step PRESET ROWS``: an eager step of each published system: tokens a second, MFU, the optimisers' share, memory;
* ``variants``: the same of PR 1166 without TTT-Linear, in float32, and with kernels that need not repeat their sums;
* ``plain ...``: steps, optimisers and TTT-Linear against the straightforward versions of the benchmarks;
* ``scoring``: sliding windows of 2048 at stride 64, in float32 and under autocast, against a plain loop;
* ``compiled PRESET ROWS``: losses against eager steps, seconds of compilation, late graphs (none), and the same speeds;
* ``run``: ``--steps`` steps of PR 1166 through the launcher, like any other run, on the built-in corpus. Rows and
  compilation are those that were fastest above.

A part that would no longer end within ``--minutes`` is skipped, and the file says so; ``--parts`` takes some, by the
beginning of their names. Without a CUDA device it says so and ends with status 0; with failures it ends with status 1.
``--device cpu --quick`` is for its own test: the same code at a size that a CPU can do.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import bench_optimizer
import bench_scoring
import bench_training
import bench_ttt_linear
import plain_training

from golfbook import compute, provenance
from golfbook import run as runs
from golfbook.config.load import load_config
from golfbook.config.schema import Config
from golfbook.errors import GolfbookError
from golfbook.evaluate import scoring
from golfbook.files import atomic_write_json, runs_root
from golfbook.model import attention, costs
from golfbook.model.gpt import GPT, initialise
from golfbook.plain.layers import masked_attention
from golfbook.study import stages
from golfbook.train import choices
from golfbook.train import step as steps

PRESET = "pr1166_e2e_ttt_flow"
PRESETS = (PRESET, "pr1406", "pr1232_flow")
ROWS = (8, 64)  # sequences of a step; fewer than the second where memory is short
ATTENTION_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 4e-2}  # float32 products may use TF32 on a GPU
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
CORPUS = {"data.source": "pydocs", "data.fineweb_train_shards": 1}
RUN_SECONDS = 60  # what the steps of the run may take; its batch follows from this
Values = dict[str, Any]
Part = Callable[[], Values]


class Check:
    """One machine and the report about it."""

    def __init__(self, device: torch.device, quick: bool, count: int) -> None:
        self.device, self.quick, self.count = device, quick, count
        self.report: Values = {}

    def parts(self) -> dict[str, tuple[float, Part]]:
        """Each part by name, with the seconds that it may take on a GPU."""
        presets, rows = (PRESETS[:1], (1, 2)) if self.quick else (PRESETS, ROWS)
        large = [min(rows[-1], fitting_rows(self.config(preset), self.device)) for preset in presets]
        eager = {
            f"step {preset} {n}": (20, functools.partial(self.step, preset, n))
            for preset, most in zip(presets, large, strict=True) for n in sorted({rows[0], most})
        }  # fmt: skip
        compiled = {
            f"compiled {preset} {n}": (100, functools.partial(self.compiled, preset, n))
            for preset, n in zip(presets, large, strict=True)
        }
        first, *others = compiled
        return {
            "attention": (45, self.attention),
            **eager,
            "variants": (20, self.variants),
            **{
                f"plain {size} {precision}": (15, functools.partial(self.plain_step, size, precision))
                for size in (("tiny",) if self.quick else ("pr1166", "pr1232"))
                for precision in ("float32", "bfloat16")
            },
            "plain optimizers": (15, self.plain_optimizers),
            "plain TTT-Linear": (15, self.plain_ttt_linear),
            "scoring": (30, self.scoring),
            first: compiled[first],
            "run": (210, self.run),
            **{name: compiled[name] for name in others},
            f"compiled {PRESET} {rows[0]}": (100, functools.partial(self.compiled, PRESET, rows[0])),
            "compiled, float32": (100, functools.partial(self.compiled, PRESET, 1, precision="float32")),
        }

    def config(self, preset: str, **overrides: Any) -> Config:
        """A published system on this device; in the quick form its tiny scale with few layers."""
        given: Values = {"machine.device": self.device.type, "machine.precision": "bfloat16", **overrides}
        if self.quick:
            given = {"model.num_layers": 4, **given}
        return load_config(preset, scale="tiny" if self.quick else "published", overrides=given)

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object], repeats: int = 5, warmups: int = 2) -> float:
        """Median seconds of ``work``."""
        times = []
        for number in range(warmups + (1 if self.quick else repeats)):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            if number >= warmups:
                times.append(time.perf_counter() - started)
        return statistics.median(times)

    def machine(self) -> Values:
        """Name, versions and ceilings of what is checked."""
        found = {**provenance.environment(), "machine": platform.node(), "device": str(self.device)}
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            found |= {
                "gpu": properties.name,
                "gpu_memory_bytes": properties.total_memory,
                "capability": ".".join(map(str, torch.cuda.get_device_capability(self.device))),
            }
        found["ceilings_flops"] = {p: compute.product_ceiling(self.device, p) for p in ("float32", "bfloat16")}
        return found

    def attention(self) -> Values:
        """Largest error of outputs and gradients of each backend and dtype; raises where one is too large."""
        length, found, wrong = 128 if self.quick else 2048, {}, []
        for backend in ("blocked", "sdpa", "flex", "flash3"):
            for dtype in (torch.float32, torch.bfloat16):
                name = f"{backend}, {str(dtype).removeprefix('torch.')}"
                reason = attention.why_not(backend, self.device, dtype)
                if reason:
                    found[name] = f"not run: {reason}"
                    continue
                generator = torch.Generator().manual_seed(0)
                inputs = [torch.randn(2, n, length, 64, generator=generator) for n in (8, 4, 4, 8)]
                exact = [x.to(self.device, torch.float64) for x in inputs]
                given = [x.to(self.device, dtype) for x in inputs]
                compute = functools.partial(attention.causal_attention, backend=backend)
                values = [forward_and_backward(f, *x) for f, x in ((masked_attention, exact), (compute, given))]
                errors = [(a.double() - b).norm() / b.norm() for b, a in zip(*values, strict=True)]
                found[name] = max(errors).item()
                found[f"{name}, ms"] = 1000 * self.seconds(functools.partial(forward_and_backward, compute, *given))
                if not found[name] < ATTENTION_TOLERANCE[dtype]:
                    wrong.append(f"{name}: {found[name]:.2g}")
        if wrong:
            raise GolfbookError(f"attention differs from the masked formula: {', '.join(wrong)}")
        return found

    def step(self, preset: str, rows: int, **overrides: Any) -> Values:
        """Speed of an eager step."""
        return self.speed(self.training_step(self.config(preset, **overrides)), rows)

    def training_step(self, config: Config) -> steps.TrainingStep:
        """A step from the weights of seed 0, none of whose matrices is zero."""
        return steps.TrainingStep(bench_training.unlike_zero(initialise(GPT(config.model), 0)), config, self.device)

    def speed(self, step: steps.TrainingStep, rows: int) -> Values:
        """Tokens a second, share of the ceiling, share of the optimisers, and memory, of a step of ``rows`` rows."""
        config = step.config
        tokens = bench_training.batch(config, rows, 0, str(self.device))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        whole = self.seconds(lambda: step(*tokens, lr_scale=0.1, check=False))
        optimizers = self.seconds(lambda: [optimizer.step() for optimizer in step.optimizers.values()])
        speed = tokens[0].numel() / whole
        work = costs.per_token(config.model, config.train.sequence_length, causal=True).training
        return {
            "notes": step.notes,
            "tokens": tokens[0].numel(),
            "seconds": whole,
            "tokens_per_second": speed,
            "mfu": speed * work / self.report["machine"]["ceilings_flops"][step.precision],
            "optimizer_seconds": optimizers,
            "optimizer_share": optimizers / whole,
            "peak_memory_bytes": compute.peak_memory_bytes(self.device),
        }

    def variants(self) -> Values:
        """What one thing costs in the first step above: the same step without it."""
        rows = 1 if self.quick else ROWS[0]
        found: Values = {
            "without TTT-Linear": self.step(PRESET, rows, **{"model.ttt_linear.enabled": False}),
            "float32": self.step(PRESET, rows, **{"machine.precision": "float32"}),
        }
        torch.use_deterministic_algorithms(False)
        try:
            found["sums in any order"] = self.step(PRESET, rows)
        finally:
            choices.set_up(1, self.device)
        with_it = self.report.get(f"step {PRESET} {rows}", {}).get("seconds")
        if with_it:
            found["ttt_linear_share"] = 1 - found["without TTT-Linear"]["seconds"] / with_it
        return found

    def plain_step(self, size: str, precision: str) -> Values:
        """Medians of a step of the straightforward version and of ours."""
        repeats = 1 if self.quick else 3
        options = SimpleNamespace(repeats=repeats, threads=1, device=str(self.device), compile=False, profile=False)
        return bench_training.measure(size, precision, options)

    def plain_optimizers(self) -> Values:
        """Medians of the straightforward optimisers and of ours."""
        preset, repeats = ("quickstart", 1) if self.quick else (PRESET, 3)
        return bench_optimizer.measure(preset, "bfloat16", repeats, str(self.device), 1)

    def plain_ttt_linear(self) -> Values:
        """Medians of TTT-Linear, forward and backward in float32: the published loop and ours."""
        size = {"rows": 1, "length": 64, "width": 64} if self.quick else {"rows": ROWS[0], "length": 2048, "width": 512}
        module, x, seed = bench_ttt_linear.make(argparse.Namespace(heads=8, **size))
        module, x, seed = module.to(self.device), x.detach().to(self.device), seed.to(self.device)
        sides = {"plain": functools.partial(bench_ttt_linear.plain_loop, module), "ours": module}
        return {
            name: self.seconds(functools.partial(forward_and_backward, side, x, seed), repeats=3)
            for name, side in sides.items()
        }

    def scoring(self) -> Values:
        """Targets a second in windows of 2048 at stride 64, ours and one window at a time, in both precisions."""
        found: Values = {"legal test-time training": "not run: the library has none yet"}
        size = {"window": 128 if self.quick else 2048, "stride": 64}
        tokens = np.random.default_rng(0).integers(1024, size=size["window"] + (4 if self.quick else 96) * 64 + 1)
        for preset in (PRESET,) if self.quick else (PRESET, "pr1232_flow"):
            model = bench_training.unlike_zero(initialise(GPT(self.config(preset).model), 0)).to(self.device).eval()
            for precision in ("float32", "bfloat16"):
                plain, nll = plain_training.plain_model(model.config, model.state_dict(), precision), {}
                sides: dict[str, Callable[[], Any]] = {
                    "ours": functools.partial(scoring.score, model, tokens, **size),
                    "one window at a time": functools.partial(
                        bench_scoring.one_window_at_a_time, plain, self.device, tokens, **size
                    ),
                }
                for name, work in sides.items():
                    autocast = precision == "bfloat16" and name == "ours"
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
                        nll[name] = work()
                        seconds = self.seconds(work, repeats=2, warmups=0)
                    found[f"{preset}, {precision}, {name}"] = {
                        "seconds": seconds,
                        "targets_per_second": (len(tokens) - 1) / seconds,
                        "mean_nll": float(nll[name].mean()),
                    }
                apart = float(np.abs(np.subtract(*nll.values())).max())
                found[f"{preset}, {precision}, largest difference in nats"] = apart
        return found

    def compiled(self, preset: str, rows: int, precision: str = "bfloat16") -> Values:
        """Losses of compiled and eager steps, and speed; raises where losses differ or a graph is late or missing."""
        configs = [
            self.config(preset, **{"machine.precision": precision, "machine.compile": on}) for on in (True, False)
        ]
        compiled, eager = map(self.training_step, configs)
        seconds, graphs, losses = compiled.warm_up(rows), steps.compiled_graphs(), []
        if not compiled.compiled:
            raise GolfbookError("; ".join(compiled.notes))
        for seed in range(3):
            batch = bench_training.batch(configs[0], rows, seed, str(self.device))
            losses.append([step(*batch, lr_scale=0.1).item() for step in (compiled, eager)])
        late, apart = steps.compiled_graphs() - graphs, max(abs(a - b) for a, b in losses)
        values = {"compile_seconds": seconds, "losses_compiled_eager": losses, "graphs_after_warmup": late}
        if not apart < LOSS_TOLERANCE[precision] or late:
            raise GolfbookError(f"compiled and eager differ by {apart:.2g}, or a graph was compiled late: {values}")
        del eager
        return {**values, **self.speed(compiled, rows)}

    def run(self) -> Values:
        """Train through the launcher; raises where the loss does not fall or a graph is compiled late."""
        best, compiled, rows, speed = self.fastest()
        length = self.config(PRESET).train.sequence_length
        pieces = 1
        while 2 * pieces * rows * length * self.count <= RUN_SECONDS * speed and not self.quick:
            pieces *= 2
        config = self.config(
            PRESET,
            **{
                **CORPUS,
                "data.max_validation_tokens": 4096 if self.quick else 65536,
                "train.steps": self.count,
                "train.schedule.warmdown_steps": self.count // 2,
                "train.batch_tokens": (8 if self.quick else rows * pieces) * length,
                "train.micro_batches": pieces,
                "machine.compile": compiled,
                "machine.validate_every": 0,
                "machine.checkpoint_every": 0,
            },
        )
        run = runs.create_run("gpu_check", f"check_{time.strftime('%Y%m%d_%H%M%S')}", config)
        result = stages.run_training(run)
        points = [p for p in run.read_metrics() if p["kind"] == "train"]
        if not points[-1]["loss"] < points[0]["loss"] - 0.2 or result["recompilations"]:
            raise GolfbookError(f"the loss went from {points[0]['loss']} to {points[-1]['loss']}; see {run.path}")
        return {
            **result,
            "losses": [(p["step"], p["loss"]) for p in points],
            "as_fast_as": best,
            "batch_tokens": config.train.batch_tokens,
            "micro_batches": pieces,
            "run": run.name,
        }

    def fastest(self) -> tuple[str, bool, int, float]:
        """The fastest step of PR 1166 in the report: its part, whether compiled, rows, tokens a second."""
        done = [
            (values["tokens_per_second"], name)
            for name, values in self.report.items()
            if name.split()[1:2] == [PRESET] and values["status"] == "ok"
        ]
        if not done:
            return "", False, 1, 1.0
        speed, name = max(done)
        return name, name.startswith("compiled"), int(name.split()[-1]), speed


def forward_and_backward(compute: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of all tensors but the last, which is the gradient of the output."""
    *inputs, seed = tensors
    for x in inputs:
        x.requires_grad_()
    out = compute(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, seed)]


def fitting_rows(config: Config, device: torch.device) -> int:
    """Sequences of a step whose activations take half of the memory at most: a power of two; two on a CPU."""
    if device.type != "cuda":
        return 2
    room, rows = torch.cuda.get_device_properties(device).total_memory / 2, 1
    while costs.activation_bytes(config.model, 2 * rows * config.train.sequence_length) < room:
        rows *= 2
    return rows


@contextlib.contextmanager
def prepared_corpus() -> Iterator[None]:
    """Make the corpus of the run in another process meanwhile: it takes a minute in which no GPU has work."""
    modules = "from golfbook.config.load import load_config; from golfbook.data import dataset"
    work = f"{modules}; dataset.prepare(load_config({PRESET!r}, overrides={CORPUS!r}))"
    with subprocess.Popen([sys.executable, "-c", work]) as process:
        try:
            yield
        finally:
            process.kill()


def main(arguments: list[str]) -> int:
    """Run the parts; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="parts that would end later are skipped")
    parser.add_argument("--parts", nargs="+", default=[""], help="beginnings of names (default: all)")
    parser.add_argument("--steps", type=int, default=200, help="of the run")
    parser.add_argument("--quick", action="store_true", help="small sizes, for the test of this script")
    parser.add_argument("--out", type=Path, help="default: runs/gpu_check/MACHINE.json")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("gpu-check: torch sees no CUDA device here, so there is nothing to check (skipped)")
        return 0
    begun, device = time.perf_counter(), torch.device(options.device)
    chosen = choices.set_up(1, device)
    measured = time.perf_counter() - begun
    check = Check(device, options.quick, options.steps)
    check.report |= {
        "machine": {**check.machine(), "choices": choices.describe(chosen), "seconds_to_choose": measured},
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    out = options.out or runs_root() / "gpu_check" / f"{platform.node()}.json"
    parts = {name: part for name, part in check.parts().items() if name.startswith(tuple(options.parts))}
    with prepared_corpus() if "run" in parts else contextlib.nullcontext():
        for name, (expected, part) in parts.items():
            started = time.perf_counter()
            if started - begun + expected > 60 * options.minutes:
                values: Mapping[str, Any] = {"status": "skipped", "message": f"no {expected:.0f} s were left for it"}
            else:
                print(f"== {name}", flush=True)
                values = attempted(part)
            check.report[name] = {**values, "part_seconds": time.perf_counter() - started}
            atomic_write_json(out, check.report)
    ended = {name: check.report[name]["status"] for name in parts}
    for status in ("skipped", "failed"):
        print(f"{status}: {', '.join(name for name in ended if ended[name] == status) or 'none'}")
    print(f"written: {out}")
    return int("failed" in ended.values())


def attempted(part: Part) -> Values:
    """What a part found; a failure becomes a note, since the report of what failed is the purpose."""
    try:
        return {"status": "ok", **part()}
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"status": "failed", "message": message}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
