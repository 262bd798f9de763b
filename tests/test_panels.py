"""Panels: driving a control changes the image; without a person the same state is a plain picture."""

from __future__ import annotations

import base64
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import IPython.display
import numpy as np
import pandas as pd
import pytest
import torch

from golfbook.compress import rowwise
from golfbook.config.load import load_config
from golfbook.data.tokenizer import Tokenizer, train_tokenizer
from golfbook.errors import DataError
from golfbook.files import project_root
from golfbook.model.gpt import GPT, initialise
from golfbook.panels import architecture as architecture_panels
from golfbook.panels import base as panels
from golfbook.panels import frontier as frontier_panels
from golfbook.panels import monitor, schedules
from golfbook.panels import seeds as seed_panels
from golfbook.panels import size as size_panels
from golfbook.panels import text as text_panels
from golfbook.panels import training as training_panels
from golfbook.plots import size as size_plots
from golfbook.plots import style
from golfbook.run import Run

SMALL = {
    "model": {"vocab_size": 300, "num_layers": 2, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "rope_dims": 8},
    "model.bigram": {"vocab_size": 32, "dim": 8},
    "model.value_embedding.dim": 8,
    "model.xsa": 1,
    "train.steps": 20,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    return Tokenizer.load(train_tokenizer(["the cat and the hat sat on the mat " * 20] * 20, 300, path))


def make_panel(kind: str, tokenizer: Tokenizer) -> panels.Panel:
    config = load_config("quickstart", overrides=SMALL)
    if kind == "tokens":
        return text_panels.tokens(tokenizer, "the cat")
    if kind == "losses":
        torch.set_num_threads(1)
        return text_panels.losses(initialise(GPT(config.model), 1), tokenizer, "the cat")
    if kind == "windows":
        return text_panels.windows(1000, 64)
    if kind == "build":
        return architecture_panels.build("pr1166_e2e_ttt_flow")
    if kind == "newton_schulz":
        return training_panels.newton_schulz(torch.randn(12, 40, generator=torch.Generator().manual_seed(0)), "matrix")
    if kind == "trajectories":
        folder = project_root() / "runs/published"
        return training_panels.trajectories(
            *(pd.read_csv(folder / f"{name}.csv") for name in ("trajectories", "events", "runs"))
        )
    if kind == "schedule":
        return schedules.schedule(config.train)
    if kind == "bits_and_clip":
        weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0)).pow(3) * 0.01  # long tails
        return size_panels.bits_and_clip(weight, "matrix")
    if kind == "ways_to_store":
        stored = [
            (rule, bits, coder, 1000.0 * bits * size, 0.1, 2.0, 0.1 / bits)
            for rule, rates in (("no floor, xz", (4.0, 5.0)), ("equal slope", (2.0, 3.0)))
            for bits in rates
            for coder, size in (("xz", 2), ("entropy", 1))
        ]
        columns = ["rule", "bits", "coder", "bytes", "tax_bpb", "val_bpb", "divergence_bpb"]
        return size_panels.ways_to_store(pd.DataFrame(stored, columns=columns))
    if kind == "seeds_needed":
        return seed_panels.seeds_needed(0.0312, 0.0063)
    if kind == "coverage":
        return seed_panels.coverage(studies=20)
    if kind == "ladder":
        return text_panels.ladder({"raw": 39215, "lzma": 15204, "model": 13302.5}, unit="bytes", title="Sizes")
    if kind == "budget":
        return frontier_panels.budget(frontier_pieces(), {"a": "A", "b": "B"}, ("MLP", "code"), start=330)
    rows = [(bits, 100 * bits, 2 + 2.0**-bits) for bits in range(3, 9)]
    return size_panels.bits_choice(pd.DataFrame(rows, columns=["bits", "artifact_bytes", "val_bpb"]))


def frontier_pieces() -> pd.DataFrame:
    rows = [
        (r, bits, 50_000 * bits * share, 100_000, 4.0**-bits)
        for r, share in (("a", 1), ("b", 0.9))
        for bits in (3, 4, 8)
    ]
    return pd.DataFrame(rows, columns=["recipe", "bits", "MLP", "code", "divergence_bpb"])


def test_the_best_of_a_budget_is_what_fits_with_its_code() -> None:
    panel = frontier_panels.budget(frontier_pieces(), {"a": "A", "b": "B"}, ("MLP", "code"), start=330)
    for budget, bits in ((330, 4), (270, 3), (460, 8), (230, 0)):
        said = panel.figure(guess=5.0, budget=budget).get_supxlabel()
        assert said == f"your guess: 5; it is {bits}"


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("tokens", "text", "the hat 🚀"),
        ("tokens", "text", ""),
        ("losses", "text", "mat on the cat"),
        ("losses", "text", ""),
        ("windows", "stride", 8),
        ("windows", "guess", 12),
        ("schedule", "warmdown_steps", 4),
        ("schedule", "warmdown_shape", "cosine"),
        ("schedule", "min_lr_scale", 0.5),
        ("schedule", "lr_warmup_steps", 5),
        ("schedule", "method", "swa"),
        ("schedule", "qat_start", 0.5),
        ("schedule", "clock", True),
        ("schedule", "muon_momentum_warmup_steps", 3),
        ("schedule", "ema_decay", 0.0),
        ("schedule", "guess", 30),
        ("build", "layers", 12),
        ("build", "guess", 5),
        ("newton_schulz", "step", 8),
        ("newton_schulz", "coefficients", "polar_express"),
        ("newton_schulz", "row_norm", True),
        ("newton_schulz", "guess", 95),
        ("trajectories", "metric", "train_loss"),
        ("trajectories", "gepa", True),
        ("trajectories", "guess", 0.05),
        ("bits_and_clip", "bits", 3),
        ("bits_and_clip", "clip", 0.0),
        ("bits_and_clip", "clip", 0.99),
        ("bits_and_clip", "scale_floor", True),
        ("bits_and_clip", "guess", 3.5),
        ("ways_to_store", "rule", "no floor, xz"),
        ("ways_to_store", "bits", 2.0),
        ("ways_to_store", "coder", "xz"),
        ("ways_to_store", "guess", 4),
        ("coverage", "rule", "mean ± t standard errors"),
        ("coverage", "shown", 10),
        ("coverage", "seed", 2),
        ("coverage", "guess", 5),
        ("bits_choice", "bits", 4),
        ("bits_choice", "guess", 5),
        ("ladder", "guess", 14000),
        ("budget", "budget", 450),
        ("budget", "guess", 4.0),
        ("seeds_needed", "difference", 0.001),
        ("seeds_needed", "std", 0.009),
        ("seeds_needed", "guess", 3),
    ],
)
def test_moving_a_control_changes_the_image(kind: str, name: str, value: Any, tokenizer: Tokenizer) -> None:
    panel = make_panel(kind, tokenizer)
    controls, message, image = panel.widget().children
    fields = dict(zip(panel.controls, controls.children, strict=True))
    first = image.value
    assert first == panel.png()
    fields[name].value = value
    assert message.value == ""
    assert image.value[:4] == b"\x89PNG"
    assert image.value != first
    assert image.value == panel.png(**{name: value})
    fields[name].value = panel.state[name]
    assert image.value == first


def test_controls_report_only_when_let_go_and_the_image_keeps_its_size(tokenizer: Tokenizer) -> None:
    for kind in ("tokens", "schedule", "bits_choice"):
        controls, _, image = make_panel(kind, tokenizer).widget().children
        for field in controls.children:
            assert getattr(field, "continuous_update", False) is False
        width, height = panels.png_size(image.value)
        assert image.layout.width == f"{width}px"
        assert int(image.layout.height.removesuffix("px")) >= height


def test_an_error_becomes_a_message_and_the_picture_stays() -> None:
    def draw(bits: int) -> style.Picture:
        if bits == 2:
            raise DataError("no <b> here")
        return size_plots.budget({"code": bits})

    controls, message, image = panels.Panel(draw, {"bits": panels.Slider("bits", 1, 1, 3)}).widget().children
    before = image.value
    controls.children[0].value = 2
    assert message.value == "no &lt;b> here"
    assert image.value == before
    controls.children[0].value = 3
    assert message.value == ""
    assert image.value != before


def test_a_guess_is_shown_beside_the_truth_of_the_state() -> None:
    inner = panels.Panel(lambda code: size_plots.budget({"code": code}), {"code": panels.Slider("code", 1, 1, 9)})
    panel = panels.guessing(inner, panels.Slider("guess", 0, 0, 99), lambda code: 10 * code)
    assert panel.figure().get_supxlabel() == ""
    assert panel.figure(guess=7, code=3).get_supxlabel() == "your guess: 7; it is 30"


def test_the_truth_beside_a_guess_follows_the_state(tokenizer: Tokenizer) -> None:
    def said(kind: str, guess: float, **changes: Any) -> float:
        words = make_panel(kind, tokenizer).figure(guess=guess, **changes).get_supxlabel()
        assert words.startswith(f"your guess: {guess:g}; it is ")
        return float(words.rpartition(" ")[2])

    assert said("build", 3) > said("build", 3, layers=12) > said("build", 3, width=768) == 0  # no bits are few enough
    assert said("build", 3, width=256) == 8
    assert said("schedule", 90) == round(100 * 0.997**20)
    assert said("schedule", 90, clock=True, fits=10) == round(100 * 0.997**10)
    quintic, polar = (said("newton_schulz", 50, coefficients=name, step=2) for name in ("quintic", "polar_express"))
    assert quintic < polar == 100
    assert said("ways_to_store", 9, bits=5.0) == said("ways_to_store", 9, bits=3.0) == 3  # the nearest measured rate
    assert said("ways_to_store", 9, bits=2.0, coder="xz", rule="no floor, xz") == 8
    few, all_runs = (said("trajectories", 0.05, gepa=gepa, metric="val_loss") for gepa in (False, True))
    assert 0.08 < few < all_runs < 0.12  # the longer runs win more


def test_two_standard_errors_of_two_seeds_raise_false_alarms() -> None:
    panel = seed_panels.coverage()
    honest, naive = (panel.figure(rule=rule).axes[0].get_title(loc="left") for rule in reversed(seed_panels.RULES))
    counts = [int(title.split(": ")[1].split(" of")[0]) for title in (honest, naive)]
    assert max(counts) > 15 > 12 > min(counts)


def test_a_state_is_drawn_once() -> None:
    drawn: list[int] = []

    def draw(bits: int) -> style.Picture:
        drawn.append(bits)
        return size_plots.budget({"code": bits})

    panel = panels.Panel(draw, {"bits": panels.Slider("bits", 1, 1, 3)})
    for bits in (1, 2, 1, 2):
        panel.png(bits=bits)
    assert drawn == [1, 2]


@pytest.mark.parametrize(
    ("setting", "stdin", "expected"),
    [("", True, True), ("", False, False), ("1", True, False), ("0", False, True)],
)
def test_who_gets_controls(setting: str, stdin: bool, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLFBOOK_STATIC", setting)
    shell = SimpleNamespace(kernel=SimpleNamespace(_allow_stdin=stdin))
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    assert panels.interactive() is expected


def test_show_gives_controls_with_a_picture_beside_or_the_picture_alone(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(IPython.display, "display", lambda value, **_: shown.append(value))
    panel = make_panel("bits_choice", tokenizer)
    monkeypatch.setenv("GOLFBOOK_STATIC", "1")
    panels.show(panel)
    monkeypatch.setenv("GOLFBOOK_STATIC", "0")
    panels.show(panel)
    assert shown[0].data == panel.png()
    assert "application/vnd.jupyter.widget-view+json" in shown[1]
    assert base64.b64decode(shown[1]["image/png"]) == panel.png()


def test_the_clock_of_the_schedule_panel_shortens_the_run(tokenizer: Tokenizer) -> None:
    panel = make_panel("schedule", tokenizer)
    whole, slow = (panel.figure(clock=True, fits=fits).axes[0].lines[0].get_ydata() for fits in (20, 10))
    assert list(whole) == list(panel.figure().axes[0].lines[0].get_ydata())
    assert len(slow) == 10 and slow[-1] == pytest.approx(whole[-1])  # the warmdown ends with the time all the same


def test_play_gives_a_gif_or_the_last_frame_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []
    drawn: list[int] = []
    monkeypatch.setattr(IPython.display, "display", lambda value, **_: shown.append(value))

    def frame(code: int) -> style.Picture:
        drawn.append(code)
        return size_plots.budget({"code": code})

    frames = [functools.partial(frame, code) for code in (10, 1_000_000)]
    monkeypatch.setenv("GOLFBOOK_STATIC", "1")
    panels.play(frames, [100, 100])
    assert drawn == [1_000_000] and shown[0].data == style.png(frames[-1]())
    monkeypatch.setenv("GOLFBOOK_STATIC", "0")
    panels.play(frames, [100, 100])
    assert shown[1].data[:6] == b"GIF89a" and shown[1].format == "gif"


def test_clip_quantize_follows_the_quantiser() -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(3))
    q, scale = rowwise.clip_quantize(weight, 6, 0.99)
    bound = weight.abs().quantile(0.99, dim=1)
    assert scale.float().numpy() == pytest.approx((bound / 31).numpy(), rel=1e-3)
    assert int(q.abs().max()) == 31
    assert (q.abs() == 31).float().mean() == pytest.approx(0.02, abs=0.01)
    whole, _ = rowwise.clip_quantize(weight, 6, 1.0)
    assert ((whole.abs() == 31).sum(dim=1) >= 1).all()


def points(step: int) -> list[dict[str, Any]]:
    return [
        {"kind": "validation", "step": 0, "val_loss": 7.0, "val_bpb": 4.0, "seconds": 0.0},
        {
            "kind": "train",
            "step": step,
            "loss": 6.0 - step / 10,
            "lr_scale": 1.0,
            "tokens_per_second": 1234.0,
            "seconds": 1.0,
        },
    ]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, load_config("quickstart", overrides=SMALL))


def test_monitor_prints_lines_where_nobody_watches(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GOLFBOOK_STATIC", "1")
    update = monitor.training_monitor(run, seconds=0.0)
    update([])
    update(points(5))
    update(points(5))
    update(points(10))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 5/20, loss 5.500 nats/token, 1,234 tokens/s, validation 4.000 bits/byte at step 0",
        "step 10/20, loss 5.000 nats/token, 1,234 tokens/s, validation 4.000 bits/byte at step 0",
    ]
    slow = monitor.training_monitor(run, seconds=3600.0)
    slow(points(5))
    slow(points(10))
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_monitor_redraws_one_image_from_what_is_on_the_disk(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLFBOOK_STATIC", "0")
    monkeypatch.setattr(monitor, "REDRAW_SECONDS", 0.0)
    widgets: list[Any] = []
    monkeypatch.setattr(monitor, "display_widget", lambda widget, static: widgets.append(widget))
    update = monitor.training_monitor(run, unigram_bpb=3.5)
    (image,) = widgets
    values = [image.value]
    for step in (5, 20):
        for point in points(step):
            run.append_metrics(point)
        update(run.read_metrics())
        values.append(image.value)
    assert len(set(values)) == 3
    assert len(widgets) == 1
    assert values[-1] == style.png(monitor.attach(run, unigram_bpb=3.5))


def test_attach_draws_what_the_run_left(run: Run) -> None:
    for point in points(7):
        run.append_metrics(point)
    loss = monitor.attach(run).axes[0].lines[0]
    assert np.asarray(loss.get_xydata()).tolist() == [[7.0, pytest.approx(5.3)]]


def test_a_guess_comes_before_the_answer(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A person sees the last bar after a guess; a reader of an executed notebook, who cannot guess, at once."""
    panel = make_panel("ladder", tokenizer)

    def labels(figure: style.Picture) -> list[str]:
        return [text.get_text() for text in figure.axes[0].texts]

    monkeypatch.setenv("GOLFBOOK_STATIC", "0")
    assert labels(panel.figure()) == ["39,215 (100%)", "15,204 (39%)", "?"]
    assert labels(panel.figure(guess=12000))[-1] == "13,302 (34%)"
    monkeypatch.setenv("GOLFBOOK_STATIC", "1")
    assert labels(panel.figure())[-1] == "13,302 (34%)"
    bits = make_panel("bits_choice", tokenizer)
    assert bits.figure()._supxlabel is None
    assert bits.figure(guess=5)._supxlabel.get_text() == "your guess: 5; it is 7"  # 2 + 2**-7 < 2 + 2**-8 + 0.01
