"""What bytes and context are worth: groups, whole models, sensitivity, and paired gaps of windows, by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import invent_choices
from golfbook.analysis import context, rates, sizes, statistics
from golfbook.compress.budget import code_bytes
from golfbook.compress.coders import XZ
from golfbook.compress.container import read_artifact
from golfbook.compress.estimates import cross_entropy_bits
from golfbook.compress.export import export, quantize_model
from golfbook.compress.quantizer import Statistics, dequantize
from golfbook.config.load import load_config
from golfbook.config.schema import Config
from golfbook.config.tables import CODERS
from golfbook.data import dataset
from golfbook.evaluate import scoring
from golfbook.model.gpt import GPT, exported_state, initialise
from golfbook.panels import size as size_panels

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon"]
SMALL = {
    "model": {"vocab_size": 300, "num_layers": 2, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "rope_dims": 8},
    "model.bigram": {"vocab_size": 32, "dim": 8},
    "model.value_embedding.dim": 8,
    "model.xsa": 1,
    "model.mtp.num_heads": 1,
    "data.source": "text",
    "data.validation_fraction": 0.3,
    "train.sequence_length": 32,
    "train.batch_tokens": 64,
    "quantize.passthrough_numel": 512,
    "quantize.scale_floor": False,
    "score.window": 16,
    "score.stride": 8,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT, Config, dataset.Dataset]:
    folder = tmp_path_factory.mktemp("sizes")
    words = random.Random(1)
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as stream:
        for _ in range(120):
            stream.write(json.dumps({"text": " ".join(words.choices(WORDS, k=40))}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOLFBOOK_CACHE", str(folder / "cache"))
        invent_choices(folder / "cache")
        config = load_config("quickstart", overrides={**SMALL, "data.path": str(folder / "corpus.jsonl")})
        data = dataset.prepare(config)
    torch.set_num_threads(1)
    model = initialise(GPT(config.model), 1)
    with torch.no_grad():
        for value in model.parameters():  # so that the projections that start at zero do something
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())))
    return model, config, data


def test_entropy_and_error() -> None:
    assert sizes.entropy_bits([1, 1, 2, 2]) == pytest.approx(1.0)
    assert sizes.entropy_bits([7, 7]) == 0.0
    assert sizes.entropy_bits(np.arange(64)) == pytest.approx(6.0)
    assert sizes.relative_error([3.0, 4.0], [3.0, 4.0]) == 0.0
    assert sizes.relative_error([3.0, 4.0], [0.0, 0.0]) == pytest.approx(1.0)


def test_groups_hold_every_byte(prepared: tuple[GPT, Config, dataset.Dataset]) -> None:
    model, config, _ = prepared
    packed = quantize_model(model, config.quantize)
    table = sizes.group_bytes(packed, config.quantize).set_index("group")
    plain = [t for t in packed.values() if t.value is not None]
    stored = sum(t.value.nbytes for t in plain)
    integers = sum(t.q.numel() for t in packed.values() if t.q is not None)
    assert table.loc[sizes.PLAIN, "nominal_bytes"] == table.loc[sizes.PLAIN, "entropy_bytes"] == stored
    assert table.loc[sizes.PLAIN, "coded_bytes"] == len(XZ.encode(plain, config.quantize.coder_level))
    assert table.drop(sizes.PLAIN)["nominal_bytes"].sum() == integers
    assert set(table.index) == {"attention", "MLP", "embedding tables", sizes.PLAIN}
    mlp = [sizes.entropy_bits(t.q) * t.q.numel() / 8 for n, t in packed.items() if ".mlp." in n and t.q is not None]
    assert table.loc["MLP", "entropy_bytes"] == pytest.approx(sum(mlp))


def test_store_and_score_is_what_the_artifact_scores(
    prepared: tuple[GPT, Config, dataset.Dataset], tmp_path: Path
) -> None:
    model, config, data = prepared
    stored, bpb = sizes.store_and_score(model, config, data, 100)
    export(tmp_path / "a.golf", model, config, data.tokenizer.sha256)
    loaded = read_artifact(tmp_path / "a.golf")
    nll = scoring.score(loaded.build(), data.val_tokens[:101], window=16, stride=16)
    assert stored == loaded.bytes
    assert bpb == scoring.bits_per_byte(nll, int(data.val_token_bytes[:100].sum()))


def test_sensitivity_changes_one_tensor_and_puts_it_back(prepared: tuple[GPT, Config, dataset.Dataset]) -> None:
    model, config, data = prepared
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = sizes.sensitivity(model, config, data, 100, bits=4).set_index("name")
    packed = quantize_model(model, config.quantize)
    assert list(table.index) == [n for n, t in packed.items() if t.q is not None and t.bits > 4]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for name in (table.index[0], table.index[-2]):  # the later one shows that the first was put back
        coarse = config.quantize.model_copy(update={"matrix_bits": 4, "other_bits": 4})
        fewer = quantize_model(model, coarse)[name]
        found = []
        for tensors in (packed, {**packed, name: fewer}):
            probe = GPT(config.model)
            probe.load_state_dict(dequantize(tensors), strict=False)
            found.append(scoring.score(probe, data.val_tokens[:97], window=16, stride=16))
        total = int(data.val_token_bytes[:96].sum())
        lost = scoring.bits_per_byte(found[1], total) - scoring.bits_per_byte(found[0], total)
        assert lost != 0 and table.loc[name, "lost"] == pytest.approx(lost, abs=1e-6)
        assert table.loc[name, "n"] == 6 and table.loc[name, "low"] < lost < table.loc[name, "high"]
        saved = (sizes.entropy_bits(packed[name].q) - sizes.entropy_bits(fewer.q)) * fewer.q.numel() / 8000
        assert table.loc[name, "saved_kb"] == pytest.approx(saved)


def test_above_line_interpolates_seed_by_seed() -> None:
    rows = [("x", 1, 100, 2.0), ("y", 1, 200, 1.0), ("v", 1, 150, 1.4), ("x", 2, 100, 2.0), ("v", 2, 150, 1.4)]
    table = pd.DataFrame(rows, columns=["variant", "seed", "artifact_bytes", "quantization_val_bpb"])
    assert sizes.above_line(table, ["y", "x"], "v").to_dict("records") == [{"seed": 1, "score": 1.4, "on_line": 1.5}]


def test_gain_by_position_pairs_windows() -> None:
    rng = np.random.default_rng(0)
    contiguous = rng.exponential(3, 83)  # 10 windows of 8, and a rest that is left out
    gaps = rng.normal(-0.1, 0.05, (10, 8))
    table = context.gain_by_position(contiguous + np.append(gaps, [9, 9, 9]), contiguous, 8, bins=3)
    assert table["context"].tolist() == [1.0, 2.5, 6.0]  # positions 1, 2 to 3, 4 to 8
    summary = statistics.describe(gaps[:, 1:3].mean(axis=1))
    assert table.loc[1, ["mean", "low", "high", "n"]].tolist() == pytest.approx(
        [summary.mean, summary.low, summary.high, 10]
    )


def test_stride_ladder_is_paired_and_counts_work() -> None:
    rng = np.random.default_rng(0)
    wide = rng.exponential(3, 32)
    table = context.stride_ladder({4: wide - 0.1, 8: wide}, 8, 60)
    assert table["stride"].tolist() == [8, 4] and table["difference"][0] == 0
    assert table["val_bpb"][0] == scoring.bits_per_byte(wide, 60)
    assert table["difference"][1] == pytest.approx(table["val_bpb"][1] - table["val_bpb"][0])
    assert table["high"][1] - table["low"][1] < 1e-9  # every target gains the same: no spread left
    assert table["work"].tolist() == [1.0, (8 * 7) / 32]  # seven windows of eight, four tokens apart


def test_window_means_of_a_text_shorter_than_a_window() -> None:
    assert context.window_means(np.array([1.0, 3.0]), 8).tolist() == [2.0]


@pytest.fixture(scope="module")
def known(prepared: tuple[GPT, Config, dataset.Dataset]) -> Statistics:
    return rates.learnt(*prepared, sequences=8)


def test_feedback_makes_outputs_better_and_weights_worse(
    prepared: tuple[GPT, Config, dataset.Dataset], known: Statistics
) -> None:
    state = exported_state(prepared[0])
    table = rates.feedback_effect(state, known, 3).set_index("name")
    assert set(table.index) == {name for name in known if "count" not in known[name]}
    assert table["weighted"].median() < 0.9 < 1.1 < table["plain"].median()


def test_equal_slope_makes_a_bit_worth_the_same_everywhere(
    prepared: tuple[GPT, Config, dataset.Dataset], known: Statistics
) -> None:
    recipes = ["records: k sigma, GPTQ", "equal slope"]
    table = rates.allocation(prepared[0], prepared[1], known, recipes, 4.0)
    before, after = (np.log(table.loc[table["recipe"] == recipe, "slope"]) for recipe in recipes)
    assert len(before) == len(after) == 10
    # but for tensors at the coarsest step, which the loss would let go further
    assert after.quantile(0.9) - after.quantile(0.2) < (before.quantile(0.9) - before.quantile(0.2)) / 2


def test_a_trellis_gains_about_a_decibel() -> None:
    gain = rates.trellis_gain([4, 8]).set_index("states")["gain"]
    assert gain[4] == pytest.approx(1.0, abs=0.06) and gain[8] == pytest.approx(1.09, abs=0.06)


def test_coders_are_compared_on_the_same_tensors(prepared: tuple[GPT, Config, dataset.Dataset]) -> None:
    packed = quantize_model(prepared[0], prepared[1].quantize)
    table = rates.coders(packed, 6).set_index("coder")
    assert set(table.index) == set(CODERS) and (table["seconds"] > 0).all()
    assert table.loc["xz", "bytes"] == len(XZ.encode(list(packed.values()), 6))
    assert table.loc["entropy", "bytes"] == pytest.approx(cross_entropy_bits(list(packed.values())) / 8, abs=64)


def test_ways_are_measured_and_their_saving_is_told(
    prepared: tuple[GPT, Config, dataset.Dataset], known: Statistics
) -> None:
    model, config, data = prepared
    table = rates.ways(model, config, data, known, 256)
    assert len(table) == sum(len(bits) for bits in rates.RATES.values()) * len(rates.CHOSEN_CODERS)
    for _, rows in table.groupby(["rule", "coder"]):
        assert rows.sort_values("bits")["bytes"].is_monotonic_increasing
        assert rows["divergence_bpb"].iloc[0] > rows["divergence_bpb"].iloc[-1] > 0
    losses = [0.1, 0.01, 0.001]
    rows = [
        (rule, "entropy", size * k, loss) for rule, size in (("a", 2), ("b", 1)) for k, loss in enumerate(losses, 1)
    ]
    made = pd.DataFrame(rows, columns=["rule", "coder", "bytes", "divergence_bpb"])
    assert rates.saving(made) == "Bytes that *b* needs at equal divergence, one seed: -50% against *a*."
    made.loc[made["rule"] == "b", "divergence_bpb"] /= 1e6
    assert "not measured at a common quality" in rates.saving(made)


def test_calibration_texts_are_drawn_from_their_seeds(prepared: tuple[GPT, Config, dataset.Dataset]) -> None:
    table = rates.sources(*prepared, 4.0, 256, sequences=2)
    assert list(table["source"]) == ["training"] * 2 + ["generated"] * 2 + ["random"] * 2
    assert table["divergence_bpb"].nunique() == 6 and (table["divergence_bpb"] > 0).all()


def test_a_plan_spends_its_cap_and_says_on_what(
    prepared: tuple[GPT, Config, dataset.Dataset], known: Statistics
) -> None:
    model, config, data = prepared
    cap = code_bytes() + 20_000
    plan = rates.plan(model, config, data, known, cap)
    spent = rates.parts(plan)
    assert cap - 400 < code_bytes() + plan.bytes <= cap
    assert sum(spent.values()) == pytest.approx(code_bytes() + plan.bytes, abs=8)
    assert spent["integers"] > 15_000 and min(spent.values()) > 0
    panel = size_panels.budget_meter(model, config, data, known)
    least = int(panel.controls["cap"].low)  # type: ignore[union-attr]
    said = panel.figure(cap=least + 8, guess=3.0)
    assert f"Cap {1000 * (least + 8):,} bytes: fits" in said.axes[0].get_title(loc="left")
    assert said.get_supxlabel().startswith("your guess: 3; it is ")
