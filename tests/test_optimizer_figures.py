"""What optimisers do, in numbers and pictures: momentum in a valley, Newton-Schulz on the directions of a gradient."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from golfbook.analysis import optimizers
from golfbook.panels import training as training_panels
from golfbook.plots import optimizers as optimizer_plots
from golfbook.plots import style
from golfbook.train import muon


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_the_path_is_that_of_nesterov_momentum(momentum: float) -> None:
    """torch's SGD with Nesterov keeps m and u as Muon does."""
    valley = optimizers.Valley()
    point = torch.ones(2, dtype=torch.float64, requires_grad=True)
    descent = torch.optim.SGD([point], lr=0.02, momentum=momentum, nesterov=momentum > 0)
    expected = [point.detach().clone()]
    for _ in range(30):
        descent.zero_grad()
        (0.5 * (valley.flat * point[0] ** 2 + valley.steep * point[1] ** 2)).backward()
        descent.step()
        expected.append(point.detach().clone())
    np.testing.assert_allclose(valley.descend(0.02, momentum, 30), torch.stack(expected).numpy(), rtol=1e-9)


def test_arrival_counts_steps_and_knows_who_never_arrives() -> None:
    valley = optimizers.Valley()
    steps = valley.arrival(np.array([0.03, 0.02, 0.001, 0.07]), 0.0)
    by_hand = np.ceil(np.log(0.01) / np.log(1 - np.array([0.03, 0.02])))
    assert steps[:2].tolist() == by_hand.tolist()
    assert np.isinf(steps[2:]).all(), "too slow for 400 steps, and beyond 2/30 it diverges"
    assert valley.arrival(1 / 30, 0.7) < 0.5 * valley.arrival(2 / 31, 0.0), "momentum pays"


def test_momentum_panel_shows_the_path_and_keeps_the_answer_for_later() -> None:
    panel = training_panels.momentum()
    left, _, right, *_ = panel.figure(rate=0.034, momentum=0.7, truth=True).axes
    path = optimizers.Valley().descend(0.034, 0.7, training_panels.SHOWN_STEPS)
    np.testing.assert_allclose(left.lines[0].get_xydata(), np.clip(path, -1.3, 1.3))
    assert f"{optimizers.Valley().arrival(0.034, 0.7):.0f} steps" in left.get_title(loc="left")
    labels = [text.get_text() for text in right.get_legend().get_texts()]
    found = int(labels[1].split()[1])
    assert labels[1].startswith("best: ") and found <= optimizers.Valley().arrival(0.034, 0.7)
    assert "does not arrive" in panel.figure(rate=0.07, truth=False).axes[0].get_title(loc="left")
    assert panel.figure(truth=False).axes[2].get_legend() is None, "nobody has guessed yet"


def random_matrix(rows: int, columns: int, smallest: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(rows, min(rows, columns), generator=generator))
    v, _ = torch.linalg.qr(torch.randn(columns, min(rows, columns), generator=generator))
    return (u * torch.logspace(0, np.log10(smallest), min(rows, columns))) @ v.mT


@pytest.mark.parametrize("kind", ["quintic", "polar_express"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (12, 60)])
def test_directions_walk_along_the_polynomials(kind: muon.Coefficients, shape: tuple[int, int]) -> None:
    matrix = random_matrix(*shape, smallest=1e-2)
    sizes = optimizers.direction_sizes(matrix, 5, kind)
    expected = [np.linalg.svd(matrix.double().numpy(), compute_uv=False)]
    expected[0] = expected[0] / np.linalg.norm(expected[0]) / (1 if kind == "quintic" else muon.SAFETY)
    for a, b, c in muon.iteration_coefficients(5, kind):
        x = expected[-1]
        expected.append(a * x + b * x**3 + c * x**5)
    np.testing.assert_allclose(sizes, expected, atol=5e-4)  # float32, and shared products for long matrices
    final = torch.linalg.svdvals(muon.newton_schulz(matrix, 5, torch.float32, kind).double()).numpy()
    np.testing.assert_allclose(sorted(sizes[-1]), sorted(final), atol=5e-4)
    rounded = optimizers.direction_sizes(matrix, 5, kind, torch.bfloat16)
    assert 1e-4 < np.abs(rounded - sizes)[-1].max() < 0.2


def test_row_norms_change_where_the_iteration_starts() -> None:
    matrix = random_matrix(24, 40, smallest=1e-2) * torch.logspace(0, 2, 24)[:, None]
    before = matrix.clone()
    plain, rows = (optimizers.direction_sizes(matrix, 0, row_norm=on)[0] for on in (False, True))
    expected = torch.linalg.svdvals((matrix / matrix.norm(dim=1, keepdim=True)).double())
    np.testing.assert_allclose(rows, (expected / expected.norm()).numpy(), atol=1e-6)
    assert rows.min() / rows.max() > plain.min() / plain.max()
    assert torch.equal(matrix, before)


def test_newton_schulz_panel_draws_the_sizes() -> None:
    matrix = random_matrix(24, 40, smallest=1e-2)
    panel = training_panels.newton_schulz(matrix, "w")
    sizes = optimizers.direction_sizes(matrix, 5)
    left, right = panel.figure().axes
    assert np.allclose(left.collections[0].get_offsets(), np.stack([sizes[4], sizes[5]], axis=1))
    assert right.lines[-2].get_ydata() == pytest.approx(sizes[5])
    assert f"median {np.median(sizes[5]):.2g}" in right.get_title(loc="left")
    first = panel.png()
    for change in ({"step": 0}, {"coefficients": "polar_express"}, {"row_norm": True}, {"dtype": "bfloat16"}):
        assert panel.png(**change) != first


def test_animation_moves_up_to_the_curve_and_across_and_is_small() -> None:
    matrix = random_matrix(24, 40, smallest=1e-2)
    frames, times = training_panels.newton_schulz_frames(matrix, "w")
    assert len(frames) == len(times) == 1 + 4 * 5 and max(times) == times[-1]
    sizes = optimizers.direction_sizes(matrix, 5)
    series = {"quintic": (sizes, muon.iteration_coefficients(5))}
    for moment, x, y in ((0, 0, 0), (0.5, 0, 1), (1, 1, 1), (1.5, 1, 2), (5, 5, 5)):
        (axes,) = optimizer_plots.newton_schulz_moment(series, moment, title="t").axes
        found = axes.collections[0].get_offsets()
        assert np.allclose(found, np.stack([sizes[x], sizes[y]], axis=1)), moment
        assert f"{int(moment)} of 5 steps" in axes.get_title(loc="left")
    data = style.gif([frame() for frame in frames], times)
    assert len(data) < 300_000
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == len(frames) and max(image.size) <= 800
