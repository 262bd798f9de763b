"""What this machine computes with: device and precision by capability, and how fast its matrix products are.

Every choice comes with its reason, which is logged; none needs a person to know the machine.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import resource
import shutil
import sys
import time
from typing import Any

import torch

from golfbook.config import Config
from golfbook.errors import RunError

EXACT = 1e-5  # relative error of a float32 product; products rounded to bfloat16 are off by 2e-3


def choose_device(config: Config, rank: int = 0) -> torch.device:
    """CUDA where it is there and allowed, else the CPU; raises RunError where CUDA is demanded and missing."""
    wanted = config.train.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RunError("train.device is 'cuda', but torch sees no CUDA device; use 'auto' or 'cpu'")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", rank % torch.cuda.device_count())


def choose_precision(config: Config, device: torch.device) -> tuple[str, str]:
    """Dtype of activations, "float32" or "bfloat16", and the reason; ``train.precision`` "auto" asks the hardware.

    "auto" takes bfloat16 where the processor multiplies it natively: GPUs from Ampere on, CPUs with AMX or AVX512-BF16.
    Elsewhere it would be slower than float32.
    """
    if config.train.precision != "auto":
        return config.train.precision, "train.precision says so"
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bfloat16", "the GPU has it") if native else ("float32", "the GPU has no bfloat16")
    if torch.cpu._is_amx_tile_supported():
        return "bfloat16", "the CPU has AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return "bfloat16", "the CPU has AVX512-BF16"
    return "float32", "the CPU has no bfloat16 products"


def prepare(threads: int, device: torch.device) -> str:
    """Set up this process: threads, repeatable kernels, and the library of float32 products, which is returned.

    torch multiplies float32 matrices with MKL, which leaves half of the vector units of AMD's CPUs idle. oneDNN does
    not, and torch hands float32 products to it once it *may* round them to bfloat16. Without AMX it does not do so, and
    whether it does is measured here: where the products are not exact to float32, MKL stays.
    """
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    fills: Any = torch.utils.deterministic
    fills.fill_uninitialized_memory = False  # a help for debugging that costs 2 % of a step
    chosen = "oneDNN" if device.type == "cpu" and _onednn_is_exact() else "torch's default"
    _products().fp32_precision = "bf16" if chosen == "oneDNN" else "ieee"
    return chosen


def _products() -> Any:
    return torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch sets it without declaring it


@functools.cache
def _onednn_is_exact() -> bool:
    if not torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return False  # the first has no such path in torch, the second would really round
    settings = _products()
    before = settings.fp32_precision
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(128, 128, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    try:
        settings.fp32_precision = "bf16"
        errors = [
            (product.double() - exact).norm() / exact.norm() for product in (a @ b, torch.bmm(a[None], b[None])[0])
        ]
    except RuntimeError:  # an older torch has another name for it
        return False
    finally:
        settings.fp32_precision = before
    return max(errors).item() < EXACT


def product_ceiling(device: torch.device, precision: str, size: int = 0, repeats: int = 5) -> float:
    """Operations a second of a large square matrix product here, the best of ``repeats``: what MFU is measured against.

    ``size`` is its side (0: 1024 on a CPU, 8192 on a GPU). Uses the threads and libraries that are set. The numbers are
    random: a GPU multiplies equal ones faster, which no training does.
    """
    size = size or (8192 if device.type == "cuda" else 1024)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=generator).to(getattr(torch, precision)) for _ in range(2))
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / min(times[1:])


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """Largest resident size of this process so far; on a GPU the most its allocator held."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def why_not_compile(device: torch.device) -> str:
    """Why ``torch.compile`` cannot work here; empty where it can."""
    if device.type == "cuda":
        return "" if importlib.util.find_spec("triton") else "the package triton is not installed"
    compilers = [os.environ.get("CXX", ""), "g++", "clang++", "c++"]
    return "" if any(shutil.which(name) for name in compilers if name) else "there is no C++ compiler"
