"""Runs a plan: a bounded pool of workers, each of which has one notebook after the other executed by papermill.

A thread a worker takes the runs in order and starts their stages one after the other. What is finished is skipped, what
failed is tried again by the next call, what was killed resumes; a failed run does not stop the others.

The thread that works on a run owns its trainer, which is detached: where a stage does not succeed, or the job is to
stop, it ends the trainer before anything else. When this process dies its stage processes and kernels end within a
second or two; trainers may go on, and the next call takes them up again first, so that they count as runs in hand.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from golfbook.config.tables import EXECUTORS, named
from golfbook.files import figures_root, log_tail, sha256_file
from golfbook.machine import visible_gpus
from golfbook.provenance import code_sha256
from golfbook.run import Run, create_run, list_runs
from golfbook.study.estimates import uses_gpu
from golfbook.study.interrupts import Interrupts
from golfbook.study.notebook import describe_exit, error_path, note_failure, read_figure_record, stage_log
from golfbook.study.plan import Plan, notebook_path
from golfbook.study.processes import Executor, Stage
from golfbook.study.progress import Figure, Progress, Report, RunStatus, State, doing
from golfbook.study.results import collect, digest, is_collected, note_seconds, note_variants, rows
from golfbook.train import launcher

POLL_SECONDS = 0.2
FIGURE_SECONDS = 15.0
NOTEBOOK_SECONDS = 10.0  # for a notebook process that was asked to end


def run(
    plan: Plan,
    on_progress: Callable[[Progress], None] | None = None,
    *,
    redraw: bool = False,
    interrupts: Interrupts | None = None,
    executor: str = "processes",
) -> Report:
    """Do what a plan asks for and is not done yet; then collect the results and execute the plotting notebooks.

    ``redraw`` leaves the runs as they are and executes every plotting notebook, also those whose pictures are current.
    ``on_progress`` is called several times a second. The first of ``interrupts`` (default: one's own) stops what is
    running: trainers save a checkpoint, all files are kept, and the report says so; a second one kills the trainers.
    ``executor`` names where notebooks are executed, see :data:`golfbook.config.tables.EXECUTORS`.
    Raises :class:`RunError` where the runs folder cannot be written; failures of runs are in the report.
    """
    with contextlib.ExitStack() as stack:
        if interrupts is None:
            interrupts = stack.enter_context(Interrupts())
        job = _Job(plan, on_progress or (lambda progress: None), interrupts)
        job.executor = stack.enter_context(named(EXECUTORS, executor)())
        try:
            if not redraw:
                job.execute_runs()
            if not interrupts.count:
                job.execute_figures(redraw)
        finally:  # also where the progress cannot be shown any more
            job.stop()
        report = job.report()
    if not report.nothing_done:
        note_seconds(plan, report.seconds)
    return report


class _Job:
    """The state of one call of :func:`run`: workers, what they have in hand, and the clock."""

    executor: Executor

    def __init__(self, plan: Plan, on_progress: Callable[[Progress], None], interrupts: Interrupts) -> None:
        self.plan = plan
        self.on_progress = on_progress
        self.interrupts = interrupts
        self.started = time.monotonic()
        self.stopping = False
        self.notes: list[str] = []
        self.threads: list[threading.Thread] = []
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
        count = max(planned.config.machine.processes for planned in plan.runs)  # any worker may get the largest run
        for slot in range(plan.workers):
            self.slots.put([gpus[(slot * count + i) % len(gpus)] for i in range(count)] if gpus else [])
        self.at_start = self._fraction()
        self.planned_seconds = plan.remaining_seconds() + FIGURE_SECONDS * len(plan.figures)

    def execute_runs(self) -> None:
        """Work through all runs; returns when every one has ended, or when the job is to stop."""
        waiting: queue.SimpleQueue[RunStatus] = queue.SimpleQueue()
        for status in self._take_up([status for status in self.statuses if status.state != "done"]):
            waiting.put(status)
        for _ in range(min(self.plan.workers, waiting.qsize())):
            self._start(self._work, waiting)
        while any(thread.is_alive() for thread in self.threads) and not self.interrupts.count:
            self._tell()
            time.sleep(POLL_SECONDS)
        if self.threads:
            self._tell()

    def _take_up(self, waiting: list[RunStatus]) -> list[RunStatus]:
        """Return the runs in the order to work on them: first those whose trainer an earlier call has left running.

        Trainers that are too many for the workers, and those of runs that are no longer part of the job, are stopped.
        """
        folder = self.plan.folder.resolve()
        alive = {path for path in launcher.trainers() if path.parent == folder}
        planned = {status.planned.path.resolve(): status.planned.run for status in self.statuses}
        waiting = sorted(waiting, key=lambda status: status.planned.path.resolve() not in alive)
        late = [status.planned.run for status in waiting[self.plan.workers :]]
        unwanted = [run for run in late if run.path.resolve() in alive]
        foreign = [run for run in list_runs(self.plan.study) if run.path.resolve() in alive - planned.keys()]
        for run in foreign:
            if launcher.is_of_a_job(run) and not run.is_locked("job"):
                unwanted.append(run)
                self.notes.append(f"The trainer of {run.name}, which is no longer part of this job, was stopped.")
            else:
                self.notes.append(f"{run.name} is being trained, and not by this job.")
        self._end_trainers(*unwanted)
        return waiting

    def execute_figures(self, redraw: bool) -> None:
        """Collect the results, then execute those plotting notebooks whose pictures do not show them yet, or all."""
        study = self.plan.study
        found = rows(study)
        if not is_collected(study, found):
            collect(study)
        finished = any(status.state == "done" for status in self.statuses)
        for figure in self.figures:
            if self.interrupts.count:
                return
            record = read_figure_record(study, figure.name)
            figure.outputs = [figures_root() / name for name in record.get("outputs", [])]
            if not finished:
                figure.state, figure.message = "skipped", "no run has finished"
            elif not redraw and self._is_current(figure, record, digest(found)):
                figure.state = "current"
            else:
                self._execute_figure(figure)

    def stop(self) -> None:
        """End all that is still in hand, in order; whatever it has written stays."""
        self.stopping = True
        asked = time.monotonic()
        self.executor.stop(hurry=False)
        while any(thread.is_alive() for thread in self.threads):
            if self._hurry() or time.monotonic() > asked + NOTEBOOK_SECONDS:
                self.executor.stop(hurry=True)
            with contextlib.suppress(Exception):  # where nobody sees it any more, the rest must end all the same
                self._tell()
            time.sleep(POLL_SECONDS)

    def _hurry(self) -> bool:
        """Return whether somebody does not want to wait for a stop in order."""
        return self.interrupts.count > 1

    def report(self) -> Report:
        """Report how it all ended."""
        seconds = time.monotonic() - self.started
        return Report(self.plan, self.statuses, self.figures, seconds, self.interrupts.count > 0, self.notes)

    def _start(self, work: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self.threads.append(thread)
        thread.start()
        return thread

    def _work(self, waiting: queue.SimpleQueue[RunStatus]) -> None:
        gpus = self.slots.get()
        while not self.stopping:
            try:
                status = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                self._execute_run(status, gpus)
            except Exception as error:  # a thread's exception would vanish, and with it the run
                status.state, status.message = "failed", f"{type(error).__name__}: {error}"
            if status.state != "done":
                alive = launcher.is_running(status.planned.run)
                self._end_trainers(status.planned.run)
                if alive and status.state == "failed":
                    status.message += "\nIts trainer was stopped; the next call goes on from its last checkpoint."

    def _execute_run(self, status: RunStatus, gpus: list[str]) -> None:
        planned = status.planned
        for stage in self.plan.stages:
            if stage in status.finished:
                continue
            status.state, status.stage, status.since = "running", stage, time.time()
            status.log = stage_log(planned.run, stage)
            before = planned.run.read_result(stage)
            arguments = (str(planned.path), stage, json.dumps(dict(planned.overrides)))
            machine = planned.config.machine
            mine = tuple(gpus[: machine.processes])
            code = self.executor.submit(Stage("stage", arguments, status.log, machine.threads, mine))
            status.executed.append(stage)
            if self.stopping:
                status.state = "stopped"
                return
            if code != 0 or not planned.finished(stage):
                status.state, status.message = "failed", self._cause(status.log, code)
                note_failure(planned.run, stage, before, status.message)
                return
            status.finished.add(stage)
        status.state = "done"

    def _end_trainers(self, *runs: Run) -> None:
        """End the trainers of these runs, but for those that another job works on, and say which cannot be ended."""
        mine = [run for run in runs if not run.is_locked("job")]
        for pid in launcher.stop(*mine, hurry=self._hurry):
            self.notes.append(f"Process {pid} cannot be killed; it still trains a run of this study.")

    def _execute_figure(self, figure: Figure) -> None:
        figure.state = "running"
        figure.log = self.plan.folder / "notebooks" / f"{figure.name}.log"
        done: list[int] = []
        log, threads = figure.log, self.plan.runs[0].config.machine.threads
        stage = Stage("figure", (self.plan.study, figure.name), log, threads)
        worker = self._start(lambda: done.append(self.executor.submit(stage)))
        while worker.is_alive() and not self.interrupts.count:
            self._tell()
            worker.join(POLL_SECONDS)
        if self.interrupts.count:
            figure.state = "waiting"
            return
        record = read_figure_record(self.plan.study, figure.name)
        figure.outputs = [figures_root() / name for name in record.get("outputs", [])]
        if done == [0]:
            figure.state = "done"
        else:
            figure.state, figure.message = "failed", self._cause(log, done[0] if done else 1)
        self._tell()

    def _cause(self, log: Path, code: int) -> str:
        try:
            return error_path(log).read_text(encoding="utf-8")
        except OSError:
            return describe_exit(code) + log_tail(log)

    def _is_current(self, figure: Figure, record: dict[str, Any], results: str) -> bool:
        executed = self.plan.folder / "notebooks" / f"{figure.name}.ipynb"
        return (
            record.get("results_sha256") == results
            and record.get("code_sha256") == code_sha256(everything=True)
            and record.get("notebook_sha256") == sha256_file(notebook_path(figure.name))
            and executed.is_file()
            and all(path.is_file() for path in figure.outputs)
        )

    def _fraction(self) -> float:
        """Return the share of all expected seconds of the job that is done."""
        total = FIGURE_SECONDS * len(self.figures)
        done = FIGURE_SECONDS * sum(f.state not in ("waiting", "running") for f in self.figures)
        for status in self.statuses:
            for stage in self.plan.stages:
                cost = status.planned.estimate.seconds[stage]
                total += cost
                if status.state == "failed" or stage in status.finished:
                    done += cost
                elif stage == "training":  # also what an earlier call left of it
                    done += cost * launcher.trained_steps(status.planned.run) / status.planned.config.train.steps
        return min(1.0, done / total)

    def _tell(self) -> None:
        fraction, seconds = self._fraction(), time.monotonic() - self.started
        gained = fraction - self.at_start
        left = max(0.0, self.planned_seconds - seconds)
        if gained > 0:  # trust the plan at first, then more and more what is seen
            trust = min(1.0, 3 * gained / (1 - self.at_start))
            left = (1 - trust) * left + trust * seconds * (1 - fraction) / gained
        busy = ["stopping in order; Ctrl-C again stops at once"] if self.stopping else []
        for status in self.statuses:
            if status.state == "running":
                busy.append(f"{status.planned.name} {doing(status)}")
        busy += [f"figure {figure.name}" for figure in self.figures if figure.state == "running"]
        self.on_progress(Progress(fraction, left, seconds, tuple(busy)))
