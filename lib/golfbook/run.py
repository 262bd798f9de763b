"""The run folder: what one (variant, seed) leaves on disk, and how to tell whether a stage of it is done.

``runs/<study>/<variant>-s<seed>-<hash>/`` holds ``config.json`` (resolved), ``env.json`` (versions, hardware, commit),
``log.txt``, ``metrics.jsonl`` (append-only curves), ``activity.jsonl`` (what was done when),
``checkpoint.safetensors``, ``artifact.golf``, ``notebooks/`` (as executed) and one ``result.<stage>.json`` a stage,
written last. A stage is done if its result says ``ok`` and the files it read and wrote still have the hashes noted
there; an executed notebook proves nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from golfbook import activity
from golfbook.config.load import check_parameters, load_config, validate
from golfbook.config.schema import Config
from golfbook.errors import ConfigError, GolfbookError, RunError
from golfbook.files import atomic_write_json, read_json, runs_root, sha256_file
from golfbook.provenance import environment, provenance

STAGE_NOTEBOOKS = {
    "training": "03_training",
    "quantization": "04_quantization",
    "test_time_training": "05_test_time_training",
}
STAGES = tuple(STAGE_NOTEBOOKS)
SCHEMA_VERSION = 1
State = Literal["done", "failed", "stale", "missing"]


@dataclass(frozen=True)
class Run:
    """One run folder. Make one with :func:`create_run`, or open an existing one with :func:`open_run`."""

    path: Path
    config: Config

    @property
    def name(self) -> str:
        """Return ``<study>/<folder>``, for messages."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def study(self) -> str:
        """Return the name of the study: the parent folder."""
        return self.path.parent.name

    @property
    def variant(self) -> str:
        """Return the name of the variant, the first part of the folder name."""
        return self.path.name.rsplit("-", 2)[0]

    @property
    def log_path(self) -> Path:
        """Return the path of everything the training processes print."""
        return self.path / "log.txt"

    @property
    def metrics_path(self) -> Path:
        """Return the path of the append-only JSON lines: training and validation points."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoint_path(self) -> Path:
        """Return the path of the last whole checkpoint (safetensors)."""
        return self.path / "checkpoint.safetensors"

    @property
    def artifact_path(self) -> Path:
        """Return the path of the quantised, compressed model."""
        return self.path / "artifact.golf"

    @property
    def tokenizer_path(self) -> Path:
        """Return the path of a copy of the SentencePiece model this run was made with."""
        return self.path / "tokenizer.model"

    @property
    def notebooks_path(self) -> Path:
        """Return the folder of executed notebooks."""
        return self.path / "notebooks"

    def result_path(self, stage: str) -> Path:
        """Return the file that says how a stage ended."""
        if stage not in STAGES:
            raise RunError(f"unknown stage '{stage}' (stages: {', '.join(STAGES)})")
        return self.path / f"result.{stage}.json"

    def write_result(self, stage: str, values: Mapping[str, Any], *, reads: Mapping[str, str], writes: Path) -> None:
        """Record that a stage succeeded. ``reads`` maps names to SHA-256 sums; ``writes`` is the file it made."""
        atomic_write_json(
            self.result_path(stage),
            {
                "schema_version": SCHEMA_VERSION,
                "stage": stage,
                "status": "ok",
                "preset": self.config.preset,
                "variant": self.variant,
                "seed": self.config.seed,
                "config_hash": self.config.hash,
                "environment": provenance(),
                "reads": dict(reads),
                "writes": {"file": writes.name, "sha256": sha256_file(writes), "bytes": writes.stat().st_size},
                "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                **values,
            },
        )

    def write_failure(self, stage: str, message: str) -> None:
        """Record that a stage failed, so that status can say why; the next run tries it again."""
        atomic_write_json(
            self.result_path(stage),
            {"schema_version": SCHEMA_VERSION, "stage": stage, "status": "failed", "message": message},
        )

    def read_result(self, stage: str) -> dict[str, Any] | None:
        """Read a stage's result file; None where there is none or it is unreadable."""
        return read_json(self.result_path(stage)) or None

    def state(self, stage: str) -> State:
        """Return ``done``, ``failed``, ``stale`` (something it read or wrote has changed since) or ``missing``.

        Whether the dataset is still the one that was trained on is checked where it is opened, by the stages.
        """
        result = self.read_result(stage)
        if result is None:
            return "missing"
        if result.get("status") != "ok":
            return "failed"
        if result.get("schema_version") != SCHEMA_VERSION or result.get("config_hash") != self.config.hash:
            return "stale"
        written = self.path / result["writes"]["file"]
        if not written.is_file() or _cached_sha256(written) != result["writes"]["sha256"]:
            return "stale"
        index = STAGES.index(stage)
        if index:
            before = self.read_result(STAGES[index - 1])
            if self.state(STAGES[index - 1]) != "done" or before is None:
                return "stale"
            if result["reads"].get(before["writes"]["file"]) != before["writes"]["sha256"]:
                return "stale"
        return "done"

    def is_done(self, stage: str) -> bool:
        """Return whether a stage needs no more work."""
        return self.state(stage) == "done"

    def append_metrics(self, point: Mapping[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``; one write, so a killed process tears only its end."""
        try:
            with self.metrics_path.open("ab+") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(max(0, size - 1))
                torn = size > 0 and stream.read(1) != b"\n"  # of a process that was killed while it wrote
                stream.write((("\n" if torn else "") + json.dumps(dict(point)) + "\n").encode())
        except OSError as error:
            raise RunError(f"cannot write {self.metrics_path}: {error.strerror}; check free space") from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read the whole points of ``metrics.jsonl``; where a resumed run wrote a step again, the later one counts."""
        points: dict[tuple[str, int], dict[str, Any]] = {}
        with contextlib.suppress(FileNotFoundError):
            for line in self.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    point = json.loads(line)
                    points[(point["kind"], point["step"])] = point
        return sorted(points.values(), key=lambda p: (p["step"], p["kind"]))

    @contextlib.contextmanager
    def lock(self, name: str, timeout: float = -1) -> Iterator[None]:
        """Hold the lock ``name`` of this folder; it vanishes with the process.

        Raises :class:`RunError` after ``timeout`` seconds, and where the folder cannot be written.
        """
        held = FileLock(self.path / f".{name}.lock", timeout=timeout)
        try:
            held.acquire()
        except Timeout:
            raise RunError(f"{self.name}: another process is busy with '{name}'") from None
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror or error}; check its permissions") from error
        try:
            yield
        finally:
            held.release()

    def is_locked(self, name: str) -> bool:
        """Return whether some process holds the lock ``name``. Writes nothing where nobody ever held it."""
        path = self.path / f".{name}.lock"
        if not path.exists():
            return False
        try:
            with FileLock(path, timeout=0):
                return False
        except Timeout:
            return True
        except OSError:  # a folder nobody can write is a folder nobody works on
            return False


def run_folder(study: str, variant: str, config: Config) -> Path:
    """Return the folder a run lives in."""
    check_parameters(study=study, variant=variant)
    for kind, name in (("study", study), ("variant", variant)):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name):
            raise RunError(f"{kind} name '{name}' may hold letters, digits, '_', '.', '+' and '-' only")
    return runs_root() / study / f"{variant}-s{config.seed}-{config.hash}"


def create_run(study: str, variant: str, config: Config) -> Run:
    """Open the run folder of a config, making it where needed.

    Raises RunError where the disk refuses, and where the folder of that name holds another configuration.
    """
    run = Run(run_folder(study, variant, config), config)
    path = run.path / "config.json"
    if path.is_file():
        held = open_run(run.path).config
        if held.hash != config.hash:
            raise RunError(
                f"{path} is that of another run (seed {held.seed}, {held.hash}): the folder was copied or renamed; "
                "give it its own name back, or delete it"
            )
        if held.machine != config.machine:  # how often a run is logged, validated and saved may change on the way
            atomic_write_json(path, config.model_dump(mode="json"))
    else:
        atomic_write_json(run.path / "env.json", environment())
        atomic_write_json(path, config.model_dump(mode="json"))
    return run


def open_run(path: str | Path) -> Run:
    """Open an existing run folder. Raises RunError where it is none."""
    path = Path(path).resolve()
    try:
        tree = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is not a run folder: config.json is missing or unreadable ({error})") from None
    try:
        return Run(path, validate(tree))
    except ConfigError as error:
        raise RunError(
            f"{path} was made by another version of golfbook, or its config.json was changed ({error}); delete the "
            "folder, or use another study name"
        ) from None


def notebook_run(
    preset: str,
    seed: int,
    overrides: Mapping[str, Any] | None,
    study: str,
    variant: str,
    run_dir: str = "",
    scale: str = "published",
) -> Run:
    """Open the run a stage notebook works on: ``run_dir`` where a job gives one, else the folder of its parameters.

    Raises :class:`ConfigError` naming a parameter that is of the wrong kind, and how to write it.
    """
    check_parameters(run_dir=run_dir)
    if run_dir:
        run = open_run(run_dir)
    else:
        run = create_run(study, variant, load_config(preset, scale=scale, seed=seed, overrides=overrides))
    activity.record_in(run.path)
    return run


def list_runs(study: str) -> list[Run]:
    """List a study's runs by folder name, each configuration once; :func:`skipped_runs` names what is passed over."""
    return [found for found in _folders(study).values() if isinstance(found, Run)]


def skipped_runs(study: str) -> dict[Path, str]:
    """List the folders of a study that are no runs of it, each with the reason: made by an older version, or copied."""
    return {folder: found for folder, found in _folders(study).items() if isinstance(found, str)}


def _folders(study: str) -> dict[Path, Run | str]:
    """List every run folder of a study, with the run or the reason why it does not count."""
    root = runs_root() / study
    folders = {path for path in root.glob("*-s*-*") if path.is_dir()}
    folders |= {path.parent for path in root.glob("*/config.json")}
    return {folder: _identify(folder) for folder in sorted(folders)}


def _identify(folder: Path) -> Run | str:
    """Return the run in a folder, or why it is none: its name must be that of its config, and its results its own."""
    try:
        run = open_run(folder)
    except GolfbookError:
        return "its config.json is missing, damaged or of an older version"
    ending = f"-s{run.config.seed}-{run.config.hash}"
    results = (run.read_result(stage) or {} for stage in STAGES)
    made_as = {f"{result['variant']}{ending}" for result in results if "variant" in result}
    if folder.name.endswith(ending) and folder.name == run.path.name:
        copied = sorted(name for name in made_as - {folder.name} if (folder.parent / name).is_dir())
        return f"a copy of {copied[0]}" if copied else run
    originals = sorted(path.name for path in folder.parent.glob(f"*{ending}") if path != folder)
    if originals:
        return f"a copy of {originals[0]}"
    return f"its name does not end in {ending}, as its config.json asks: renamed, or of an older version"


def exit_with_parent(cleanup: Callable[[], None] | None = None) -> None:
    """End this process soon after its parent has died, so that ``kill -9`` of a launcher leaves no orphan at work."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        if cleanup is not None:
            cleanup()
        os._exit(3)

    threading.Thread(target=watch, daemon=True, name="exit-with-parent").start()


def _cached_sha256(path: Path) -> str:
    status = path.stat()
    return _sha256_of(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4096)
def _sha256_of(path: Path, mtime_ns: int, size: int) -> str:
    return sha256_file(path)
