"""A whole job on the shipped notebooks with real training, at a size of seconds: run, repeated, and killed on the way.

The killed job must end with exactly the numbers and artifacts of the undisturbed one: nothing is lost or done twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import yaml
from filelock import FileLock

from fixture_project import kill, wait_for
from golfbook.data import dataset
from golfbook.files import atomic_write_bytes, sha256_file
from golfbook.run import STAGE_NOTEBOOKS, STAGES, Run, open_run

ROOT = Path(__file__).resolve().parents[1]
WORDS = "alpha beta gamma delta array function returns value element index list string model token byte weight"
STEPS = 30
PATIENCE = 300  # seconds; far more than anything here takes
OVERRIDES: dict[str, Any] = {
    "data": {"source": "text", "validation_fraction": 0.3},
    "model": {
        "vocab_size": 320, "num_layers": 2, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "rope_dims": 8,
        "xsa": 1, "bigram": {"vocab_size": 64, "dim": 8}, "value_embedding": {"dim": 8, "layers": [-1]},
    },
    "train": {
        "steps": STEPS, "batch_tokens": 128, "sequence_length": 32, "schedule": {"warmdown_steps": 15},
        "averaging": {"ema_decay": 0.5}, "optimizer": {"muon_momentum_warmup_steps": 10},
    },
    "machine": {"validate_every": 10, "log_every": 1, "checkpoint_every": 2},
    "quantize": {"passthrough_numel": 256},
    "score": {"stride": 8},
}  # fmt: skip


@dataclass
class Home:
    """A folder with a corpus and a job file; runs, cache and figures lie in it, named by relative paths."""

    path: Path
    printed: str = ""
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def write(self, documents: Path, **more: Any) -> None:
        overrides = {**OVERRIDES, "data": {**OVERRIDES["data"], "path": str(documents)}}
        job = {
            "study": "whole",
            "preset": "quickstart",
            "stages": list(STAGES),
            "seeds": [7],
            "variants": {"skips": {}, "no_skips": {"model.unet_skips": False}},
            "workers": 2,
            "overrides": overrides,
            **more,
        }
        (self.path / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        folders = {"GOLFBOOK_RUNS": "runs", "GOLFBOOK_CACHE": "cache", "GOLFBOOK_FIGURES": "pictures"}
        process = subprocess.Popen(
            [sys.executable, "-m", "golfbook.cli", *arguments], cwd=self.path, text=True, start_new_session=True,
            env={**os.environ, **folders, "GOLFBOOK_ROOT": str(ROOT), "COLUMNS": "160"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.started.append(process)
        return process

    def end(self) -> None:
        """Stop, in order, what a failed test has left running."""
        for process in self.started:
            if process.poll() is None:
                process.terminate()
                process.communicate(timeout=PATIENCE)

    def call(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        output = process.communicate(timeout=PATIENCE)[0]
        return process.returncode, output

    def folder(self, variant: str) -> Path | None:
        """The run folder of a variant, once it is there."""
        return next((path.parent for path in self.path.glob(f"runs/whole/{variant}-s7-*/config.json")), None)

    def run(self, variant: str) -> Run:
        path = self.folder(variant)
        assert path is not None
        return open_run(path)

    def numbers(self, variant: str) -> dict[str, Any]:
        """Everything a run found that must not depend on how often it was interrupted."""
        run = self.run(variant)
        assert [run.state(stage) for stage in STAGES] == ["done"] * 3
        results = {stage: run.read_result(stage) or {} for stage in STAGES}
        curve = {(p["kind"], p["step"]): (p.get("loss"), p.get("val_loss")) for p in run.read_metrics()}
        assert set(curve) >= {("train", step) for step in range(1, STEPS + 1)}
        assert results["quantization"]["writes"]["sha256"] == sha256_file(run.artifact_path)
        return {
            "folder": run.path.name,
            "val_bpb": {stage: result["val_bpb"] for stage, result in results.items()},
            "val_loss": {stage: result["val_loss"] for stage, result in results.items()},
            "tokens_seen": results["training"]["tokens_seen"],
            "artifact_sha256": results["quantization"]["writes"]["sha256"],
            "artifact_bytes": results["quantization"]["artifact_bytes"],
            "curve": curve,
        }


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test run have in common."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "whole_job"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def documents(shared: Path) -> Path:
    draw = random.Random(0)
    texts = [" ".join(draw.choice(WORDS.split()) for _ in range(draw.randint(30, 90))) for _ in range(200)]
    path = shared / "documents.jsonl"
    atomic_write_bytes(path, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    return path


@pytest.fixture(scope="module")
def undisturbed(shared: Path, documents: Path) -> Home:
    """The job run once from nothing to its end, by whichever process of the test run comes first."""
    home, printed = Home(shared / "undisturbed"), shared / "printed.txt"
    with FileLock(shared / "lock"):
        if not printed.exists():
            home.path.mkdir()
            home.write(documents, figures=["10_seeds"])
            code, output = home.call("run", "job.yaml")
            assert code == 0, output
            printed.write_text(output, encoding="utf-8")
    home.printed = printed.read_text(encoding="utf-8")
    return home


def test_one_command_leaves_numbers_tables_notebooks_and_figures(undisturbed: Home) -> None:
    table = pd.read_parquet(undisturbed.path / "runs/whole/results.parquet").set_index("variant")
    assert sorted(table.index) == ["no_skips", "skips"]
    for variant in table.index:
        numbers, run = undisturbed.numbers(variant), undisturbed.run(variant)
        for stage in STAGES:
            assert table[f"{stage}_val_bpb"][variant] == numbers["val_bpb"][stage]
            assert (run.notebooks_path / f"{STAGE_NOTEBOOKS[stage]}.ipynb").is_file()
        assert table["artifact_bytes"][variant] == run.artifact_path.stat().st_size
        headline = numbers["val_bpb"]["test_time_training"]
        assert headline < table["unigram_bpb"][variant] * 1.5
        [line] = [x for x in undisturbed.printed.splitlines() if x.startswith(f"{variant} ") and "±" in x]
        assert f"{headline:.4f} ± –" in line and f"{table['artifact_bytes'][variant]:,}" in line
    first, second = (undisturbed.numbers(variant) for variant in ("skips", "no_skips"))
    assert first["val_bpb"] != second["val_bpb"] and first["artifact_sha256"] != second["artifact_sha256"]
    drawn = pd.read_csv(undisturbed.path / "pictures/whole_seeds.csv").set_index("variant")["val_bpb"]
    assert drawn.to_dict() == pytest.approx(table["test_time_training_val_bpb"].to_dict())
    assert (undisturbed.path / "pictures/whole_seeds.png").stat().st_size > 1000
    curves = pd.read_parquet(undisturbed.path / "runs/whole/metrics.parquet")
    assert (curves[curves["kind"] == "train"].groupby("variant").size() == STEPS).all()


def test_relative_folders_are_one_place_for_command_notebook_and_trainer(undisturbed: Home) -> None:
    assert {path.name for path in undisturbed.path.iterdir()} == {"job.yaml", "runs", "cache", "pictures"}
    for wrong in ("pictures", "notebooks/pictures", "cache", "notebooks/cache", "notebooks/runs"):
        assert not (ROOT / wrong).exists()


def test_the_artifact_alone_gives_the_headline_on_the_validation_text(
    undisturbed: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`golfbook score` reads nothing but the artifact, its tokenizer and a text; the number is that of the job."""
    monkeypatch.setenv("GOLFBOOK_CACHE", str(undisturbed.path / "cache"))
    run = undisturbed.run("skips")
    data = dataset.prepare(run.config)
    starts = [i for i, token in enumerate(data.val_tokens) if token == data.tokenizer.bos_id]
    parts = [data.val_tokens[a + 1 : b] for a, b in zip(starts, [*starts[1:], len(data.val_tokens)], strict=True)]
    texts = [data.tokenizer.decode(part) for part in parts]
    assert sum(len(text.encode()) for text in texts) == data.val_bytes
    held_out = undisturbed.path.parent / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    code, printed = undisturbed.call("score", str(run.artifact_path), "--text", str(held_out), "--stride", "8")
    assert code == 0, printed
    headline = (run.read_result("test_time_training") or {})["val_bpb"]
    found = re.search(r"bits per byte\s+([\d.]+)", printed)
    assert found and float(found[1]) == pytest.approx(headline, abs=1e-6)


def test_the_same_command_again_does_nothing(undisturbed: Home) -> None:
    def written() -> dict[Path, int]:
        files = [p for name in ("runs", "pictures") for p in (undisturbed.path / name).rglob("*") if p.is_file()]
        return {path: path.stat().st_mtime_ns for path in files if path.suffix != ".lock"}  # taking a lock may touch it

    before = written()
    code, printed = undisturbed.call("run", "job.yaml")
    assert code == 0 and "Nothing to do: every stage and figure of this job is done." in printed
    assert written() == before


def trainer_of(home: Home, variant: str) -> tuple[psutil.Process, psutil.Process] | None:
    """The detached launcher of a run and its worker, the process that trains; None before they are there."""
    path = home.folder(variant)
    if path is None or not (path / "trainer.json").is_file():
        return None
    launcher = psutil.Process(json.loads((path / "trainer.json").read_text())["pid"])
    workers = [p for p in launcher.children() if "golfbook.train.loop" in p.cmdline()]
    return (launcher, workers[0]) if workers else None


def stop_after_first_checkpoint(home: Home, variant: str) -> tuple[psutil.Process, psutil.Process]:
    """Freeze the worker of a run as soon as its first checkpoint is whole, so that it is certainly mid-way."""
    wait_for(lambda: trainer_of(home, variant), "the trainer has started", PATIENCE)
    processes, path = trainer_of(home, variant), home.folder(variant)
    assert processes is not None and path is not None
    limit = time.monotonic() + PATIENCE
    while not (path / "checkpoint.safetensors").exists():
        assert time.monotonic() < limit and processes[1].is_running()
        time.sleep(0.002)
    processes[1].suspend()
    assert not (path / "result.training.json").exists(), "the trainer was done before it could be stopped"
    return processes


def kernel_of(command: subprocess.Popen[str], stage: str, variant: str) -> psutil.Process | None:
    """The kernel that executes the notebook of a stage for a run of this command."""
    for process in psutil.Process(command.pid).children():
        with contextlib.suppress(psutil.Error):  # it may end at any moment
            words = process.cmdline()
            if (
                "golfbook.study.notebook" in words
                and stage in words
                and any(f"/{variant}-s7-" in word for word in words)
            ):
                return next((child for child in process.children() if "ipykernel_launcher" in child.cmdline()), None)
    return None


def command_line(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):  # it may have ended meanwhile
        return process.cmdline()
    return []


def gone(processes: list[psutil.Process]) -> None:
    for process in processes:
        wait_for(
            lambda p=process: not p.is_running() or p.status() == psutil.STATUS_ZOMBIE, f"{process} ends", PATIENCE
        )


def test_a_job_killed_in_training_and_in_quantization_ends_with_the_same_numbers(
    undisturbed: Home, documents: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    home = Home(tmp_path)
    home.write(documents)
    request.addfinalizer(home.end)

    # kill -9 of the command and of one trainer's worker; the other trainer is detached and may go on by itself
    command = home.start("run", "job.yaml")
    launcher, worker = stop_after_first_checkpoint(home, "skips")
    below = [p for p in psutil.Process(command.pid).children(recursive=True) if p not in (launcher, worker)]
    attached = [p for p in below if {"golfbook.study.notebook", "ipykernel_launcher"} & set(command_line(p))]
    assert len(attached) == 4, "two stage processes and their kernels"
    kill(command.pid)
    command.wait()
    kill(worker.pid)
    gone([*attached, launcher, worker])
    run = home.run("skips")
    assert run.read_result("training") is None or run.state("training") == "failed"
    assert run.checkpoint_path.is_file()

    # again; now kill -9 of the kernel that quantises: the command reports it and finishes the other variant
    command = home.start("run", "job.yaml")
    wait_for(lambda: kernel_of(command, "quantization", "skips"), "quantization has begun", PATIENCE)
    kernel = kernel_of(command, "quantization", "skips")
    assert kernel is not None
    kill(kernel.pid)
    output = command.communicate(timeout=PATIENCE)[0]
    assert command.returncode == 1, output
    assert "FAILED skips-s7, quantization: " in output
    resumed = [int(n) for n in re.findall(r"resuming at step (\d+)", run.log_path.read_text())]
    assert len(resumed) == 1 and 2 <= resumed[0] < STEPS and resumed[0] % 2 == 0
    assert run.state("training") == "done" and run.state("quantization") == "failed"
    assert home.numbers("no_skips") == undisturbed.numbers("no_skips")

    # and once more, to the end
    code, output = home.call("run", "job.yaml")
    assert code == 0, output
    assert home.numbers("skips") == undisturbed.numbers("skips")
    tables = [pd.read_parquet(h.path / "runs/whole/results.parquet") for h in (home, undisturbed)]
    for column in ("variant", "config_hash", "dataset_fingerprint", *(f"{stage}_val_bpb" for stage in STAGES)):
        assert tables[0][column].tolist() == tables[1][column].tolist(), column
    assert not list(home.path.rglob("*.partial.ipynb")) and not list(home.path.rglob("*.tmp"))
