"""What a study found, gathered from its run folders into two tables: one row a run, one row a metric point.

Everything is read from ``result.<stage>.json``, ``config.json``, ``env.json`` and ``metrics.jsonl``; collecting twice
gives the same tables.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from golfbook.config.load import check_parameters
from golfbook.errors import RunError, nearest
from golfbook.files import (
    atomic_path,
    atomic_write_bytes,
    atomic_write_json,
    canonical_json,
    project_root,
    read_json,
    runs_root,
    sha256_bytes,
)
from golfbook.run import STAGES, Run, list_runs, skipped_runs
from golfbook.study.plan import Plan, flatten, variant_hash

if TYPE_CHECKING:
    import pandas as pd

ENVELOPE = (
    *("schema_version", "stage", "status", "preset", "variant", "seed", "config_hash"),
    *("reads", "writes", "environment"),
)
PREFIXED = ("val_bpb", "val_loss", "finished_at")  # several stages report them: never without the stage's name
PROVENANCE = {  # column: key of a result's environment
    "golfbook_version": "golfbook",
    "code_sha256": "code_sha256",
    "git_commit": "git_commit",
    "git_dirty": "git_dirty",
    "python_version": "python",
    "torch_version": "torch",
    "processor": "processor",
}
RECORD = "job.json"
REFERENCE_COLUMNS = (  # of results.csv, after the settings; those a study does not have are left out
    *(
        "test_time_training_val_bpb",
        "contiguous_val_bpb",
        "quantization_val_bpb",
        "training_val_bpb",
        "float_val_bpb",
        "tax_bpb",
    ),
    *("unigram_bpb", "artifact_bytes", "code_bytes", "total_bytes", "parameters", "steps", "tokens_seen"),
    *("train_seconds", "peak_memory_bytes", "precision", "products", "attention", "device", "weights"),
    *("dataset_fingerprint",),
    *("golfbook_version", "torch_version", "git_commit", "git_dirty", "code_sha256", "processor"),
)


def studies() -> list[str]:
    """List all studies that hold at least one run."""
    return sorted({path.parent.parent.name for path in runs_root().glob("*/*/config.json")})


def current_runs(study: str) -> list[Run]:
    """List the runs of a study, without those of variants that its job file no longer has.

    A job notes which configuration each of its variants has. When a variant of a job file is edited, renamed or
    removed, its runs stay on the disk but are no longer part of the study; further seeds of a variant are, and so are
    runs that no job ever had (of notebooks executed by hand). Raises :class:`RunError` where there is no such study.
    """
    check_parameters(study=study)
    known = studies()
    if study not in known:  # a name such as '..' is never among them
        raise RunError(f"there is no study '{study}'{nearest(study, known)} (studies: {', '.join(known) or 'none'})")
    former = set(read_record(study).get("former", ()))
    return [run for run in list_runs(study) if _label(run.variant, variant_hash(run.config)) not in former]


def rows(study: str) -> list[dict[str, Any]]:
    """Return one flat mapping a run: identity, state of each stage, results of finished stages, environment.

    A result keeps its name (``artifact_bytes``); where stages report different values under one name it is prefixed
    (``training_val_bpb``). Results of stale or failed stages are left out. Where one name stands for several
    configurations, ``variant`` is ``<name>@<variant_hash>``, so that they are never averaged. What made a run (commit,
    versions, processor) is that of its last finished stage; stages that differ in it have columns of their own.
    """
    runs = current_runs(study)
    labels = _labels(runs)
    values = [{stage: _values(run, stage) for stage in STAGES} for run in runs]
    prefixed = {*PREFIXED, *(name for results in values for name in _ambiguous(results))}
    found = []
    for run, results in zip(runs, values, strict=True):
        row: dict[str, Any] = {
            "study": study,
            "variant": labels[run.path],
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
        row |= _environment(run.path / "env.json")
        for result in results.values():
            row |= {name: value for name, value in result.items() if name in PROVENANCE}
        found.append(row)
    return sorted(found, key=lambda row: (row["variant"], row["seed"], row["config_hash"]))


def finished(study: str) -> tuple[pd.DataFrame, list[str]]:
    """Return the runs of a study that are done with every stage, and a line about each folder that is left out.

    The table has the columns of :func:`rows`, with ``val_bpb`` for the score of the last stage. Raises
    :class:`RunError` where there is no such study, and where no run of it is finished.
    """
    import pandas as pd

    found = rows(study)
    notes = [f"passed over: {folder.name}: {reason}" for folder, reason in skipped_runs(study).items()]
    undone = {i: [s for s in STAGES if row[f"{s}_state"] != "done"] for i, row in enumerate(found)}
    waiting = [found[i] | {"stage": missing[0]} for i, missing in undone.items() if missing]
    if len(waiting) == len(found):
        raise RunError(f"study '{study}' has no finished run yet; golfbook run papermill_jobs/{study}.yaml makes them")
    if waiting:
        left = f"{len(waiting)} of {len(found)} runs are not finished and left out; run the job again to finish them:"
        states = (f"{r['variant']}, seed {r['seed']}: {r['stage']} {r[r['stage'] + '_state']}" for r in waiting)
        notes += [left, *(f"  {state}" for state in states)]
    table = pd.DataFrame([row for i, row in enumerate(found) if not undone[i]])
    return table.rename(columns={f"{STAGES[-1]}_val_bpb": "val_bpb"}), notes


def digest(found: Iterable[Mapping[str, Any]]) -> str:
    """Return the SHA-256 of collected rows: what a figure was made from."""
    return sha256_bytes(canonical_json(list(found)).encode())


def collect(study: str) -> pd.DataFrame:
    """Write ``results.parquet`` and ``metrics.parquet`` into the folder of a study; return the table of results.

    Raises :class:`RunError` where there is no such study, where it has no run, or where the disk refuses.
    """
    import pandas as pd

    found = rows(study)
    if not found:
        passed = "; ".join(f"{folder.name} was passed over: {reason}" for folder, reason in skipped_runs(study).items())
        raise RunError(f"study '{study}' has no run to collect" + (f" ({passed})" if passed else ""))
    keys = ("variant", "seed", "run", "config_hash")
    identities = {row["run"]: {key: row[key] for key in keys} for row in found}
    points = [
        {**identities[run.path.name], **point}
        for run in current_runs(study)
        if run.path.name in identities
        for point in run.read_metrics()
    ]
    for name, table in (("results", found), ("metrics", points)):
        with atomic_path(runs_root() / study / f"{name}.parquet") as path:
            pd.DataFrame(table).to_parquet(path, index=False)
    update_record(study, lambda record: {**record, "results_sha256": digest(found)})
    return pd.DataFrame(found)


def reference_folder(study: str) -> Path:
    """Return where the small committed tables of a study lie: ``<project>/runs/reference/<study>``."""
    return project_root() / "runs" / "reference" / study


def reference_tables(study: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the results of a study that are worth keeping, as ``(results, curves)``, from its run folders.

    ``results`` has a row for each run that finished the last stage any run of the study has finished: ``variant``,
    ``seed``, ``config_hash``, a column for every setting in which runs of the study differ, named like
    ``train.optimizer.matrix_lr``, then the numbers and what made them. ``curves`` has a row a validation of these runs:
    ``variant``, ``seed``, ``step``, ``tokens_seen``, ``seconds`` of training and ``val_bpb``; the last one of a run is
    of the weights handed on, those before it are of the weights in training. Raises :class:`RunError` where no run is
    finished.
    """
    import pandas as pd

    found = rows(study)
    reached = [s for s in STAGES if any(row[f"{s}_state"] == "done" for row in found)]
    if not reached:
        raise RunError(f"study '{study}' has no finished run; run its job first")
    found = [row for row in found if row[f"{reached[-1]}_state"] == "done"]
    trees = [flatten(json.loads(row["config_json"])) for row in found]
    varied = [key for key in trees[0] if key not in ("seed", "preset") and len({_text(t[key]) for t in trees}) > 1]
    kept = [name for name in REFERENCE_COLUMNS if any(name in row for row in found)]
    results = [
        {key: row[key] for key in ("variant", "seed", "config_hash")}
        | {key: _text(tree[key]) if isinstance(tree[key], list) else tree[key] for key in varied}
        | {name: row.get(name) for name in kept}
        for row, tree in zip(found, trees, strict=True)
    ]
    runs = {run.path.name: run for run in current_runs(study)}
    curves = [
        {
            "variant": row["variant"],
            "seed": row["seed"],
            "step": point["step"],
            "tokens_seen": point["step"] * runs[row["run"]].config.train.batch_tokens,
            "seconds": point["seconds"],
            "val_bpb": point["val_bpb"],
        }
        for row in found
        for point in runs[row["run"]].read_metrics()
        if point["kind"] == "validation"
    ]
    return pd.DataFrame(results), pd.DataFrame(curves)


def export_reference(study: str) -> tuple[list[Path], int]:
    """Write ``results.csv`` and ``curves.csv`` of :func:`reference_tables` into :func:`reference_folder`, atomically.

    Numbers have eight digits; equal results give equal bytes. Returns the files and how many runs are in them. Raises
    :class:`RunError` where no run is finished or the disk refuses.
    """
    tables = dict(zip(("results", "curves"), reference_tables(study), strict=True))
    written = [reference_folder(study) / f"{name}.csv" for name in tables]
    for path, table in zip(written, tables.values(), strict=True):
        atomic_write_bytes(path, table.to_csv(index=False, lineterminator="\n", float_format="%.8g").encode())
    return written, len(tables["results"])


def is_collected(study: str, found: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether the parquet files on the disk hold exactly these rows."""
    files = [runs_root() / study / f"{name}.parquet" for name in ("results", "metrics")]
    return all(path.is_file() for path in files) and read_record(study).get("results_sha256") == digest(found)


def read_record(study: str) -> dict[str, Any]:
    """Read what jobs have noted about a study: the variants of each job file, those it had before (``former``), and the
    hash of the last collection.
    """
    return read_json(runs_root() / study / RECORD)


def update_record(study: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace the record of a study by what ``change`` makes of it, one process at a time."""
    folder = runs_root() / study
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".job.lock")
        lock.acquire()
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error.strerror or error}; check space and permissions") from error
    try:
        before = read_record(study)
        after = change(before)
        if after != before:
            atomic_write_json(folder / RECORD, after)
    finally:
        lock.release()


def note_variants(plan: Plan) -> None:
    """Note which configuration each variant of a job has, and which it no longer has, for :func:`current_runs`.

    Several job files may share a study: a variant is former only when no job file has it any more.
    """
    source = _source(plan)
    mine = sorted({_label(run.variant, variant_hash(run.config)) for run in plan.runs})

    def change(record: dict[str, Any]) -> dict[str, Any]:
        jobs = {**record.get("jobs", {}), source: mine}
        before = {*record.get("former", ()), *record.get("jobs", {}).get(source, ())}
        return {**record, "jobs": jobs, "former": sorted(before.difference(*jobs.values()))}

    update_record(plan.study, change)


def note_seconds(plan: Plan, seconds: float) -> None:
    """Note how long a call of a job took that had something to do."""
    source = _source(plan)
    update_record(plan.study, lambda record: {**record, "seconds": {**record.get("seconds", {}), source: seconds}})


def _source(plan: Plan) -> str:
    inside = plan.source.is_relative_to(project_root())
    return str(plan.source.relative_to(project_root()) if inside else plan.source)


def _label(variant: str, configuration: str) -> str:
    return f"{variant}@{configuration}"


def _labels(runs: Iterable[Run]) -> dict[Path, str]:
    """Return the name of each run's variant; with its hash where the same name stands for several configurations."""
    hashes: dict[str, set[str]] = {}
    for run in runs:
        hashes.setdefault(run.variant, set()).add(variant_hash(run.config))
    return {
        run.path: run.variant if len(hashes[run.variant]) == 1 else _label(run.variant, variant_hash(run.config))
        for run in runs
    }


def _ambiguous(results: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Return the names under which the stages of one run report different values."""
    seen: dict[str, Any] = {}
    pairs = [pair for values in results.values() for pair in values.items()]
    return {name for name, value in pairs if seen.setdefault(name, value) != value}


def _values(run: Run, stage: str) -> dict[str, Any]:
    result = run.read_result(stage)
    if result is None or not run.is_done(stage):
        return {}
    values = {name: value for name, value in result.items() if name not in ENVELOPE}
    made_by = result.get("environment") or {}
    values |= {column: made_by[key] for column, key in PROVENANCE.items() if key in made_by}
    return {name: canonical_json(v) if isinstance(v, dict | list) else v for name, v in values.items()}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else canonical_json(value)


def _environment(path: Path) -> dict[str, Any]:
    env = read_json(path)
    if not env:
        return {}
    packages = env.get("packages") or {}
    known = {**env, "torch": packages.get("torch")}
    return {column: known.get(key) for column, key in PROVENANCE.items()} | {"cores": env.get("cores")}
