"""Peak memory of a training step at published size, with and without recomputing activations in the backward pass.

    python tests/benchmarks/bench_memory.py [--preset pr1166_e2e_ttt_flow] [--rows 8] [--precision bfloat16]

Each side takes two whole steps (forward, backward, clipping, Muon and AdamW, moving average) in a process of its own;
what is printed is the largest resident size of that process, everything included. Fails where recomputing needs more
than ``--limit`` GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import torch

from golfbook import compute
from golfbook.config.load import load_config
from golfbook.model.gpt import GPT, initialise
from golfbook.train import choices
from golfbook.train.averaging import WeightAverage
from golfbook.train.step import TrainingStep

SIDES = {"activations kept": False, "activations recomputed": True}


def measure(options: argparse.Namespace) -> None:
    """Body of one process: two steps, then a line of JSON."""
    overrides = {"machine.precision": options.precision, "machine.checkpoint_activations": options.recompute}
    config = load_config(options.preset, overrides={**overrides, "machine.compile": False})
    choices.set_up(options.threads, torch.device("cpu"))
    before = compute.peak_memory_bytes()
    step = TrainingStep(initialise(GPT(config.model), 0), config, torch.device("cpu"))
    average = WeightAverage(config.train, step.model.state_dict())
    length = config.train.sequence_length
    tokens = torch.randint(
        config.model.vocab_size, (options.rows, length + 1), generator=torch.Generator().manual_seed(0)
    )
    times = []
    for number in range(2):
        started = time.perf_counter()
        loss = step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        average.update(number, 1.0, step.model.state_dict())
        times.append(time.perf_counter() - started)
    found = {"loss": loss.item(), "seconds": min(times), "peak": compute.peak_memory_bytes(), "before": before}
    print(json.dumps(found))


def main() -> None:
    """Run both sides and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="pr1166_e2e_ttt_flow")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--precision", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=12.0, metavar="GB", help="of the side that recomputes")
    parser.add_argument("--recompute", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        measure(options)
        return
    print(choices.title(torch.device("cpu")))
    print(f"{options.preset}, {options.rows} x 2048 tokens, {options.precision}, one process with all it holds")
    found = {}
    for label, recompute in SIDES.items():
        command = [sys.executable, __file__, *sys.argv[1:], "--side", *(["--recompute"] if recompute else [])]
        one = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        found[label] = one
        print(
            f"  {label:24s} peak {one['peak'] / 1e9:6.2f} GB ({(one['peak'] - one['before']) / 1e9:.2f} above the "
            f"libraries), {one['seconds']:.1f} s a step, loss {one['loss']:.6f}"
        )
    kept, recomputed = found.values()
    print(f"  memory {recomputed['peak'] / kept['peak']:.2f} times, time {recomputed['seconds'] / kept['seconds']:.2f}")
    if recomputed["loss"] != kept["loss"]:
        sys.exit("recomputing changed the loss")
    if recomputed["peak"] > options.limit * 1e9:
        sys.exit(f"recomputing needs {recomputed['peak'] / 1e9:.2f} GB, more than {options.limit} GB")


if __name__ == "__main__":
    main()
