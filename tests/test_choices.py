"""What is chosen for a machine: decisions on invented timings, one decision for a study, and a real measurement."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from itertools import cycle
from pathlib import Path

import pytest
import torch

from conftest import invent_choices
from golfbook import compute
from golfbook.compute import Choices
from golfbook.config.load import load_config
from golfbook.run import Run, create_run
from golfbook.train import choices

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"default": 1.0, "other": 0.5}, "other"),
        ({"default": 1.0, "other": 0.95}, "default"),  # faster, but not clearly
        ({"default": 1.0, "other": 1.5}, "default"),
        ({"default": 1.10, "other": 1.0}, "other"),
        ({"default": 1.0, "other": 0.9, "third": 0.8}, "third"),
    ],
)
def test_a_default_is_left_only_for_a_clear_gain(seconds, chosen):
    assert choices.decide(seconds, "default") == chosen


def test_a_race_takes_turns_and_keeps_the_least_time():
    order, moment = [], cycle([0.0, 3.0, 0.0, 1.0, 0.0, 2.0, 0.0, 5.0])  # a reads 3, b 1, a 2, b 5
    found = choices.race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.0, lambda: next(moment))
    assert found == {"a": 2.0, "b": 1.0}
    assert "".join(order) == "ababab"  # the first pair warms up


def timings(monkeypatch, invented: dict[str, float]) -> None:
    """Let every race end with invented times, and nothing run."""

    def race(candidates, seconds, clock):
        return {name: invented.get(name, 1.0) for name in candidates}

    monkeypatch.setattr(choices, "race", race)
    monkeypatch.setattr(compute, "products_are_exact", lambda library: True)


def test_each_choice_follows_its_own_timings(monkeypatch):
    timings(monkeypatch, {"onednn": 0.5, "bfloat16": 0.6, "blocked": 0.95})
    found = choices.measure(CPU)
    assert (found.products, found.precision) == ("onednn", {"short": "bfloat16", "long": "bfloat16"})
    assert set(found.attention.values()) == {"sdpa"} and len(found.attention) == 8
    text = "\n".join(choices.describe(found))
    assert "precision, short: bfloat16 (float32 1e+03 ms, bfloat16 600 ms)" in text
    assert "attention, training, bfloat16, long: sdpa (sdpa 1e+03 ms, blocked 950 ms)" in text


def test_slow_bfloat16_products_end_the_matter(monkeypatch):
    timings(monkeypatch, {"bfloat16": 3.0, "blocked": 0.5})
    found = choices.measure(CPU)
    assert found.precision == {"short": "float32", "long": "float32"}
    assert found.attention == {
        compute.case(training, torch.float32, time): "blocked" for training in (True, False) for time in (256, 2048)
    }
    assert found.seconds[choices.TRIAL] == {"float32": 1.0, "bfloat16": 3.0}


def test_a_library_that_rounds_is_no_candidate(monkeypatch):
    timings(monkeypatch, {"onednn": 0.1})
    monkeypatch.setattr(compute, "products_are_exact", lambda library: library == "torch")
    assert choices.measure(CPU).products == "torch"


@pytest.fixture
def run(golfbook_home: Path) -> Run:
    return create_run("study", "base", load_config("quickstart", seed=1))


def test_one_decision_for_a_study_and_for_each_of_its_runs(run, golfbook_home, monkeypatch):
    def never(device):
        raise AssertionError("measured again")

    monkeypatch.setattr(choices, "measure", never)
    first = choices.of_run(run, CPU)
    assert first.attention["training, float32, short"] == "blocked"
    assert json.loads((run.path / "choices.json").read_text()) == {"cpu": asdict(first)}
    invent_choices(golfbook_home / "cache", precision={"short": "bfloat16", "long": "bfloat16"})
    assert choices.of_machine(CPU).precision["short"] == "bfloat16"
    other = create_run("study", "base", load_config("quickstart", seed=2))
    assert choices.of_run(other, CPU) == first  # as its study
    assert choices.of_run(run, CPU) == first  # as it began
    elsewhere = create_run("second", "base", load_config("quickstart", seed=2))
    assert choices.of_run(elsewhere, CPU).precision["short"] == "bfloat16"


def test_choices_that_cannot_be_followed_here_are_made_again(run, caplog):
    kept = asdict(choices.of_run(run, CPU))
    kept["attention"] = {"training, bfloat16, long": "flash3"}
    (run.path / "choices.json").write_text(json.dumps({"cpu": kept}))
    assert "flash3" not in choices.of_run(run, CPU).attention.values()
    assert "cannot run here" in caplog.text and run.name in caplog.text


def test_a_gpu_does_not_follow_what_was_measured_on_the_cpu(run, monkeypatch):
    """A notebook computes on the CPU while the trainer of the same run has the GPU."""
    gpu, identity = torch.device("cuda", 0), choices.identity
    monkeypatch.setattr(choices, "identity", lambda device: identity(CPU) | {"device": device.type})
    monkeypatch.setattr(choices, "measure", lambda device: Choices(precision={"long": device.type}))
    assert [choices.of_run(run, device).precision["long"] for device in (CPU, gpu, CPU)] == ["cpu", "cuda", "cpu"]


def test_a_candidate_that_cannot_run_is_left_out(caplog):
    def broken():
        raise RuntimeError("built for another torch")

    assert choices.race({"sdpa": lambda: None, "flash3": broken}, 0.0, lambda: 0.0) == {"sdpa": 0.0}
    assert "'flash3' is left out" in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[]", '{"unknown": 1}'])
def test_a_damaged_file_is_measured_again(content, golfbook_home, monkeypatch):
    path = choices.cached(choices.identity(CPU))
    path.write_text(content)
    monkeypatch.setattr(choices, "measure", lambda device: Choices("onednn"))
    assert choices.of_machine(CPU).products == "onednn"
    assert choices.of_machine(CPU) == Choices("onednn") and json.loads(path.read_text())["products"] == "onednn"


def test_a_cache_that_cannot_be_written_costs_only_the_measurement(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("GOLFBOOK_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(choices, "measure", lambda device: Choices("onednn"))
    assert choices.of_machine(CPU).products == "onednn"
    assert "could not be kept" in caplog.text


def test_switches_of_the_libraries_make_another_machine(monkeypatch):
    before = choices.identity(CPU)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "another")
    assert choices.cached(choices.identity(CPU)) != choices.cached(before)


def test_a_real_measurement_is_whole_and_draws_no_random_numbers():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    found = choices.measure(CPU)
    assert torch.equal(torch.rand(1), expected)
    assert set(found.precision) == {"short", "long"} and set(found.attention.values()) <= {"sdpa", "blocked"}
    for name, seconds in found.seconds.items():
        assert all(value > 0 for value in seconds.values()), name
        if name.startswith("attention"):
            default, chosen = seconds["sdpa"], seconds[found.attention[name.removeprefix("attention, ")]]
            assert chosen <= min(seconds.values()) * choices.CLEAR_GAIN and chosen <= default
    assert choices.why_not(found, CPU) == ""


def test_compiled_code_is_kept_apart_for_each_kind_of_machine(golfbook_home, monkeypatch):
    folders = []
    for capability in ("AVX2", "AVX512"):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        monkeypatch.setattr(choices, "measure", lambda device: Choices())
        choices.set_up(1, CPU)
        folders.append(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]))
    assert folders[0] != folders[1] and {path.parent for path in folders} == {golfbook_home / "cache" / "inductor"}
    choices.set_up(1, CPU)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    for name in ("a cache", "documents.jsonl"):  # torch cannot compile into the one, nobody can write into the other
        (golfbook_home / "documents.jsonl").touch()
        monkeypatch.setenv("GOLFBOOK_CACHE", str(golfbook_home / name))
        choices.set_up(1, CPU)
        assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    choices.set_up(1, CPU)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"
