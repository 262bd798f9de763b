"""Schedules: published values, bounds, monotone warmdown, clock and cosine variants, and the table for the picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from by_name import train_config
from golfbook.config.schema import TrainConfig
from golfbook.train.averaging import WeightAverage
from golfbook.train.schedules import lr_scale, muon_momentum, qat_active, schedule_table, snapshot_due, step_weights

CONFIGS = st.builds(
    train_config,
    steps=st.integers(1, 300),
    warmdown_steps=st.integers(0, 400),
    lr_warmup_steps=st.integers(0, 40),
    warmdown_shape=st.sampled_from(["linear", "cosine"]),
    min_lr_scale=st.floats(0, 0.9),
    muon_momentum_warmup_steps=st.integers(0, 400),
)


def test_published_values():
    config = TrainConfig()
    assert [lr_scale(k, config) for k in (0, 2874)] == [1.0, 1.0]
    for step, value in ((6322, 0.20019), (6323, 0.19995), (6538, 0.15008), (6539, 0.14985), (7184, 1 / 4311)):
        assert lr_scale(step, config) == pytest.approx(value, abs=1e-5)
    assert muon_momentum(0, config) == pytest.approx(0.92)
    assert muon_momentum(750, config) == pytest.approx(0.955)
    assert muon_momentum(5000, config) == pytest.approx(0.99)


def test_published_events():
    """PR 1166: first snapshot at step 6350, QAT from step 6539 at threshold 0.15 (section 16)."""
    config = train_config(qat_start=0.15)
    table = schedule_table(config)
    assert table["step"][table["snapshot"]][0] + 1 == 6350
    assert table["step"][table["qat"]][0] == 6539
    assert table["qat"][6539:].all()
    assert not schedule_table(TrainConfig())["qat"].any()


def test_published_clock():
    """PR 1406 section 11.7: 599 s, warmdown of 3,500 steps; steps of 97.13 ms: it begins some 340 s before the end."""
    config = train_config(steps=9000, warmdown_steps=3500, max_seconds=599.0)
    warmdown = 3500 * 0.09713
    begins = 599.0 - warmdown
    step = round(begins / 0.09713)
    assert lr_scale(step - 5, config, begins - 0.5, 0.09713) == 1.0
    assert lr_scale(step, config, begins + warmdown / 4, 0.09713) == pytest.approx(0.75)
    assert lr_scale(9, config, 598.9) == pytest.approx(0.1 / (3500 * 598.9 / 9))  # the mean comes from step and clock
    assert lr_scale(0, config, 0.0) == 1.0
    assert lr_scale(7000, config, 650.0) == 0.0
    assert lr_scale(10, train_config(config, warmdown_steps=0), 650.0) == 1.0
    with pytest.raises(ValueError, match="elapsed_seconds"):
        lr_scale(1, config)


@settings(max_examples=60, deadline=None)
@given(config=CONFIGS)
def test_bounds_and_monotone_warmdown(config):
    table = schedule_table(config)
    scale, warm = table["lr_scale"], config.schedule.lr_warmup_steps
    assert len(scale) == config.steps
    assert (scale > 0).all() and (scale <= 1).all()
    assert (np.diff(scale[warm:]) <= 1e-12).all()
    assert (scale >= np.minimum(config.schedule.min_lr_scale, (table["step"] + 1) / max(warm, 1)) - 1e-12).all()
    assert (np.diff(table["muon_momentum"]) >= -1e-12).all()
    assert table["muon_momentum"].max() <= config.optimizer.muon_momentum + 1e-12
    if config.schedule.warmdown_steps:
        assert lr_scale(config.steps + warm, config) == pytest.approx(config.schedule.min_lr_scale, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(config=CONFIGS, seconds=st.floats(0.01, 50), step_seconds=st.floats(0.01, 2))
def test_the_clock_agrees_with_steps_of_equal_length(config, seconds, step_seconds):
    timed = train_config(config, max_seconds=seconds)
    table = schedule_table(timed, step_seconds)
    assert 1 <= len(table["step"]) <= config.steps
    whole = train_config(config, max_seconds=step_seconds * config.steps)
    np.testing.assert_allclose(schedule_table(whole)["lr_scale"], schedule_table(config)["lr_scale"], atol=1e-9)


def test_warmup_and_cosine_formulas():
    config = train_config(steps=100, lr_warmup_steps=10, warmdown_steps=40, warmdown_shape="cosine", min_lr_scale=0.1)
    assert lr_scale(0, config) == pytest.approx(0.1)
    assert lr_scale(9, config) == lr_scale(60, config) == 1.0
    assert lr_scale(80, config) == pytest.approx(0.55)  # half way
    assert lr_scale(100, config) == pytest.approx(0.1)
    linear = train_config(config, warmdown_shape="linear")
    assert lr_scale(90, linear) == pytest.approx(0.1 + 0.9 * 0.25)
    assert lr_scale(90, config) < lr_scale(90, linear)


def test_a_warm_up_starts_neither_snapshots_nor_qat():
    config = train_config(steps=100, lr_warmup_steps=50, warmdown_steps=20, swa_every=1, swa_start=0.5, qat_start=0.5)
    table = schedule_table(config)
    assert table["lr_scale"][5] < 0.5
    assert not table["snapshot"][:50].any() and not table["qat"][:50].any()
    assert table["snapshot"][91:].all() and table["qat"][91:].all() and not table["qat"][90]
    assert not qat_active(5, 0.1, config) and qat_active(95, 0.1, config) and snapshot_due(95, 0.1, config)


@pytest.mark.parametrize("averaging", ["none", "ema", "swa", "swa_of_ema"])
@pytest.mark.parametrize("changes", [{}, {"swa_start": 0.0}, {"ema_decay": 0.0}, {"steps": 1}])
def test_step_weights_are_what_the_average_does(averaging, changes):
    """Weights that are a different unit vector after each step: the average then holds the share of every step."""
    settings = {"steps": 30, "warmdown_steps": 20, "swa_start": 0.6, "swa_every": 3, "ema_decay": 0.8, **changes}
    config = train_config(averaging=averaging, **settings)
    table = schedule_table(config)
    steps = len(table["step"])
    unit = torch.eye(steps + 1)
    average = WeightAverage(config, {"w": unit[0]})
    for step, scale in enumerate(table["lr_scale"]):
        average.update(step, float(scale), {"w": unit[step + 1]})
    expected = average.result({"w": unit[steps]})["w"].numpy()
    shares, initial = step_weights(config, table)
    np.testing.assert_allclose(np.concatenate([[initial], shares]), expected, atol=1e-6)
    assert initial + shares.sum() == pytest.approx(1)
