"""Pictures and comparisons of training: selections of a study, honest differences, published curves."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from golfbook.analysis import comparisons, statistics
from golfbook.errors import GolfbookError
from golfbook.panels import training as training_panels
from golfbook.plots import style
from golfbook.plots import training as training_plots
from golfbook.study import results
from golfbook.study.plan import flatten, plan
from golfbook.train.schedules import schedule_table

PROJECT = Path(__file__).parents[1]
REFERENCE = PROJECT / "runs/reference/training"
PUBLISHED = {n: pd.read_csv(PROJECT / "runs/published" / f"{n}.csv") for n in ("trajectories", "events", "runs")}
WORDS = {"none": "last weights", "ema": "moving average", "swa": "mean of 25 snapshots of the weights"}


@pytest.fixture(scope="module")
def job() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOLFBOOK_ROOT", str(PROJECT))
        return plan(PROJECT / "papermill_jobs/training.yaml")


@pytest.fixture(scope="module")
def study(job: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables that the shipped job would leave, with invented scores that depend on the settings."""
    trees = [flatten(run.config.model_dump(mode="json")) for run in job.runs]
    varied = [k for k in trees[0] if k not in ("seed", "preset") and len({str(tree[k]) for tree in trees}) > 1]
    luck = np.random.default_rng(0)
    of_seed = dict(zip((1, 2, 3, 4), luck.normal(0, 0.01, 4), strict=True))
    rows, curves = [], []
    for run, tree in zip(job.runs, trees, strict=True):
        train, seed = run.config.train, run.config.seed
        best = {"muon": 0.05, "adamw": 0.004}[train.optimizer.matrix_optimizer]
        score = (
            2.0
            + 0.01 * np.log2(train.optimizer.matrix_lr / best) ** 2
            + 0.05 * (train.optimizer.matrix_optimizer == "adamw")
        )
        score += {0: 0.1, 50: 0.1, 75: 0.02}.get(train.schedule.warmdown_steps, 0) if train.steps == 300 else 0.0
        score += {"none": 0.03, "swa": -0.01}.get(train.averaging.method, 0) + of_seed[seed] + luck.normal(0, 0.001)
        same = {"variant": run.variant, "seed": seed}
        rows.append(
            {**same, **{key: tree[key] for key in varied}, "val_bpb": score, "steps": train.steps}
            | {
                "tokens_seen": train.steps * train.batch_tokens,
                "weights": WORDS.get(train.averaging.method, "swa of ema"),
            }
        )
        for step in range(0, train.steps + 1, train.steps // 5):
            tokens = step * train.batch_tokens
            curves.append({**same, "step": step, "tokens_seen": tokens, "seconds": step / 10, "val_bpb": score + 1})
    return pd.DataFrame(rows), pd.DataFrame(curves)


def test_the_job_is_one_comparison_at_a_time(job: Any) -> None:
    assert job.study == "training" and job.stages == ("training",) and len(job.runs) == 112
    configs = {run.variant: run.config.train for run in job.runs}
    assert {c.steps * c.batch_tokens for c in configs.values()} == {614_400}
    for name, config in configs.items():
        scale = config.batch_tokens / 2048
        assert config.steps * scale == 300 and config.optimizer.muon_momentum_warmup_steps * scale == 100, name
        assert config.averaging.ema_decay == pytest.approx(0.98**scale, abs=1e-5)
        if scale != 1:
            assert config.schedule.warmdown_steps * scale == pytest.approx(150, abs=2)
            root = config.optimizer.matrix_lr / 0.025
            assert root == pytest.approx(scale**0.5 if name.endswith("_root") else 1, rel=1e-4)
            assert [config.optimizer.scalar_lr / 0.025, config.optimizer.embed_lr / 0.035] == pytest.approx(
                [root, root], rel=1e-4
            )
        if config.averaging in ("swa", "swa_of_ema"):
            table = schedule_table(config)
            taken = table["step"][table["snapshot"]]
            assert len(taken) == (15 if name == "swa_last_fifth" else 25) and taken[-1] == 299, name
            if name == "swa_warmdown_0":
                assert table["lr_scale"].min() > 0.99


def test_comparisons_are_chosen_by_settings(study: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    table, _ = study
    renamed = table.assign(variant=table["variant"].where(table["variant"] == "base", "v" + table["variant"]))
    for runs in (table, renamed):
        rates = comparisons.by_learning_rate(runs)
        assert rates.groupby("series")["x"].unique().map(sorted).to_dict() == {
            "Muon": [0.00625, 0.0125, 0.025, 0.05, 0.1, 0.2],
            "AdamW": [0.001, 0.002, 0.004, 0.008, 0.016, 0.032],
        }
        assert len(comparisons.by_warmdown(runs)[0]) == 5 * 4
        averages, _ = comparisons.by_averaging(runs)
        assert averages.groupby("group")["variant"].nunique().to_dict() == {"constant rate": 3, "with the warmdown": 5}
        sizes, _ = comparisons.by_batch_size(runs)
        assert sizes.groupby(["series", "x"])["seed"].count().eq(4).all() and len(sizes) == 2 * 4 * 4
        assert set(sizes["x"]) == {1024, 2048, 4096, 8192}


def test_batch_sizes_are_compared_at_equal_tokens_only(study: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    table = study[0].copy()
    table.loc[table["variant"] == "batch_8192", "tokens_seen"] *= 2
    assert "batch_8192" not in set(comparisons.by_batch_size(table)[0]["variant"])


def test_differences_are_paired_over_seeds(study: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    table, _ = study
    wide = table.pivot(index="seed", columns="variant", values="val_bpb")
    for variant, reference, (_, found), label in (
        ("warmdown_0", "base", comparisons.by_warmdown(table), "none: constant rate"),
        ("warmdown_cosine", "base", comparisons.by_warmdown(table), "cosine, last 150 of 300 steps"),
        ("batch_4096_root", "base", comparisons.by_batch_size(table), "4,096, rates times root"),
        ("base", "no_average", comparisons.by_averaging(table), "moving average"),
    ):
        expected = statistics.paired_difference(wide[variant], wide[reference])
        row = found[found["label"] == label].iloc[0]
        assert (row["mean"], row["low"], row["high"]) == pytest.approx((expected.mean, expected.low, expected.high))
        assert row["n"] == 4


def test_missing_seeds_are_left_out_of_pairs(study: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    table = study[0]
    gone = table[~((table["variant"] == "warmdown_0") & (table["seed"] == 2))]
    _, found = comparisons.by_warmdown(gone)
    assert found.set_index("label").loc["none: constant rate", "n"] == 3


def test_rates_are_chosen_on_the_other_seeds() -> None:
    """A series of pure luck: its best mean flatters it, the choice on other seeds does not."""
    luck = np.random.default_rng(1)
    rows = [("AdamW", 1.0, seed, 2.0) for seed in range(6)]
    rows += [("Muon", x, seed, 2.0 + luck.normal(0, 0.1)) for x in (1.0, 2.0, 4.0, 8.0) for seed in range(6)]
    runs = pd.DataFrame(rows, columns=["series", "x", "seed", "val_bpb"])
    same, held = comparisons.optimizer_differences(runs).to_dict("records")
    muon_scores = runs[runs["series"] == "Muon"].pivot(index="x", columns="seed", values="val_bpb")
    assert same["mean"] == pytest.approx(muon_scores.mean(axis=1).min() - 2.0)
    by_hand = []
    for seed in muon_scores.columns:
        rate = muon_scores.drop(columns=seed).mean(axis=1).idxmin()
        by_hand.append(muon_scores.loc[rate, seed] - 2.0)
    assert held["mean"] == pytest.approx(np.mean(by_hand)) and held["n"] == 6
    assert held["mean"] >= same["mean"]
    one = comparisons.optimizer_differences(runs[runs["seed"] == 0])
    assert len(one) == 1 and np.isnan(one["low"].iloc[0]), "one seed: no interval, and no other seeds to choose on"


def test_findings_follow_the_table(study: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    """Words come first and turn with the scores, so no finding is written into the text."""
    table, _ = study
    found = comparisons.findings(table)
    assert all(line.startswith("**") for line in found)
    text, turned = "\n".join(found), "\n".join(comparisons.findings(table.assign(val_bpb=4 - table["val_bpb"])))
    for words, opposite in (
        ("Muon ends better than AdamW", "Muon ends worse than AdamW"),
        ("**No other length and shape of the warmdown is better than the base's.**", "ways to change the length"),
        ("none: constant rate +0.1", "none: constant rate -0.1"),
        (
            "Every other way of averaging, with the warmdown, is better",
            "Every other way of averaging, with the warmdown",
        ),
    ):
        assert words in text and opposite in turned
    assert "(n = 4" not in text and text.count("n = 4 pairs") == len(found) - 1
    alone = "\n".join(comparisons.findings(table[table["seed"] == 1]))
    assert "nan" in alone and "cannot be told from" in alone and "Every" not in alone


@pytest.mark.parametrize(
    ("neither", "average", "warmdown", "both", "words"),
    [
        (2.2, 2.0, 2.0, 2.0, "do the same work: alone they remove 0.20 and 0.20, together 0.20, no more"),
        (2.2, 2.0, 2.1, 1.9, "help each other: alone they remove 0.20 and 0.10, together 0.30"),
        (2.2, 2.3, 2.1, 2.0, "are not both of use here"),
    ],
)
def test_averaging_and_warmdown_are_told_from_four_cells(
    neither: float, average: float, warmdown: float, both: float, words: str, study: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    table = study[0].copy()
    luck = np.random.default_rng(5).normal(0, 0.001, len(table))
    cells = {"no_average_warmdown_0": neither, "warmdown_0": average, "no_average": warmdown, "base": both}
    for variant, score in cells.items():
        mine = table["variant"] == variant
        table.loc[mine, "val_bpb"] = score + luck[mine]
    scores, differences = comparisons.averaging_and_warmdown(table)
    assert set(scores["variant"]) == set(cells)
    wide = table.pivot(index="seed", columns="variant", values="val_bpb")
    expected = [wide[v] - wide["no_average_warmdown_0"] for v in ("warmdown_0", "no_average", "base")]
    better = min(wide["warmdown_0"], wide["no_average"], key=lambda values: values.mean())
    assert differences["mean"].tolist() == pytest.approx([d.mean() for d in (*expected, wide["base"] - better)])
    assert words in comparisons.findings(table)[0]
    left, _ = training_plots.two_by_two(scores, differences, title="t", against="a").axes
    (hollow,) = [line for line in left.lines if line.get_markerfacecolor() == "none"]
    assert hollow.get_ydata()[0] == pytest.approx(average + warmdown - neither, abs=0.003)
    dots = np.concatenate([line.get_ydata() for line in left.lines if line.get_marker() == "o"])
    assert len(dots) == 4 * 4 + 1
    gone = comparisons.averaging_and_warmdown(table[table["variant"] != "no_average"])
    assert gone[0].empty and gone[1].empty


def test_another_study_is_told_variant_by_variant(study: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    mine = study[0][study[0]["variant"].isin(["base", "adamw_lr_0.032", "muon_lr_0.05"])]
    table = mine[
        ["variant", "seed", "val_bpb", "train.optimizer.matrix_lr", "train.optimizer.matrix_optimizer"]
    ].assign(train_seconds=30.0, parameters=1000)
    found = comparisons.findings(table)
    assert sorted(line.split(" the base model")[0] for line in found) == [
        "`adamw_lr_0.032` is **worse** than",
        "`muon_lr_0.05` is **better** than",
    ]
    changes = comparisons.changes(table).set_index("variant")
    assert changes.loc["base", "changes"] == "nothing"
    assert (
        changes.loc["adamw_lr_0.032", "changes"]
        == "train.optimizer.matrix_lr: 0.032, train.optimizer.matrix_optimizer: adamw"
    )
    assert changes["minutes"].tolist() == pytest.approx([2.0] * 3) and changes["seeds"].tolist() == [4] * 3


def test_sweep_shows_every_run_interval_and_the_best(study: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    runs = comparisons.by_learning_rate(study[0])
    differences = comparisons.optimizer_differences(runs)
    left, right = training_plots.sweep(runs, differences, xlabel="rate", title="t", against="a").axes
    dots = {tuple(p) for line in left.lines if line.get_marker() == "o" for p in line.get_xydata().tolist()}
    for point in runs[["x", "val_bpb"]].itertuples(index=False, name=None):
        assert any(np.allclose(point, dot) for dot in dots)
    summary = statistics.describe(runs.loc[(runs["series"] == "Muon") & (runs["x"] == 0.05), "val_bpb"])
    bars = next(c for c in left.containers if "Muon" in str(c.get_label()))
    index = list(bars[0].get_xdata()).index(0.05)
    low, high = sorted(bars[2][0].get_segments()[index][:, 1])
    assert (low, high) == pytest.approx((summary.low, summary.high))
    rings = [line.get_xydata()[0].tolist() for line in left.lines if line.get_markerfacecolor() == "none"]
    means = runs.groupby(["series", "x"])["val_bpb"].mean()
    best = [[mine.idxmin()[1], mine.min()] for _, mine in means.groupby("series")]
    np.testing.assert_allclose(sorted(rings), sorted(best))
    assert left.get_xscale() == "log" and left.get_ylabel() == "bits per byte"
    means = [c[0].get_xdata()[0] for c in right.containers]
    assert means == pytest.approx(differences["mean"].tolist())
    assert right.get_yticklabels()[0].get_text() == "each at its best rate\n(n = 4 pairs)"


def test_a_diverged_run_is_marked_and_does_not_flatten_the_rest(study: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    table = study[0].copy()
    table.loc[table["variant"] == "adamw_lr_0.032", "val_bpb"] = 7.0
    runs = comparisons.by_learning_rate(table)
    left, _ = training_plots.sweep(
        runs, comparisons.optimizer_differences(runs), xlabel="rate", title="t", against="a"
    ).axes
    assert left.get_ylim()[1] < 4
    assert "7.00" in [text.get_text() for text in left.texts]
    assert any(line.get_marker() == "^" and line.get_xdata()[0] == 0.032 for line in left.lines)


def test_conditions_show_groups_seeds_and_signs(study: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    scores, differences = comparisons.by_averaging(study[0])
    left, right = training_plots.conditions(scores, differences, title="t", against="a").axes
    dots = np.concatenate([line.get_xdata() for line in left.lines if line.get_marker() == "o"])
    assert sorted(dots) == pytest.approx(sorted(scores["val_bpb"]))
    assert {t.get_text() for t in left.texts} == {"with the warmdown", "constant rate"}
    assert "mean of 25 snapshots of the weights (swa_last_fifth)" in set(scores["label"]), "never two variants in a row"
    assert all(t.get_text().endswith("(n = 4)") for t in left.get_yticklabels())
    colours = {
        round(float(c[0].get_xdata()[0]), 6): matplotlib.colors.to_hex(c[0].get_color()).upper()
        for c in right.containers
    }
    for row in differences.to_dict("records"):
        clear = style.GREEN if row["high"] < 0 else style.RED if row["low"] > 0 else style.GREY
        assert colours[round(row["mean"], 6)] == clear.upper()


def test_one_seed_has_no_interval(study: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    table = study[0]
    picture = training_plots.conditions(*comparisons.by_warmdown(table[table["seed"] == 1]), title="t", against="a")
    for axes in picture.axes:
        for container in axes.containers:
            assert not any(np.isfinite(segment).any() for segment in container[2][0].get_segments())
    assert style.png(picture)[:4] == b"\x89PNG"


def test_panel_shows_the_curves_of_the_chosen_variants(study: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    table, curves = study
    panel = training_panels.curves(table, curves)
    means = table[table["variant"] != "base"].groupby("variant")["val_bpb"].mean()
    assert panel.state["first"] == "base" and panel.state["second"] == means.idxmin()
    for x in training_plots.COUNTS:
        (axes,) = panel.figure(x=x).axes
        chosen = curves[curves["variant"].isin(["base", means.idxmin()])]
        drawn = np.concatenate([line.get_xydata() for line in axes.lines if line.get_marker() != "o"])
        np.testing.assert_allclose(sorted(drawn.tolist()), sorted(chosen[[x, "val_bpb"]].to_numpy().tolist()))
    assert set(panel.controls["first"].options.values()) == set(table["variant"])
    assert panel.png(second="no_average") != panel.png()


def test_reference_tables_are_read_or_said_to_be_missing(
    study: tuple[pd.DataFrame, pd.DataFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOLFBOOK_ROOT", str(tmp_path))
    assert comparisons.read_reference("training") is None
    folder = results.reference_folder("training")
    folder.mkdir(parents=True)
    table = study[0].rename(columns={"val_bpb": "training_val_bpb"})
    table.to_csv(folder / "results.csv", index=False)
    study[1].to_csv(folder / "curves.csv", index=False)
    read = comparisons.read_reference("training")
    assert read is not None
    assert comparisons.findings(read[0]) == comparisons.findings(study[0])
    table[table["variant"] != "base"].to_csv(folder / "results.csv", index=False)
    with pytest.raises(GolfbookError, match="no variant 'base'"):
        comparisons.read_reference("training")


def test_published_trajectories_are_the_published_points() -> None:
    points, events, runs = PUBLISHED.values()
    picture = training_panels.trajectories(points, events, runs).figure(gepa=True)
    steps, _, hours, strip = picture.axes
    shown = points[(points["metric"] == "val_bpb") & (points["step"] > 0)]
    for axes, x in ((steps, shown["step"]), (hours, shown["train_time_ms"] / 3.6e6)):
        drawn = np.concatenate([line.get_xydata() for line in axes.lines if len(line.get_xdata())])
        np.testing.assert_allclose(sorted(drawn.tolist()), sorted(np.stack([x, shown["value"]], axis=1).tolist()))
    names = [text.get_text() for text in steps.get_legend().get_texts()]
    assert names[0] == "PR 1166, 2xA100-PCIE-40GB, 6 runs" and len(names) == 5
    assert names[4].startswith("GEPA (PR 612 to 668), ") and not any("S1" in name for name in names)
    ends = sorted(max(line.get_xdata()) for line in picture.axes[1].lines if line.get_linewidth() == 0.8)
    assert ends == sorted(events.loc[events["event"] == "train_end", "step"])
    marked = [line.get_xdata()[0] for line in picture.axes[1].lines if line.get_marker() == "s"]
    assert sorted(marked) == sorted(events.loc[events["event"] == "late_qat", "step"])
    assert strip.get_xlabel() == "hours of training" and strip.get_xlim() == hours.get_xlim()
    assert len(training_panels.trajectories(points, events, runs).figure().axes[0].get_legend().get_texts()) == 4
    only_loss = training_panels.trajectories(points, events, runs).figure(metric="train_loss").axes[0]
    assert not any("1232" in text.get_text() for text in only_loss.get_legend().get_texts()), "it published none"


def test_published_gains_of_the_warmdown() -> None:
    gains = comparisons.warmdown_gains(PUBLISHED["trajectories"], PUBLISHED["events"])
    row = gains[gains["variant"] == "base_20k"].iloc[0]  # its README: 1.2016 before, 1.1062 at the end
    assert (row["start"], row["before"], row["end"]) == (8000, 1.2016, 1.1062)
    assert row["gain"] == pytest.approx(0.0954)
    assert gains.loc[gains["system"] == "S1406", "gain"].isna().all(), (
        "nothing was validated near the start of its warmdown"
    )
    assert gains["gain"].count() == 15


def test_pictures_are_pure_and_labelled(study: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    table, curves = study
    kept = table.copy(), curves.copy(), PUBLISHED["trajectories"].copy()
    rates = comparisons.by_learning_rate(table)
    draws = [
        lambda: training_plots.sweep(
            rates, comparisons.optimizer_differences(rates), xlabel="x", title="t", against="a"
        ),
        lambda: training_plots.sweep(rates, pd.DataFrame(), xlabel="x", title="t", against="a"),
        lambda: training_plots.conditions(*comparisons.by_warmdown(table), title="t", against="a"),
        lambda: training_panels.curves(table, curves).figure(),
        lambda: training_plots.trajectories(*PUBLISHED.values()),
    ]
    for draw in draws:
        picture = draw()
        data = style.png(picture)
        assert data == style.png(draw())
        with Image.open(io.BytesIO(data)) as image:
            assert 800 <= image.width <= 1100 and image.height < 700
        assert all(axes.get_title(loc="left") or axes.get_xlabel() or not axes.axison for axes in picture.axes)
    for before, after in zip(kept, (table, curves, PUBLISHED["trajectories"]), strict=True):
        pd.testing.assert_frame_equal(before, after)


def test_reference_tables_are_those_of_the_job(job: Any) -> None:
    table, curves = pd.read_csv(REFERENCE / "results.csv"), pd.read_csv(REFERENCE / "curves.csv")
    hashes = {(run.variant, run.config.seed): run.config.hash for run in job.runs}
    runs = list(zip(table["variant"], table["seed"], strict=True))
    assert len(runs) == len(set(runs)) and set(runs) <= set(hashes), "runs that are not in the job"
    assert table["config_hash"].tolist() == [hashes[run] for run in runs], "made with other settings than the job's"
    assert {("base", seed) for seed in (1, 2, 3, 4)} <= set(runs)
    assert table["dataset_fingerprint"].nunique() == 1 and table["processor"].nunique() == 1
    assert set(table["tokens_seen"]) == {614_400} and table["training_val_bpb"].between(1, 8).all()
    last = curves.sort_values("step").groupby(["variant", "seed"])["val_bpb"].last()
    assert set(last.index) == set(runs)
    found = table.set_index(["variant", "seed"])["training_val_bpb"]
    np.testing.assert_allclose(last.loc[runs], found.loc[runs], rtol=1e-6)
