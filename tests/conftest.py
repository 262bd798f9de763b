"""Shared fixtures: one thread, and run, cache and figure folders that belong to the test."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")


@pytest.fixture
def golfbook_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty run and cache folders for one test."""
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
