"""What made a result: versions, hardware, commit and the hash of the code it can depend on."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from golfbook import __version__
from golfbook.files import project_root, sha256_bytes, sha256_file
from golfbook.machine import torch_build

# Sources that a result can depend on; what plans, plots and shows is not among them.
SCIENCE = (
    *("activity.py", "compute.py", "errors.py", "files.py", "machine.py", "run.py", "provenance.py", "study/stages.py"),
    *(f"{name}/*.py" for name in ("config", "data", "model", "published", "evaluate", "compress", "train")),
)


def provenance() -> dict[str, Any]:
    """Return the part of :func:`environment` that every result carries."""
    found = environment()
    names = ("golfbook", "code_sha256", "git_commit", "git_dirty", "python", "processor", "cuda")
    return {name: found[name] for name in names} | {"torch": found["packages"]["torch"]}


@functools.cache
def environment() -> dict[str, Any]:
    """Return versions, hardware and commit: what a result must be compared under."""

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(project_root()), *arguments], capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    packages = ("numpy", "scipy", "sentencepiece", "safetensors", "pydantic", "papermill", "pandas")
    changes = git("status", "--porcelain")
    torch = torch_build()
    return {
        "golfbook": __version__,
        "code_sha256": code_sha256(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages} | {"torch": torch.get("__version__", version("torch"))},
        "cuda": torch.get("cuda") or torch.get("hip"),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": None if changes is None else bool(changes),
    }


def code_sha256(everything: bool = False) -> str:
    """Return one hash of source files by name: those that a result can depend on, or of the whole library.

    So editing a plot changes no result, but has the pictures drawn again.
    """
    root = Path(__file__).parent
    if root.parent.is_file():  # this module was loaded from one script that holds them all
        return sha256_file(root.parent)
    files = sorted({path for room in (("**/*.py",) if everything else SCIENCE) for path in root.glob(room)})
    return sha256_bytes("".join(f"{f.relative_to(root).as_posix()} {sha256_file(f)}\n" for f in files).encode())


def processor(exactly: bool = False) -> str:
    """Return the name of this machine's processor; ``exactly`` adds family, model, stepping and a hash of its flags.

    Names such as "AMD EPYC" stand for several generations.
    """
    with contextlib.suppress(OSError):
        block = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        if exactly and "flags" in facts:
            flags = f"flags {sha256_bytes(facts['flags'].encode())[:10]}"
            return ", ".join([*(facts.get(n, "") for n in ("model name", "cpu family", "model", "stepping")), flags])
        if not exactly and facts.get("model name"):
            return facts["model name"]
    return platform.processor() or platform.machine()
