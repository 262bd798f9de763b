"""Handles on a training process: start it, watch it, re-attach to it, stop it.

The trainer runs in a session of its own, so that a closed browser or a dead kernel loses nothing; what it does is read
from ``metrics.jsonl``, by as many watchers as there are. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil

from golfbook.errors import RunError
from golfbook.files import atomic_write_json, cache_root, folders, project_root
from golfbook.runs import Run

Update = Callable[[list[dict[str, Any]]], None]


def is_running(run: Run) -> bool:
    """Whether a trainer of this run is alive, here or started by another process."""
    with contextlib.suppress(OSError, ValueError, KeyError, psutil.Error):
        note = json.loads((run.path / "trainer.json").read_text(encoding="utf-8"))
        process = psutil.Process(note["pid"])
        if process.create_time() == note["created"] and process.status() != psutil.STATUS_ZOMBIE:
            return True
    return run.is_locked("trainer")


def launch(run: Run) -> bool:
    """Start the trainer in a session of its own, unless one is alive or the stage is done; whether it did. No wait."""
    with run.lock("launch", timeout=60):
        if run.is_done("training") or is_running(run):
            return False
        if run.state("training") != "missing":
            run.result_path("training").unlink(missing_ok=True)
        train = run.config.train
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=0"]
        command += [f"--nproc-per-node={train.processes}", "-m", "golfbook.training", str(run.path)]
        folders_ = {**folders(), "TORCHINDUCTOR_CACHE_DIR": str(cache_root() / "inductor")}  # shared between runs
        threads = {"OMP_NUM_THREADS": str(train.threads), "MKL_NUM_THREADS": str(train.threads)}
        try:
            with run.log_path.open("ab") as log:
                log_start = log.seek(0, os.SEEK_END)
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    cwd=project_root(), env={**os.environ, **folders_, **threads},
                )  # fmt: skip
        except OSError as error:
            raise RunError(f"cannot start the trainer of {run.name}: {error}") from error
        created = psutil.Process(process.pid).create_time()
        note = {"pid": process.pid, "created": created, "log_start": log_start}
        atomic_write_json(run.path / "trainer.json", note)
    return True


def follow(run: Run, on_update: Update | None = None, poll: float = 0.5) -> dict[str, Any]:
    """Wait until the trainer ends, handing all metrics to ``on_update`` whenever there are new ones.

    Returns the stage's result. Raises RunError with the reason where training did not succeed. Interrupting this call
    leaves the trainer running: call it again to re-attach, or :func:`stop` to end it.
    """
    size = -1
    while True:
        alive = is_running(run)
        now = run.metrics_path.stat().st_size if run.metrics_path.exists() else 0
        if on_update is not None and now != size:
            on_update(run.read_metrics())
            size = now
        if not alive:
            break
        time.sleep(poll)
    result = run.read_result("training")
    if run.is_done("training") and result is not None:
        return result
    if result is not None and result.get("status") == "failed":
        raise RunError(f"training of {run.name} failed: {result['message']}")
    raise RunError(
        f"training of {run.name} ended without a result ({_cause(run)}); run it again to resume. Last lines of "
        f"{run.log_path}:\n{log_tail(run)}"
    )


def _cause(run: Run) -> str:
    """Which process of the last launch died and how, from the words of torch's launcher; "killed?" where it is mute."""
    text = ""
    with contextlib.suppress(OSError, ValueError, KeyError):
        start = json.loads((run.path / "trainer.json").read_text(encoding="utf-8"))["log_start"]
        with run.log_path.open("rb") as log:
            log.seek(start)
            text = log.read().decode(errors="replace")
    entry = r"rank\s*: (\d+) \(local_rank: \d+\)\s*exitcode\s*: (-?\d+)"
    table = [(int(rank), int(code)) for rank, code in re.findall(entry, text)]
    if not table:
        return "killed?"
    # torch's launcher ends the others by SIGTERM, and a lost process makes them fail: another signal is the cause
    killed = [one for one in table if one[1] < 0 and one[1] != -signal.SIGTERM]
    root = re.search(entry, text.partition("Root Cause")[2])
    rank, code = killed[0] if killed else (int(root[1]), int(root[2])) if root else table[0]
    if code >= 0:
        return f"the process of rank {rank} ended with status {code}"
    name = {number.value: number.name for number in signal.Signals}.get(-code, f"signal {-code}")
    return f"the process of rank {rank} was killed by {name}"


def stop(run: Run, timeout: float = 60) -> None:
    """Ask the trainer to save a checkpoint and end; kills it where it has not ended after ``timeout`` seconds."""
    if not is_running(run):
        return
    with contextlib.suppress(OSError, ValueError, psutil.Error):
        note = json.loads((run.path / "trainer.json").read_text(encoding="utf-8"))
        process = psutil.Process(note["pid"])
        if process.create_time() != note["created"]:
            return
        family = [process, *process.children(recursive=True)]
        process.terminate()
        _, alive = psutil.wait_procs(family, timeout=timeout)
        for member in alive:
            member.kill()


def log_tail(run: Run, lines: int = 12) -> str:
    """The last lines of the run's log."""
    with contextlib.suppress(OSError):
        return "\n".join(run.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    return "(no log)"
