"""What the command line shows: plans, progress, and how a job ended. Rich tables from plain data."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from golfbook.jobs import Progress, Report
from golfbook.plan import Plan
from golfbook.results import rows
from golfbook.runs import STAGES, list_runs, skipped_runs
from golfbook.statistics import describe, spread_text

LINE_SECONDS = 15.0  # between two progress lines where the output is no terminal
MARKS = {"done": "[green]done[/]", "failed": "[red]failed[/]", "stale": "[yellow]stale[/]", "missing": "[dim]–[/]"}
SECONDS = ("train_seconds", "quantize_seconds", "score_seconds")


def duration(seconds: float) -> str:
    """``8 s``, ``2 min 5 s``, ``3 h 20 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """``1.3 GB``, decimal as in the challenge."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def show_path(path: Path) -> str:
    """A path as short as it can be written from the working folder."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def show_plan(console: Console, plan: Plan) -> None:
    """Print the runs of a plan, the state of their stages, and the estimate of time and memory."""
    table = Table(title=f"{plan.study}: {len(plan.runs)} runs of preset {Path(plan.preset).stem}", title_justify="left")
    table.add_column("variant")
    table.add_column("seed", justify="right")
    table.add_column("changes to the preset")
    for stage in plan.stages:
        table.add_column(stage.replace("_", " "))
    for run in plan.runs:
        changes = Text(", ".join(f"{key}={value}" for key, value in run.overrides.items()) or "none")
        states = [MARKS["done"] if run.finished(s) else _unfinished(run.run.state(s)) for s in plan.stages]
        table.add_row(run.variant, str(run.config.seed), changes, *states)
    console.print(table)
    left = plan.remaining_seconds()
    if left:
        console.print(
            f"To do: {len(plan.remaining())} of {len(plan.runs) * len(plan.stages)} stages, {plan.workers} runs at a "
            f"time; about {duration(left)} and {size(plan.memory_bytes())} of memory, "
            f"by {plan.runs[0].estimate.source}.",
            highlight=False,
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
            console.print(Text(f"FAILED {status.planned.name}, {status.stage}: {first}", style="red"), soft_wrap=True)
            for line in (*rest, f"    log: {status.log}"):
                console.print(Text(line), soft_wrap=True)
    for figure in report.figures:
        if figure.state == "failed":
            console.print(Text(f"FAILED figure {figure.name}: {figure.message}", style="red"), soft_wrap=True)
            console.print(Text(f"    log: {figure.log}"), soft_wrap=True)
        elif figure.state == "skipped":
            console.print(f"Figure {figure.name} was not drawn: {figure.message}.")
    places = [
        ("study", plan.folder),
        ("tables", plan.folder / "results.parquet"),
        ("", plan.folder / "metrics.parquet"),
    ]
    places += [("notebooks", run.path / "notebooks") for run in plan.runs[:1]]
    pictures = [path for figure in report.figures for path in figure.outputs if path.is_file()]
    places += [("figures" if i == 0 else "", path) for i, path in enumerate(pictures)]
    for label, path in places:
        more = (
            f"  (and {len(plan.runs) - 1} more run folders beside it)"
            if label == "notebooks" and len(plan.runs) > 1
            else ""
        )
        if path.exists():
            console.print(Text(f"{label:>10}  {show_path(path)}{more}"), soft_wrap=True)
    again = f"golfbook run {show_path(plan.source)}"
    if report.interrupted:
        console.print(f"Stopped. Everything so far is kept; go on with: {again}", style="yellow", soft_wrap=True)
    elif report.nothing_done:
        console.print("Nothing to do: every stage and figure of this job is done.", style="green")
    elif report.failures:
        console.print(f"Failed: {len(report.failures)}. Try again with: {again}", style="red", soft_wrap=True)
    else:
        console.print(f"Done in {duration(report.seconds)}.", style="green")


def show_study(console: Console, study: str, only: Sequence[str] | None = None) -> None:
    """Print one line a variant: n, BPB mean ± std, artifact bytes, seconds; then what the numbers are.

    ``only`` names the run folders to show, in the order their variants are printed in; default: all of the study.
    """
    by_folder = {row["run"]: row for row in rows(study)}
    found = [by_folder[name] for name in (only or by_folder) if name in by_folder]
    variants = list(dict.fromkeys(row["variant"] for row in found))
    table = Table(title=f"{study}: bits per byte of held-out text, lower is better", title_justify="left")
    for name, justify in (("variant", "left"), ("n", "right"), ("BPB mean ± std", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name in ("artifact bytes", "seconds"):
        table.add_column(name, justify="right")
    table.add_column("")
    notes = set()
    for variant in variants:
        mine = [row for row in found if row["variant"] == variant]
        stage = next((s for s in reversed(STAGES) if any(f"{s}_val_bpb" in row for row in mine)), None)
        if stage is None:
            summary = describe([])
        else:
            summary = describe([row.get(f"{stage}_val_bpb", math.nan) for row in mine])
            notes.add(stage)
        failed = sum(any(row[f"{s}_state"] == "failed" for s in STAGES) for row in mine)
        remark = f"[red]{failed} failed[/]" if failed else ""
        if stage not in (None, STAGES[-1]):
            remark = ", ".join(filter(None, (remark, f"BPB after {stage}")))
        size_text = _mean_text([row["artifact_bytes"] for row in mine if "artifact_bytes" in row])
        seconds = [sum(row[k] for k in SECONDS if k in row) for row in mine if any(k in row for k in SECONDS)]
        table.add_row(variant, str(summary.n), spread_text(summary), size_text, _mean_text(seconds), remark)
    console.print(table)
    if STAGES[-1] in notes:
        console.print(
            "BPB is that of the reloaded artifact under sliding windows, the headline number.", highlight=False
        )
    if any("@" in variant for variant in variants):
        console.print(
            "One name stands for several configurations, told apart by their hash: see variant_hash and config_json in "
            "the collected table.",
            highlight=False,
        )
    _show_context(console, found)
    _show_skipped(console, study)


def show_status(console: Console, study: str, last: bool = True) -> None:
    """Print the state of every run of a study, with the first line of each failure.

    Unless the table of the study follows (``last`` is false), also how many folders could not be read.
    """
    table = Table(title=study, title_justify="left")
    for name in ("run", *STAGES):
        table.add_column(name)
    failures = []
    for run in list_runs(study):
        states = [run.state(stage) for stage in STAGES]
        table.add_row(run.path.name, *(MARKS[state] for state in states))
        for stage, state in zip(STAGES, states, strict=True):
            if state == "failed":
                message = (run.read_result(stage) or {}).get("message") or "unknown cause"
                failures.append(f"{run.path.name}, {stage}: {str(message).splitlines()[0]}")
    console.print(table)
    for failure in failures:
        console.print(Text(failure, style="red"), soft_wrap=True)
    if last:
        _show_skipped(console, study)


def _show_skipped(console: Console, study: str) -> None:
    count = len(skipped_runs(study))
    if count:
        folders = "run folder of an older version was" if count == 1 else "run folders of an older version were"
        console.print(f"{count} {folders} passed over.", style="yellow", highlight=False)


def _show_context(console: Console, found: list[dict[str, Any]]) -> None:
    unigram = sorted({round(float(row["unigram_bpb"]), 4) for row in found if "unigram_bpb" in row})
    if unigram:
        text = " / ".join(f"{value:.4f}" for value in unigram)
        console.print(f"For comparison, the unigram entropy of the validation text is {text} BPB.", highlight=False)
    for changes in sorted({row["validation_changes"] for row in found if "validation_changes" in row}):
        console.print(Text(f"What the tokenizer changed in this text: {changes}."), soft_wrap=True)
    sized = [row for row in found if "total_bytes" in row and "limit_bytes" in row]
    if sized:
        largest = max(sized, key=lambda row: row["total_bytes"])
        fits = all(row.get("within_budget") for row in sized)
        verdict = "all within" if fits else "[red]over[/]"
        console.print(
            f"Code and artifact together: at most {largest['total_bytes']:,} bytes, {verdict} the limit of "
            f"{largest['limit_bytes']:,}.",
            highlight=False,
        )


def show_score(console: Console, values: Mapping[str, str]) -> None:
    """Print name and value pairs in two columns."""
    table = Table(show_header=False, box=None)
    table.add_column(justify="right", style="dim")
    table.add_column()
    for name, value in values.items():
        table.add_row(name, Text(value))
    console.print(table)


class _Lines:
    """One line every few seconds, and one whenever a run changes its stage."""

    def __init__(self, console: Console) -> None:
        self.console, self.last = console, -math.inf
        self.busy: tuple[str, ...] = ()

    def __call__(self, progress: Progress) -> None:
        stages = tuple(" ".join(line.split()[:2]) for line in progress.busy)
        now = time.monotonic()
        if stages != self.busy or now - self.last >= LINE_SECONDS:
            self.last, self.busy = now, stages
            busy = "; ".join(progress.busy) or "collecting"
            line = f"{progress.fraction:4.0%}  {_clock(progress)}  {busy}"
            self.console.print(Text(line), soft_wrap=True)


def _clock(progress: Progress) -> str:
    return f"{duration(progress.seconds)}, about {duration(progress.seconds_left)} left"


def _unfinished(state: str) -> str:
    return "[yellow]to do[/]" if state in ("done", "missing") else f"[yellow]to do[/] ({MARKS[state]})"


def _mean_text(values: list[float]) -> str:
    return f"{sum(values) / len(values):,.0f}" if values else "–"
