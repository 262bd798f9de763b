"""What this process may use of its machine: cores, memory and GPUs, as a plan needs them. Nothing imports torch.

A container or a batch job gets less than the machine has, and only its control groups (cgroups, version 1 or 2) say how
much. ``root`` is the folder that holds ``/proc``, ``/sys`` and ``/dev``.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

from golfbook.errors import RunError

ROOT = Path("/")
GPU_NODES = ("nvidia[0-9]*", "dxg", "kfd", "nvhost-gpu")  # NVIDIA, Windows' Linux, AMD, Jetson
COUNT_GPUS = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"


def available_cores(root: Path = ROOT) -> float:
    """Count the cores this process may use: those it may run on, or its container's CPU quota where that is less."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    for group in _control_groups("cpu", root):
        quota, period, *_ = [*_words(group / "cpu.max"), "", ""]
        if not quota:
            quota, period = (" ".join(_words(group / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit():  # "max" and -1 stand for no limit
            cores = min(cores, int(quota) / int(period))
    return cores


def available_memory(root: Path = ROOT) -> int:
    """Return the bytes this process may still take: what the machine has left, or its container where that is less.

    Pages of files do not count as taken, because the kernel gives them up.
    """
    free = psutil.virtual_memory().available
    for group in _control_groups("memory", root):
        for limit, usage, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.high", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            words = [*_words(group / limit), *_words(group / usage)]
            if len(words) == 2 and all(word.isdigit() for word in words):
                names = _words(group / "memory.stat")
                sizes = dict(zip(names[::2], names[1::2], strict=False))
                files = sum(int(sizes.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                free = min(free, max(0, int(words[0]) - max(0, int(words[1]) - files)))
    return free


def visible_gpus(root: Path = ROOT) -> list[str]:
    """List the GPUs that torch will use here, as ``CUDA_VISIBLE_DEVICES`` spells them; empty without any.

    A torch built for the CPU and a machine without the device of a GPU need no further question. Elsewhere torch
    itself is asked, in a process of its own: only it knows whether driver and devices are of use to it.
    """
    if not {"cuda", "hip"} & torch_build().keys() or not any(
        path for name in GPU_NODES for path in (root / "dev").glob(name)
    ):
        return []
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = count_gpus(allowed)
    return [str(i) for i in range(count)] if allowed is None else [n.strip() for n in allowed.split(",")][:count]


@functools.cache
def count_gpus(allowed: str | None) -> int:
    """Count the GPUs torch sees in this environment, whose ``CUDA_VISIBLE_DEVICES`` is ``allowed``.

    Raises :class:`RunError` with torch's words where it cannot even be asked: planning on, as if there were no GPU,
    would put all runs on the first one.
    """
    asked = subprocess.run([sys.executable, "-P", "-c", COUNT_GPUS], capture_output=True, text=True)
    if asked.returncode or not asked.stdout.split():
        last = (asked.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise RunError(f"torch could not be asked for its GPUs: {last}; set machine.device to 'cpu' to do without")
    return int(asked.stdout.split()[-1])


def torch_build() -> dict[str, str]:
    """Read what torch calls itself (``__version__``) and the ``cuda`` or ``hip`` it was built for, without an import.

    The version of its package does not tell builds apart: where pip fetched the one with CUDA, it is 2.13.0 alone.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return {}
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return {}
    return dict(re.findall(r"^(\w+)(?:: [^=]+)? = ['\"](.*)['\"]$", text, re.MULTILINE))


def _control_groups(controller: str, root: Path) -> Iterator[Path]:
    """List the folders of the control groups this process is in, from its own up to the top, of either version."""
    own = {}  # path of the process's group by controllers; those of version 2 have none
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        own[controllers] = path
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        if not after.startswith(("cgroup ", "cgroup2 ")):
            continue
        kind, _, options = after.split(" ", 2)
        if kind == "cgroup" and controller not in options.split(","):
            continue
        top, mounted = (_unescaped(part) for part in before.split(" ")[3:5])
        path = next((p for names, p in own.items() if controller in names.split(",")), "/")
        path = own.get("", "/") if kind == "cgroup2" else path
        inside = PurePosixPath("/")
        if PurePosixPath(path).is_relative_to(top):  # else the path is one outside this container
            inside = PurePosixPath("/") / PurePosixPath(path).relative_to(top)
        if ".." in inside.parts:
            inside = PurePosixPath("/")
        for folder in (inside, *inside.parents):
            yield root / mounted.lstrip("/") / str(folder).lstrip("/")


def _unescaped(text: str) -> str:
    r"""Return a path of ``mountinfo``, which writes a space as ``\040``."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _words(path: Path) -> list[str]:
    return [word for line in _lines(path) for word in line.split()]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
