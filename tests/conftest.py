"""Shared fixtures: one thread, and run, cache and figure folders that belong to the test."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from golfbook.files import atomic_write_json

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell does that to what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What a test lets this process compute with ends with the test."""
    compiled = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    yield
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ and compiled is None:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    compute = sys.modules.get("golfbook.compute")
    if compute is not None:
        compute.prepare(compute.torch.get_num_threads(), compute.torch.device("cpu"), compute.Choices())
        compute.torch.use_deterministic_algorithms(False)


def invent_choices(cache: Path, **changes: object) -> None:
    """Put choices into a cache as if they had been measured: tests then compute alike on every machine, and at once."""
    import torch

    from golfbook import compute
    from golfbook.train import choices

    attention = {f"training, {dtype}, short": "blocked" for dtype in ("float32", "bfloat16")}
    precision = {"short": "float32", "long": "float32"}
    who = choices.identity(torch.device("cpu"))
    found = compute.Choices(**{"precision": precision, "attention": attention, "identity": who, **changes})
    atomic_write_json(cache / "choices" / choices.cached(who).name, asdict(found))


@pytest.fixture
def golfbook_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty run folder for one test, and a cache that holds nothing but invented choices."""
    invent_choices(tmp_path / "cache")
    monkeypatch.setenv("GOLFBOOK_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("GOLFBOOK_CACHE", str(tmp_path / "cache"))
    return tmp_path


_read_only: list[Path] = []  # folders that refuse to be written, also to root, whom no permission stops


@functools.cache
def _watch_writes() -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not _read_only or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.chmod"):
            return
        name = arguments[0]
        writes = event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and isinstance(name, str | bytes | os.PathLike):
            path = Path(os.fsdecode(name)).absolute()
            if any(path.is_relative_to(folder) for folder in _read_only):
                raise PermissionError(13, "Permission denied", str(path))

    sys.addaudithook(hook)


@pytest.fixture
def read_only() -> Callable[[Path], AbstractContextManager[None]]:
    """Make a folder refuse to be written by this process, while the context lasts."""
    _watch_writes()

    @contextlib.contextmanager
    def refuse(folder: Path) -> Iterator[None]:
        _read_only.append(folder)
        try:
            yield
        finally:
            _read_only.remove(folder)

    return refuse
