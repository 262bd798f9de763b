"""Figures: what they show is what they were given, they leave no state behind, and their files are byte-stable."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot
from matplotlib.axes import Axes
from PIL import Image

from by_name import train_config
from golfbook.analysis import context, frontier, statistics
from golfbook.config.schema import TrainConfig
from golfbook.errors import GolfbookError, RunError
from golfbook.evaluate.windows import plan_windows
from golfbook.plots import frontier as frontier_plots
from golfbook.plots import quantization as quantization_plots
from golfbook.plots import schedules, style
from golfbook.plots import seeds as seed_plots
from golfbook.plots import size as size_plots
from golfbook.plots import text as text_plots
from golfbook.train.schedules import schedule_table


def legend(axes: Axes) -> list[str]:
    found = axes.get_legend()
    return [text.get_text() for text in found.get_texts()] if found else []


METRICS = [
    {"kind": "validation", "step": 0, "val_bpb": 4.2, "val_loss": 7.0, "seconds": 0.0},
    {"kind": "train", "step": 10, "loss": 6.5, "lr_scale": 1.0, "tokens_per_second": 100.0, "seconds": 1.0},
    {"kind": "train", "step": 20, "loss": 5.5, "lr_scale": 0.5, "tokens_per_second": 100.0, "seconds": 2.0},
    {"kind": "validation", "step": 20, "val_bpb": 3.1, "val_loss": 5.4, "seconds": 2.0},
]
SEEDS = pd.DataFrame(
    [("a", 1, 2.10), ("a", 2, 2.12), ("a", 3, 2.15), ("b", 1, 2.20), ("b", 2, 2.21)],
    columns=["variant", "seed", "val_bpb"],
)


EVERYTHING = {
    "warmdown_shape": "cosine", "min_lr_scale": 0.1, "lr_warmup_steps": 2, "max_seconds": 5.0, "averaging": "swa",
    "swa_start": 0.8, "swa_every": 1, "qat_start": 0.5,
}  # fmt: skip


def schedule_config(**changes: Any) -> TrainConfig:
    """Ten steps, the last four a warmdown; a batch of one sequence."""
    settings = {
        "steps": 10, "warmdown_steps": 4, "muon_momentum_warmup_steps": 5, "muon_momentum_start": 0.8,
        "muon_momentum": 0.9, "batch_tokens": 64, "sequence_length": 64, "ema_decay": 0.5,
    }  # fmt: skip
    return train_config(**{**settings, **changes})


def examples() -> dict[str, style.Picture]:
    """One example of every kind of figure."""
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 0.05, (8, 64))
    scale = np.abs(weights).max(axis=1, keepdims=True) / 31
    integers = np.round(weights / scale)
    plan = plan_windows(100, 32, 8)
    widths = pd.DataFrame(
        {"bits": [4, 5, 6], "error": [0.1, 0.05, 0.02], "artifact_bytes": [100, 120, 140], "val_bpb": [2.3, 2.2, 2.1]}
    )
    ladder = context.stride_ladder({32: rng.exponential(2, 96), 16: rng.exponential(2, 96)}, 32, 300)
    gains = context.gain_by_position(rng.exponential(2, 200), rng.exponential(2, 200), 20)
    ways = pd.DataFrame({"name": ["4 bits", "floor"], "artifact_bytes": [400_000, 410_000], "tax": [0.01, 0.005]})
    prices = pd.DataFrame(
        {"name": ["a.weight"], "group": ["MLP"], "saved_kb": [8.0], "lost": [0.002], "low": [-0.001], "high": [0.005]}
    )
    errors = pd.DataFrame({"name": ["a.weight", "b"], "plain": [2.0, 1.5], "weighted": [0.5, 0.8]})
    bits = [("k", "a.weight", 3.0, 40.0), ("k", "b", 3.1, 0.5), ("e", "a.weight", 4.0, 9.0), ("e", "b", 2.0, 8.0)]
    walks = [{0: (0.2, [(0, 2)]), 2: (0.5, [(0, 0)])}, {0: (0.4, [(0, 2), (0, 4)]), 1: (0.3, [(0, 2), (0, 3)])}]
    stored = [("r", 3.0, coder, size, 0.01, 2.0, 0.02) for coder, size in (("xz", 9000), ("entropy", 8000))]
    ways_columns = ["rule", "bits", "coder", "bytes", "tax_bpb", "val_bpb", "divergence_bpb"]
    spent = {"code": 100, "integers": 500, "side information": 20, "floats": 30, "header": 10}
    texts = {"source": ["training", "random"], "tax_bpb": [0.001, 0.002], "divergence_bpb": [0.001, 0.003]}
    return {
        "feedback": quantization_plots.feedback(errors, bits=4),
        "allocation": quantization_plots.allocation(pd.DataFrame(bits, columns=["recipe", "name", "bits", "slope"])),
        "trellis": quantization_plots.trellis([1.8, 3.6], walks, 4),
        "gains": quantization_plots.gains(pd.DataFrame({"states": [4, 8], "gain": [1.0, 1.1]})),
        "ways": quantization_plots.ways(pd.DataFrame(stored, columns=ways_columns), "r", 3.0, "xz"),
        "spectrum": quantization_plots.spectrum({"E": [3.0, 2.0, 1.0], "noise": [2.0, 2.0, 1.9]}, rank=1, name="a"),
        "sources": quantization_plots.sources(pd.DataFrame(texts)),
        "meter": quantization_plots.meter(spent, 600, bits=2.5, tax=0.003),
        "training_curve": schedules.training_curve(METRICS, steps=40, unigram_bpb=3.5),
        "training_curve of nothing": schedules.training_curve([], steps=40),
        "schedule": schedules.schedule(schedule_config()),
        "schedule with everything": schedules.schedule(schedule_config(**EVERYTHING), 0.5),
        "schedule of one step of AdamW": schedules.schedule(schedule_config(steps=1, matrix_optimizer="adamw")),
        "seeds": seed_plots.seeds(SEEDS, unigram_bpb=3.5),
        "coverage": seed_plots.coverage({2: statistics.null_intervals(2, 30), 4: statistics.null_intervals(4, 30)}, 20),
        "seeds_needed": seed_plots.seeds_needed(0.002, 0.001),
        "bytes_per_token": text_plots.bytes_per_token([0, 1, 1, 3]),
        "top_pieces": text_plots.top_pieces(["a", "$b$", "\U0001f600"], [3, 2, 1], [3, 4, 4]),
        "tokens": text_plots.tokens(["\u2581the", "$x$", "\U0001f600"], [4, 3, 4]),
        "tokens of nothing": text_plots.tokens([], [], []),
        "vocabularies": text_plots.vocabularies(
            pd.DataFrame({"pieces": [300, 900], "bits_per_token": [6.0, 8.0], "bits_per_byte": [4.0, 3.0]})
        ),
        "ladder": text_plots.ladder(
            {"raw": 39215, "lzma": 15204, "model": 13302.5}, unit="bytes", title="Sizes", guess=14000
        ),
        "windows": text_plots.windows(plan.starts, plan.first, plan.stop, window=32, targets=100),
        "times_scored": text_plots.times_scored([1, 1], [1, 4], first_target=7),
        "gain_by_position": text_plots.gain_by_position(gains, sliding="stride 2"),
        "stride_ladder": text_plots.stride_ladder(ladder, targets=96),
        "parameters": size_plots.parameters({"attention": 30, "MLP": 70}, title="100 parameters"),
        "quantization": size_plots.quantization(
            weights, integers, integers * scale, bits=6, scale=float(scale[0, 0]), name="matrix"
        ),
        "bits_curve": size_plots.bits_curve(
            pd.DataFrame({"bits": [3, 4], "clip": ["all", "all"], "error": [0.2, 0.1], "entropy_bits": [2.5, 3.4]})
        ),
        "bits_choice": size_plots.bits_choice(widths, 5),
        "entropy_bytes": size_plots.entropy_bytes(
            pd.DataFrame({"group": ["MLP"], "nominal_bytes": [1000], "entropy_bytes": [700.0], "coded_bytes": [720]})
        ),
        "floor": size_plots.floor(ways, ways, ["4 bits"], {"line": [-0.002, 0.001]}),
        "sensitivity": size_plots.sensitivity(prices, bits=4),
        **sizes_against_quality(),
        "budget": size_plots.budget({"code": 100_000, "artifact": 500_000}),
    }


def sizes_against_quality() -> dict[str, style.Picture]:
    """The pictures of notebook 13, of two invented recipes, three seeds and two lengths."""
    rows = [
        (steps, seed, recipe, bits, 100_000 * share * bits, 120_000 * share * bits, 2.0, 0.0, seed * 4.0**-bits, 2.0, 1)
        for steps in (400, 1600)
        for seed in (1, 2, 3)
        for recipe, share in ((frontier.FLOOR, 1.0), (frontier.OURS, 0.8))
        for bits in (4, 6, 8)
    ]
    table = pd.DataFrame(rows, columns=list(frontier.COLUMNS))
    one, names = table[table["steps"] == 1600], frontier.MAIN
    pieces = one[one["seed"] == 1].assign(**dict.fromkeys(frontier.PARTS, 30_000))
    reference = frontier.REFERENCES[0]
    lengths = frontier.by_length(table, [reference])
    ideal = frontier.front(one, size="memoryless_bytes")
    return {
        "front": frontier_plots.front(frontier.front(one), names, ideal, title="Front"),
        "steps": frontier_plots.steps(frontier.steps_apart(one, frontier.ANCHOR), title="Steps"),
        "lengths": frontier_plots.lengths(lengths, {(reference[0], reference[2]): "PR 1166"}),
        "slopes": frontier_plots.slopes(one, frontier.slopes(one, 1_000_000), names, 1_000_000),
        "parts": frontier_plots.parts(pieces[pieces["bits"] == 4], names, frontier.PARTS),
        "within": frontier_plots.within(pieces, names, frontier.PARTS, 250.0),
        "within nothing": frontier_plots.within(pieces, names, frontier.PARTS, 1.0),
    }


@pytest.fixture(scope="module")
def pictures() -> dict[str, style.Picture]:
    return examples()


def test_every_figure_is_labelled_and_draws_without_warning(
    pictures: dict[str, style.Picture], recwarn: pytest.WarningsRecorder
) -> None:
    for name, figure in pictures.items():
        with Image.open(io.BytesIO(style.png(figure))) as image:
            width, height = image.size
            assert 500 <= width <= 1100, name
            assert 100 < height < 1000, name
            assert len(image.convert("L").getcolors()) > 10, name
        titles = [figure.get_suptitle(), *(axes.get_title(loc="left") for axes in figure.axes)]
        assert any(titles), name
        if figure.axes[0].axison:
            assert any(axes.get_xlabel() for axes in figure.axes) or name in ("seeds", "entropy_bytes"), name
            assert all(axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes[-1:]), name
    assert not [w for w in recwarn if "Glyph" in str(w.message) or "layout" in str(w.message)]


def test_titles_say_what_the_pictures_of_quantisers_show(pictures: dict[str, style.Picture]) -> None:
    walk, meter = pictures["trellis"], pictures["meter"].axes[0].get_title(loc="left")
    assert "error 0.30 along the best walk, 0.20 by rounding" in walk.get_suptitle()
    (best,) = [line for line in walk.axes[0].lines if line.get_label() == "the best walk"]
    assert list(best.get_ydata()) == [0, 0, 1]
    assert "does NOT fit: 60 bytes too many" in meter and "predicted tax 0.0030" in meter
    assert "9,000 bytes, tax +0.0100, 2.0000 bits per byte" in pictures["ways"].get_suptitle()
    assert "first 1 hold 64.3%" in legend(pictures["spectrum"].axes[0])[0]


def test_figures_leave_pyplot_and_settings_alone() -> None:
    before = dict(matplotlib.rcParams)
    examples()
    assert pyplot.get_fignums() == []
    assert dict(matplotlib.rcParams) == before


def test_foreign_settings_do_not_change_a_figure() -> None:
    plain = style.png(size_plots.budget({"code": 10, "artifact": 20}))
    with matplotlib.rc_context({"font.size": 22, "axes.grid": False, "axes.facecolor": "red"}):
        assert style.png(size_plots.budget({"code": 10, "artifact": 20})) == plain


def test_notebooks_show_a_figure_as_one_png(pictures: dict[str, style.Picture]) -> None:
    assert pictures["budget"]._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n"


def test_saved_files_are_equal_for_equal_data(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    for folder in ("one", "two"):
        monkeypatch.setenv("GOLFBOOK_FIGURES", str(tmp_path / folder))
        paths = style.save(seed_plots.seeds(SEEDS), "study_seeds", SEEDS)
        assert [p.name for p in paths] == ["study_seeds.png", "study_seeds.svg", "study_seeds.csv"]
        written.append([p.read_bytes() for p in paths])
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == sorted(p.name for p in paths)
    assert written[0] == written[1]
    assert not re.search(rb"20\d\d-\d\d-\d\d", written[0][1])
    pd.testing.assert_frame_equal(pd.read_csv(io.BytesIO(written[0][2])), SEEDS)


def test_save_names_what_is_wrong(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GolfbookError, match="plain file name"):
        style.save(seed_plots.seeds(SEEDS), "../escape")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GOLFBOOK_FIGURES", str(tmp_path / "file"))
    with pytest.raises(RunError, match="cannot write"):
        style.save(seed_plots.seeds(SEEDS), "seeds")


def test_training_curve_shows_the_points() -> None:
    loss, scale, score = schedules.training_curve(METRICS, steps=40, unigram_bpb=3.5).axes
    assert loss.lines[0].get_xydata().tolist() == [[10, 6.5], [20, 5.5]]
    assert score.lines[0].get_xydata().tolist() == [[0, 4.2], [20, 3.1]]
    assert score.lines[1].get_ydata()[0] == 3.5
    assert scale.get_xlim() == loss.get_xlim() == (0, 40)


def test_seeds_shows_every_seed_mean_and_interval() -> None:
    (axes,) = seed_plots.seeds(SEEDS).axes
    dots = np.concatenate(
        [c.get_offsets()[:, 1] for c in axes.collections if len(c.get_offsets()) and c.get_array() is None]
    )
    for value in SEEDS["val_bpb"]:
        assert np.isclose(dots, value).any()
    assert [t.get_text() for t in axes.get_xticklabels()] == ["a\nn = 3", "b\nn = 2"]
    summary = statistics.describe([2.10, 2.12, 2.15])
    bars = [c.lines for c in axes.containers]
    low, high = sorted(bars[0][2][0].get_segments()[0][:, 1])
    assert bars[0][0].get_ydata()[0] == pytest.approx(summary.mean)
    assert (low, high) == pytest.approx((summary.low, summary.high))
    joined = [line for line in axes.lines if line.get_color() == style.LIGHT and len(line.get_xdata()) == 2]
    assert len(joined) == 2  # seeds 1 and 2 are in both variants, seed 3 is not


def test_seeds_claims_no_interval_for_one_seed() -> None:
    (axes,) = seed_plots.seeds(SEEDS[SEEDS["seed"] == 1]).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert any("no interval" in label for label in labels)
    assert all(container.lines[2] == () for container in axes.containers)


def test_unigram_entropy_is_a_line_or_said_to_be_off_the_scale() -> None:
    for value, expected in ((2.15, "unigram entropy 2.150"), (3.5, "unigram entropy 3.500: off the scale")):
        (axes,) = seed_plots.seeds(SEEDS, unigram_bpb=value).axes
        assert expected in [text.get_text() for text in axes.get_legend().get_texts()]


def test_schedule_follows_the_formulas() -> None:
    rate, momentum, average = schedules.schedule(schedule_config()).axes
    assert rate.lines[0].get_ydata() == pytest.approx([1] * 7 + [0.75, 0.5, 0.25])
    assert momentum.lines[0].get_ydata() == pytest.approx([0.8, 0.82, 0.84, 0.86, 0.88] + [0.9] * 5)
    shares = average.lines[0].get_ydata()
    assert shares[-1] == 0.5
    assert sum(shares) == pytest.approx(1 - 0.5**10)
    assert legend(rate) == ["learning-rate scale", "linear warmdown from step 6"]


def test_schedule_shows_everything_that_a_config_can_say() -> None:
    """Clock of 5 s at half a second a step: ten steps, and every mark where the table of the schedule has it."""
    config = schedule_config(**EVERYTHING)
    table = schedule_table(config, 0.5)
    rate, _, average = schedules.schedule(config, 0.5).axes
    assert rate.lines[0].get_ydata() == pytest.approx(table["lr_scale"])
    snapshots = next(line for line in rate.lines if "snapshots" in str(line.get_label()))
    assert list(snapshots.get_xdata()) == list(table["step"][table["snapshot"]])
    assert legend(rate) == [
        "learning-rate scale", "warm-up", "cosine warmdown from step 6", "ends at 0.1 of the base rates",
        f"{table['snapshot'].sum()} SWA snapshots below 0.8",
        f"fake-quantised below 0.5: from step {table['step'][table['qat']][0]}",
    ]  # fmt: skip
    assert average.get_title(loc="left") == f"SWA of {table['snapshot'].sum()} snapshots"
    assert average.lines[0].get_ydata() == pytest.approx([1 / table["snapshot"].sum()] * table["snapshot"].sum())
    (clock,) = rate.child_axes
    assert clock.get_xlabel() == "training time (s)"
    slow = schedules.schedule(config, 1.0)
    assert "5 of 10 steps" in slow.get_suptitle() and len(slow.axes[0].lines[0].get_xdata()) == 5


def test_schedule_says_what_never_happens() -> None:
    rate, momentum, average = schedules.schedule(
        schedule_config(warmdown_steps=0, averaging="swa", qat_start=0.5, matrix_optimizer="adamw")
    ).axes
    assert legend(rate) == ["learning-rate scale", "SWA: no snapshot is taken", "fake quantisation never starts"]
    assert average.get_title(loc="left") == "SWA without a snapshot: the last weights"
    assert "AdamW" in momentum.texts[0].get_text()


def test_gif_has_all_frames_and_their_times() -> None:
    def frames() -> list[style.Picture]:
        return [size_plots.budget({"code": n * 1_000_000}) for n in (1, 4, 9)]

    data = style.gif(frames(), [100, 200, 300])
    assert data == style.gif(frames(), [100, 200, 300])
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "GIF" and image.n_frames == 3
        times = []
        for index in range(3):
            image.seek(index)
            times.append(image.info["duration"])
    assert times == [100, 200, 300]


def test_windows_draws_the_plan() -> None:
    plan = plan_windows(100, 32, 8)
    (axes,) = text_plots.windows(plan.starts, plan.first, plan.stop, window=32, targets=100).axes
    spans = [(p.get_x(), p.get_width()) for p in axes.patches]
    assert spans[:6] == [(0, 32), (0, 32), (8, 32), (32, 8), (16, 32), (40, 8)]
    assert f"{len(plan)} forward passes" in axes.get_title(loc="left")
    assert "at least 24 tokens" in axes.get_title(loc="left")


def test_tokens_are_spelt_so_that_any_font_has_them() -> None:
    assert text_plots.printable("\u2581a b") == "␣a␣b"
    assert text_plots.printable("\n\U0001f600") == "U+000AU+1F600"
    (axes,) = text_plots.tokens(["a", "b"], [1, 2], [1.0, 2.0]).axes
    assert "2 tokens, 3 bytes" in axes.get_title(loc="left")
    assert f"{3 / np.log(2) / 3:.2f} bits per byte" in axes.get_title(loc="left")


def test_gain_by_position_draws_the_table_and_enlarges_what_is_far() -> None:
    table = pd.DataFrame({"context": [2.0, 40.0], "mean": [-0.5, 0.002], "low": [-0.6, 0.001], "high": [-0.4, 0.003]})
    left, right = text_plots.gain_by_position(table.assign(n=7), sliding="stride 2").axes
    assert left.containers[0].lines[0].get_xydata().tolist() == [[2, -0.5], [40, 0.002]]
    (bar,) = right.containers[0].lines[2][0].get_segments()
    assert bar[:, 1] == pytest.approx([0.001, 0.003]) and "n = 7" in left.get_title(loc="left")
    short = text_plots.gain_by_position(table[:1].assign(n=7), sliding="stride 2")
    assert style.png(short)[:4] == b"\x89PNG"  # a window of a few tokens has something to enlarge too


def test_ladder_draws_paired_bars() -> None:
    table = context.stride_ladder({8: np.arange(32.0), 4: np.arange(32.0) - np.repeat([1, 2, 1, 2], 8)}, 8, 100)
    left = text_plots.stride_ladder(table, targets=32).axes[0]
    bar = left.containers[0].lines[2][0].get_segments()[1][:, 1]
    assert bar == pytest.approx([table["low"][1], table["high"][1]])


def test_coverage_paints_what_misses_red() -> None:
    found = np.array([[-1.0, 2.0], [0.5, 1.5], [-3.0, -0.1]])
    (axes,) = seed_plots.coverage({4: found}, 2).axes
    assert axes.get_title(loc="left") == "n = 4: 1 of 2 miss 0"
    red = [
        c.get_segments() for c in axes.collections if matplotlib.colors.to_hex(c.get_color()[0]) == style.RED.lower()
    ]
    assert [segment[:, 0].tolist() for segment in red[0]] == [[0.5, 1.5]]


def test_floor_joins_the_means_of_its_line() -> None:
    rows = [("4 bits", 400e3, 0.01), ("4 bits", 402e3, 0.012), ("5 bits", 460e3, 0.002), ("floor", 410e3, 0.005)]
    table = pd.DataFrame(rows, columns=["name", "artifact_bytes", "tax"])
    left, right = size_plots.floor(table[:1], table, ["5 bits", "4 bits"], {"line": [-0.002, -0.001, 0.0]}).axes
    assert left.lines[0].get_xydata() == pytest.approx(np.array([[401, 0.011], [460, 0.002]]))
    assert right.containers[0].lines[0].get_xdata()[0] == pytest.approx(-0.001)
    assert "n = 3 seeds" in right.get_yticklabels()[0].get_text()


def test_sensitivity_sorts_by_price() -> None:
    names = {"name": ["cheap", "dear"], "group": ["MLP", "attention"], "saved_kb": [10.0, 2.0]}
    table = pd.DataFrame({**names, "lost": [0.001, 0.002], "low": [0.0, 0.001], "high": [0.002, 0.003]})
    (axes,) = size_plots.sensitivity(table, bits=4).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dear, 2.0 kB", "cheap, 10.0 kB"]
    assert [bar.get_width() for bar in axes.patches[:2]] == pytest.approx([0.001, 0.0001])


def test_budget_says_what_is_left_or_too_much() -> None:
    inside = size_plots.budget({"code": 1_000_000, "artifact": 2_000_000})
    assert inside.axes[0].get_title(loc="left") == "3,000,000 of 16,000,000 bytes (18.75%): 13,000,000 bytes left"
    beyond = size_plots.budget({"code": 1_000_000, "artifact": 16_000_000})
    assert "1,000,000 bytes too many" in beyond.axes[0].get_title(loc="left")


def test_a_row_on_its_grid_counts_levels_and_clipped_weights() -> None:
    def title(weights: list[float], scale: float, bits: int) -> str:
        row = np.array([weights])
        return (
            size_plots.quantization(row, 0 * row, row, bits=bits, scale=scale, name="row").axes[0].get_title(loc="left")
        )

    cut = title([-1.0, -0.5, 0.0, 0.5, 2.0], 0.5, 3)
    assert "7 of 7 levels" in cut and "20.0% clipped" in cut
    assert "0.0% clipped" in title([-1.0, 1.0], 0.333, 3)  # a scale rounded down to float16 cuts nothing off
    assert "7 of 63 levels" in title([-0.1, 0.0, 0.1], 1 / 31, 6)


def test_seeds_needed_agrees_with_simulated_studies() -> None:
    (axes,) = seed_plots.seeds_needed(0.002, 0.001).axes
    n, chance = axes.lines[0].get_data()
    draws = np.random.default_rng(0).normal(0.002, 0.001, (4000, 5))
    shown = [d.low > 0 or d.high < 0 for d in map(statistics.describe, draws)]
    assert chance[list(n).index(5)] == pytest.approx(np.mean(shown), abs=0.03)
    needed = int(n[np.argmax(chance >= 0.8)])
    assert f"needs {needed} seeds" in axes.get_title(loc="left")
    assert np.isfinite(seed_plots.seeds_needed(0.05, 0.0001).axes[0].lines[0].get_ydata()).all()
    assert "more than 24" in seed_plots.seeds_needed(0.0001, 0.001).axes[0].get_title(loc="left")


def test_front_greys_what_is_dominated_and_names_every_recipe(pictures: dict[str, style.Picture]) -> None:
    (axes,) = pictures["front"].axes
    faces = [line.get_markerfacecolor() for line in axes.lines if line.get_marker() in "os^D" and len(line.get_xdata())]
    assert faces.count(style.LIGHT) > 0 and faces.count(frontier_plots.COLOURS[3]) > 0
    words = legend(axes)
    assert frontier.MAIN[frontier.FLOOR] in words and frontier.MAIN[frontier.OURS] in words
    assert frontier.MAIN[frontier.RECORDS] not in words, "a recipe without points has no line"


def test_steps_state_percent_interval_and_n(pictures: dict[str, style.Picture]) -> None:
    (axes,) = pictures["steps"].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all together (n = 3)"]
    assert [text.get_text() for text in axes.texts] == ["-20.0 % ± 0.0"]


def test_within_a_budget_the_best_that_fits_is_circled(pictures: dict[str, style.Picture]) -> None:
    left, right = pictures["within"].axes
    assert len(left.collections[-1].get_offsets()) == 1
    assert len(pictures["within nothing"].axes[0].collections[-1].get_offsets()) == 0
    assert sum("nothing fits" in text.get_text() for text in right.texts) == 2
    assert sum("nothing fits" in text.get_text() for text in pictures["within nothing"].axes[1].texts) == 4
