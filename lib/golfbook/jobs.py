"""Runs a plan: a bounded pool of subprocesses, one a stage, each of which executes one notebook by papermill.

A thread a worker takes the runs in order and starts their stages one after the other. What is finished is skipped, what
failed is tried again by the next call, what was killed resumes; a failed run does not stop the others. When this
process dies its stage processes and kernels end within a second or two; a trainer, which is detached, may go on and is
taken up again by the next call.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from golfbook import activity, launcher
from golfbook.errors import RunError
from golfbook.estimates import uses_gpu
from golfbook.execution import (
    child_main,
    describe_exit,
    error_path,
    figure_record,
    log_tail,
    note_failure,
    stage_log,
)
from golfbook.files import figures_root, folders, project_root, sha256_file
from golfbook.machine import visible_gpus
from golfbook.plan import Plan, PlannedRun, notebook_path, plan
from golfbook.results import collect, digest, is_collected, note_seconds, note_variants, rows
from golfbook.runs import create_run, environment

__all__ = ["Figure", "Progress", "Report", "RunStatus", "collect", "plan", "run"]

POLL_SECONDS = 0.2
FIGURE_SECONDS = 15.0
State = Literal["waiting", "running", "done", "failed", "stopped"]


@dataclass
class RunStatus:
    """One run of a job while it is worked on, and how it ended."""

    planned: PlannedRun
    state: State = "waiting"
    stage: str = ""
    since: float = 0.0  # when the stage began, by the clock of the wall
    executed: list[str] = field(default_factory=list)
    finished: set[str] = field(default_factory=set)
    message: str = ""
    log: Path | None = None


@dataclass
class Figure:
    """One plotting notebook of a job and how it ended."""

    name: str
    state: Literal["waiting", "running", "done", "failed", "current", "skipped"] = "waiting"
    message: str = ""
    log: Path | None = None
    outputs: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """A moment of a job: share done of all work, expected seconds left, seconds so far, and one text a busy run."""

    fraction: float
    seconds_left: float
    seconds: float
    busy: tuple[str, ...]


@dataclass
class Report:
    """How a job ended."""

    plan: Plan
    runs: list[RunStatus]
    figures: list[Figure]
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def nothing_done(self) -> bool:
        """Whether everything was finished before."""
        return not any(r.executed or r.state == "failed" for r in self.runs) and all(
            figure.state == "current" for figure in self.figures
        )

    @property
    def failures(self) -> list[RunStatus | Figure]:
        """Runs and figures that failed."""
        failed: list[RunStatus | Figure] = [status for status in self.runs if status.state == "failed"]
        return failed + [figure for figure in self.figures if figure.state == "failed"]


def run(plan: Plan, on_progress: Callable[[Progress], None] | None = None, *, redraw: bool = False) -> Report:
    """Do what a plan asks for and is not done yet; then collect the results and execute the plotting notebooks.

    ``redraw`` leaves the runs as they are and executes every plotting notebook, also those whose pictures are current.
    ``on_progress`` is called several times a second. Ctrl-C stops what is running, keeps all files and returns a report
    that says so. Raises :class:`RunError` where the runs folder cannot be written; failures of runs are in the report.
    """
    job = _Job(plan, on_progress or (lambda progress: None))
    try:
        if not redraw:
            job.execute_runs()
        job.execute_figures(redraw)
    except KeyboardInterrupt:
        job.stop()
    report = job.report()
    if not report.nothing_done:
        note_seconds(plan, report.seconds)
    return report


class _Job:
    """The state of one call of :func:`run`: workers, their subprocesses, and the clock."""

    def __init__(self, plan: Plan, on_progress: Callable[[Progress], None]) -> None:
        self.plan = plan
        self.on_progress = on_progress
        self.started = time.monotonic()
        self.stopping = threading.Event()
        self.interrupted = False
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.guard = threading.Lock()
        note_variants(plan)  # first: a run folder whose variant was never noted would look like one made by hand
        for planned in plan.runs:
            create_run(plan.study, planned.variant, planned.config)
        self.statuses = []
        for planned in plan.runs:
            finished = {stage for stage in plan.stages if planned.finished(stage)}
            state: State = "done" if finished >= set(plan.stages) else "waiting"
            self.statuses.append(RunStatus(planned, state, finished=finished))
        self.figures = [Figure(name) for name in plan.figures]
        gpus = visible_gpus() if uses_gpu(plan.runs[0].config) else []
        self.slots: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
        count = max(planned.config.train.processes for planned in plan.runs)  # any worker may get the largest run
        for slot in range(plan.workers):
            self.slots.put([gpus[(slot * count + i) % len(gpus)] for i in range(count)] if gpus else [])
        self.at_start = self._fraction()
        self.planned_seconds = plan.remaining_seconds() + FIGURE_SECONDS * len(plan.figures)

    def execute_runs(self) -> None:
        """Work through all runs; returns when every one has ended."""
        waiting: queue.SimpleQueue[RunStatus] = queue.SimpleQueue()
        for status in self.statuses:
            if status.state != "done":
                waiting.put(status)
        count = min(self.plan.workers, waiting.qsize())
        threads = [threading.Thread(target=self._work, args=(waiting,), daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            self._tell()
            time.sleep(POLL_SECONDS)
        if count:
            self._tell()

    def execute_figures(self, redraw: bool) -> None:
        """Collect the results, then execute those plotting notebooks whose pictures do not show them yet, or all."""
        study = self.plan.study
        found = rows(study)
        if not is_collected(study, found):
            collect(study)
        finished = any(status.state == "done" for status in self.statuses)
        for figure in self.figures:
            record = _read_record(figure_record(study, figure.name))
            figure.outputs = [figures_root() / name for name in record.get("outputs", [])]
            if not finished:
                figure.state, figure.message = "skipped", "no run has finished"
            elif not redraw and self._is_current(figure, record, digest(found)):
                figure.state = "current"
            else:
                self._execute_figure(figure)

    def stop(self) -> None:
        """Stop all subprocesses and trainers; whatever they have written stays."""
        self.interrupted = True
        self.stopping.set()
        busy = [status for status in self.statuses if status.state == "running"]
        with self.guard:
            processes = list(self.processes.values())
        for process in processes:
            process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
        for status in busy:
            status.state, status.message = "stopped", ""
        for status in busy:
            if status.stage == "training":
                launcher.stop(status.planned.run)  # it saves a checkpoint first

    def report(self) -> Report:
        """How it all ended."""
        seconds = time.monotonic() - self.started
        return Report(self.plan, self.statuses, self.figures, seconds, self.interrupted)

    def _work(self, waiting: queue.SimpleQueue[RunStatus]) -> None:
        gpus = self.slots.get()
        while not self.stopping.is_set():
            try:
                status = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                self._execute_run(status, gpus)
            except Exception as error:  # a thread's exception would vanish, and with it the run
                status.state, status.message = "failed", f"{type(error).__name__}: {error}"

    def _execute_run(self, status: RunStatus, gpus: list[str]) -> None:
        planned = status.planned
        for stage in self.plan.stages:
            if stage in status.finished:
                continue
            if self.stopping.is_set():
                status.state = "stopped"
                return
            status.state, status.stage, status.since = "running", stage, time.time()
            status.log = stage_log(planned.run, stage)
            before = planned.run.read_result(stage)
            overrides = json.dumps(dict(planned.overrides))
            code = self._spawn(status.log, planned, gpus, "stage", str(planned.path), stage, overrides)
            status.executed.append(stage)
            if self.stopping.is_set():
                status.state = "stopped"
                return
            if code != 0 or not planned.finished(stage):
                status.state, status.message = "failed", self._cause(status.log, code)
                note_failure(planned.run, stage, before, status.message)
                return
            status.finished.add(stage)
        status.state = "done"

    def _execute_figure(self, figure: Figure) -> None:
        figure.state = "running"
        figure.log = self.plan.folder / "notebooks" / f"{figure.name}.log"
        done: list[int] = []
        log, first = figure.log, self.plan.runs[0]
        worker = threading.Thread(
            target=lambda: done.append(self._spawn(log, first, [], "figure", self.plan.study, figure.name)), daemon=True
        )
        worker.start()
        while worker.is_alive():
            self._tell()
            worker.join(POLL_SECONDS)
        record = _read_record(figure_record(self.plan.study, figure.name))
        figure.outputs = [figures_root() / name for name in record.get("outputs", [])]
        if done == [0]:
            figure.state = "done"
        else:
            figure.state, figure.message = "failed", self._cause(log, done[0] if done else 1)
        self._tell()

    def _spawn(self, log: Path, planned: PlannedRun, gpus: list[str], kind: str, *arguments: str) -> int:
        """Start one notebook process and wait for it; returns its exit status."""
        report = error_path(log)
        command = [sys.executable, "-m", "golfbook.jobs", kind, str(os.getpid()), str(report), *arguments]
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            report.unlink(missing_ok=True)
            with log.open("ab") as stream, self.guard:
                if self.stopping.is_set():
                    return 1
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=_environment(planned, gpus),
                    cwd=project_root(),
                    start_new_session=True,  # Ctrl-C reaches this process alone, which stops the others in order
                )
                self.processes[process.pid] = process
        except OSError as error:
            raise RunError(
                f"cannot write {log}: {error.strerror or error}; check free space and permissions"
            ) from error
        try:
            return process.wait()
        finally:
            with self.guard:
                del self.processes[process.pid]

    def _cause(self, log: Path, code: int) -> str:
        try:
            return error_path(log).read_text(encoding="utf-8")
        except OSError:
            return describe_exit(code) + log_tail(log)

    def _is_current(self, figure: Figure, record: dict[str, Any], results: str) -> bool:
        executed = self.plan.folder / "notebooks" / f"{figure.name}.ipynb"
        return (
            record.get("results_sha256") == results
            and record.get("code_sha256") == environment()["code_sha256"]
            and record.get("notebook_sha256") == sha256_file(notebook_path(figure.name))
            and executed.is_file()
            and all(path.is_file() for path in figure.outputs)
        )

    def _fraction(self) -> float:
        """Share of all expected seconds of the job that is done."""
        total = FIGURE_SECONDS * len(self.figures)
        done = FIGURE_SECONDS * sum(f.state not in ("waiting", "running") for f in self.figures)
        for status in self.statuses:
            for stage in self.plan.stages:
                cost = status.planned.estimate.seconds[stage]
                total += cost
                if status.state == "failed" or stage in status.finished:
                    done += cost
                elif stage == "training":  # also what an earlier call left of it
                    done += cost * _trained_steps(status.planned) / status.planned.config.train.steps
        return min(1.0, done / total)

    def _tell(self) -> None:
        fraction, seconds = self._fraction(), time.monotonic() - self.started
        gained = fraction - self.at_start
        left = max(0.0, self.planned_seconds - seconds)
        if gained > 0:  # trust the plan at first, then more and more what is seen
            trust = min(1.0, 3 * gained / (1 - self.at_start))
            left = (1 - trust) * left + trust * seconds * (1 - fraction) / gained
        busy = []
        for status in self.statuses:
            if status.state == "running":
                busy.append(f"{status.planned.name} {_doing(status)}")
        busy += [f"figure {figure.name}" for figure in self.figures if figure.state == "running"]
        self.on_progress(Progress(fraction, left, seconds, tuple(busy)))


def _environment(planned: PlannedRun, gpus: list[str]) -> dict[str, str]:
    """Environment of a notebook process: the same folders whatever its working folder is, and the planned threads."""
    threads = str(planned.config.train.threads)
    extra = {
        **folders(),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "JUPYTER_PREFER_ENV_PATH": "1",  # the python3 kernel of this environment, not one in the home folder
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",  # of the logs, whatever the terminal of this process can show
    }
    if gpus:
        extra["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[: planned.config.train.processes])
    return {**os.environ, **extra}


def _doing(status: RunStatus) -> str:
    """The stage of a running run, with the steps it has trained, and what else is being done in it."""
    words, what = status.stage, activity.now(status.planned.path, status.since)
    if status.stage == "training":
        steps = _trained_steps(status.planned)
        if steps or what == "training":
            words += f" {steps}/{status.planned.config.train.steps}"
    return words if what in ("", "training") else f"{words}: {what}"


def _trained_steps(planned: PlannedRun) -> int:
    """Last step noted in the metrics of a run; only the end of the file is read."""
    try:
        with planned.run.metrics_path.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 2000))
            lines = stream.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return min(int(json.loads(line)["step"]), planned.config.train.steps)
    return 0


def _read_record(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


if __name__ == "__main__":
    child_main(sys.argv[1:])
