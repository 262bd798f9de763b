"""Quantisers: published integers and scales exactly, the options, and input that must be refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golfbook.compress.export import quantize_model
from golfbook.compress.quantizer import dequantize, quantize, stored_as
from golfbook.compress.rowwise import quantize_matrix, quantize_other, row_quantiles
from golfbook.config.load import load_config
from golfbook.config.schema import QuantizeConfig
from golfbook.config.tables import QUANTIZERS
from golfbook.errors import RunError
from golfbook.model.gpt import GPT, initialise, model_facts
from reference import sine, uniform

GOLDEN = Path(__file__).parent / "golden"
SCHEMES = {
    "int6": lambda w: quantize_matrix(w, 6),
    "int5": lambda w: quantize_matrix(w, 5),
    "int8": lambda w: quantize_other(w, 8),
    "int6 without search": lambda w: quantize_matrix(w, 6, clip_search=False),
    "int5 without search": lambda w: quantize_matrix(w, 5, clip_search=False),
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def decode(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    scale = scale.float()
    return q.float() * (scale[:, None] if scale.ndim else scale)


@pytest.mark.parametrize("scheme", ["int6", "int5", "int8"])
@pytest.mark.parametrize("name", ["M1_std002", "M2_std06", "M3_heavy", "V_1d", "B3_3d"])
def test_published_outputs_exactly(name, scheme):
    """Small weights (all rows on the floor), ordinary ones, heavy tails, a vector and a 3-D tensor (PR 1166)."""
    data = np.load(GOLDEN / "quantisers_pr1166.npz")
    q, scale = SCHEMES[scheme](torch.from_numpy(data[f"input/{name}"]))
    expected = data[f"{name}/{scheme}/scale"]
    np.testing.assert_array_equal(q.numpy(), data[f"{name}/{scheme}/q"])
    np.testing.assert_array_equal(scale.numpy(), expected)
    assert q.dtype == torch.int8 and scale.numpy().dtype == expected.dtype
    error = (torch.from_numpy(data[f"input/{name}"]) - decode(q, scale)).square().mean().item()
    assert error == pytest.approx(float(data[f"{name}/{scheme}/mse"]), rel=1e-5)


# PR 1166/1170 specification: tag, scheme, q[0, :8], sum q, sum |q|, scale[:3], mean squared error. Schemes without a
# search are those of PR 1170; the value -qmax-1 that they admit is not reached.
SMALL, BIG = ("quant_small", 0.6), ("quant_big", 3.0)
TABLE = [
    (SMALL, "int6", "-18 14 3 -4 10 2 0 0", -66, 37284, [0.032257080] * 3, 7.128998e-05),
    (SMALL, "int6 without search", "-18 14 3 -4 10 2 0 0", -66, 37284, [0.032257080] * 3, 7.128998e-05),
    (SMALL, "int5 without search", "-9 7 1 -2 5 1 0 0", -8, 17912, [0.066650391] * 3, 2.902604e-04),
    (SMALL, "int8", "-72 55 12 -15 39 7 -1 0", -151, 153571, [0.007873535] * 3, 4.618360e-06),
    (BIG, "int6", "0 -10 3 12 27 4 -12 6", -1004, 62930, [0.096069336, 0.096435547, 0.095520020], 6.465272e-04),
    (BIG, "int6 without search", "0 -10 3 12 27 4 -12 6", -984, 62770, [0.096130371, 0.096557617, 0.095947266],
     6.473304e-04),
    (BIG, "int5 without search", "0 -5 2 6 13 2 -6 3", -494, 30272, [0.198608398, 0.199462891, 0.198242188],
     2.678860e-03),
    (BIG, "int8", "0 -43 14 49 110 17 -49 25", -4066, 257684, [0.023468018, 0.023559570, 0.023406982], 4.106035e-05),
]  # fmt: skip


@pytest.mark.parametrize(("fill", "scheme", "start", "total", "absolute", "scales", "error"), TABLE)
def test_published_table(fill, scheme, start, total, absolute, scales, error):
    tag, a = fill
    weight = torch.from_numpy(((2 * uniform(tag, 16 * 512) - 1) ** 3 * a).reshape(16, 512)).float()
    q, scale = SCHEMES[scheme](weight)
    assert q[0, :8].tolist() == [int(v) for v in start.split()]
    assert (int(q.int().sum()), int(q.int().abs().sum())) == (total, absolute)
    assert scale[:3].tolist() == pytest.approx(scales, abs=1e-9)
    assert (weight - decode(q, scale)).square().mean().item() == pytest.approx(error, rel=1e-5)


def test_pr1406_int8_and_plain_rounding_vectors():
    q, scale = quantize_other(4 * sine(700, 5, 64).float(), 8)
    assert scale.tolist() == pytest.approx([0.015380859, 0.015502930, 0.015541077, 0.015686035, 0.015716553], abs=1e-9)
    assert q[0, :8].tolist() == [34, 23, 46, 19, 113, 105, 100, -5]
    assert (int(q.int().sum()), int(q.int().abs().sum())) == (1110, 19756)
    weight = 4 * sine(600, 6, 160).float()
    q, scale = quantize_matrix(weight, 6)
    expected = [0.0642089844, 0.0644531250, 0.0635986328, 0.0644531250, 0.0639648438, 0.0637817383]
    assert scale.tolist() == pytest.approx(expected, abs=1e-9)
    assert (int(q.int().sum()), int(q.int().abs().sum())) == (-758, 15122)
    assert (weight - decode(q, scale)).square().mean().item() == pytest.approx(3.44518e-4, rel=1e-5)
    q, scale = quantize_matrix(0.8 * sine(600, 6, 160).float(), 6)
    assert scale.tolist() == [0.032257080078125] * 6
    assert (int(q.int().sum()), int(q.int().abs().sum())) == (-283, 6007)


def published_route(name: str, numel: int, config: QuantizeConfig) -> str:
    """PR 1166 sections 17.1 and 11.2: the rule of the published scripts, which look at names."""
    control = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weight", "smear", "ve_layer_scales")
    if numel <= config.passthrough_numel:
        return "float16"
    if any(part in name for part in (*control, "ve_shared.scale", "attn_gate", "vr_lambda")):
        return "float32"
    if "tok_emb" in name or "lm_head" in name:
        return "int8"
    return "int6" if any(part in name for part in (".mlp.", ".attn.", ".proj.")) else "int8"


EVERYTHING = {
    "gated_attention": True, "depth_gate": True, "tie_embeddings": False, "canon": {"last_n": 2},
    "bigram": {"trigram": True}, "ttt_linear": {"enabled": True}, "flow": {"enabled": True},
    "native_flow": {"enabled": True},
}  # fmt: skip


@pytest.mark.parametrize("residual", ["none", "lambda", "alpha"])
@pytest.mark.parametrize("limit", [0, 100, 65536])
def test_components_say_what_the_published_names_say(residual, limit):
    model = load_config({"model": {**EVERYTHING, "value_residual": residual}}).model
    config = QuantizeConfig(passthrough_numel=limit)
    with torch.device("meta"):
        state = GPT(model).state_dict()
    facts = model_facts(model)
    assert list(facts) == list(state)
    for name, tensor in state.items():
        kind, bits = stored_as(facts[name].storage, tensor.numel(), config)
        assert (f"int{bits}" if kind == "int" else kind) == published_route(name, tensor.numel(), config), name


def test_published_model_is_stored_as_published():
    """PR 1166 section 17.1: number of values in six bits, eight bits and float16."""
    config = load_config("pr1166_e2e_ttt_flow")
    with torch.device("meta"):
        state = GPT(config.model).state_dict()
    counts = {6: 0, 8: 0, 16: 0, 32: 0}
    for name, tensor in state.items():
        counts[stored_as(model_facts(config.model)[name].storage, tensor.numel(), config.quantize)[1]] += tensor.numel()
    assert counts == {6: 23_592_960, 8: 1_900_544, 16: 255_894, 32: 0}


@given(
    bits=st.integers(3, 8), rows=st.integers(1, 6), columns=st.integers(1, 40), exponent=st.integers(-9, 4),
    search=st.booleans(), floor=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_every_value_is_within_half_a_step_or_clipped(bits, rows, columns, exponent, search, floor, seed):
    qmax = 2 ** (bits - 1) - 1
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 10.0**exponent
    weight[seed % rows] = 0.0
    for q, scale in (
        quantize_matrix(weight, bits, clip_search=search, scale_floor=floor),
        quantize_other(weight, bits, scale_floor=floor),
    ):
        assert q.dtype == torch.int8 and scale.dtype == torch.float16 and scale.shape == (rows,)
        assert int(q.abs().max()) <= qmax and (scale > 0).all()
        if floor:
            assert (scale >= torch.tensor(1 / qmax).half()).all()
        error = (weight - decode(q, scale)).abs()
        step = scale.float()[:, None]
        inside = q.abs() < qmax
        # the published int8 rule rounds with a float32 scale that differs from the stored one by up to 2^-11
        assert (error <= step * (0.5 + qmax * 2**-10 + 1e-4))[inside].all()
        assert (q[seed % rows] == 0).all() and (decode(q, scale)[seed % rows] == 0).all()
        clipped = ~inside & (weight.abs() > step * qmax)
        assert (decode(q, scale).abs() <= weight.abs())[clipped].all()


def test_without_floor_small_rows_keep_their_shape():
    """Rows of 0.02: the floor leaves 3 of 63 levels, without it all are used and the error falls a hundredfold."""
    weight = 0.02 * torch.randn(8, 256, generator=torch.Generator().manual_seed(0)).clamp(-3, 3)
    (q_floor, s_floor), (q, s) = (quantize_matrix(weight, 6, scale_floor=f) for f in (True, False))
    assert int(q_floor.abs().max()) <= 2 and int(q.abs().max()) == 31
    errors = [(weight - decode(a, b)).square().mean() for a, b in ((q_floor, s_floor), (q, s))]
    assert errors[1] < errors[0] / 50


def test_without_floor_int8_rounds_with_the_stored_scale():
    weight = torch.randn(40, 300, generator=torch.Generator().manual_seed(1))
    q, scale = quantize_other(weight, 8, scale_floor=False)
    stored = scale.float()[:, None]
    clip = torch.quantile(weight.abs(), 0.9999984, dim=1, keepdim=True)
    assert torch.equal(q, (weight.clamp(-clip, clip) / stored).round().clamp(-127, 127).to(torch.int8))
    published, _ = quantize_other(3 * weight, 8)
    assert not torch.equal(published, quantize_other(3 * weight, 8, scale_floor=False)[0])


@pytest.mark.parametrize("shape", [(7,), (), (2, 3, 4)])
def test_zero_and_tiny_tensors_that_are_no_matrix(shape):
    for value in (0.0, 1e-30, 1e-6):
        for quantiser in (quantize_matrix, quantize_other):
            q, scale = quantiser(torch.full(shape, value), 6)
            assert scale.shape == () and scale > 0
            assert decode(q, scale) == pytest.approx(value, abs=1e-7)


def test_state_keeps_names_shapes_and_order():
    config = load_config("quickstart")
    model = initialise(GPT(config.model), seed=0)
    state = model.state_dict()
    quantized = quantize_model(model, config.quantize)
    decoded = dequantize(quantized)
    assert list(quantized) == list(decoded) == list(state)
    for name, tensor in state.items():
        stored = quantized[name]
        assert stored.name == name and stored.shape == tuple(tensor.shape) == tuple(decoded[name].shape)
        assert decoded[name].dtype == torch.float32
        assert float((decoded[name] - tensor).square().mean()) <= 1e-3 * float(tensor.square().mean())
        decoded[name].zero_()
    again = dequantize(quantized)
    assert float(again["blocks.0.attn_scale"].min()) == 1.0  # a decoded tensor shares no memory with the stored one
    assert {t.bits for t in quantized.values()} == {6, 8, 16}


def test_control_tensors_above_the_limit_stay_float32():
    state = {"skip_weights": torch.randn(3, 8), "bigram.scale": torch.tensor(0.05)}
    storage = {"skip_weights": "control", "bigram.scale": "other"}
    quantized = quantize(state, storage, QuantizeConfig(passthrough_numel=0))
    assert quantized["skip_weights"].kind == "float32" and quantized["bigram.scale"].kind == "int"
    assert torch.equal(dequantize(quantized)["skip_weights"], state["skip_weights"])


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_refuses_what_cannot_be_stored(quantizer):
    config = QuantizeConfig(quantizer=quantizer, passthrough_numel=4, scale_floor=False)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(RunError, match=r"'fc'.*not finite"):
            quantize({"fc": torch.tensor([[1.0, bad]])}, {"fc": "mlp"}, config)
    with pytest.raises(RunError, match=r"'skips'.*7e\+04 does not fit float16"):
        quantize({"skips": torch.tensor([1.0, 70000.0])}, {"skips": "control"}, config)
    for storage in ("other", "matrix"):
        with pytest.raises(RunError, match=r"'w'.*65504"):
            quantize({"w": torch.full((3, 4), 1e9)}, {"w": storage}, config)
    with pytest.raises(RunError, match=r"'steps'.*torch.int64"):
        quantize({"steps": torch.arange(3)}, {"steps": "control"}, config)
    assert quantize({"w": torch.tensor([65504.0])}, {"w": "control"}, config)["w"].kind == "float16"


def test_quantisers_differ_in_their_clip_alone():
    model = initialise(GPT(load_config("quickstart").model), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) ** 3)
    rules = ("percentiles", "row_maximum")
    one, two = (quantize_model(model, QuantizeConfig(quantizer=name, passthrough_numel=4096)) for name in rules)
    changed = {name for name in one if not torch.equal(one[name].dequantize(), two[name].dequantize())}
    assert changed and all(model_facts(model.config)[name].storage in ("matrix", "mlp") for name in changed)


@pytest.mark.parametrize("columns", [1, 2, 3, 64, 511, 512, 1536, 2000])
def test_row_quantiles_are_those_of_torch(columns):
    """Bit for bit, ties and zero rows included, so that integers cannot depend on which one is used."""
    matrix = torch.randn(40, columns, generator=torch.Generator().manual_seed(columns)).abs()
    matrix[0] = 0
    matrix[1] = 0.25
    quantiles = (0.1, 0.5, 0.9990, 0.9995, 0.9999, 0.99999, 0.9999984, 1.0)
    for chosen in (quantiles, quantiles[2:], quantiles[-1:]):
        expected = torch.quantile(matrix, torch.tensor(chosen), dim=1)
        assert torch.equal(row_quantiles(matrix, chosen), expected)
