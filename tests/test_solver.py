"""Filling a byte budget: plans fit and fill it, know their bytes and loss, and say where none fits; the whole stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from golfbook.compress.budget import code_bytes
from golfbook.compress.container import read_artifact
from golfbook.compress.export import export, quantize_model
from golfbook.compress.fit import Fitted
from golfbook.compress.quantizer import Statistics, dequantize
from golfbook.compress.solver import FULL
from golfbook.compress.statistics import collect
from golfbook.config.load import load_config
from golfbook.config.schema import Config
from golfbook.data import dataset
from golfbook.errors import ConfigError
from golfbook.model.gpt import GPT, initialise
from golfbook.plain import gptq as plain
from golfbook.run import create_run
from golfbook.study import stages

SMALL = {
    "model.model_dim": 32, "model.num_layers": 3, "model.num_heads": 2, "model.num_kv_heads": 1, "model.rope_dims": 8,
    "model.xsa": 1, "model.vocab_size": 300, "model.bigram.vocab_size": 128, "model.bigram.dim": 16,
    "model.value_embedding.dim": 16,
}  # fmt: skip
SOLVE = {"quantize.quantizer": "rate_distortion", "quantize.coder": "entropy", "quantize.fit": "solve"}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> GPT:
    made = initialise(GPT(load_config("quickstart", overrides=SMALL).model), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


@pytest.fixture(scope="module")
def statistics(model: GPT) -> Statistics:
    text = torch.randint(300, (8, 33), generator=torch.Generator().manual_seed(0))
    return collect(model, [(text[:, :-1], text[:, 1:])], gradients=True, outputs=True)


def configured(limit: int, **rate: object) -> Config:
    """Settings that leave an artifact ``limit`` bytes."""
    given = {f"quantize.rate.{name}": value for name, value in rate.items()}
    return load_config("quickstart", overrides=SMALL | SOLVE | given | {"budget.limit_bytes": code_bytes() + limit})


def solved(folder: Path, model: GPT, statistics: Statistics, limit: int, **rate: object) -> Fitted:
    return export(folder / "a.golf", model, configured(limit, **rate), "0" * 64, statistics)


@pytest.mark.parametrize(("limit", "rate"), [(24_000, {}), (18_000, {"states": 1}), (40_000, {"feedback": "both"})])
def test_a_plan_fits_and_fills_its_limit(
    limit: int, rate: dict[str, object], model: GPT, statistics: Statistics, tmp_path: Path
) -> None:
    fitted = solved(tmp_path, model, statistics, limit, **rate)
    size = (tmp_path / "a.golf").stat().st_size
    assert fitted.artifact_bytes == size and not fitted.warning
    assert 0.995 * limit < size <= limit
    assert fitted.expected_bytes == pytest.approx(size, rel=0.005)
    assert fitted.report()["expected_artifact_bytes"] == fitted.expected_bytes
    assert fitted.report()["expected_loss_increase"] == fitted.expected_loss > 0
    artifact = read_artifact(tmp_path / "a.golf")
    assert artifact.quantize_config == fitted.config and artifact.quantize_config.rate.bits != 3.5
    assert all(torch.equal(artifact.state[name], value) for name, value in dequantize(fitted.quantized).items())


def test_more_bytes_cost_less_loss(model: GPT, statistics: Statistics, tmp_path: Path) -> None:
    losses = [solved(tmp_path, model, statistics, limit).expected_loss for limit in (16_000, 20_000, 26_000)]
    assert losses == sorted(losses, reverse=True) and losses[0] > 2 * losses[-1]


def test_the_predicted_loss_is_the_quadratic_form(model: GPT, statistics: Statistics, tmp_path: Path) -> None:
    for feedback in ("columns", "both"):
        known = statistics
        if feedback == "columns":
            known = {n: {k: v for k, v in kinds.items() if k != "outputs"} for n, kinds in statistics.items()}
        fitted = solved(tmp_path, model, known, 24_000, feedback=feedback)
        expected = 0.0
        for name, tensor in fitted.quantized.items():
            if tensor.kind != "step":
                continue
            error = (model.state_dict()[name] - tensor.dequantize()).double()
            facts = {kind: value.double() for kind, value in known[name].items()}
            if "output" in facts:  # the table that is the head too: a product with the traces of both terms
                counted = facts["output"] * facts["gram"].trace() + facts["count"] * facts["gradient"].sum()
                gram = facts["output"].sum() * facts["gram"] + facts["count"].sum() * facts["gradient"].diag()
                expected += 0.5 * plain.output_loss((counted / counted.sum()).sqrt()[:, None] * error, gram)
            elif "count" in facts:
                expected += 0.5 * float(facts["count"] @ error.square() @ facts["gradient"])
            elif feedback == "columns":
                expected += 0.5 * plain.output_loss(facts["gradient"].sqrt()[:, None] * error, facts["gram"])
            else:
                root = torch.linalg.cholesky(facts["outputs"] + 1e-12 * torch.eye(len(error)))
                expected += 0.5 * plain.output_loss(root.T @ error, facts["gram"])
        assert fitted.expected_loss == pytest.approx(expected, rel=1e-4)


def test_where_nothing_fits_a_warning_says_by_how_much(model: GPT, statistics: Statistics, tmp_path: Path) -> None:
    fitted = solved(tmp_path, model, statistics, 2_000)
    size = (tmp_path / "a.golf").stat().st_size
    assert fitted.over_bytes == size - 2_000 > 0
    assert f"{size - 2_000:,} bytes over the 2,000 that code leaves" in fitted.warning
    assert "set a smaller quantize.passthrough_numel, or make the model smaller" in fitted.warning
    assert "rate.bits" not in fitted.warning, "those it chose itself"
    assert fitted.config.passthrough_numel == 256 and read_artifact(tmp_path / "a.golf").bytes == size


def test_a_model_that_cannot_fill_its_limit_is_stored_finely(
    model: GPT, statistics: Statistics, tmp_path: Path
) -> None:
    fitted = solved(tmp_path, model, statistics, 10_000_000)
    assert fitted.artifact_bytes < 500_000 and not fitted.warning
    assert fitted.expected_loss < 1e-3 * solved(tmp_path, model, statistics, 20_000).expected_loss


def test_solve_needs_the_entropy_coder_and_its_quantiser() -> None:
    with pytest.raises(ConfigError, match=r"'solve' knows sizes under quantize.coder 'entropy', not 'zstd'"):
        load_config("quickstart", overrides=SOLVE | {"quantize.coder": "zstd"})
    with pytest.raises(ConfigError, match=r"quantize.fit 'solve' is not made for quantize.quantizer 'gptq'"):
        load_config("quickstart", overrides=SOLVE | {"quantize.quantizer": "gptq"})


def test_the_whole_stage(golfbook_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained run is calibrated on no validation text, quantised into its budget, and scored as expected."""
    words = ("the", "model", "reads", "a", "token", "and", "learns", "to", "guess", "what", "comes", "next")
    generator = np.random.default_rng(0)
    lines = [f"number {i}: " + " ".join(generator.choice(words, size=60)) + "." for i in range(200)]
    corpus = golfbook_home / "documents.jsonl"
    corpus.write_text("\n".join(f'{{"text": "{line}"}}' for line in lines), encoding="utf-8")
    limit = 24_000
    overrides = SMALL | SOLVE | {
        "data.source": "text", "data.path": str(corpus), "data.max_validation_tokens": 2000, "train.steps": 40,
        "train.batch_tokens": 512, "train.sequence_length": 64, "train.schedule.warmdown_steps": 20,
        "quantize.calibration.sequences": 16, "budget.limit_bytes": code_bytes() + limit, "score.stride": 32,
    }  # fmt: skip
    run = create_run("solved", "solve", load_config("quickstart", seed=1, overrides=overrides))
    asked = []

    def calibrate(trained: GPT, config: Config, data: dataset.Dataset) -> Statistics | None:
        class Blind:
            tokenizer, train_shards = data.tokenizer, data.train_shards

        asked.append(config.quantize.calibration.sequences)
        return stages_calibrate(trained, config, Blind())

    stages_calibrate = stages.calibrate
    monkeypatch.setattr(stages, "calibrate", calibrate)
    result = stages.ensure(run, "test_time_training")
    quantized = run.read_result("quantization")
    assert asked == [16] and quantized is not None
    assert 0.995 * limit < result["artifact_bytes"] <= limit
    assert result["artifact_bytes"] == run.artifact_path.stat().st_size
    assert quantized["expected_artifact_bytes"] == pytest.approx(result["artifact_bytes"], rel=0.005)
    assert quantized["over_bytes"] == 0 and 0 < quantized["expected_loss_increase"] < 0.5
    assert abs(quantized["tax_bpb"]) < 0.5
