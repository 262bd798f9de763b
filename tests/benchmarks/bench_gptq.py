"""Speed of quantisation: GPTQ and the clip search against the published formulas, and pruning at published size.

    python tests/benchmarks/bench_gptq.py [--parts gptq clips prune] [--repeats 5] [--threads 1]

gptq: a matrix of 512 x 1536 with a Gram matrix of inputs that hang together, against PR 1406 section 15 as it is
written: Cholesky factor, inverse and Cholesky factor in float32, then for each of five clips a loop over columns in
blocks of 128. Ours works in float64. Integers are compared with those of the published formulas in float64, of which
not one may differ; their float32 gives some thousandths of a per cent of other integers, which depends on the
processor, and is printed.

clips: the five clips of a matrix by ``torch.quantile`` a percentile, and both whole searches; all integers are equal.

prune: 66 matrices of the published shapes with 26 million integers, pruned until xz at preset 9 has a given size.
"""

from __future__ import annotations

import argparse
import lzma
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from golfbook.compress.fit import fit
from golfbook.compress.gptq import gptq_matrix
from golfbook.compress.quantizer import QuantizedTensor
from golfbook.compress.rowwise import CLIP_PERCENTILES, quantize_matrix, row_scales
from golfbook.config.schema import QuantizeConfig
from golfbook.train import choices

QMAX = 31


def published_scales(weight: Tensor) -> list[Tensor]:
    """PR 1166 section 17.3: float16 row scales of each percentile, a call of torch.quantile for each."""
    magnitude = weight.abs()
    clips = [torch.quantile(magnitude, percentile, dim=1) for percentile in CLIP_PERCENTILES]
    return [(clip / QMAX).clamp_min(1 / QMAX).half() for clip in clips]


def published_search(weight: Tensor) -> tuple[Tensor, Tensor]:
    """PR 1166 section 17.3: round with each of them, keep the one with the smallest squared error."""
    best, least = None, float("inf")
    for scale in published_scales(weight):
        q = (weight / scale.float()[:, None]).round().clamp(-QMAX, QMAX).to(torch.int8)
        error = (weight - q.float() * scale.float()[:, None]).square().mean().item()
        if error < least:
            best, least = (q, scale), error
    assert best is not None
    return best


def published_gptq(weight: Tensor, gram: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """PR 1406 section 15, both dampings included."""
    columns, hessian = weight.size(1), gram.to(dtype)
    for _ in range(2):
        hessian = hessian + 0.005 * hessian.diagonal().mean() * torch.eye(columns, dtype=dtype)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    hessian, ordered = hessian[order][:, order], weight[:, order].to(dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    best, least = None, float("inf")
    for half in published_scales(weight):
        scale, left = half.to(dtype), ordered.clone()
        q = torch.zeros(weight.shape, dtype=torch.int8)
        for a in range(0, columns, 128):
            b = min(a + 128, columns)
            block, errors, inside = left[:, a:b].clone(), torch.zeros_like(left[:, a:b]), upper[a:b, a:b]
            for j in range(b - a):
                q[:, a + j] = (block[:, j] / scale).round().clamp(-QMAX, QMAX).to(torch.int8)
                errors[:, j] = (block[:, j] - q[:, a + j] * scale) / inside[j, j]
                block[:, j:] -= errors[:, j, None] * inside[j, j:]
            left[:, b:] -= errors @ upper[a:b, b:]
        error = (ordered - q * scale[:, None]).square().mean().item()
        if error < least:
            best, least = (q[:, order.argsort()], half), error
    assert best is not None
    return best


def timed(sides: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Run the sides in turn; return what each gave, and print medians and their ratio, by the clock and of CPU."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    results: dict[str, Any] = {}
    for _ in range(repeats + 1):  # the first round warms up
        for name, work in sides.items():
            begin, used = time.perf_counter(), time.process_time()
            results[name] = work()
            seconds[name].append((time.perf_counter() - begin, time.process_time() - used))
    clock, busy = (
        {n: statistics.median(pair[i] for pair in found[1:]) for n, found in seconds.items()} for i in (0, 1)
    )
    for name in sides:
        print(f"  {name:>10}: {1e3 * clock[name]:9.2f} ms, of CPU {1e3 * busy[name]:9.2f} ms")
    ratios = [found["published"] / found["golfbook"] for found in (clock, busy)]
    print(f"  ratio: {ratios[0]:.2f} by the clock, {ratios[1]:.2f} of CPU")
    return results


def matrix(rows: int, columns: int, size: float) -> Tensor:
    """Weights with rows of different sizes and heavy tails."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    return size * weight * (1 + 0.1 * weight.abs()) * (0.5 + torch.rand(rows, 1, generator=generator))


def bench_gptq(repeats: int) -> None:
    """One matrix, with rows above the floor of the scale, where all five clips differ, and below it."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(1536, 1536, generator=generator) * torch.rand(1536, 1, generator=generator) ** 2
    x = torch.randn(6144, 1536, generator=generator) @ mix
    gram = x.T @ x / len(x)
    for what, size in (("five scales a row", 0.8), ("rows on the floor", 0.1)):
        weight = matrix(512, 1536, size)
        print(f"GPTQ, 512 x 1536, 6 bits, five clips, {what}, median of {repeats}")
        results = timed(
            {
                "published": lambda w=weight: published_gptq(w, gram),
                "golfbook": lambda w=weight: gptq_matrix(w, gram, 6),
            },
            repeats,
        )
        q, scale = results["golfbook"]
        exact, exact_scale = published_gptq(weight, gram, torch.float64)
        other = int((q != exact).sum()), int((results["published"][0] != exact).sum())
        print(f"  integers other than those of the published formulas in float64: {other[0]:,} of {q.numel():,} here,")
        print(f"  {other[1]:,} by the published formulas in float32")
        if other[0] or not torch.equal(scale, exact_scale):
            sys.exit("the integers differ")


def bench_clips(repeats: int) -> None:
    """Row scales alone, then the whole search."""
    for shape in ((1536, 512), (512, 1536)):
        weight = matrix(*shape, 0.8)
        print(f"five clips of {shape[0]} x {shape[1]}, scales alone, median of {repeats}")
        results = timed(
            {
                "published": lambda w=weight: torch.stack(published_scales(w)),
                "golfbook": lambda w=weight: row_scales(w, QMAX, True),
            },
            repeats,
        )
        print("the whole search, rounding and errors included")
        searched = timed(
            {"published": lambda w=weight: published_search(w), "golfbook": lambda w=weight: quantize_matrix(w, 6)},
            repeats,
        )
        equal = [torch.equal(*results.values()), *map(torch.equal, *searched.values())]
        print(f"  scales and integers equal: {all(equal)}")
        if not all(equal):
            sys.exit("the integers differ")


def bench_prune(_: int) -> None:
    """PR 1406 section 17 in vectors, with the sizes of xz."""
    shapes = {"attn.c_q": (512, 512), "attn.c_k": (256, 512), "attn.c_v": (256, 512), "attn.proj": (512, 512)}
    shapes |= {"mlp.fc": (1536, 512), "mlp.proj": (512, 1536)}
    state = {f"blocks.{i}.{name}.weight": matrix(*shape, 0.12) for i in range(11) for name, shape in shapes.items()}
    config = QuantizeConfig(quantizer="gptq", fit="prune", coder_level=9)
    spent: list[float] = []

    def write(quantized: Mapping[str, QuantizedTensor], config: QuantizeConfig) -> int:
        begin = time.perf_counter()
        size = len(
            lzma.compress(b"".join(t.q.numpy().tobytes() for t in quantized.values() if t.q is not None), preset=9)
        )
        spent.append(time.perf_counter() - begin)
        return size

    storage = dict.fromkeys(state, "mlp")
    whole = fit(state, storage, config, None, write, 2**40).artifact_bytes
    spent.clear()
    begin = time.perf_counter()
    fitted = fit(state, storage, config, None, write, int(0.97 * whole))
    seconds = time.perf_counter() - begin
    print(
        f"pruning to 97 % of {whole:,} bytes: {fitted.pruned:,} of {fitted.candidates:,} integers -1 and 1 to zero, "
        f"{fitted.artifact_bytes:,} of {fitted.limit_bytes:,} bytes"
    )
    print(
        f"  {seconds:.1f} s with quantising, of which {sum(spent):.1f} s in {len(spent)} calls of xz, the first before"
    )
    print(f"  pruning; all the rest {seconds - sum(spent):.1f} s")
    if fitted.over_bytes:
        sys.exit("it does not fit")


def main() -> None:
    """Run the parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"gptq": bench_gptq, "clips": bench_clips, "prune": bench_prune}
    parser.add_argument("--parts", nargs="+", choices=list(parts), default=list(parts))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{choices.title(torch.device('cpu'))}, {options.threads} thread(s)")
    for part in options.parts:
        parts[part](options.repeats)


if __name__ == "__main__":
    main()
