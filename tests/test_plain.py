"""The plain code against the fast code: one formula a line on the one side, what trains and scores on the other.

The plain side computes in float64 where it can, so what is measured is the rounding of the fast side in float32.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from golfbook.compress import rowwise
from golfbook.compress.export import quantize_model
from golfbook.config.architecture import ModelConfig
from golfbook.config.load import load_config, preset_names
from golfbook.config.schema import QuantizeConfig
from golfbook.evaluate import scoring
from golfbook.model.gpt import GPT, exported_state
from golfbook.plain import layers, ttt_linear
from golfbook.plain import quantize as plain_quantize
from golfbook.plain import score as plain_score
from golfbook.plain.model import PlainGPT
from golfbook.plain.muon import PlainMuon
from golfbook.train.muon import make_optimizers, parameter_groups
from test_architecture import documents, model_config, models, open_model

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def exact(model: GPT) -> PlainGPT:
    """The plain model with the same weights in float64, ready for gradients."""
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    return PlainGPT(model.config, weights)


def assert_near(found: torch.Tensor, expected: torch.Tensor, share: float, what: str, floor: float = 0.0) -> None:
    """The norm of the difference is at most a share of the norm of what is expected, or of ``floor``."""
    apart, whole = (found.double() - expected).norm().item(), expected.norm().item()
    assert apart <= share * max(whole, floor), f"{what} is {apart / max(whole, floor):.2g} of its norm away"


# -- the model ---------------------------------------------------------------------------------------------------------


def compare_models(config: ModelConfig) -> None:
    """Logits, the loss of training and all its gradients."""
    model, tokens = open_model(config).train(), documents(config.vocab_size)
    targets, plain = tokens.roll(-1, 1), exact(model)
    torch.manual_seed(0)
    loss = model.loss(tokens, targets)
    loss.backward()
    torch.manual_seed(0)  # flow matching draws times, then noise
    times, noise = torch.rand(tokens.shape).double(), torch.randn(*tokens.shape, config.model_dim).double()
    expected = plain.loss(tokens, targets) + plain.auxiliary_loss(tokens, targets, times, noise)
    assert_near(loss, expected, 1e-5, "loss")
    assert_near(model(tokens), plain.logits(tokens), 1e-4, "logits")
    gradients = torch.autograd.grad(expected, list(plain.weights.values()), allow_unused=True)
    largest = max(g.norm().item() for g in gradients if g is not None)
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        if gradient is None:
            assert parameter.grad is None, name
        else:
            assert_near(parameter.grad, gradient, 1e-3, f"gradient of {name}", floor=1e-4 * largest)


@pytest.mark.parametrize("preset", preset_names())
def test_presets(preset: str) -> None:
    compare_models(load_config(preset, scale="tiny").model)


SMALL = {
    "vocab_size": 40, "num_layers": 4, "model_dim": 16, "num_heads": 4, "num_kv_heads": 2, "rope_dims": 4, "xsa": 2,
    "value_embedding": {"dim": 3, "layers": [0, 2]},
}  # fmt: skip


@pytest.mark.parametrize(
    "values",
    [
        {
            "depth_gate": True, "canon": {"last_n": 3}, "value_residual": "alpha", "native_flow": {"enabled": True},
            "mtp": {"num_heads": 2}, "tie_embeddings": False, "bigram": {"vocab_size": 29, "trigram": True},
            "smear_document_mask": True, "recurrence": [0, 2, 2], "recurrence_place": "in_place",
        },
        {
            "gated_attention": True, "value_residual": "lambda", "flow": {"enabled": True}, "unet_skips": False,
            "ttt_linear": {"enabled": True, "num_heads": 2}, "ln_scale": False, "rope_dims": 0, "recurrence": [3, 0],
            "rope_train_length": 16, "xsa": [0, 3], "leaky_slope": 0.1,
        },
    ],
)  # fmt: skip
def test_every_switch(values: dict) -> None:
    compare_models(model_config(**SMALL | values))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(config=models())
def test_any_valid_combination(config: ModelConfig) -> None:
    compare_models(config)


def test_the_plain_model_is_the_published_one() -> None:
    """Outputs of the published PR 1166 code, filled so that every gate is open: logits, loss and gradients."""
    data = load_file(GOLDEN / "small_pr1166_hot.safetensors")
    meta = json.loads((GOLDEN / "small_pr1166.json").read_text())
    state = {k.removeprefix("state/"): v.double() for k, v in data.items() if k.startswith("state/")}
    plain = PlainGPT(model_config(**meta["model"]), {name: value.requires_grad_() for name, value in state.items()})
    loss = plain.loss(data["x"], data["y"])
    assert loss.item() == pytest.approx(meta["hot"]["loss"], abs=1e-5)
    logits = plain.logits(data["x"])[:, meta["logit_positions"]]
    torch.testing.assert_close(logits.float(), data["logits_at_pos"], atol=1e-4, rtol=0)
    loss.backward()
    for name, expected in ((k.removeprefix("grad/"), v) for k, v in data.items() if k.startswith("grad/")):
        torch.testing.assert_close(state[name].grad.float(), expected, atol=2e-4, rtol=1e-3)


def test_hidden_states_at_the_start_of_a_longer_input() -> None:
    config = load_config("pr1166_e2e_ttt_flow", scale="tiny").model
    model, tokens = open_model(config), documents(config.vocab_size, length=32)
    with torch.no_grad():
        for length in (32, 3000):  # beyond 1,024 the rotary base depends on the length
            assert_near(model.hidden(tokens, length), exact(model).hidden(tokens, length), 1e-5, f"{length}")
        assert not torch.allclose(model.hidden(tokens, 3000), model.hidden(tokens), atol=1e-3)


def test_hashed_rows_one_pair_at_a_time() -> None:
    tokens = torch.randint(0, 1024, (2, 9), generator=torch.Generator().manual_seed(0))
    pairs, triples = (layers.bigram_rows(tokens, 97, order) for order in (2, 3))
    for row in range(2):
        for t in range(9):
            a, b, c = (int(tokens[row, max(t - back, 0)]) for back in range(3))
            key = (36313 * a) ^ (27191 * b)
            assert pairs[row, t] == (key % 96 if t >= 1 else 96)
            assert triples[row, t] == ((key ^ (51497 * c)) % 96 if t >= 2 else 96)


def test_bfloat16_stays_near() -> None:
    config = load_config("pr1166_e2e_ttt_flow", scale="tiny").model
    model, tokens = open_model(config), documents(config.vocab_size)
    coarse = PlainGPT(config, {name: weight.bfloat16() for name, weight in model.state_dict().items()})
    with torch.no_grad():
        assert coarse.hidden(tokens).dtype == torch.bfloat16 and coarse.logits(tokens).dtype == torch.float32
        assert_near(coarse.logits(tokens), exact(model).logits(tokens), 0.1, "logits")


@pytest.mark.parametrize("size", [1, 3, 8])
def test_ttt_linear_by_token_equals_by_mini_batch(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    config = model_config(
        model_dim=12, num_heads=2, num_kv_heads=2, rope_dims=4,
        ttt_linear={"enabled": True, "num_heads": 2, "mini_batch": size},
    )  # fmt: skip
    weights = {
        name.removeprefix("ttt_refiner."): weight.double()
        for name, weight in open_model(config).state_dict().items()
        if name.startswith("ttt_refiner.")
    }
    x = torch.randn(2, 17, 12, generator=generator, dtype=torch.float64)
    one, many = (
        ttt_linear.refine(weights, x, config.ttt_linear, inner)
        for inner in (ttt_linear.by_token, ttt_linear.by_mini_batch)
    )
    torch.testing.assert_close(one, many, atol=1e-12, rtol=1e-10)
    assert one[:, : 17 - 17 % size].any() and not one[:, 17 - 17 % size :].any()


def test_the_inner_gradient_is_that_of_the_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    z, target, gamma, delta = torch.randn(4, 3, 8, generator=generator, dtype=torch.float64)
    z.requires_grad_()
    loss = (gamma * ttt_linear.normalised(z)[0] + delta - target).square().sum() / 2
    (expected,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(ttt_linear.inner_gradient(z.detach(), target, gamma, delta), expected)


# -- optimiser, integers, score ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["pr1166_e2e_ttt_flow", "pr1232_flow", "pr1406"])
@pytest.mark.parametrize("polynomials", ["quintic", "polar_express"])
def test_muon_steps_of_published_settings(preset: str, polynomials: str) -> None:
    """Three steps, to what the iteration's dtype allows; the momenta are in the dtype of each system."""
    overrides = {"train.optimizer.newton_schulz_coefficients": polynomials}
    config = load_config(preset, scale="tiny", overrides=overrides)
    model = open_model(config.model)
    named, names = dict(model.named_parameters()), parameter_groups(model, config.train)["matrix"]
    start = {name: named[name].detach().clone() for name in names}
    weights = {name: weight.clone() for name, weight in start.items()}
    fast, plain = make_optimizers(model, config.train)["muon"], PlainMuon(list(weights.values()), config.train)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for name in names:
            gradient = torch.randn(named[name].shape, generator=generator)
            named[name].grad, weights[name].grad = gradient, gradient.clone()
        fast.step()
        plain.step()
    for name in names:
        moved = weights[name] - start[name]
        assert_near(named[name].detach() - start[name], moved.double(), 0.03, name)


@given(
    bits=st.integers(3, 8), rows=st.integers(1, 5), columns=st.integers(1, 300), exponent=st.integers(-6, 3),
    search=st.booleans(), floor=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_integers_and_scales_exactly(bits, rows, columns, exponent, search, floor, seed) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 3 * 10.0**exponent
    weight[seed % rows] *= seed % 2  # a row of zeros now and then
    for shaped in (weight, weight[0], weight[None]):
        for fast, plain in (
            (
                rowwise.quantize_matrix(shaped, bits, clip_search=search, scale_floor=floor),
                plain_quantize.quantize_matrix(shaped, bits, search, floor),
            ),
            (
                rowwise.quantize_other(shaped, bits, scale_floor=floor),
                plain_quantize.quantize_other(shaped, bits, floor),
            ),
        ):
            for found, expected in zip(fast, plain, strict=True):
                assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize(
    "changes",
    [{}, {"mlp_bits": 5, "quantizer": "row_maximum"}, {"scale_floor": False, "matrix_bits": 4, "other_bits": 6}],
)
def test_a_whole_state_is_stored_alike(changes) -> None:
    model = open_model(
        model_config(vocab_size=40, num_layers=3, model_dim=16, num_heads=4, num_kv_heads=2, rope_dims=4, xsa=1,
                     gated_attention=True, bigram={"vocab_size": 29, "dim": 5}, tie_embeddings=False,
                     value_embedding={"dim": 3, "layers": [1]}, ttt_linear={"enabled": True, "num_heads": 2})
    )  # fmt: skip
    state = exported_state(model)
    config = QuantizeConfig(passthrough_numel=20, **changes)
    fast, plain = quantize_model(model, config), plain_quantize.quantize_state(state, config)
    assert list(fast) == list(plain)
    for name, stored in fast.items():
        values, scale = plain[name]
        own = stored.value if stored.q is None else stored.q
        assert own.dtype == values.dtype and torch.equal(own, values), name
        assert (stored.scale is None) == (scale is None), name
        assert scale is None or (stored.scale.dtype == scale.dtype and torch.equal(stored.scale, scale)), name
        assert torch.equal(stored.dequantize(), plain_quantize.decode(plain[name]))


@pytest.mark.parametrize("preset", ["pr1166_e2e_ttt_flow", "pr1170_nfm", "pr1406"])
@pytest.mark.parametrize(("targets", "window", "stride"), [(20, 64, 16), (129, 32, 32), (100, 48, 20)])
def test_scores(preset: str, targets: int, window: int, stride: int) -> None:
    """No loss is further than 2e-5 nats from the plain model's in float64, and neither are bits per byte."""
    model = open_model(load_config(preset, scale="tiny").model)
    tokens = np.random.default_rng(targets).integers(0, model.config.vocab_size, targets + 1).astype(np.uint16)
    fast = scoring.score(model, tokens, window=window, stride=stride)
    plain = plain_score.score(exact(model).logits, tokens, window, stride)
    assert plain.shape == (targets,)
    np.testing.assert_allclose(fast, plain, atol=2e-5, rtol=0)
    assert scoring.bits_per_byte(fast, 3 * targets) == pytest.approx(
        plain_score.bits_per_byte(plain, 3 * targets), abs=2e-5
    )
