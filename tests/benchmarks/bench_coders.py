"""Size and speed of the coders on the same integers and side information.

    python tests/benchmarks/bench_coders.py [--run RUN_FOLDER] [--millions 6] [--threads 1]

Without a run: Gaussian matrices of the shapes of PR 1166 whose deviations vary by row and column, in about 3.7 bits,
with a step a row and a column; once without a trellis and once with one of 8 states. With a finished run: its trained
model as its own quantiser stores it. All coders at their best level, xz also at the published one. Every stream is
decoded and compared. The last column is over the cross-entropy under the entropy coder's own models.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from golfbook.compress.coders import Coder, entry_of
from golfbook.compress.estimates import cross_entropy_bits, estimate_bits
from golfbook.compress.export import quantize_model
from golfbook.compress.quantizer import QuantizedTensor
from golfbook.config.tables import CODERS, named
from golfbook.run import open_run
from golfbook.train import choices
from golfbook.train.checkpoints import load_model

SHAPES = ((512, 512), (256, 512), (256, 512), (512, 512), (1536, 512), (512, 1536))  # of one block
ROWS = (("xz", 6), ("xz", 9), ("zstd", 19), ("brotli", 11), ("zlib", 9), ("entropy", 0))


def synthetic(millions: float, states: int) -> list[QuantizedTensor]:
    """Blocks of Gaussian integers whose deviation varies by row and column around 3 steps."""
    rng = np.random.default_rng(0)
    blocks = max(1, round(millions * 1e6 / sum(rows * columns for rows, columns in SHAPES)))
    found = []
    for number, (rows, columns) in enumerate(SHAPES * blocks):
        spread = np.exp(0.2 * rng.standard_normal((rows, 1)) + 0.3 * rng.standard_normal((1, columns)))
        q = np.rint(3 * spread * rng.standard_normal((rows, columns))).astype(np.int16)
        logs = [torch.from_numpy(rng.binomial(24, 0.5, size).astype(np.uint8)) for size in (rows, columns)]
        found.append(
            QuantizedTensor(
                f"matrix{number:04d}", "step", 0, q=torch.from_numpy(q), scale=torch.tensor(0.01).half(), rows=logs[0],
                columns=logs[1], states=states,
            )
        )  # fmt: skip
    return found


def measure(title: str, tensors: Sequence[QuantizedTensor]) -> None:
    """Print one table; ends the program where a decoded tensor differs."""
    integers = sum(tensor.q.numel() for tensor in tensors if tensor.q is not None)
    least, table = cross_entropy_bits(tensors) / 8, [entry_of(tensor) for tensor in tensors]
    started = time.perf_counter()
    predicted = sum(estimate_bits(tensors).values()) / 8
    print(
        f"\n{title}: {integers:,} integers; cross-entropy under the models of 'entropy' {least:,.0f} bytes, with all "
        f"side information; estimate of the integers alone {predicted:,.0f} in {time.perf_counter() - started:.2f} s"
    )
    print(
        f"{'coder':12s}{'bytes':>12s}{'bits each':>11s}{'encode s':>10s}{'decode s':>10s}{'above cross-entropy':>22s}"
    )
    for name, level in ROWS:
        coder: Coder = named(CODERS, name)
        started = time.perf_counter()
        stream = coder.encode(tensors, level)
        coded = time.perf_counter()
        decoded = coder.decode(memoryview(stream), table)
        ended = time.perf_counter()
        for tensor in tensors:
            if not torch.equal(decoded[tensor.name].dequantize(), tensor.dequantize()):
                raise SystemExit(f"{name}: '{tensor.name}' is not what it was")
        print(
            f"{name + ' ' + str(level):12s}{len(stream):12,d}{8 * len(stream) / integers:11.3f}{coded - started:10.2f}"
            f"{ended - coded:10.2f}{100 * (len(stream) / least - 1):20.2f} %"
        )


def main() -> None:
    """Measure a trained model, or synthetic ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--millions", type=float, default=6)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{choices.title(torch.device('cpu'))}, {options.threads} threads")
    if options.run:
        run = open_run(options.run)
        quantized = quantize_model(load_model(run), run.config.quantize)
        measure(f"{options.run.name}, {run.config.quantize.quantizer}", [quantized[name] for name in sorted(quantized)])
        return
    for states in (1, 8):
        measure(f"Gaussian matrices, {states} states", synthetic(options.millions, states))


if __name__ == "__main__":
    main()
