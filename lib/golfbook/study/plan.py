"""A job file becomes a plan: every mistake that can be found before anything runs is found here.

>>> from golfbook.study.plan import plan
>>> for run in plan("papermill_jobs/quickstart.yaml").runs:
...     print(run.variant, run.config.seed, run.path)

A job file names a study, a preset, stages, seeds and variants; ``overrides`` (for all variants), ``figures`` and
``workers`` may follow. Planning builds the configuration of every (variant, seed), checks that each notebook exists and
declares every parameter it will be given (papermill itself runs on with the default when a name is misspelt), and
estimates time and memory. Nothing here imports torch or papermill.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from golfbook.config.load import load_config, read_yaml
from golfbook.config.schema import Config
from golfbook.errors import ConfigError, GolfbookError, nearest
from golfbook.files import canonical_json, project_root, resolve, runs_root, sha256_bytes
from golfbook.machine import available_cores, available_memory, visible_gpus
from golfbook.run import STAGE_NOTEBOOKS, STAGES, Run, run_folder
from golfbook.study.estimates import Estimate, estimate, read_history, uses_gpu

STAGE_PARAMETERS = ("preset", "seed", "study", "variant", "overrides", "run_dir")
FIGURE_PARAMETERS = ("study",)
REQUIRED_KEYS = ("study", "preset", "stages", "seeds", "variants")
OPTIONAL_KEYS = ("scale", "overrides", "figures", "workers")


@dataclass(frozen=True)
class PlannedRun:
    """One (variant, seed): its configuration, its folder, and what it is expected to cost."""

    variant: str
    config: Config
    overrides: Mapping[str, Any]
    path: Path
    estimate: Estimate

    @property
    def run(self) -> Run:
        """Return the run folder as an object; the folder need not exist yet."""
        return Run(self.path, self.config)

    @property
    def name(self) -> str:
        """Return ``<variant>-s<seed>``, for messages."""
        return f"{self.variant}-s{self.config.seed}"

    def finished(self, stage: str) -> bool:
        """Return whether a stage needs no more work: see :func:`stage_finished`."""
        return stage_finished(self.run, stage)


@dataclass(frozen=True)
class Plan:
    """A validated job: all its runs in the order they are started, seed by seed."""

    source: Path
    study: str
    preset: str
    stages: tuple[str, ...]
    runs: tuple[PlannedRun, ...]
    figures: tuple[str, ...]
    workers: int

    @property
    def folder(self) -> Path:
        """Return the folder of the study: run folders, tables, executed figure notebooks."""
        return runs_root() / self.study

    @property
    def variants(self) -> tuple[str, ...]:
        """Return the names of the variants in the order of the job file."""
        return tuple(dict.fromkeys(run.variant for run in self.runs))

    def remaining(self) -> list[tuple[PlannedRun, str]]:
        """List all (run, stage) pairs that still need work."""
        return [(run, stage) for run in self.runs for stage in self.stages if not run.finished(stage)]

    def remaining_seconds(self) -> float:
        """Estimate the wall-clock seconds of what remains, with all workers busy."""
        costs: dict[str, float] = {}
        for run, stage in self.remaining():
            costs[run.name] = costs.get(run.name, 0.0) + run.estimate.seconds[stage]
        return max(max(costs.values()), sum(costs.values()) / self.workers) if costs else 0.0

    def memory_bytes(self) -> int:
        """Estimate the bytes of memory when all workers are busy."""
        return sum(sorted((run.estimate.memory_bytes for run in self.runs), reverse=True)[: self.workers])


def plan(path: str | Path, *, workers: int | None = None) -> Plan:
    """Read and validate a job file; ``workers`` replaces the number of runs it asks to have in hand at a time.

    Raises :class:`ConfigError` naming the file, the key and what was expected.
    """
    path = Path(path)
    job = read_yaml(path)
    _refuse_repeated_keys(path)
    problems = _check_shape(job)
    if problems:
        raise ConfigError(f"{path}: " + "; ".join(problems))
    preset = job["preset"]
    if preset.endswith((".yaml", ".yml")):
        preset = str(resolve(preset))
    history = read_history()
    runs: list[PlannedRun] = []
    shared = flatten(job.get("overrides") or {})
    for seed in job["seeds"]:
        for variant, own in job["variants"].items():
            overrides = {**shared, **flatten(own or {})}
            try:
                _refuse_reserved(overrides)
                config = load_config(preset, scale=job.get("scale", "published"), seed=seed, overrides=overrides)
                _check_files(config)
                folder = run_folder(job["study"], variant, config)
                cost = estimate(config, job["stages"], history)
            except GolfbookError as error:
                problems.append(f"variant '{variant}': {error}")
                continue
            runs.append(PlannedRun(variant, config, overrides, folder, cost))
        if problems:  # the other seeds would only repeat them
            raise ConfigError(f"{path}: " + "; ".join(problems))
    _refuse_equal_variants(path, runs)
    _refuse_mixed_devices(path, runs)
    figures = tuple(job.get("figures") or ())
    for stage in job["stages"]:
        check_notebook(STAGE_NOTEBOOKS[stage], STAGE_PARAMETERS)
    for figure in figures:
        check_notebook(figure, FIGURE_PARAMETERS)
    made = Plan(path.resolve(), job["study"], preset, tuple(job["stages"]), tuple(runs), figures, 1)
    return replace(made, workers=workers or job.get("workers") or _default_workers(made))


def stage_finished(run: Run, stage: str) -> bool:
    """Return whether a job has no more to do for a stage: its result is whole, and its notebook ran to the end.

    The executed notebook gets its final name only after its process succeeded, so a notebook that fails in a cell after
    the result was written is tried again; the stage itself is then skipped, because its result is there.
    """
    return executed_notebook(run, stage).is_file() and run.is_done(stage)


def executed_notebook(run: Run, stage: str) -> Path:
    """Return where the notebook of a stage lies once it has run to its end."""
    return run.notebooks_path / f"{STAGE_NOTEBOOKS[stage]}.ipynb"


def notebook_path(name: str) -> Path:
    """Return the path of a notebook of the project. Raises :class:`ConfigError` where there is none of that name."""
    folder = project_root() / "notebooks"
    path = folder / f"{name}.ipynb"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.ipynb"))
        raise ConfigError(f"there is no notebook {path}{nearest(name, known)}")
    return path


def check_notebook(name: str, parameters: tuple[str, ...]) -> None:
    """Check that a notebook has one cell tagged ``parameters`` and that it assigns each name in ``parameters``."""
    path = notebook_path(name)
    try:
        text = path.read_text(encoding="utf-8")
        if text.startswith("\ufeff"):  # papermill and JupyterLab cannot read it either
            raise ValueError("it begins with a byte-order mark; save it as UTF-8 without one")
        cells = json.loads(text)["cells"]
        tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
        sources = [cell["source"] for cell in tagged]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a notebook: {error}") from None
    if len(tagged) != 1:
        raise ConfigError(f"{path} has {len(tagged)} cells tagged 'parameters'; a job needs exactly one")
    declared = _assigned_names(path, sources[0] if isinstance(sources[0], str) else "".join(sources[0]))
    for parameter in parameters:
        if parameter not in declared:
            raise ConfigError(
                f"{path}: the parameters cell does not set '{parameter}'{nearest(parameter, declared)} "
                f"(it sets {', '.join(declared) or 'nothing'})"
            )


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested overrides in dotted form, so that those of a variant can replace single keys of the shared ones."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str):
            raise ConfigError(f"override key {key!r} is not text; write keys as 'section.name'")
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def variant_hash(config: Config) -> str:
    """Return ten hexadecimal digits naming a config without its seed: what the runs of one variant share."""
    return sha256_bytes(canonical_json(config.model_dump(mode="json", exclude={"preset", "seed"})).encode())[:10]


def _default_workers(made: Plan) -> int:
    """Return as many runs at a time as cores (or GPUs) and memory allow, no more than there are runs."""
    machines = [run.config.machine for run in made.runs]
    if uses_gpu(made.runs[0].config):  # so do all others
        units = len(visible_gpus()) // max(machine.processes for machine in machines)
    else:
        units = int(available_cores() // max(machine.threads * machine.processes for machine in machines))
    fits = available_memory() // max(run.estimate.memory_bytes for run in made.runs)
    return max(1, min(units, fits, len(made.runs)))


def _check_shape(job: Mapping[str, Any]) -> list[str]:
    """List everything wrong with the job file itself, before a single configuration is built."""
    known = (*REQUIRED_KEYS, *OPTIONAL_KEYS)
    found = [f"unknown key '{key}'{nearest(str(key), known)}" for key in job if key not in known]
    found += [f"the key '{key}' is missing" for key in REQUIRED_KEYS if key not in job]
    for key in ("study", "preset", "scale"):
        if key in job and not isinstance(job[key], str):
            found.append(f"{key} must be text, got {job[key]!r}")
    found += _check_list(job, "stages", str, "names of stages") + _check_list(job, "seeds", int, "whole numbers")
    found += _check_list(job, "figures", str, "names of notebooks", may_be_empty=True)
    if not found and (bad := [s for s in job["stages"] if s not in STAGES]):
        found.append(f"unknown stage '{bad[0]}'{nearest(bad[0], STAGES)} (stages: {', '.join(STAGES)})")
    elif not found and tuple(job["stages"]) != STAGES[: len(job["stages"])]:
        found.append(f"stages must be the first of {', '.join(STAGES)} in this order, got {', '.join(job['stages'])}")
    if not found and min(job["seeds"]) < 0:
        found.append(f"seeds must not be negative, got {min(job['seeds'])}")
    variants = job.get("variants")
    if "variants" in job and (not isinstance(variants, Mapping) or not variants):
        found.append("variants must map each variant's name to its overrides, such as 'no_xsa: {model.xsa: 0}'")
    elif isinstance(variants, Mapping):
        for name, own in variants.items():
            if not isinstance(name, str):
                found.append(f"variants: the name {name!r} is not text; put it in quotes")
            if own is not None and not isinstance(own, Mapping):
                found.append(f"variants: '{name}' must be a mapping of overrides ({{}} for none), got {own!r}")
    if job.get("overrides") is not None and not isinstance(job["overrides"], Mapping):
        found.append(f"overrides must be a mapping of keys to values, got {job['overrides']!r}")
    workers = job.get("workers", 1)
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        found.append(f"workers must be a whole number of at least 1, got {workers!r}")
    return found


def _check_list(job: Mapping[str, Any], key: str, kind: type, what: str, may_be_empty: bool = False) -> list[str]:
    value = job.get(key)
    if key not in job or (value is None and may_be_empty):
        return []
    if not isinstance(value, list) or not (value or may_be_empty):
        return [f"{key} must be a list of {what}, got {value!r}"]
    wrong = [item for item in value if not isinstance(item, kind) or isinstance(item, bool)]
    if wrong:
        return [f"{key} must be a list of {what}, got {wrong[0]!r}{_yaml_hint(wrong[0], kind)}"]
    twice = [item for item in dict.fromkeys(value) if value.count(item) > 1]
    return [f"{key} names {twice[0]!r} twice"] if twice else []


def _yaml_hint(value: object, kind: type) -> str:
    if kind is int and isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return ""
        if number.is_integer():
            return f"; YAML reads it as text: write {int(number)}"
    return ""


def _refuse_reserved(overrides: Mapping[str, Any]) -> None:
    for key, instead in (("seed", "seeds"), ("preset", "preset")):
        if key in overrides:
            raise ConfigError(f"'{key}' is no override: use the key '{instead}' of the job file")


def _refuse_equal_variants(path: Path, runs: list[PlannedRun]) -> None:
    seen: dict[str, str] = {}
    for run in runs:
        other = seen.setdefault(run.config.hash, run.variant)
        if other != run.variant:
            raise ConfigError(
                f"{path}: variants '{other}' and '{run.variant}' are the same configuration; remove one or change it"
            )


def _refuse_mixed_devices(path: Path, runs: list[PlannedRun]) -> None:
    """Refuse mixed devices: workers and GPUs are counted for the whole job, and numbers of two are not compared."""
    first = runs[0]
    for run in runs:
        if uses_gpu(run.config) != uses_gpu(first.config):
            devices = [f"'{r.variant}' (machine.device: {r.config.machine.device})" for r in (first, run)]
            raise ConfigError(
                f"{path}: variants {devices[0]} and {devices[1]} would train on different kinds of device here, one "
                "on a GPU and one on the CPU; give all variants the same machine.device, or write two job files"
            )


def _check_files(config: Config) -> None:
    for key, value in (("data.path", config.data.path), ("data.tokenizer", config.data.tokenizer)):
        if value and not resolve(value).exists():
            raise ConfigError(f"{key}: there is no {resolve(value)} (relative paths start at {project_root()})")


def _refuse_repeated_keys(path: Path) -> None:
    """Refuse repeated keys: YAML readers keep the last of two equal ones without a word, and a variant would vanish."""

    def walk(node: yaml.Node | None) -> None:
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        line = key.start_mark.line + 1
                        raise ConfigError(f"{path}, line {line}: the key '{key.value}' is there twice")
                    seen.add(key.value)
                walk(value)
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                walk(item)

    walk(yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader))


def _assigned_names(path: Path, source: str) -> list[str]:
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise ConfigError(f"{path}: the parameters cell is not plain Python ({error})") from None
    names: list[str] = []
    for statement in body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        parts = [part for t in targets for part in (t.elts if isinstance(t, ast.Tuple) else [t])]
        names += [part.id for part in parts if isinstance(part, ast.Name)]
    return names
