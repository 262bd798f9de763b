"""What a trellis gains in coded bits, and how long the whole quantiser takes at published size.

    python tests/benchmarks/bench_trellis.py [--parts gains times] [--share 0.25] [--threads 1]

gains: 2^17 Gaussian samples at 0.37 deviations a step; the error at equal bits in the entropy coder's stream, against
plain rounding, by the number of states.

times: random matrices of the shapes of PR 1166, with random statistics: equal slope and error feedback without a
trellis and with one of 8 states, coding and decoding. ``--share`` takes part of the matrices and scales up what they
take; 1 takes all.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from golfbook.compress.coders import entry_of
from golfbook.compress.entropy import ENTROPY
from golfbook.compress.quantizer import QuantizedTensor, dequantize, quantize
from golfbook.compress.trellis import POLYNOMIALS, points
from golfbook.compress.viterbi import search
from golfbook.config.load import load_config
from golfbook.config.schema import QuantizeConfig, RateConfig
from golfbook.model.component import facts_of
from golfbook.model.gpt import GPT
from golfbook.train import choices

STEP = 0.37
Result = TypeVar("Result")


def coded(weight: Tensor, states: int, step: float) -> tuple[float, float]:
    """Bits a sample in the coder's stream, and the error in dB."""
    q = search(weight, torch.tensor([[step]]), states)
    error = (weight - points(q, states) * (step / 2)).square().mean()
    tensor = QuantizedTensor("w", "step", 0, q=q, scale=torch.ones(()).half(), states=states)
    return 8 * len(ENTROPY.encode([tensor], 0)) / q.numel(), 10 * math.log10(float(error))


def bench_gains(_: float) -> None:
    """Gains by states; plain rounding at two steps tells what a bit is worth."""
    weight = torch.randn(128, 1024, generator=torch.Generator().manual_seed(0))
    (bits, high), (more, low) = coded(weight, 1, STEP), coded(weight, 1, 0.9 * STEP)
    worth = (high - low) / (more - bits)
    print(f"2^17 Gaussian samples; rounding: {bits:.3f} coded bits, error {high:.2f} dB")
    for states in POLYNOMIALS:
        used = time.process_time()
        own, error = coded(weight, states, STEP)
        used = time.process_time() - used
        gain = high - worth * (own - bits) - error
        print(
            f"  {states:3d} states: {gain:.2f} dB at equal bits, {gain / worth:.3f} bits a weight, {used:.1f} s of CPU"
        )


def timed(what: str, scale: float, work: Callable[[], Result]) -> Result:
    """Do it once; print seconds by the clock and of CPU, for all matrices."""
    begin, used = time.perf_counter(), time.process_time()
    result = work()
    used = time.process_time() - used
    print(f"  {what:38s} {scale * (time.perf_counter() - begin):7.1f} s, of CPU {scale * used:7.1f} s")
    return result


def bench_times(share: float) -> None:
    """Quantising, coding and decoding."""
    config = load_config("pr1166_11l_base")
    with torch.device("meta"):
        model = GPT(config.model)
    storage = {name: facts.storage for name, facts in facts_of(model).items()}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if value.ndim == 2}
    shapes = {name: s for name, s in shapes.items() if math.prod(s) > config.quantize.passthrough_numel}
    total, names = sum(map(math.prod, shapes.values())), list(shapes)
    chosen = names[:: max(1, round(1 / share))]
    generator = torch.Generator().manual_seed(0)
    state, statistics = {}, {}
    for name in chosen:
        rows, columns = shapes[name]
        state[name] = 0.1 * torch.randn(rows, columns, generator=generator)
        x = torch.randn(2 * columns, columns, generator=generator) * torch.rand(columns, generator=generator)
        gradient = torch.rand(rows, generator=generator)
        statistics[name] = {"gram": x.T @ x / len(x), "gradient": gradient}
    scale = total / sum(map(math.prod, (shapes[name] for name in chosen)))
    print(f"PR 1166: {total / 1e6:.1f} M weights in {len(names)} matrices, timed on {len(chosen)} of them")
    for states in (1, 8):
        settings = QuantizeConfig(quantizer="rate_distortion", coder="entropy", rate=RateConfig(states=states))
        what = f"trellis of {states} states" if states > 1 else "rounding"
        found = timed(f"{what}, quantising", scale, lambda s=settings: quantize(state, storage, s, statistics))
        tensors = list(found.values())
        stream = timed(f"{what}, coding", scale, lambda t=tensors: ENTROPY.encode(t, 0))
        table = [entry_of(tensor) for tensor in tensors]
        back = timed(f"{what}, decoding", scale, lambda s=stream, t=table: dequantize(ENTROPY.decode(memoryview(s), t)))
        print(f"    {8 * len(stream) * scale / total:.3f} bits a weight")
        if any(not torch.equal(back[name], tensor.dequantize()) for name, tensor in found.items()):
            sys.exit("what is decoded is not what was coded")


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"gains": bench_gains, "times": bench_times}
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{choices.title(torch.device('cpu'))}, {options.threads} thread(s)")
    for part in options.parts:
        parts[part](options.share)


if __name__ == "__main__":
    main()
