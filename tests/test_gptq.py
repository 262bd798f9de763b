"""GPTQ: the published vectors to the integer, the plain reference, the identity of its loss, and broken statistics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golfbook.compress.gptq import DAMPING, feedback, gptq_matrix, output_loss, reverse_factor
from golfbook.compress.quantizer import quantize
from golfbook.compress.rowwise import quantize_matrix, quantize_other, row_scales
from golfbook.config.schema import QuantizeConfig
from golfbook.errors import RunError
from golfbook.plain import gptq as plain
from reference import sine


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def inputs(columns: int, positions: int, seed: int) -> torch.Tensor:
    """Correlated inputs of very different sizes, the second one dead."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(positions, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x = x * torch.rand(columns, generator=generator) ** 2
    x[:, 1] = 0
    return x


def gram(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def published_gram() -> torch.Tensor:
    """PR 1406 section 30: 640 positions of 160 inputs."""
    return gram(sine(500, 640, 160).double() * (0.2 + 0.3 * (torch.arange(160) % 7))).float()


ENDS = [
    "26 29 4 -11 29 -7 -31 30 7 -14 -17 -6 28 -10 14 3 15 16 23 -21 11 20 21 29",
    "9 12 1 -5 12 -3 -12 10 3 -6 -7 -2 11 -4 5 1",
]
ROWS = [0.0643310547, 0.0644531250, 0.0635986328, 0.0644531250, 0.0639648438, 0.0637817383]
VECTORS = [
    (4.0, ENDS[0], -750, 15130, 7.83822e-4, 0.0359112, ROWS, 1),
    (0.8, ENDS[1], -308, 6020, 2.04231e-4, 0.00881235, [0.032257080078125] * 6, 0),
]


@pytest.mark.parametrize(("size", "ends", "total", "absolute", "error", "loss", "scales", "clip"), VECTORS)
def test_published_vectors(size, ends, total, absolute, error, loss, scales, clip):
    """PR 1406 section 30; the clip that wins is 0.9995, or the first one where the floor makes all equal."""
    weight, raw = size * sine(600, 6, 160).float(), published_gram()
    q, scale = gptq_matrix(weight, raw, 6)
    expected = [int(value) for value in ends.split()]
    assert [*q[0, :16].tolist(), *q[0, -8:].tolist()][: len(expected)] == expected
    assert (int(q.int().sum()), int(q.int().abs().sum())) == (total, absolute)
    assert scale.tolist() == pytest.approx(scales, abs=1e-9)
    assert torch.equal(scale, row_scales(weight, 31, True)[clip])
    apart = weight.double() - q.double() * scale.double()[:, None]
    assert apart.square().mean().item() == pytest.approx(error, rel=1e-5)
    once = plain.damped(raw.double())  # the published losses are of H as it is gathered
    assert plain.output_loss(apart, once) == pytest.approx(loss, rel=1e-5)


def test_published_losses_of_plain_rounding():
    weight, once = 4 * sine(600, 6, 160).float(), plain.damped(published_gram().double())
    q, scale = quantize_matrix(weight, 6)
    apart = weight.double() - q.double() * scale.double()[:, None]
    assert plain.output_loss(apart, once) == pytest.approx(0.0426455, rel=1e-5)


@given(
    columns=st.integers(2, 90), rows=st.integers(1, 9), bits=st.integers(3, 8), floor=st.booleans(),
    size=st.sampled_from([0.02, 0.5, 3.0]), seed=st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_equal_to_the_plain_columns(columns, rows, bits, floor, size, seed):
    """Also with more inputs than positions, so that H has a factor by its damping alone."""
    weight = size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    raw = gram(inputs(columns, 48, seed))
    q, scale = gptq_matrix(weight, raw, bits, scale_floor=floor)
    expected, scales = plain.quantize_matrix(weight, raw, bits, floor)
    assert torch.equal(q, expected) and torch.equal(scale, scales)
    assert q.dtype == torch.int8 and scale.dtype == torch.float16


@pytest.mark.parametrize("block", [1, 7, 64, 300])
def test_blocks_change_nothing(block):
    weight = torch.randn(20, 200, generator=torch.Generator().manual_seed(0))
    factor = reverse_factor(gram(inputs(200, 400, 0)), 0.01, dtype=torch.float64)
    steps = torch.rand(20, 200, generator=torch.Generator().manual_seed(1)) + 0.1
    for chosen in (steps, steps[:, :1], steps[:1]):
        q, error = feedback(weight, chosen, factor, 9, block)
        assert torch.equal(q, feedback(weight, chosen.expand_as(weight), factor, 9)[0])
        assert torch.equal(error, weight.double() - q * chosen.double())
    assert feedback(weight, steps / 1000, factor, 30000)[0].abs().max() > 1000


def test_factor_gives_the_gram_back_and_the_loss_of_an_error():
    raw = gram(inputs(120, 60, 3))
    factor = reverse_factor(raw, 0.02, dtype=torch.float64)
    hessian = raw.double() + 0.02 * raw.double().diagonal().mean() * torch.eye(120, dtype=torch.float64)
    assert torch.equal(factor, factor.tril())
    torch.testing.assert_close(factor.T @ factor, hessian, rtol=1e-12, atol=1e-12)
    error = torch.randn(5, 120, dtype=torch.float64)
    assert output_loss(error, factor) == pytest.approx(plain.output_loss(error, hessian), rel=1e-10)
    rounded = reverse_factor(raw, 0.02)
    assert rounded.dtype == torch.float32 and torch.equal(rounded, factor.float())


def test_feedback_takes_error_from_the_outputs():
    """On inputs that hang together; a diagonal H leaves nothing to make up for, so that is plain rounding."""
    weight, raw = torch.randn(30, 64, generator=torch.Generator().manual_seed(0)), gram(inputs(64, 500, 1))
    steps = torch.full((30, 1), 0.4)
    factor = reverse_factor(raw, DAMPING, dtype=torch.float64)
    rounded = (weight / steps).round().clamp(-31, 31)
    losses = [
        output_loss(error, factor) for error in (feedback(weight, steps, factor, 31)[1], weight - rounded * steps)
    ]
    assert losses[0] < 0.7 * losses[1]
    alone = reverse_factor(torch.diag(torch.rand(64) + 0.1), DAMPING)
    assert torch.equal(feedback(weight, steps, alone, 31)[0].float(), rounded)


def test_what_is_no_matrix_with_a_gram_is_stored_as_by_pr1166():
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(12, 30, generator=generator) for name in ("table", "fc", "unseen")}
    state |= {"scale": torch.randn(3, generator=generator), "stack": torch.randn(2, 5, 6, generator=generator)}
    storage = {"table": "other", "fc": "mlp", "unseen": "matrix", "scale": "control", "stack": "matrix"}
    statistics = {name: {"gram": gram(inputs(30, 90, 2))} for name in ("table", "fc")}
    config = QuantizeConfig(quantizer="gptq", passthrough_numel=4, mlp_bits=5)
    stored = quantize(state, storage, config, statistics)
    assert list(stored) == list(state) and stored["scale"].kind == "float16"
    expected = {
        "table": quantize_other(state["table"], 8),
        "fc": gptq_matrix(state["fc"], statistics["fc"]["gram"], 5),
        "unseen": quantize_matrix(state["unseen"], 6),
        "stack": quantize_matrix(state["stack"], 6),
    }
    for name, (q, scale) in expected.items():
        assert torch.equal(stored[name].q, q) and torch.equal(stored[name].scale, scale), name
    assert not torch.equal(expected["fc"][0], quantize_matrix(state["fc"], 5)[0])


def test_dead_inputs_and_layers():
    """A layer that saw nothing is rounded plainly; a dead input does not disturb the others."""
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    q, scale = gptq_matrix(weight, torch.zeros(20, 20), 6)
    expected, scales = quantize_matrix(weight, 6)
    assert torch.equal(q, expected) and torch.equal(scale, scales)


def test_broken_statistics_name_the_tensor():
    weight, good = torch.randn(4, 3), torch.eye(3)
    config = QuantizeConfig(quantizer="gptq", passthrough_numel=0)
    for bad, reason in (
        (torch.eye(4), r"'blocks.0.mlp.fc'.*3 x 3"),
        (good * torch.nan, r"'blocks.0.mlp.fc'.*finite"),
        (good - 2, r"'blocks.0.mlp.fc'.*not positive definite"),
    ):
        with pytest.raises(RunError, match=reason):
            quantize(
                {"blocks.0.mlp.fc": weight}, {"blocks.0.mlp.fc": "mlp"}, config, {"blocks.0.mlp.fc": {"gram": bad}}
            )
