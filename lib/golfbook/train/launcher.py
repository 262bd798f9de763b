"""Handles on a training process: start it, watch it, re-attach to it, stop it.

The trainer runs in a session of its own, so that a closed browser or a dead kernel loses nothing; what it does is read
from ``metrics.jsonl``, by as many watchers as there are. It is known by its command line, which names the run folder:
neither a step of the system clock nor a process id used again makes it look like another. Nothing here imports torch.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from golfbook.errors import RunError
from golfbook.files import atomic_write_json, folders, log_tail, project_root, read_json
from golfbook.run import Run

Update = Callable[[list[dict[str, Any]]], None]
MODULE, AGENT = "golfbook.train.loop", "torch.distributed.run"
SAVE_SECONDS = 60  # for a trainer that was asked to stop, to end its step and to write a checkpoint
LOOPBACK = "127.0.0.1"
JOB_VARIABLE = "GOLFBOOK_JOB"  # set in the notebook processes of a job, which owns the trainers they start
# What torch's launcher reads or sets; none of it is meant for a training on one machine.
LAUNCHER_VARIABLES = re.compile(
    r"PET_.*|TORCH_?ELASTIC_.*|((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|PYTHON_EXEC|"
    r"LOGLEVEL|USE_LIBUV|TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
)


def is_running(run: Run) -> bool:
    """Return whether a trainer of this run is alive, here or started by another process."""
    return is_launcher_of(run, _note(run)["pid"]) or run.is_locked("trainer")


def is_launcher_of(run: Run, pid: int) -> bool:
    """Return whether this process id is that of a launcher of this run."""
    with contextlib.suppress(psutil.Error):
        return _works_on(psutil.Process(pid).cmdline()) == (run.path.resolve(), True)
    return False


def trainers() -> dict[Path, int]:
    """Find the trainers of this machine: the process id of each launcher by the run folder it works on."""
    return {folder: process.pid for folder, agent, process in _processes() if agent}


def is_of_a_job(run: Run) -> bool:
    """Return whether a job started the last trainer of this run, and not a notebook that somebody has open."""
    return bool(_note(run).get("job"))


def command(run: Run) -> list[str]:
    """Return the command that trains a run, all on this machine, whose name it never asks, on any free port."""
    words = [sys.executable, "-m", AGENT, "--nnodes=1", f"--nproc-per-node={run.config.machine.processes}"]
    words += ["--rdzv-backend=c10d", f"--rdzv-endpoint={LOOPBACK}:0", f"--local-addr={LOOPBACK}", "--max-restarts=0"]
    words += [f"--log-dir={os.devnull}"]  # its folder of logs: ours are in the run folder
    return [*words, "-m", MODULE, str(run.path.resolve()).replace("$", "$$")]  # torch takes the arguments for templates


def environment(run: Run) -> dict[str, str]:
    """Return the environment of a trainer: this one's, without what launchers leave in it, with what is ours to say."""
    threads = str(run.config.machine.threads)
    kept = {name: value for name, value in os.environ.items() if not LAUNCHER_VARIABLES.fullmatch(name)}
    kept |= folders()
    kept |= {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVE_SECONDS),
    }
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == LOOPBACK for address in addresses):
            kept["GLOO_SOCKET_IFNAME"] = name  # otherwise it looks this machine's name up
    return kept


def launch(run: Run) -> bool:
    """Start the trainer in a session of its own, unless one is alive or the stage is done; whether it did. No wait."""
    with run.lock("launch", timeout=60):
        if run.is_done("training") or is_running(run):
            return False
        log_start = run.log_path.stat().st_size if run.log_path.exists() else 0
        pid = trainers().get(run.path.resolve())  # of a process that died before it could note it
        if pid is None:
            if run.state("training") != "missing":
                run.result_path("training").unlink(missing_ok=True)
            try:
                with run.log_path.open("ab") as log:
                    process = subprocess.Popen(
                        command(run), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                        cwd=project_root(), env=environment(run),
                    )  # fmt: skip
            except OSError as error:
                raise RunError(f"cannot start the trainer of {run.name}: {error}") from error
        note = {"pid": pid or process.pid, "log_start": log_start, "job": JOB_VARIABLE in os.environ}
        atomic_write_json(run.path / "trainer.json", note)
    return pid is None


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
        f"{run.log_path}:{log_tail(run.log_path, 12)}"
    )


def _cause(run: Run) -> str:
    """Say which process of the last launch died and how, in torch's launcher's words; "killed?" where it is mute."""
    text = ""
    with contextlib.suppress(OSError), run.log_path.open("rb") as log:
        log.seek(_note(run)["log_start"])
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


def stop(*runs: Run, timeout: float = SAVE_SECONDS, hurry: Callable[[], bool] = lambda: False) -> list[int]:
    """Ask the trainers of some runs, all at once, to save a checkpoint and end; returns when they have.

    They are killed after ``timeout`` seconds, or as soon as ``hurry()`` holds. Returns the ids of those processes that
    cannot be killed either.
    """
    mine, asked = {run.path.resolve() for run in runs}, set()
    limit = time.monotonic() + timeout
    while members := [found for found in _processes() if found[0] in mine]:
        now = time.monotonic()
        if hurry():
            limit = min(limit, now)
        if now > limit + 10:
            return [process.pid for _, _, process in members]
        for _, agent, process in members:
            with contextlib.suppress(psutil.Error):
                if now >= limit:
                    process.kill()
                elif agent and process.pid not in asked:  # once: it asks the others, and a second time is an order
                    asked.add(process.pid)
                    process.terminate()
        psutil.wait_procs([process for _, _, process in members], timeout=0.2)
    return []


def _note(run: Run) -> dict[str, Any]:
    """Read what the last launch noted: ``pid`` of the launcher, ``log_start`` (bytes of the log before it), ``job``."""
    note = read_json(run.path / "trainer.json")
    return {"log_start": 0, **(note if isinstance(note.get("pid"), int) else {"pid": 0})}


def _processes() -> Iterator[tuple[Path, bool, psutil.Process]]:
    """Yield every training process: the run folder it works on, whether it is the launcher of others, the process."""
    for process in psutil.process_iter(["cmdline"]):
        folder, agent = _works_on(process.info["cmdline"] or [])
        if folder is not None:
            with contextlib.suppress(psutil.Error):  # anew: psutil tells a kept one by the clock of its start
                yield folder, agent, psutil.Process(process.pid)


def _works_on(words: list[str]) -> tuple[Path | None, bool]:
    """Find the run folder that a command line trains (None: no run's), and whether it is that of the launcher."""
    if words[-3:-1] != ["-m", MODULE]:
        return None, False
    agent = AGENT in words
    return Path(words[-1].replace("$$", "$") if agent else words[-1]).resolve(), agent


def trained_steps(run: Run) -> int:
    """Read the last step noted in the metrics of a run; only the end of the file is read."""
    try:
        with run.metrics_path.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 2000))
            lines = stream.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return min(int(json.loads(line)["step"]), run.config.train.steps)
    return 0
