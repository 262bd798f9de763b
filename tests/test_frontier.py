"""Size against quality: bytes at a quality, settings of recipes, and the yardstick against a plain computation."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional

from conftest import invent_choices
from golfbook.analysis import frontier
from golfbook.compress.budget import code_bytes
from golfbook.compress.calibration import calibrate
from golfbook.compress.export import quantize_model
from golfbook.compress.quantizer import Statistics, dequantize
from golfbook.config.load import load_config
from golfbook.config.schema import Config
from golfbook.data import dataset
from golfbook.errors import ConfigError, GolfbookError
from golfbook.model.gpt import GPT, initialise

SMALL = {
    "model": {"vocab_size": 300, "num_layers": 2, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "rope_dims": 8},
    "model.bigram": {"vocab_size": 32, "dim": 8},
    "model.value_embedding.dim": 8,
    "model.xsa": 1,
    "data.source": "text",
    "data.validation_fraction": 0.3,
    "train.sequence_length": 32,
    "train.batch_tokens": 64,
    "quantize.passthrough_numel": 512,
    "quantize.scale_floor": False,
    "score.window": 16,
    "score.stride": 8,
}
Tiny = tuple[GPT, Config, dataset.Dataset, Statistics]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = tmp_path_factory.mktemp("frontier")
    words = random.Random(1)
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as stream:
        for _ in range(120):
            text = " ".join(words.choices(["alpha", "beta", "gamma", "delta", "epsilon"], k=40))
            stream.write(json.dumps({"text": text}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOLFBOOK_CACHE", str(folder / "cache"))
        invent_choices(folder / "cache")
        config = load_config("quickstart", overrides={**SMALL, "data.path": str(folder / "corpus.jsonl")})
        data = dataset.prepare(config)
        torch.set_num_threads(1)
        model = initialise(GPT(config.model), 1).eval()
        with torch.no_grad():
            for value in model.parameters():  # so that the projections that start at zero do something
                value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())))
        statistics = calibrate(model, frontier.settings(config, frontier.OURS, 3.0), data)
    assert statistics is not None
    return model, config, data, statistics


def points(sizes: list[float], taxes: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"artifact_bytes": sizes, "divergence_bpb": taxes})


def test_bytes_lie_between_measured_ones_where_the_log_of_the_tax_does() -> None:
    rows = points([300, 100, 200], [0.01, 1.0, 0.1])
    assert frontier.bytes_at(rows, 0.1) == pytest.approx(200)
    assert frontier.bytes_at(rows, 10**-0.25) == pytest.approx(125)
    assert frontier.bytes_at(rows, 0.01) == pytest.approx(300) and frontier.bytes_at(rows, 1.0) == pytest.approx(100)


@pytest.mark.parametrize("quality", [1.1, 0.009, 0.0, -1.0, math.nan])
def test_nothing_is_said_beyond_what_was_measured(quality: float) -> None:
    assert math.isnan(frontier.bytes_at(points([100, 200, 300], [1.0, 0.1, 0.01]), quality))


def test_more_bytes_that_are_worse_count_as_no_better_and_lost_signs_are_left_out() -> None:
    rows = points([100, 200, 300, 400, 500], [1.0, 0.1, 0.2, 0.01, -0.001])
    assert frontier.bytes_at(rows, 0.1) == pytest.approx(200)
    assert frontier.bytes_at(rows, 10**-1.5) == pytest.approx(300)


def test_settings_change_how_to_quantise_and_nothing_else(tiny: Tiny) -> None:
    _, config, _, _ = tiny
    for recipe in frontier.RECIPES:
        found = frontier.settings(config, recipe, 4.0)
        assert found.model_copy(update={"quantize": config.quantize}) == config
    ours, published = (frontier.settings(config, recipe, 4.0).quantize for recipe in (frontier.OURS, frontier.FLOOR))
    assert (ours.rate.bits, ours.rate.states, ours.coder, ours.passthrough_numel) == (4.0, 8, "entropy", 256)
    assert (published.matrix_bits, published.other_bits, published.coder, published.scale_floor) == (4, 6, "xz", True)
    assert published.passthrough_numel == 512
    assert frontier.settings(config, frontier.FLOOR, 7).quantize.other_bits == 8
    with pytest.raises(ConfigError, match="did you mean 'no floor, xz'"):
        frontier.settings(config, "no flor, xz", 4)


def test_every_change_leads_from_one_recipe_to_the_next() -> None:
    assert frontier.STEPS[0][1] == frontier.FLOOR and frontier.STEPS[-1][2] == frontier.OURS
    assert all(one[2] == two[1] for one, two in zip(frontier.STEPS, frontier.STEPS[1:], strict=False))
    assert {name for _, *both in (*frontier.STEPS, *frontier.SIDEWAYS) for name in both} <= set(frontier.RECIPES)


def test_yardstick_is_the_plain_computation(tiny: Tiny) -> None:
    model, config, data, statistics = tiny
    quantize = frontier.settings(config, frontier.RECORDS, 3.0).quantize
    other = GPT(config.model).eval()
    other.load_state_dict(dequantize(quantize_model(model, quantize, statistics)))
    measured = frontier.Yardstick(model, config, data, targets=200, rows=4).measure(other)
    tokens = torch.from_numpy(data.val_tokens[:193].astype(np.int64))  # six windows of 32 fit into 200 targets
    loss, before, divergence = 0.0, 0.0, 0.0
    for start in range(0, 192, 32):
        window, targets = tokens[None, start : start + 32], tokens[start + 1 : start + 33]
        with torch.no_grad():
            p, q = (functional.log_softmax(one(window)[0].double(), dim=-1) for one in (model, other))
        before -= float(p[range(32), targets].sum())
        loss -= float(q[range(32), targets].sum())
        divergence += float((p.exp() * (p - q)).sum())
    bits = math.log(2) * int(data.val_token_bytes[:192].sum())
    expected = {"val_bpb": loss / bits, "tax_bpb": (loss - before) / bits, "divergence_bpb": divergence / bits}
    assert measured == pytest.approx(expected, rel=1e-3, abs=2e-7) and measured["divergence_bpb"] > 0


def test_a_model_against_itself_has_no_tax(tiny: Tiny) -> None:
    model, config, data, _ = tiny
    found = frontier.Yardstick(model, config, data, targets=96).measure(model)
    assert found["tax_bpb"] == pytest.approx(0, abs=1e-6) and found["divergence_bpb"] == pytest.approx(0, abs=1e-6)


@pytest.fixture(scope="module")
def table(tiny: Tiny) -> pd.DataFrame:
    model, config, data, statistics = tiny
    rates = {frontier.FLOOR: (4, 8), frontier.RECORDS: (4.0, 6.0), frontier.OURS: (3.0, 4.0, 6.0)}
    return frontier.measure(model, config, data, statistics, rates, targets=512)


def test_more_bits_cost_bytes_and_save_divergence(table: pd.DataFrame) -> None:
    assert [*table.columns] == [name for name in frontier.COLUMNS if name not in ("steps", "seed")]
    for _, rows in table.groupby("recipe"):
        assert rows["artifact_bytes"].is_monotonic_increasing and rows["divergence_bpb"].is_monotonic_decreasing
    coded = table["recipe"] != frontier.FLOOR
    assert (table["memoryless_bytes"] > 0).equals(coded)


@pytest.mark.parametrize("recipe", frontier.MAIN)
def test_parts_add_up_to_the_artifact_and_its_code(tiny: Tiny, recipe: str) -> None:
    model, config, data, statistics = tiny
    artifact = frontier.stored(model, config, data, statistics, recipe, 4.0)
    found = frontier.parts(artifact)
    assert tuple(found) == frontier.PARTS and found["code"] == code_bytes()
    assert sum(found.values()) == artifact.bytes + code_bytes()
    assert all(found[name] > 0 for name in ("attention", "MLP", "embedding tables", "step sizes", "float16 tensors"))


def invented() -> pd.DataFrame:
    """Three seeds whose tax falls as 4^-bits; ours needs 20 % fewer bytes than PR 1166, xz, and 1 % more a seed."""
    rows = []
    for seed in (1, 2, 3):
        for recipe, share in ((frontier.FLOOR, 1.0), (frontier.OURS, 0.8 + 0.01 * seed)):
            for bits in (4, 5, 6, 7, 8):
                size = 1000 * share * bits
                rows.append((1600, seed, recipe, bits, size, 0, 2.0, 0.0, seed * 4.0**-bits, 2.0, 1.0))
    return pd.DataFrame(rows, columns=list(frontier.COLUMNS))


def test_ratios_are_of_bytes_at_equal_divergence_seed_by_seed() -> None:
    made = invented()
    needed = frontier.needed(made, frontier.OURS, (frontier.FLOOR, 6))
    assert needed.to_list() == pytest.approx([4860, 4920, 4980]) and [*needed.index] == [1, 2, 3]
    assert frontier.needed(made, frontier.OURS, (frontier.FLOOR, 6), size="bits").to_list() == pytest.approx([6, 6, 6])
    (row,) = frontier.by_length(made, frontier.REFERENCES[:1]).itertuples()
    assert (row.steps, row.n, row.mean) == (1600, 3, pytest.approx(0.82)) and row.low < 0.81 < 0.83 < row.high
    (whole,) = frontier.steps_apart(made, frontier.ANCHOR).itertuples()
    assert (whole.change, whole.n, whole.mean) == ("all together", 3, pytest.approx(0.82))


def test_trend_says_whether_the_gain_shrinks() -> None:
    made, longer = invented(), invented().assign(steps=4800)
    assert "other lengths were not measured" in frontier.trend(made, frontier.REFERENCES[0])
    alone = frontier.trend(pd.concat([made, longer[longer["seed"] == 2]]), frontier.REFERENCES[0])
    assert "n = 1 seeds of both lengths say nothing" in alone
    ours = longer["recipe"] == frontier.OURS
    for share, word in ((1.1, "shrinks"), (0.9, "grows"), (1.0, "does not clearly change")):
        changed = longer.assign(artifact_bytes=longer["artifact_bytes"].where(~ours, longer["artifact_bytes"] * share))
        found = frontier.trend(pd.concat([made, changed]), frontier.REFERENCES[0])
        assert f"the gain {word} with training" in found and f"0.820 at 1,600 steps, {0.82 * share:.3f} at" in found


def test_the_slope_of_4_to_the_minus_bits_is_two_octaves() -> None:
    found = frontier.slopes(invented(), weights=8000).set_index("recipe")
    assert found["mean"].to_list() == pytest.approx([2.0, 2 / 0.82], rel=1e-3) and [*found["n"]] == [3, 3]
    assert found.loc[frontier.FLOOR, "std"] == pytest.approx(0, abs=1e-9)


def test_front_keeps_what_nothing_dominates() -> None:
    found = frontier.front(invented()).set_index(["recipe", "bits"])
    assert not found.loc[frontier.OURS, "dominated"].any()
    one = found.loc[(frontier.FLOOR, 6)]
    assert one["mean"] == pytest.approx(6 ** (1 / 3) * 4.0**-6) and one["low"] < one["mean"] < one["high"]
    assert (one["kilobytes"], one["n"]) == (6.0, 3)


def test_dominated_is_what_another_beats_in_one_and_matches_in_the_other() -> None:
    assert frontier.pareto([1, 2, 2, 3, 1], [3, 2, 2.5, 2, 3]).tolist() == [True, True, False, False, True]


def test_a_smaller_ratio_buys_layers_and_width() -> None:
    given = ("pr1166_11l_a", 16_576_172, 104_955)
    as_published, less = frontier.fitting(*given, 1.0), frontier.fitting(*given, 0.8)
    assert as_published["total_bytes"] == pytest.approx(16_681_127, abs=1)
    assert as_published["left_bytes"] == pytest.approx(-681_127, abs=1)
    assert (as_published["num_layers"], as_published["model_dim"]) == (11, 512)
    assert less["num_layers"] > 11 and less["model_dim"] > 512
    assert all(0 < less[f"{name}_bytes"] <= 16_000_000 for name in ("num_layers", "model_dim"))


def test_tables_are_read_from_csv_or_parquet_and_checked(tmp_path: Path) -> None:
    made = invented()
    made.to_csv(tmp_path / "one.csv", index=False)
    made.to_parquet(tmp_path / "one.parquet")
    for name in ("one.csv", "one.parquet"):
        pd.testing.assert_frame_equal(frontier.read_table(tmp_path / name), made, check_dtype=False)
    made.drop(columns="bits").to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(GolfbookError, match="it lacks bits"):
        frontier.read_table(tmp_path / "other.csv")
    with pytest.raises(GolfbookError, match="makes it"):
        frontier.read_table(tmp_path / "none.csv")
