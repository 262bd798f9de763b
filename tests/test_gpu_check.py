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
    parts = ["attention", "step", "variants", "plain", "scoring", "compiled pr1166_e2e_ttt_flow 2", "run"]
    command = ["--device", "cpu", "--quick", "--steps", "30", "--out", str(out), "--parts", *parts]
    try:
        assert gpu_check.main([*command, "--minutes", "30"]) == 0
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    report = json.loads(out.read_text())
    assert {report[part]["status"] for part in report.keys() - {"machine", "started_at"}} == {"ok"}
    assert report["machine"]["machine"] and report["machine"]["ceilings_flops"]["float32"] > 1e8
    assert report["attention"]["blocked, float32"] < 1e-5
    assert "not run" in report["attention"]["flash3, bfloat16"]
    assert 0 < report["step pr1166_e2e_ttt_flow 2"]["optimizer_share"] < 1
    assert report["scoring"]["pr1166_e2e_ttt_flow, float32, largest difference in nats"] < 1e-4
    assert report["compiled pr1166_e2e_ttt_flow 2"]["graphs_after_warmup"] == 0
    assert report["run"]["steps"] == 30 and report["run"]["losses"][-1][1] < report["run"]["losses"][0][1]


def invented(monkeypatch: pytest.MonkeyPatch, **parts: tuple[float, gpu_check.Part]) -> None:
    monkeypatch.setattr(gpu_check.Check, "parts", lambda self: parts)
    monkeypatch.setattr(gpu_check.Check, "machine", lambda self: {})


def test_a_part_that_fails_is_noted_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def wrong() -> gpu_check.Values:
        raise ValueError("wrong numbers")

    invented(monkeypatch, first=(1, wrong), second=(1, lambda: {"value": 1}))
    out = tmp_path / "check.json"
    assert gpu_check.main(["--device", "cpu", "--out", str(out)]) == 1
    report = json.loads(out.read_text())
    assert report["first"]["message"] == "ValueError: wrong numbers"
    assert report["second"]["status"] == "ok" and report["second"]["value"] == 1


def test_parts_without_time_and_parts_not_asked_for_are_left_out(tmp_path, monkeypatch, capsys):
    invented(monkeypatch, long=(100, lambda: {}), short=(1, lambda: {}), other=(1, lambda: {}))
    out = tmp_path / "check.json"
    assert gpu_check.main(["--device", "cpu", "--minutes", "1", "--parts", "long", "sh", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["long"]["status"] == "skipped" and report["short"]["status"] == "ok" and "other" not in report
    assert "skipped: long" in capsys.readouterr().out


def test_an_eager_step_does_not_pass_for_a_compiled_one(monkeypatch):
    monkeypatch.setattr(gpu_check.compute, "why_not_compile", lambda device: "no compiler")
    check = gpu_check.Check(torch.device("cpu"), quick=True, count=1)
    with pytest.raises(gpu_check.GolfbookError, match="no compiler"):
        check.compiled(gpu_check.PRESET, 1)


def test_the_run_takes_what_was_fastest():
    check = gpu_check.Check(torch.device("cpu"), quick=True, count=1)
    for kind, rows, status, speed in (("step", 8, "ok", 9.0), ("compiled", 64, "ok", 20.0), ("step", 99, "failed", 0)):
        check.report[f"{kind} {gpu_check.PRESET} {rows}"] = {"status": status, "tokens_per_second": speed}
    assert check.fastest() == (f"compiled {gpu_check.PRESET} 64", True, 64, 20.0)
