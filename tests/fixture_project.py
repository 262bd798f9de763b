"""A small project for tests of the job runner: notebooks that write results through golfbook.run, and train nothing.

A file ``<fault>-<variant>-s<seed>`` in the project folder makes the training notebook of that run misbehave, or start
what the rest of the library takes for its trainer.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
import yaml

JOB: dict[str, Any] = {
    "study": "small",
    "preset": "quickstart",
    "stages": ["training", "quantization", "test_time_training"],
    "seeds": [1],
    "variants": {"xsa": {}, "no_xsa": {"model.xsa": 0}},
    "figures": ["10_seeds"],
}

PARAMETERS = """
preset: str = "quickstart"  # preset
seed: int = 1
study: str = "alone"
variant: str = "base"
overrides: dict = {}
run_dir: str = ""
"""

OPEN = """
import os, signal, time
from pathlib import Path
from golfbook.errors import DataError
from golfbook.files import project_root, sha256_bytes, sha256_file
from golfbook.run import notebook_run
run = notebook_run(preset, seed, overrides, study, variant, run_dir)
(run.path / "pid.txt").write_text(str(os.getpid()))
with (run.path / "executions.txt").open("a") as stream:
    stream.write(os.environ["OMP_NUM_THREADS"] + "\\n")
def fault(name):
    return (project_root() / f"{name}-{run.variant}-s{seed}").exists()
"""

TRAINER = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[-1])
def save(*_):
    (folder / "saved.txt").touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn" in sys.argv else save)
(folder / "training.txt").touch()
time.sleep(300)
"""

TRAINING = [
    """
if fault("kill"):
    os.kill(os.getpid(), signal.SIGKILL)
""",
    """
if fault("error"):
    raise ValueError("a broken cell")
if fault("data"):
    raise DataError("shard 7 is one byte short; download it again")
""",
    """
if fault("trainer") or fault("stubborn"):
    from fixture_project import start_trainer
    trainer = start_trainer(run.path, stubborn=fault("stubborn"))
    while fault("trainer") or fault("stubborn"):
        time.sleep(0.1)
step = max([p["step"] for p in run.read_metrics()], default=0)
while step < 40:
    step += 10
    run.append_metrics({"kind": "train", "step": step, "loss": 1 / step})
    while fault("slow"):
        time.sleep(0.1)
""",
    """
run.checkpoint_path.write_text(run.config.hash)
value = 2.0 + int(run.config.hash, 16) / 16**10
run.write_result(
    "training",
    {
        "val_bpb": value, "val_loss": value, "train_seconds": 5.0, "parameters": 1000, "unigram_bpb": 4.5,
        "validation_changes": "1 characters in 1 of 2 documents: '[A]' became '[a]'",
    },
    reads={}, writes=run.checkpoint_path,
)
""",
    """
if fault("plot"):
    raise ValueError("a plot failed after the result was written")
""",
]

QUANTIZATION = [
    """
run.artifact_path.write_bytes(run.checkpoint_path.read_bytes() * 3)
run.write_result(
    "quantization",
    {
        "val_bpb": value_of(run) + 0.01, "artifact_bytes": 30, "code_bytes": 70, "total_bytes": 100,
        "limit_bytes": 16000000, "within_budget": True, "quantize_seconds": 1.0,
    },
    reads={"checkpoint.safetensors": sha256_file(run.checkpoint_path)}, writes=run.artifact_path,
)
"""
]

SCORING = [
    """
run.write_result(
    "test_time_training",
    {"val_bpb": value_of(run) - 0.01, "tokens": 999, "artifact_bytes": 30, "score_seconds": 2.0},
    reads={"artifact.golf": sha256_file(run.artifact_path)}, writes=run.artifact_path,
)
"""
]

VALUE = "def value_of(run):\n    return run.read_result('training')['val_bpb']"

FIGURE = """
import subprocess, sys
from golfbook.files import figures_root, project_root, runs_root
count = len(list((runs_root() / study).glob("*/result.test_time_training.json")))
(figures_root() / f"{study}_seeds.png").write_text(f"{count} runs")
other = f"import pathlib; pathlib.Path({str(figures_root() / 'of_another.png')!r}).touch()"
subprocess.run([sys.executable, "-c", other], check=True)
with (project_root() / "figure_count.txt").open("a") as stream:
    stream.write("x")
"""


def notebook(path: Path, parameters: str, cells: list[str]) -> None:
    """Write a notebook with one tagged cell and the given code cells."""
    first = nbformat.v4.new_code_cell(parameters.strip(), metadata={"tags": ["parameters"]})
    book = nbformat.v4.new_notebook(cells=[first, *(nbformat.v4.new_code_cell(cell.strip()) for cell in cells)])
    nbformat.write(book, path)


class Project:
    """A temporary project folder with a job file."""

    def __init__(self, root: Path) -> None:
        root.mkdir(exist_ok=True)
        self.root, self.runs, self.job = root, root / "runs", root / "papermill_jobs" / "job.yaml"
        self.output, self.temporary = "", root / "t"
        for name in ("notebooks", "papermill_jobs", "figures"):
            (root / name).mkdir()
        notebook(root / "notebooks/03_training.ipynb", PARAMETERS, [OPEN, *TRAINING])
        notebook(root / "notebooks/04_quantization.ipynb", PARAMETERS, [OPEN, VALUE, *QUANTIZATION])
        notebook(root / "notebooks/05_test_time_training.ipynb", PARAMETERS, [OPEN, VALUE, *SCORING])
        notebook(root / "notebooks/10_seeds.ipynb", "study: str = 'small'", [FIGURE])
        self.write_job()
        self.temporary.mkdir()
        spec = root / "jupyter/kernels/python3/kernel.json"
        spec.parent.mkdir(parents=True)
        spec.write_text(json.dumps({"argv": ["/another/python", "-f", "{connection_file}"], "display_name": "other"}))

    def write_job(self, **changes: Any) -> Path:
        """Write the job file; a value of None removes its key."""
        job = {key: value for key, value in {**JOB, **changes}.items() if value is not None}
        self.job.write_text(yaml.safe_dump(job, sort_keys=False))
        return self.job

    def fault(self, name: str, run: str = "xsa-s1") -> Path:
        """Make the training notebook of a run misbehave until the returned file is removed."""
        path = self.root / f"{name}-{run}"
        path.touch()
        return path

    def folder(self, run: str = "xsa-s1") -> Path:
        """The one run folder of a variant and seed."""
        [path] = (self.runs / "small").glob(f"{run}-*")
        return path

    def results(self) -> dict[str, dict[str, Any]]:
        """All result files by ``<run>/<stage>``, without the time they were written."""
        found = {}
        for path in sorted(self.runs.glob("*/*/result.*.json")):
            value = json.loads(path.read_text())
            value.pop("finished_at", None)
            found[f"{path.parent.name}/{path.name}"] = value
        return found

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "golfbook.cli", *arguments]

    def environment(self) -> dict[str, str]:
        """With another environment's kernel named python3, a temporary folder of its own, and this module."""
        return {
            **os.environ,
            "GOLFBOOK_ROOT": str(self.root),
            "GOLFBOOK_RUNS": str(self.runs),
            "COLUMNS": "160",
            "JUPYTER_PATH": str(self.root / "jupyter"),
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        }

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the command line in the background, in a process group of its own."""
        return subprocess.Popen(
            self.command(*arguments), env=self.environment(), cwd=self.root, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command line to its end."""
        return subprocess.run(
            self.command(*arguments), env=self.environment(), cwd=self.root, text=True, capture_output=True, timeout=120
        )


def start_trainer(folder: Path, *, stubborn: bool = False, job: bool = True) -> subprocess.Popen[bytes]:
    """Start a detached process that looks like the trainer of a run folder; a stubborn one does not heed SIGTERM."""
    kind = "stubborn" if stubborn else "obedient"
    command = [sys.executable, "-c", TRAINER, kind, "torch.distributed.run", "-m", "golfbook.train.loop", str(folder)]
    process = subprocess.Popen(command, start_new_session=True)
    (folder / "trainer.json").write_text(json.dumps({"pid": process.pid, "job": job}))
    wait_for((folder / "training.txt").exists, "the trainer has begun")
    return process


def trainers(folder: Path) -> set[str]:
    """Names of the run folders below a folder on which a process works as a trainer."""
    words = [process.info["cmdline"] or [""] for process in psutil.process_iter(["cmdline"])]
    return {Path(w[-1]).name for w in words if "golfbook.train.loop" in w and w[-1].startswith(str(folder))}


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Wait until a condition holds; fail the test where it never does."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            pytest.fail(f"waited {seconds} s in vain: {what}")
        time.sleep(0.05)


def kill(pid: int) -> None:
    """What ``kill -9`` does."""
    os.kill(pid, signal.SIGKILL)
