"""Jobs that are killed or stopped: no process stays behind, nothing is lost, and the next call finishes the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from fixture_project import Project, kill, trainers, wait_for
from golfbook.study import plan as planning
from golfbook.study import pool
from golfbook.study.interrupts import Interrupts
from golfbook.study.progress import Progress


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = Project(tmp_path)
    made.write_job(stages=["training"], variants={"xsa": {}}, figures=None)
    return made


def start_slow(project: Project) -> tuple[subprocess.Popen[str], psutil.Process, psutil.Process]:
    """Start a job and wait until its notebook is in the middle of its work; return command, stage process, kernel."""
    project.fault("slow")
    process = project.start("run", "papermill_jobs/job.yaml")
    wait_for(lambda: list(project.runs.glob("small/xsa-*/metrics.jsonl")), "the notebook has begun")
    kernel = psutil.Process(int((project.folder() / "pid.txt").read_text()))
    stage = kernel.parent()
    assert stage is not None and stage.ppid() == process.pid
    return process, stage, kernel


def finish(project: Project) -> None:
    """Remove the fault, run the job again, and compare its result with that of a run nobody disturbed."""
    (project.root / "slow-xsa-s1").unlink()
    done = project.call("run", "papermill_jobs/job.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    [result] = project.results().values()
    name = project.folder().name
    assert result["status"] == "ok" and result["val_bpb"] == 2.0 + int(name.split("-")[-1], 16) / 16**10
    assert len((project.folder() / "metrics.jsonl").read_text().splitlines()) == 4, "it went on where it was"
    assert not list(project.runs.rglob("*.partial.ipynb"))


def gone(*processes: psutil.Process) -> None:
    for process in processes:
        wait_for(lambda p=process: not p.is_running() or p.status() == psutil.STATUS_ZOMBIE, f"{process} ends", 20)


def test_kill_of_the_command_leaves_no_process_and_loses_nothing(project: Project) -> None:
    process, stage, kernel = start_slow(project)
    kill(process.pid)
    process.wait()
    gone(stage, kernel)
    assert project.results() == {}
    finish(project)


def test_kill_of_a_stage_process_is_reported_and_repaired(project: Project) -> None:
    process, stage, kernel = start_slow(project)
    kill(stage.pid)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 1
    assert "FAILED xsa-s1, training: the process was killed by SIGKILL" in output
    gone(kernel)
    finish(project)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_stopping_in_order_keeps_everything_and_says_how_to_go_on(project: Project, number: signal.Signals) -> None:
    process, stage, kernel = start_slow(project)
    os.kill(process.pid, number)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 130, output
    assert "Stopped. Everything so far is kept; go on with: golfbook run papermill_jobs/job.yaml" in output
    assert "Traceback" not in output and "FAILED" not in output
    gone(stage, kernel)
    assert project.results() == {}, "a stopped stage has not failed"
    if number == signal.SIGINT:
        finish(project)


def start_trainers(project: Project, kind: str, *runs: str) -> subprocess.Popen[str]:
    """Start a job whose notebooks wait for detached trainers; wait until these are there."""
    for run in runs:
        project.fault(kind, run)
    process = project.start("run", "papermill_jobs/job.yaml")
    wait_for(lambda: len(list(project.runs.glob("small/*/training.txt"))) == len(runs), "the trainers have begun")
    return process


def test_pressing_ctrl_c_again_ends_trainers_that_do_not_heed(project: Project) -> None:
    project.write_job(stages=["training"], variants={"xsa": {}, "no_xsa": {"model.xsa": 0}}, figures=None, workers=2)
    process = start_trainers(project, "stubborn", "xsa-s1", "no_xsa-s1")
    for _ in range(3):
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
    output = process.communicate(timeout=30)[0]
    assert not trainers(project.runs)
    assert process.returncode == 130 and "Stopped. Everything so far is kept; go on with: golfbook run" in output
    assert not list(project.temporary.iterdir())


def test_trainers_are_asked_for_a_checkpoint_when_the_terminal_closes(project: Project) -> None:
    process = start_trainers(project, "trainer", "xsa-s1")
    process.send_signal(signal.SIGHUP)
    output = process.communicate(timeout=30)[0]
    assert not trainers(project.runs) and (project.folder() / "saved.txt").exists()
    assert process.returncode == 130 and "Stopped." in output


def test_a_killed_kernel_takes_its_trainer_along_before_the_next_run(project: Project) -> None:
    project.write_job(stages=["training"], variants={"xsa": {}, "next": {"model.xsa": 0}}, figures=None, workers=1)
    process = start_trainers(project, "trainer", "xsa-s1")
    kill(int((project.folder() / "pid.txt").read_text()))
    output = process.communicate(timeout=60)[0]
    assert not trainers(project.runs) and process.returncode == 1
    assert "FAILED xsa-s1, training: the kernel of" in output and "Its trainer was stopped" in output
    saved, begun = project.folder() / "saved.txt", project.folder("next-s1") / "pid.txt"
    assert saved.stat().st_mtime_ns < begun.stat().st_mtime_ns


def test_a_progress_that_cannot_be_shown_ends_the_trainers_too(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in project.environment().items():
        monkeypatch.setenv(name, value)
    project.fault("trainer")

    def closed(_: Progress) -> None:
        if trainers(project.runs):
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        pool.run(planning.plan(project.job), closed)
    assert not trainers(project.runs)


def test_interrupts_are_counted_and_what_was_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([10.0, 10.05, 10.2])
    monkeypatch.setattr("golfbook.study.interrupts.time.monotonic", lambda: next(moments))
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before = signal.getsignal(signal.SIGINT)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupts.count == 0
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            assert interrupts.count == 1, "both at once are one press"
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupts.count == 2
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGHUP, previous)
