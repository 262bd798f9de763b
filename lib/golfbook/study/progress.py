"""What a job is doing and how it ended, run by run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from golfbook import activity
from golfbook.study.plan import Plan, PlannedRun
from golfbook.train import launcher

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
    notes: list[str] = field(default_factory=list)

    @property
    def nothing_done(self) -> bool:
        """Return whether everything was finished before."""
        return not any(r.executed or r.state == "failed" for r in self.runs) and all(
            figure.state == "current" for figure in self.figures
        )

    @property
    def failures(self) -> list[RunStatus | Figure]:
        """Return the runs and figures that failed."""
        failed: list[RunStatus | Figure] = [status for status in self.runs if status.state == "failed"]
        return failed + [figure for figure in self.figures if figure.state == "failed"]


def doing(status: RunStatus) -> str:
    """Return the stage of a running run, with the steps it has trained, and what else is being done in it."""
    words, what = status.stage, activity.now(status.planned.path, status.since)
    if status.stage == "training":
        steps = launcher.trained_steps(status.planned.run)
        if steps or what == "training":
            words += f" {steps}/{status.planned.config.train.steps}"
    return words if what in ("", "training") else f"{words}: {what}"
