"""Jobs that are killed or stopped: no process stays behind, nothing is lost, and the next call finishes the rest."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from fixture_project import Project, kill, wait_for


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
