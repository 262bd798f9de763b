"""Averages of weights: slow references, which one is handed on and under what name, and exact resumption."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from by_name import train_config
from golfbook.config.schema import TrainConfig
from golfbook.train.averaging import WeightAverage
from golfbook.train.schedules import lr_scale

MODES = ["none", "ema", "swa", "swa_of_ema"]


def config(mode: str, **changes) -> TrainConfig:
    values = {"steps": 30, "warmdown_steps": 20, "swa_every": 3, "swa_start": 0.5, "ema_decay": 0.9, **changes}
    return train_config(averaging=mode, **values)


def trajectory(dtype=torch.float32, steps: int = 31) -> list[dict[str, torch.Tensor]]:
    """Weights before the first step and after each of 30."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (3, 4), "b": (), "c": (5,)}
    return [{n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()} for _ in range(steps)]


def run(average: WeightAverage, weights: list[dict[str, torch.Tensor]], first: int = 0, last: int = 30) -> None:
    for step in range(first, last):
        average.update(step, lr_scale(step, average.config), weights[step + 1])


def slow(train: TrainConfig, weights: list[dict[str, torch.Tensor]], name: str) -> torch.Tensor:
    ema, snapshots = weights[0][name].double(), []
    for step in range(train.steps):
        last = weights[step + 1][name].double()
        ema = train.averaging.ema_decay * ema + (1 - train.averaging.ema_decay) * last
        if (step + 1) % train.averaging.swa_every == 0 and (
            train.steps - step
        ) / train.schedule.warmdown_steps < train.averaging.swa_start:
            snapshots.append(ema if train.averaging.method == "swa_of_ema" else last)
    if train.averaging.method in ("swa", "swa_of_ema"):
        assert len(snapshots) == 3  # after 24, 27 and 30 steps; at step 20 the scale is still 0.5
        return torch.stack(snapshots).mean(0)
    return ema if train.averaging.method == "ema" else weights[-1][name].double()


NAMES = {
    "none": "last weights",
    "ema": "moving average",
    "swa": "mean of 3 snapshots of the weights",
    "swa_of_ema": "mean of 3 snapshots of the moving average",
}


@pytest.mark.parametrize("mode", MODES)
def test_results_equal_a_slow_reference(mode):
    train, weights = config(mode), trajectory()
    average = WeightAverage(train, weights[0])
    run(average, weights)
    result = average.result(weights[-1])
    assert list(result) == list(weights[-1])
    assert average.name == NAMES[mode]
    for name, value in result.items():
        torch.testing.assert_close(value.double(), slow(train, weights, name), atol=1e-6, rtol=0)
        assert value.data_ptr() != weights[-1][name].data_ptr()


def test_the_four_modes_differ():
    weights = trajectory()
    results = []
    for mode in MODES:
        average = WeightAverage(config(mode), weights[0])
        run(average, weights)
        results.append(average.result(weights[-1])["a.weight"])
    for i, one in enumerate(results):
        for other in results[i + 1 :]:
            assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pause", [1, 25, 29])
def test_resuming_through_a_file_is_exact(mode, pause, tmp_path):
    train, weights = config(mode), trajectory()
    whole = WeightAverage(train, weights[0])
    run(whole, weights)
    first = WeightAverage(train, weights[0])
    run(first, weights, last=pause)
    save_file(first.state_tensors(), tmp_path / "average.safetensors")
    resumed = WeightAverage(train, weights[-1])  # its own start must not matter
    resumed.load_state_tensors(load_file(tmp_path / "average.safetensors"), first.state_numbers())
    run(resumed, weights, first=pause)
    assert resumed.name == whole.name
    for name, value in whole.result(weights[-1]).items():
        assert torch.equal(resumed.result(weights[-1])[name], value)


def test_without_a_snapshot_it_falls_back_and_says_so():
    weights = trajectory()
    for mode, name in (("swa", "last weights"), ("swa_of_ema", "moving average")):
        average = WeightAverage(config(mode, swa_every=1000), weights[0])
        run(average, weights)
        assert average.name == f"{name} (no snapshot was taken)"
        expected = weights[-1]["c"] if mode == "swa" else slow(config("ema"), weights, "c").float()
        torch.testing.assert_close(average.result(weights[-1])["c"], expected, atol=1e-6, rtol=0)


def test_decay_zero_stores_nothing_and_is_named():
    weights = trajectory()
    average = WeightAverage(config("ema", ema_decay=0.0), weights[0])
    run(average, weights)
    assert average.state_tensors() == {}
    assert average.name == "last weights (decay 0)"
    assert torch.equal(average.result(weights[-1])["c"], weights[-1]["c"])


def test_half_precision_weights_are_averaged_in_float32():
    weights = trajectory(torch.bfloat16)
    average = WeightAverage(config("ema"), weights[0])
    run(average, weights)
    assert {t.dtype for t in average.state_tensors().values()} == {torch.float32}
    result = average.result(weights[-1])
    assert result["c"].dtype == torch.bfloat16
    assert torch.equal(result["c"], average.state_tensors()["ema/c"].bfloat16())


def test_state_of_another_kind_is_refused():
    weights = trajectory()
    averages = {mode: WeightAverage(config(mode), weights[0]) for mode in MODES}
    run(averages["swa_of_ema"], weights)
    for mode in ("none", "swa"):
        with pytest.raises(ValueError, match=r"train\.averaging"):
            averages[mode].load_state_tensors(
                averages["swa_of_ema"].state_tensors(), averages["swa_of_ema"].state_numbers()
            )
    with pytest.raises(ValueError, match=r"train\.averaging"):
        averages["ema"].load_state_tensors({}, {"snapshots": 0})
    with pytest.raises(ValueError, match=r"train\.averaging"):
        averages["swa"].load_state_tensors({}, {"snapshots": 2})
