"""What a study found, gathered from its run folders into two tables: one row a run, one row a metric point.

Everything is read from ``result.<stage>.json``, ``config.json``, ``env.json`` and ``metrics.jsonl``; collecting twice
gives the same tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from golfbook.errors import RunError, nearest
from golfbook.files import atomic_path, atomic_write_json, canonical_json, runs_root, sha256_bytes
from golfbook.plan import Plan, variant_hash
from golfbook.runs import STAGES, Run, list_runs

if TYPE_CHECKING:
    import pandas as pd

ENVELOPE = ("schema_version", "stage", "status", "preset", "variant", "seed", "config_hash", "reads", "writes")
PREFIXED = ("val_bpb", "val_loss", "finished_at")  # several stages report them: never without the stage's name
RECORD = "job.json"


def studies() -> list[str]:
    """Names of all studies that hold at least one run."""
    return sorted({path.parent.parent.name for path in runs_root().glob("*/*/config.json")})


def current_runs(study: str) -> list[Run]:
    """Runs of a study, without those of earlier versions of a variant.

    A job notes which configuration each of its variants has. When a job file is edited, the runs of the old
    configuration stay on the disk but are no longer part of the study; seeds of the same configuration always are.
    """
    if not (runs_root() / study).is_dir():
        known = studies()
        raise RunError(f"there is no study '{study}'{nearest(study, known)} (studies: {', '.join(known) or 'none'})")
    variants = read_record(study).get("variants", {})
    return [
        run
        for run in list_runs(study)
        if variants.get(run.variant, variant_hash(run.config)) == variant_hash(run.config)
    ]


def rows(study: str) -> list[dict[str, Any]]:
    """One flat mapping a run: identity, state of each stage, results of finished stages, environment.

    A result keeps its name (``artifact_bytes``); where stages report different values under one name it is prefixed
    (``training_val_bpb``). Results of stale or failed stages are left out.
    """
    runs = current_runs(study)
    values = [{stage: _values(run, stage) for stage in STAGES} for run in runs]
    prefixed = {*PREFIXED, *(name for results in values for name in _ambiguous(results))}
    found = []
    for run, results in zip(runs, values, strict=True):
        row: dict[str, Any] = {
            "study": study,
            "variant": run.variant,
            "seed": run.config.seed,
            "preset": run.config.preset,
            "config_hash": run.config.hash,
            "variant_hash": variant_hash(run.config),
            "run": run.path.name,
            "config_json": canonical_json(run.config.model_dump(mode="json")),
        }
        for stage, result in results.items():
            row[f"{stage}_state"] = run.state(stage)
            row |= {f"{stage}_{name}" if name in prefixed else name: value for name, value in result.items()}
        found.append({**row, **_environment(run.path / "env.json")})
    return sorted(found, key=lambda row: (row["variant"], row["seed"], row["config_hash"]))


def digest(found: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of collected rows: what a figure was made from."""
    return sha256_bytes(canonical_json(list(found)).encode())


def collect(study: str) -> pd.DataFrame:
    """Write ``results.parquet`` and ``metrics.parquet`` into the folder of a study; return the table of results.

    Raises :class:`RunError` where there is no such study or the disk refuses.
    """
    import pandas as pd

    found = rows(study)
    points = [
        {"variant": run.variant, "seed": run.config.seed, "run": run.path.name, "config_hash": run.config.hash, **point}
        for run in current_runs(study)
        for point in run.read_metrics()
    ]
    for name, table in (("results", found), ("metrics", points)):
        with atomic_path(runs_root() / study / f"{name}.parquet") as path:
            pd.DataFrame(table).to_parquet(path, index=False)
    update_record(study, results_sha256=digest(found))
    return pd.DataFrame(found)


def is_collected(study: str, found: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the parquet files on the disk hold exactly these rows."""
    files = [runs_root() / study / f"{name}.parquet" for name in ("results", "metrics")]
    return all(path.is_file() for path in files) and read_record(study).get("results_sha256") == digest(found)


def read_record(study: str) -> dict[str, Any]:
    """What jobs have noted about a study: the configuration of each variant and the hash of the last collection."""
    try:
        value = json.loads((runs_root() / study / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def update_record(study: str, **values: Any) -> None:
    """Change keys of a study's record; mappings are merged, so that several job files can share a study."""
    folder = runs_root() / study
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".job.lock")
        lock.acquire()
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror or error}; check space and permissions") from error
    try:
        before = read_record(study)
        record = dict(before)
        for key, value in values.items():
            record[key] = {**record.get(key, {}), **value} if isinstance(value, Mapping) else value
        if record != before:
            atomic_write_json(folder / RECORD, record)
    finally:
        lock.release()


def note_variants(plan: Plan) -> None:
    """Note which configuration each variant of a job has, for :func:`current_runs`."""
    update_record(plan.study, variants={run.variant: variant_hash(run.config) for run in plan.runs})


def _ambiguous(results: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Names under which the stages of one run report different values."""
    seen: dict[str, Any] = {}
    pairs = [pair for values in results.values() for pair in values.items()]
    return {name for name, value in pairs if seen.setdefault(name, value) != value}


def _values(run: Run, stage: str) -> dict[str, Any]:
    result = run.read_result(stage)
    if result is None or not run.is_done(stage):
        return {}
    values = {name: value for name, value in result.items() if name not in ENVELOPE}
    return {name: canonical_json(v) if isinstance(v, dict | list) else v for name, v in values.items()}


def _environment(path: Path) -> dict[str, Any]:
    try:
        env = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    packages = env.get("packages") or {}
    return {
        "golfbook_version": env.get("golfbook"),
        "git_commit": env.get("git_commit"),
        "git_dirty": env.get("git_dirty"),
        "python_version": env.get("python"),
        "torch_version": packages.get("torch"),
        "processor": env.get("processor"),
        "cores": env.get("cores"),
    }
