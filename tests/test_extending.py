"""The diffs of docs/extending.md, applied to a copy of the project, work: from training to score and figure."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from golfbook.files import atomic_write_json
from test_whole_job import OVERRIDES, WORDS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
DIFFS = {
    section.partition("\n")[0]: re.findall(r"```diff\n(.*?)```", section, flags=re.S)
    for section in PAGE.split("\n## ")[1:]
}
# Library files that an extension may touch, its own among them.
MOST = {"A layer": 3, "A quantiser": 2, "A coder": 2, "An adaptation rule": 2, "An executor": 2, "A figure": 1}
SETTINGS = {"model.token_gain": True, "quantize.quantizer": "one_step", "quantize.coder": "bzip2"}
ADAPT = """
import json, sys, torch
import numpy as np
from golfbook.compress.container import read_artifact
from golfbook.config.load import load_config
from golfbook.config.tables import RULES, named
from golfbook.evaluate.adaptation import adapt_and_score
from golfbook.model.costs import per_token
from golfbook.run import open_run
from golfbook.train.muon import parameter_groups
torch.set_num_threads(1)
run = open_run(sys.argv[1])
artifact = read_artifact(run.artifact_path)
tokens = np.tile(np.arange(5, 37, dtype=np.uint16), 20)
sums = {}
for name in ("keep", "one_pass"):
    model = artifact.build()
    nll = adapt_and_score(model, tokens, named(RULES, name), window=32, stride=32, chunk=64, batch_windows=1)
    sums[name] = float(nll[64:].sum())
weight = artifact.state["token_gain.direction.weight"]
print(json.dumps({
    "sums": sums, "coder": artifact.quantize_config.coder, "learnt": float(weight.abs().max()),
    "steps": max(t.scale.unique().numel() for t in artifact.quantized.values() if t.kind == "int" and t.scale.ndim),
    "group": [k for k, v in parameter_groups(model, run.config.train).items() if "token_gain.direction.weight" in v],
    "work": per_token(run.config.model, 32).forward["token gain"],
}))
"""


def test_every_extension_has_one_diff_that_touches_little() -> None:
    assert {name: len(found) for name, found in DIFFS.items()} == dict.fromkeys(MOST, 1)
    for name, (diff,) in DIFFS.items():
        files = re.findall(r"^\+\+\+ b/(\S+)$", diff, flags=re.M)
        library = [file for file in files if file.startswith("lib/")]
        assert 1 <= len(library) <= MOST[name], f"{name} touches {', '.join(library)}"
        others = [file for file in files if file not in library]
        assert len(others) == (1 if name == "A figure" else 0), others


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with all diffs applied."""
    root = tmp_path_factory.mktemp("extended")
    for name in ("lib", "notebooks", "papermill_jobs", "runs/published", "runs/reference", "pyproject.toml"):
        source = ROOT / name
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", ".ipynb_checkpoints")
        shutil.copytree(source, root / name, ignore=ignore) if source.is_dir() else shutil.copy(source, root / name)
    for (diff,) in DIFFS.values():
        subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=root, check=True)
    return root


def call(root: Path, *arguments: str) -> str:
    """Run this Python on the copy of the project."""
    folders = {"ROOT": ".", "RUNS": "runs", "CACHE": "cache", "FIGURES": "figures"}
    environment = {**os.environ, **{f"GOLFBOOK_{k}": str(root / v) for k, v in folders.items()}}
    environment |= {"PYTHONPATH": str(root / "lib"), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_extensions_pass_the_projects_own_checks(extended: Path) -> None:
    for arguments in (["check", "."], ["format", "--check", "."]):
        subprocess.run([sys.executable, "-m", "ruff", *arguments], cwd=extended, check=True)
    plan = "import sys; sys.path.insert(0, sys.argv[1]); import test_imports as t"
    call(extended, "-c", f"{plan}; [t.test_imports_go_down(module) for module in t.MODULES]", str(ROOT / "tests"))


def test_the_extensions_work_together(extended: Path) -> None:
    documents = extended / "documents.jsonl"
    words = WORDS.split()
    texts = [" ".join(words[(i * k) % len(words)] for k in range(1, 120)) for i in range(1, 60)]
    documents.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    overrides = {**OVERRIDES, "data": {**OVERRIDES["data"], "path": str(documents)}}
    job = {
        "study": "mine", "preset": "quickstart", "stages": ["training", "quantization", "test_time_training"],
        "seeds": [1], "variants": {"extended": SETTINGS}, "figures": ["20_speed"], "overrides": overrides,
    }  # fmt: skip
    (extended / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    atomic_write_json(extended / "cache/.keep.json", {})
    call(extended, "-m", "golfbook.cli", "run", "job.yaml", "--executor", "patient")
    (run,) = extended.glob("runs/mine/extended-s1-*")
    assert (extended / "figures/mine_speed.png").is_file() and (extended / "figures/mine_speed.csv").is_file()
    found = json.loads(call(extended, "-c", ADAPT, str(run)))
    assert found["coder"] == "bzip2" and found["steps"] == 1, "one step for a whole matrix"
    assert found["learnt"] > 0 and found["group"] == ["scalar"] and found["work"] == 2 * 32
    assert found["sums"]["one_pass"] < found["sums"]["keep"], "a repeated text is learnt on the way"
