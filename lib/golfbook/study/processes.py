"""Where notebooks of a job are executed: the seam of executors, and subprocesses of this machine, the one there is.

An executor is a context manager whose ``submit(stage) -> status`` executes one notebook and waits for it; a new one is
a module and a line in :mod:`golfbook.config.tables`. Several threads submit at a time, as many as the plan has workers.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from golfbook.errors import RunError
from golfbook.files import folders, project_root
from golfbook.study.notebook import end_kernels, error_path, private_folder
from golfbook.train.launcher import JOB_VARIABLE

STOPPED = 1  # status of what is submitted once everything is to stop


@dataclass(frozen=True)
class Stage:
    """One notebook to execute: a stage of a run, or a plotting notebook.

    ``arguments`` are those of ``python -m golfbook.study.notebook KIND ...``; ``gpus`` are the devices it may use.
    """

    kind: str
    arguments: tuple[str, ...]
    log: Path
    threads: int
    gpus: tuple[str, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables to add: the same folders whatever the working folder is, and the planned threads."""
        extra = {
            **folders(),
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
            JOB_VARIABLE: "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONIOENCODING": "utf-8",  # of the logs, whatever the terminal of this process can show
        }
        return extra | ({"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {})


class Executor(Protocol):
    """Executes notebooks."""

    def submit(self, stage: Stage) -> int:
        """Execute a notebook, wait for it and return its exit status; raises :class:`RunError` where it cannot start.

        What the notebook prints is appended to ``stage.log``.
        """

    def stop(self, hurry: bool) -> None:
        """Ask everything submitted to end, or kill it where there is no time; nothing is started from here on."""


class Processes:
    """Executes each notebook in a subprocess of its own on this machine."""

    def __init__(self, private: Path) -> None:
        self.private, self.stopping = private, False
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.guard = threading.Lock()

    def submit(self, stage: Stage) -> int:
        """Execute a notebook; see :class:`Executor`."""
        report = error_path(stage.log)
        private = Path(tempfile.mkdtemp(prefix="", dir=self.private))
        command = [sys.executable, "-m", "golfbook.study.notebook", stage.kind, str(os.getpid())]
        command += [str(report), str(private), *stage.arguments]
        try:
            stage.log.parent.mkdir(parents=True, exist_ok=True)
            report.unlink(missing_ok=True)
            with stage.log.open("ab") as stream, self.guard:
                if self.stopping:
                    return STOPPED
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **stage.environment},
                    cwd=project_root(),
                    start_new_session=True,  # Ctrl-C reaches this process alone, which stops the others in order
                )
                self.processes[process.pid] = process
        except OSError as error:
            reason = error.strerror or error
            raise RunError(f"cannot write {stage.log}: {reason}; check free space and permissions") from error
        try:
            return process.wait()
        finally:
            with self.guard:
                del self.processes[process.pid]
            end_kernels(private)

    def stop(self, hurry: bool) -> None:
        """Terminate or kill all subprocesses; see :class:`Executor`."""
        with self.guard:
            self.stopping = True
            for process in self.processes.values():
                process.kill() if hurry else process.terminate()


@contextlib.contextmanager
def processes() -> Iterator[Executor]:
    """Execute in subprocesses of this machine; the sockets of their kernels lie in a folder that goes away."""
    with private_folder() as private:
        yield Processes(private)
