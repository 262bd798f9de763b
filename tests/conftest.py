"""Shared fixtures: one thread, and run, cache and figure folders that belong to the test."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from golfbook.files import atomic_write_json

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")


def invent_choices(cache: Path, **changes: object) -> None:
    """Put choices into a cache as if they had been measured: tests then compute alike on every machine, and at once."""
    from golfbook import choices, devices

    attention = {f"training, {dtype}, short": "blocked" for dtype in ("float32", "bfloat16")}
    precision = {"short": "float32", "long": "float32"}
    who = choices.identity(torch.device("cpu"))
    found = devices.Choices(**{"precision": precision, "attention": attention, "identity": who, **changes})
    atomic_write_json(cache / "machine" / choices.cached(who).name, asdict(found))


@pytest.fixture
def golfbook_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty run folder for one test, and a cache that holds nothing but invented choices."""
    invent_choices(tmp_path / "cache")
    monkeypatch.setenv("GOLFBOOK_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("GOLFBOOK_CACHE", str(tmp_path / "cache"))
    return tmp_path
