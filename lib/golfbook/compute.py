"""What this process computes with: device, threads, precision, library of products, attention; and its ceiling.

What was measured to be fastest on a machine is a :class:`Choices`; :mod:`golfbook.train.choices` makes one, and
:func:`prepare` puts it to use. A process that was told nothing uses torch's defaults and float32.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from golfbook.config.schema import Config
from golfbook.errors import RunError

EXACT = 1e-5  # relative error of a float32 product; products rounded to bfloat16 are off by 2e-3
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
Products = Literal["torch", "onednn"]
Backend = Literal["auto", "blocked", "sdpa", "flex", "flash3"]  # what computes attention
SHORT = 512  # tokens: up to this length what was measured on short sequences counts, and attention's blocks are halved


@dataclass(frozen=True)
class Choices:
    """What is fastest on a machine, and the seconds that show it."""

    products: Products = "torch"  # library of float32 products on a CPU
    precision: Mapping[str, str] = field(default_factory=dict)  # of activations, for "short" and "long" sequences
    attention: Mapping[str, Backend] = field(default_factory=dict)  # by case()
    seconds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # choice -> candidate -> seconds
    identity: Mapping[str, str] = field(default_factory=dict)  # the machine, libraries and switches it was measured on


_current = Choices()


def choose_device(config: Config, rank: int = 0) -> torch.device:
    """Choose CUDA where it is there and allowed, else the CPU; raises RunError where CUDA is demanded and missing."""
    wanted = config.machine.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RunError("machine.device is 'cuda', but torch sees no CUDA device; use 'auto' or 'cpu'")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", rank % torch.cuda.device_count())


def choose_precision(config: Config) -> tuple[str, str]:
    """Choose the dtype of activations, "float32" or "bfloat16", and say why; "auto": what was measured to be faster."""
    if config.machine.precision != "auto":
        return config.machine.precision, "machine.precision says so"
    length = "short" if config.train.sequence_length <= SHORT else "long"
    if length not in _current.precision:
        return "float32", "nothing was measured on this machine"
    times = _current.seconds.get(f"precision, {length}", {})
    figures = ", ".join(f"{name} {1000 * seconds:.3g} ms" for name, seconds in times.items())
    return _current.precision[length], f"measured: {figures}" if figures else "measured"


def prepare(threads: int, device: torch.device, choices: Choices) -> None:
    """Set up this process: threads, repeatable kernels, and what was measured to be fastest on this machine."""
    global _current
    _current = choices
    torch.set_num_threads(threads)
    _keep_freed_memory()
    torch.use_deterministic_algorithms(True, warn_only=True)
    fills: Any = torch.utils.deterministic
    fills.fill_uninitialized_memory = False  # a help for debugging that costs 2 % of a step
    use_products(choices.products if device.type == "cpu" else "torch")


def case(training: bool, dtype: torch.dtype, time: int) -> str:
    """Name the kind of call that one choice of attention covers, such as ``"training, bfloat16, long"``."""
    use, kind = "training" if training else "inference", str(dtype).removeprefix("torch.")
    return f"{use}, {kind}, {'short' if time <= SHORT else 'long'}"


def attention_backend(training: bool, dtype: torch.dtype, time: int) -> Backend:
    """Return what "auto" stands for in this process: what was measured for this :func:`case`, else torch's kernel."""
    return _current.attention.get(case(training, dtype, time), "sdpa")


def _keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of handing it back: to have it mapped anew costs up to a fifth of a step."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        tune = ctypes.CDLL(None).mallopt
        tune(M_TRIM_THRESHOLD, 2**31 - 1)
        tune(M_MMAP_THRESHOLD, 2**25)  # the most that glibc takes


def use_products(library: Products) -> None:
    """Compute float32 products of this process by torch's default, which is mostly MKL, or by oneDNN.

    MKL leaves half of the vector units of AMD's CPUs idle and oneDNN does not; torch hands float32 products to oneDNN
    once it *may* round them to bfloat16. Whether it then does depends on the processor: ask :func:`products_are_exact`.
    """
    torch.backends.mkldnn.matmul.fp32_precision = "bf16" if library == "onednn" else "ieee"  # type: ignore[attr-defined]


def products_are_exact(library: Products) -> bool:
    """Return whether a library's float32 products are exact to float32, of matrices small and large, one and many."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((128, 128, 128), (1024, 512, 256))
    pairs = [(torch.randn(m, k, generator=generator), torch.randn(k, n, generator=generator)) for m, k, n in shapes]
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    try:
        use_products(library)
        errors = []
        for a, b in pairs:
            exact = a.double() @ b.double()
            products = (a @ b, torch.bmm(a[None], b[None])[0], torch.nn.functional.linear(a, b.T))
            errors += [((product.double() - exact).norm() / exact.norm()).item() for product in products]
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before  # type: ignore[attr-defined]
    return max(errors) < EXACT


def product_ceiling(device: torch.device, precision: str, size: int = 0) -> float:
    """Return the operations a second of the fastest square matrix product here: what MFU is measured against.

    ``size`` is the side (0: the best of 256, 512 and 1024 on a CPU, of 8192 on a GPU); each gets 0.1 s. Uses the
    threads and libraries that are set. One thread of a CPU is timed by its own clock, which stands still while others
    have the core: a ceiling taken beside them would be too low, and training would seem to exceed it. The numbers are
    random: a GPU multiplies equal ones faster, which no training does.
    """
    sizes = [size] if size else [8192] if device.type == "cuda" else [256, 512, 1024]
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    generator = torch.Generator(device).manual_seed(0)
    best = 0.0
    for side in sizes:
        shape, dtype = (side, side), getattr(torch, precision)
        a, b = (torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(2))
        times: list[float] = []
        end = time.perf_counter() + 0.1
        while len(times) < 3 or time.perf_counter() < end:
            started = clock()
            torch.mm(a, b)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(clock() - started)
        best = max(best, 2 * side**3 / min(times[1:]))
    return best


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """Return the largest resident size of this process so far; on a GPU the most its allocator held."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def why_not_compile(device: torch.device) -> str:
    """Return why ``torch.compile`` cannot work here; empty where it can."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "the package triton is not installed"
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return "" if any(shutil.which(name) for name in compilers if name) else "there is no C++ compiler"
