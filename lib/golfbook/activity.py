"""What a run's processes are doing: one line a step in ``activity.jsonl`` of the folder they work on.

Whoever works says so by :func:`doing` or :func:`step`, whoever shows progress asks :func:`now`, and :func:`spent` adds
up where the seconds of a job's notebooks went. A process says nothing until :func:`record_in` has named a folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FILE = "activity.jsonl"
STARTING, NOTEBOOK, FIGURE = "starting the kernel", "other cells of the notebook", "the whole notebook"

_folder: Path | None = None
_doing, _tenths = NOTEBOOK, 0


def record_in(folder: Path | None, what: str = NOTEBOOK) -> None:
    """Note from now on what this process does in ``folder`` (None: nowhere), beginning with ``what``."""
    global _folder
    _folder = folder
    doing(what)


def doing(what: str, share: float = 0.0) -> None:
    """Note that this process does ``what`` from now on, of which a ``share`` from 0 to 1 is done (a line a tenth)."""
    global _doing, _tenths
    tenths = int(10 * share)
    if share and (what, tenths) == (_doing, _tenths):
        return
    _doing, _tenths = what, tenths
    if _folder is not None:
        _append(_folder, {"doing": what, **({"share": share} if share else {})})


@contextlib.contextmanager
def step(what: str) -> Iterator[Callable[[int, int], None]]:
    """Note ``what`` for a block or a decorated function, then again what was done before.

    Yields a function to call with what is done and what there is to do.
    """
    before = _doing
    doing(what)
    try:
        yield lambda done, total: doing(what, done / total)
    finally:
        doing(before)


@contextlib.contextmanager
def notebook(folder: Path, stage: str, what: str = STARTING) -> Iterator[None]:
    """Note in ``folder`` when the notebook of a stage is executed; its kernel says what else is done, if it does."""
    _append(folder, {"doing": what, "stage": stage})
    try:
        yield
    finally:
        _append(folder, {"doing": "", "stage": ""})


def now(folder: Path, since: float) -> str:
    """Say what is being done in a folder, such as ``scoring 40%``; empty where nothing was noted since a time."""
    lines = _lines(folder, 2000)
    if not lines or lines[-1]["at"] < since:
        return ""
    share = lines[-1].get("share", 0.0)
    return lines[-1]["doing"] + (f" {share:.0%}" if share else "")


def spent(folder: Path) -> dict[str, dict[str, float]]:
    """Return the seconds of each step of each notebook that was executed in a folder, every attempt included."""
    found: dict[str, dict[str, float]] = {}
    stage, what, since = "", "", 0.0
    for line in _lines(folder):
        # a notebook that begins although another has not ended: that one was killed, nobody knows when
        if stage and not line.get("stage"):
            parts = found.setdefault(stage, {})
            parts[what] = parts.get(what, 0.0) + max(0.0, line["at"] - since)
        stage, what, since = line.get("stage", stage), line["doing"], line["at"]
    return found


def _append(folder: Path, line: dict[str, Any]) -> None:
    with contextlib.suppress(OSError), (folder / FILE).open("ab") as stream:  # a note is not worth a run
        stream.write((json.dumps({"at": time.time(), **line}) + "\n").encode())


def _lines(folder: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """Read the whole lines of a folder's file, or those of its end."""
    try:
        with (folder / FILE).open("rb") as stream:
            if last_bytes is not None:
                stream.seek(max(0, stream.seek(0, os.SEEK_END) - last_bytes))
            text = stream.read()
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            values = json.loads(line)
            found.append({**values, "at": float(values["at"]), "doing": str(values["doing"])})
    return found
