"""What the command line shows: plans, progress, studies, and how a job ended."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from golfbook.analysis.statistics import spread_text
from golfbook.analysis.summaries import chosen_rows, seconds_data, states_data, variants_data
from golfbook.run import STAGES, skipped_runs
from golfbook.study.plan import Plan
from golfbook.study.progress import Progress, Report
from golfbook.study.results import read_record
from golfbook.terminal import duration, say, show_path, show_table, size

LINE_SECONDS = 15.0  # between two progress lines where the output is no terminal
CHANGE_SECONDS = 5.0  # until a line tells that a run does something else
MARKS = {
    "done": Text("done", "green"),
    "failed": Text("failed", "red"),
    "stale": Text("stale", "yellow"),
    "missing": Text("–", "dim"),
}


def show_plan(console: Console, plan: Plan) -> None:
    """Print the runs of a plan, the state of their stages, and the estimate of time and memory."""
    rows: list[list[str | Text]] = []
    for run in plan.runs:
        changes = ", ".join(f"{key}={value}" for key, value in run.overrides.items()) or "none"
        states = [MARKS["done"] if run.finished(s) else _unfinished(run.run.state(s)) for s in plan.stages]
        rows.append([run.variant, str(run.config.seed), *states, changes])
    show_table(
        console,
        ["variant", "seed", *(stage.replace("_", " ") for stage in plan.stages), "changes to the preset"],
        rows,
        title=f"{plan.study}: {len(plan.runs)} runs of preset {Path(plan.preset).stem}",
        right=["seed"],
        wrap=["changes to the preset"],
    )
    left = plan.remaining_seconds()
    if left:
        say(
            console,
            f"To do: {len(plan.remaining())} of {len(plan.runs) * len(plan.stages)} stages, {plan.workers} runs at a "
            f"time; about {duration(left)} and {size(plan.memory_bytes())} of memory, "
            f"by {plan.runs[0].estimate.source}.",
        )


@contextmanager
def follow(console: Console) -> Iterator[Any]:
    """Yield a function to call with each :class:`Progress`: a bar on a terminal, else a line every 15 seconds."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    bar = Bar(BarColumn(40), TaskProgressColumn(), TextColumn("{task.fields[note]}"), console=console)
    task = bar.add_task("job", total=1.0, note="starting")
    with Live(bar, console=console, refresh_per_second=4, transient=True) as live:

        def update(progress: Progress) -> None:
            bar.update(task, completed=progress.fraction, note=_clock(progress))
            live.update(Group(bar, *(Text(f"  {line}", style="dim") for line in progress.busy)))

        yield update


def show_report(console: Console, report: Report) -> None:
    """Print how a job ended: the table of variants, failures with their cause and log, and where everything is."""
    plan = report.plan
    show_study(console, plan.study, [planned.path.name for planned in plan.runs])
    for status in report.runs:
        if status.state == "failed":
            first, *rest = (status.message or "unknown cause").splitlines()
            say(console, f"FAILED {status.planned.name}, {status.stage}: {first}", "red")
            for line in (*rest, f"    log: {status.log}"):
                say(console, line)
    for figure in report.figures:
        if figure.state == "failed":
            first, *rest = figure.message.splitlines() or ["unknown cause"]
            say(console, f"FAILED figure {figure.name}: {first}", "red")
            for line in (*rest, f"    log: {figure.log}"):
                say(console, line)
        elif figure.state == "skipped":
            say(console, f"Figure {figure.name} was not drawn: {figure.message}.")
    for note in report.notes:
        say(console, note, "yellow")
    places = [
        ("study", plan.folder),
        ("tables", plan.folder / "results.parquet"),
        ("", plan.folder / "metrics.parquet"),
    ]
    places += [("notebooks", run.path / "notebooks") for run in plan.runs[:1]]
    pictures = [path for figure in report.figures for path in figure.outputs if path.is_file()]
    places += [("figures" if i == 0 else "", path) for i, path in enumerate(pictures)]
    others = f"  (and {len(plan.runs) - 1} more run folders beside it)" if len(plan.runs) > 1 else ""
    for label, path in places:
        more = others if label == "notebooks" else ""
        if path.exists():
            say(console, f"{label:>10}  {show_path(path)}{more}")
    again = f"golfbook run {show_path(plan.source)}"
    if report.interrupted:
        say(console, f"Stopped. Everything so far is kept; go on with: {again}", "yellow")
    elif report.nothing_done:
        say(console, "Nothing to do: every stage and figure of this job is done.", "green")
    elif report.failures:
        say(console, f"Failed: {len(report.failures)}. Try again with: {again}", "red")
    else:
        say(console, f"Done in {duration(report.seconds)}.", "green")


def show_study(console: Console, study: str, only: Sequence[str] | None = None) -> None:
    """Print one line a variant: n, BPB mean ± std, artifact bytes, seconds; then what the numbers are.

    ``only`` names the run folders to show, in the order their variants are printed in; default: all of the study.
    """
    found = chosen_rows(study, only)
    variants = variants_data(found)
    lines = []
    for one in variants:
        score = spread_text(one["n"], one["val_bpb_mean"], one["val_bpb_std"])
        remarks = [f"{one['failed']} failed"] if one["failed"] else []
        if one["val_bpb_after"] not in (None, STAGES[-1]):
            remarks.append(f"BPB after {one['val_bpb_after']}")
        remark = Text(", ".join(remarks), "red" if one["failed"] else "")
        numbers = (_number_text(one[key]) for key in ("artifact_bytes", "seconds"))
        lines.append([one["variant"], str(one["n"]), score, *numbers, remark])
    show_table(
        console,
        ["variant", "n", "BPB mean ± std", "artifact bytes", "seconds", "remark"],
        lines,
        title=f"{study}: bits per byte of held-out text, lower is better",
        right=["n", "BPB mean ± std", "artifact bytes", "seconds"],
    )
    if any(one["val_bpb_after"] == STAGES[-1] for one in variants):
        say(console, "BPB is that of the reloaded artifact under sliding windows, the headline number.")
    if any("@" in one["variant"] for one in variants):
        say(
            console,
            "One name stands for several configurations, told apart by their hash: see variant_hash and config_json in "
            "the collected table.",
        )
    _show_context(console, found)
    _show_skipped(console, study)


def show_status(console: Console, study: str, last: bool = True) -> None:
    """Print the state of every run of a study, with the first line of each failure.

    Unless the table of the study follows (``last`` is false), also which folders were passed over.
    """
    found = states_data(study)
    lines = [[one["run"], *(MARKS[one["states"][stage]] for stage in STAGES)] for one in found]
    show_table(console, ["run", *STAGES], lines, title=study)
    for one in found:
        for stage, message in one["messages"].items():
            say(console, f"{one['run']}, {stage}: {message.splitlines()[0]}", "red")
    if last:
        _show_skipped(console, study)


def show_seconds(console: Console, study: str) -> None:
    """Print where the seconds of a study went, by stage and part, and how long its jobs took by the clock."""
    found = seconds_data(study)
    total = sum(one["seconds"] for one in found)
    lines = [
        [one["stage"], one["part"], str(one["runs"]), f"{one['seconds']:.1f}", f"{one['seconds'] / total:.0%}"]
        for one in found
        if one["seconds"] >= 0.05
    ]
    right = ["runs", "seconds", "share"]
    show_table(console, ["stage", "part", *right], lines, title=f"{study}: seconds of all runs together", right=right)
    for job, seconds in read_record(study).get("seconds", {}).items():
        say(console, f"The last call of {job} that had something to do took {duration(seconds)}.")


def _show_skipped(console: Console, study: str) -> None:
    for folder, reason in skipped_runs(study).items():
        say(console, f"Passed over: {folder.name}: {reason}.", "yellow")


def _show_context(console: Console, found: list[dict[str, Any]]) -> None:
    unigram = sorted({round(float(row["unigram_bpb"]), 4) for row in found if "unigram_bpb" in row})
    if unigram:
        text = " / ".join(f"{value:.4f}" for value in unigram)
        say(console, f"For comparison, the unigram entropy of the validation text is {text} BPB.")
    for changes in sorted({row["validation_changes"] for row in found if "validation_changes" in row}):
        say(console, f"What the tokenizer changed in this text: {changes}.")
    sized = [row for row in found if "total_bytes" in row and "limit_bytes" in row]
    if sized:
        largest = max(sized, key=lambda row: row["total_bytes"])
        fits = all(row.get("within_budget") for row in sized)
        say(
            console,
            f"Code and artifact together: at most {largest['total_bytes']:,} bytes, "
            f"{'all within' if fits else 'over'} the limit of {largest['limit_bytes']:,}.",
            "" if fits else "red",
        )


class _Lines:
    """One line every 15 seconds, whenever a run begins a stage, and soon after it begins to do something else."""

    def __init__(self, console: Console) -> None:
        self.console, self.last = console, -math.inf
        self.busy: tuple[str, ...] = ()
        self.stages: tuple[str, ...] | None = None

    def __call__(self, progress: Progress) -> None:
        doing = tuple(re.sub(r" \d+(/\d+|%)", "", line) for line in progress.busy)
        stages = tuple(line.partition(":")[0] for line in doing)
        waited = time.monotonic() - self.last
        if stages != self.stages or waited >= (LINE_SECONDS if doing == self.busy else CHANGE_SECONDS):
            self.last, self.busy, self.stages = time.monotonic(), doing, stages
            busy = "; ".join(progress.busy) or "collecting"
            say(self.console, f"{progress.fraction:4.0%}  {_clock(progress)}  {busy}")


def _clock(progress: Progress) -> str:
    return f"{duration(progress.seconds)}, about {duration(progress.seconds_left)} left"


def _unfinished(state: str) -> Text:
    made = Text("to do", "yellow")
    return made if state in ("done", "missing") else Text.assemble(made, " (", MARKS[state], ")")


def _number_text(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"
