"""Every shipped preset at scale tiny through the whole job: plan, three stage notebooks by papermill, collect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from golfbook.config.load import load_config, preset_names
from golfbook.model.gpt import parameter_table

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("preset", [name for name in preset_names() if name != "quickstart"])
def test_preset_runs_through_the_whole_job(preset: str, tmp_path: Path) -> None:
    words = (
        "model",
        "token",
        "byte",
        "weight",
        "layer",
        "gate",
        "norm",
        "head",
        "value",
        "query",
        "score",
        "loss",
        "seed",
    )
    lines = [json.dumps({"text": " ".join(words[(i * j) % 11] for j in range(1, 60)) + f" {i}"}) for i in range(200)]
    (tmp_path / "documents.jsonl").write_text("\n".join(lines), encoding="utf-8")
    overrides = {
        "data": {"source": "text", "path": str(tmp_path / "documents.jsonl"), "max_validation_tokens": 600},
        "model.vocab_size": 320,
        "train": {
            "steps": 8,
            "batch_tokens": 256,
            "schedule": {"warmdown_steps": 4},
            "optimizer": {"muon_momentum_warmup_steps": 4},
        },
    }
    job = {
        "study": "presets",
        "preset": preset,
        "scale": "tiny",
        "stages": ["training", "quantization", "test_time_training"],
        "seeds": [1],
        "variants": {"base": {}},
        "overrides": overrides,
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")
    environment = os.environ | {"GOLFBOOK_RUNS": str(tmp_path / "runs"), "GOLFBOOK_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "golfbook.cli", "run", str(tmp_path / "job.yaml")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    [row] = pd.read_parquet(tmp_path / "runs" / "presets" / "results.parquet").to_dict("records")
    config = load_config(preset, scale="tiny", overrides={"model.vocab_size": 320})
    assert row["parameters"] == parameter_table(config.model)["total"]
    assert row["quantization_val_loss"] == row["dequantized_val_loss"]
    assert row["test_time_training_val_bpb"] < row["unigram_bpb"] * 3
