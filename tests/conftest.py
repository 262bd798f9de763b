"""Shared fixtures: one thread, and run, cache and figure folders that belong to the test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")


@pytest.fixture
def golfbook_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty run and cache folders for one test."""
    monkeypatch.setenv("GOLFBOOK_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("GOLFBOOK_CACHE", str(tmp_path / "cache"))
    return tmp_path
