"""Plans, studies and ends of jobs as plain data: what the command line's tables show and ``--json`` writes.

Keys are part of the command line's interface: they stay, and further ones may come.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from golfbook import activity
from golfbook.analysis.statistics import describe
from golfbook.files import runs_root
from golfbook.run import STAGES, list_runs, skipped_runs
from golfbook.study.plan import Plan, PlannedRun
from golfbook.study.progress import Figure, Report
from golfbook.study.results import current_runs, read_record, rows

SECONDS = ("train_seconds", "quantize_seconds", "score_seconds")
WORK = dict(zip(STAGES, zip(("training", "quantising", "scoring"), SECONDS, strict=True), strict=True))


def plan_data(plan: Plan) -> dict[str, Any]:
    """A plan: its runs with the states of their stages, and the estimate of time and memory."""

    def run_data(planned: PlannedRun) -> dict[str, Any]:
        return {
            "variant": planned.variant,
            "seed": planned.config.seed,
            "config_hash": planned.config.hash,
            "path": planned.path,
            "overrides": planned.overrides,
            "states": {stage: planned.run.state(stage) for stage in plan.stages},
            "to_do": [stage for stage in plan.stages if not planned.finished(stage)],
            "seconds": planned.estimate.seconds,
            "memory_bytes": planned.estimate.memory_bytes,
        }

    return {
        "job": plan.source,
        "study": plan.study,
        "preset": plan.preset,
        "stages": plan.stages,
        "figures": plan.figures,
        "workers": plan.workers,
        "seconds_left": plan.remaining_seconds(),
        "memory_bytes": plan.memory_bytes(),
        "estimated_by": plan.runs[0].estimate.source,
        "runs": [run_data(planned) for planned in plan.runs],
    }


def report_data(report: Report) -> dict[str, Any]:
    """How a job ended: its runs and figures with the cause of each failure, and the table of variants."""

    def figure_data(figure: Figure) -> dict[str, Any]:
        return {
            "figure": figure.name,
            "state": figure.state,
            "message": figure.message,
            "log": figure.log,
            "outputs": figure.outputs,
        }

    runs = [
        {
            "variant": status.planned.variant,
            "seed": status.planned.config.seed,
            "config_hash": status.planned.config.hash,
            "path": status.planned.path,
            "state": status.state,
            "executed": status.executed,
            "failed_stage": status.stage if status.state == "failed" else None,
            "message": status.message,
            "log": status.log,
        }
        for status in report.runs
    ]
    return {
        "job": report.plan.source,
        "study": report.plan.study,
        "interrupted": report.interrupted,
        "nothing_done": report.nothing_done,
        "failures": len(report.failures),
        "seconds": report.seconds,
        "runs": runs,
        "figures": [figure_data(figure) for figure in report.figures],
        "variants": variants_data(chosen_rows(report.plan.study, [run.path.name for run in report.plan.runs])),
    }


def study_data(study: str, seconds: bool = False) -> dict[str, Any]:
    """A study: the states of its runs, the folders passed over, the table of variants, and where its seconds went."""
    data: dict[str, Any] = {
        "study": study,
        "path": runs_root() / study,
        "runs": states_data(study),
        "passed_over": [{"folder": path, "reason": reason} for path, reason in skipped_runs(study).items()],
        "variants": variants_data(rows(study)),
    }
    if seconds:
        data["seconds"], data["job_seconds"] = seconds_data(study), read_record(study).get("seconds", {})
    return data


def states_data(study: str) -> list[dict[str, Any]]:
    """The state of each stage of each run of a study, and the message of each failure."""
    found = []
    for run in list_runs(study):
        states = {stage: run.state(stage) for stage in STAGES}
        failed = [stage for stage, state in states.items() if state == "failed"]
        causes = {stage: str((run.read_result(stage) or {}).get("message") or "unknown cause") for stage in failed}
        found.append(
            {
                "run": run.path.name,
                "variant": run.variant,
                "seed": run.config.seed,
                "config_hash": run.config.hash,
                "states": states,
                "messages": causes,
            }
        )
    return found


def chosen_rows(study: str, only: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Rows of a study, of the run folders named in ``only`` and in their order; default: all."""
    by_folder = {row["run"]: row for row in rows(study)}
    return [by_folder[name] for name in (only or by_folder) if name in by_folder]


def variants_data(found: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One mapping a variant: n, mean and spread of the score after the last stage it has reached, bytes, seconds."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in found:
        groups.setdefault(row["variant"], []).append(row)
    table = []
    for variant, mine in groups.items():
        stage = next((s for s in reversed(STAGES) if any(f"{s}_val_bpb" in row for row in mine)), None)
        summary = describe([] if stage is None else [row.get(f"{stage}_val_bpb", math.nan) for row in mine])
        seconds = [sum(row[k] for k in SECONDS if k in row) for row in mine if any(k in row for k in SECONDS)]
        table.append(
            {
                "variant": variant,
                "n": summary.n,
                "val_bpb_mean": summary.mean,
                "val_bpb_std": summary.std,
                "val_bpb_after": stage,
                "artifact_bytes": _mean([row["artifact_bytes"] for row in mine if "artifact_bytes" in row]),
                "seconds": _mean(seconds),
                "failed": sum(any(row[f"{s}_state"] == "failed" for s in STAGES) for row in mine),
            }
        )
    return table


def seconds_data(study: str) -> list[dict[str, Any]]:
    """Where the seconds of a study went: stage, part, in how many runs, and seconds of them all.

    Runs whose notebooks no job executed have only what their results say of the work itself.
    """
    found: dict[tuple[str, str], list[float]] = {}
    for run in current_runs(study):
        parts = activity.spent(run.path)
        for stage in STAGES:
            what, key = WORK[stage]
            alone = (run.read_result(stage) or {}).get(key)
            for part, seconds in parts.get(stage, {} if alone is None else {what: alone}).items():
                found.setdefault((stage, part), []).append(seconds)
    for stage, of_figure in activity.spent(runs_root() / study).items():
        for part, seconds in of_figure.items():
            found.setdefault((stage, part), []).append(seconds)
    order = {stage: i for i, stage in enumerate(STAGES)}
    keys = sorted(found, key=lambda key: order.get(key[0], len(order)))
    return [{"stage": s, "part": p, "runs": len(found[s, p]), "seconds": sum(found[s, p])} for s, p in keys]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
