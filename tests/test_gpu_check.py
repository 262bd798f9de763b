"""The GPU check skips where there is no GPU, and works from end to end at a size that a CPU can do."""

from __future__ import annotations

import json

import pytest
import torch

import gpu_check


def test_without_a_gpu_it_skips_and_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 0
    assert "no CUDA device" in capsys.readouterr().out


@pytest.mark.slow
def test_all_parts_on_a_cpu(golfbook_home, capsys):
    out = golfbook_home / "check.json"
    try:
        assert gpu_check.main(["--device", "cpu", "--quick", "--steps", "30", "--out", str(out)]) == 0
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    report = json.loads(out.read_text())
    assert {report[part]["status"] for part in ("attention", "compile", "benchmarks", "run")} == {"ok"}
    assert report["machine"]["machine"] and report["machine"]["ceilings_flops"]["float32"] > 1e8
    assert report["attention"]["blocked, float32"] < 1e-5
    assert "not run" in report["attention"]["flash3, bfloat16"]
    assert report["run"]["steps"] == 30 and report["run"]["losses"][-1][1] < report["run"]["losses"][0][1]
    assert report["compile"]["float32"]["graphs_after_warmup"] == 0


def test_a_part_that_fails_is_noted_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "check_attention", lambda *_: (_ for _ in ()).throw(ValueError("wrong numbers")))
    for name in ("check_compile", "check_benchmarks", "check_run"):
        monkeypatch.setattr(gpu_check, name, lambda *_: {"value": 1})
    out = tmp_path / "check.json"
    assert gpu_check.main(["--device", "cpu", "--out", str(out)]) == 1
    report = json.loads(out.read_text())
    assert report["attention"]["message"] == "ValueError: wrong numbers" and report["run"]["status"] == "ok"
