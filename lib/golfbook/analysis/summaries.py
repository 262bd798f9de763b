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
from golfbook.run import STAGES, Run, list_runs, skipped_runs
from golfbook.study.plan import Plan, PlannedRun
from golfbook.study.progress import Report
from golfbook.study.results import current_runs, read_record, rows

SECONDS = ("train_seconds", "quantize_seconds", "score_seconds")
WORK = dict(zip(STAGES, zip(("training", "quantising", "scoring"), SECONDS, strict=True), strict=True))


def plan_data(plan: Plan) -> dict[str, Any]:
    """Return a plan: its runs with the states of their stages, and the estimate of time and memory."""
    return {
        "job": plan.source,
        **_fields(plan, "study", "preset", "stages", "figures", "workers"),
        "seconds_left": plan.remaining_seconds(),
        "memory_bytes": plan.memory_bytes(),
        "estimated_by": plan.runs[0].estimate.source,
        "runs": [
            _run_data(planned)
            | {
                "overrides": planned.overrides,
                "states": {stage: planned.run.state(stage) for stage in plan.stages},
                "to_do": [stage for stage in plan.stages if not planned.finished(stage)],
                **_fields(planned.estimate, "seconds", "memory_bytes"),
            }
            for planned in plan.runs
        ],
    }


def report_data(report: Report) -> dict[str, Any]:
    """Return how a job ended: its runs and figures with the cause of each failure, and the table of variants."""
    runs = [
        _run_data(status.planned)
        | _fields(status, "state", "executed", "message", "log")
        | {"failed_stage": status.stage if status.state == "failed" else None}
        for status in report.runs
    ]
    figures = [{"figure": one.name, **_fields(one, "state", "message", "log", "outputs")} for one in report.figures]
    return {
        "job": report.plan.source,
        "study": report.plan.study,
        **_fields(report, "interrupted", "nothing_done", "seconds"),
        "failures": len(report.failures),
        "runs": runs,
        "figures": figures,
        "variants": variants_data(chosen_rows(report.plan.study, [run.path.name for run in report.plan.runs])),
    }


def _fields(thing: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(thing, name) for name in names}


def _run_data(run: PlannedRun | Run) -> dict[str, Any]:
    """Return what names a run."""
    config = run.config
    return {"variant": run.variant, "seed": config.seed, "config_hash": config.hash, "path": run.path}


def study_data(study: str, seconds: bool = False) -> dict[str, Any]:
    """Return a study: the states of its runs, folders passed over, the table of variants, where its seconds went."""
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
    """Return the state of each stage of each run of a study, and the message of each failure."""
    found = []
    for run in list_runs(study):
        states = {stage: run.state(stage) for stage in STAGES}
        failed = [stage for stage, state in states.items() if state == "failed"]
        causes = {stage: str((run.read_result(stage) or {}).get("message") or "unknown cause") for stage in failed}
        one = {name: value for name, value in _run_data(run).items() if name != "path"}
        found.append({"run": run.path.name, **one, "states": states, "messages": causes})
    return found


def chosen_rows(study: str, only: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Return rows of a study, of the run folders named in ``only`` and in their order; default: all."""
    by_folder = {row["run"]: row for row in rows(study)}
    return [by_folder[name] for name in (only or by_folder) if name in by_folder]


def variants_data(found: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one mapping a variant: n, mean and spread of its last score, bytes, seconds."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in found:
        groups.setdefault(row["variant"], []).append(row)
    table = []
    for variant, mine in groups.items():
        stage = next((s for s in reversed(STAGES) if any(f"{s}_val_bpb" in row for row in mine)), None)
        summary = describe([] if stage is None else [row.get(f"{stage}_val_bpb", math.nan) for row in mine])
        seconds = [sum(row[k] for k in SECONDS if k in row) for row in mine if any(k in row for k in SECONDS)]
        table.append(
            {"variant": variant, "n": summary.n, "val_bpb_mean": summary.mean, "val_bpb_std": summary.std}
            | {"val_bpb_after": stage, "seconds": _mean(seconds)}
            | {"artifact_bytes": _mean([row["artifact_bytes"] for row in mine if "artifact_bytes" in row])}
            | {"failed": sum(any(row[f"{s}_state"] == "failed" for s in STAGES) for row in mine)}
        )
    return table


def seconds_data(study: str) -> list[dict[str, Any]]:
    """Return where the seconds of a study went: stage, part, in how many runs, and seconds of them all.

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
