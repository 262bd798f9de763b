"""Quantisation-aware training: the exporter's values bit for bit, straight-through gradients, and compiled models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from golfbook.compress.export import quantize_model
from golfbook.compress.quantizer import dequantize, quantize
from golfbook.config.load import load_config
from golfbook.config.schema import QuantizeConfig
from golfbook.errors import RunError
from golfbook.model.gpt import GPT, initialise
from golfbook.train.muon import make_optimizers
from golfbook.train.qat import (
    PUBLISHED_TARGETS,
    fake_quantized,
    published_fake_quantize,
    published_fake_quantized,
    quantized_names,
)

TINY = {
    "model.num_layers": 2, "model.model_dim": 32, "model.num_heads": 2, "model.num_kv_heads": 1, "model.rope_dims": 8,
    "model.vocab_size": 128, "model.bigram": {"vocab_size": 64, "dim": 16}, "model.mtp.num_heads": 1, "model.xsa": 1,
    "model.value_embedding": {"dim": 16, "layers": [1]},
}  # fmt: skip
CONFIG = load_config("quickstart", overrides=TINY)
RULES = {
    "default": QuantizeConfig(passthrough_numel=600),
    "row maximum": QuantizeConfig(passthrough_numel=600, quantizer="row_maximum", matrix_bits=5),
    "no floor": QuantizeConfig(passthrough_numel=600, scale_floor=False, mlp_bits=4, other_bits=6),
    "everything": QuantizeConfig(passthrough_numel=0, scale_floor=False),
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tiny(seed: int = 0) -> GPT:
    """A model with random weights everywhere, so that every matrix matters."""
    model = initialise(GPT(CONFIG.model), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(128, (2, 17), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize("rule", RULES)
def test_weights_are_the_exporters_bit_for_bit_and_come_back(rule):
    model, config = tiny(), RULES[rule]
    before = copy.deepcopy(model.state_dict())
    stored = quantize_model(model, config)
    decoded = dequantize(stored)
    integers = [name for name, tensor in stored.items() if tensor.kind == "int"]
    with fake_quantized(model, config) as names:
        assert names == integers == quantized_names(model, config)
        assert list(model.state_dict()) == list(before)
        for name, value in model.state_dict().items():
            expected = decoded[name] if name in names else before[name]
            assert torch.equal(value, expected), name
            if value.ndim == 2 and name in names:  # a single number is its own grid
                assert not torch.equal(value, before[name]), name
    assert len(names) > 10 and not any(name.startswith("mtp_heads") for name in names)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_gradients_pass_straight_through():
    """The gradient of the real weights is that of a model which holds the quantised ones."""
    model, config = tiny(), RULES["no floor"]
    other = copy.deepcopy(model)
    decoded = dequantize(quantize_model(model, config))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name in quantized_names(model, config):
                parameter.copy_(decoded[name])
    expected = other.loss(*batch())
    expected.backward()
    with fake_quantized(model, config):
        loss = model.loss(*batch())
        loss.backward()
    assert torch.equal(loss, expected)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad), name
        assert one.grad.any() or name.startswith("skip"), name
    assert not torch.equal(model.loss(*batch()), expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_feels_the_switch_without_compiling_again(backend):
    """The published switch was compiled away. Ours changes loss and gradients of the graph that is already there."""
    torch._dynamo.reset()
    model, config = tiny(), RULES["no floor"]
    counter = CompileCounterWithBackend(backend)
    loss_of = torch.compile(model.loss, backend=counter)
    losses, gradients, graphs = [], [], []
    for active in (False, False, True, True, False):
        model.zero_grad()
        if active:
            with fake_quantized(model, config):
                loss = loss_of(*batch())
                loss.backward()
        else:
            loss = loss_of(*batch())
            loss.backward()
        losses.append(loss.item())
        gradients.append(model.blocks[0].mlp.fc.weight.grad.clone())
        graphs.append(counter.frame_count)
    assert losses[0] == losses[1] == losses[4] != losses[2] == losses[3]
    assert not torch.equal(gradients[1], gradients[2]) and torch.equal(gradients[1], gradients[4])
    assert graphs[0] == graphs[-1] > 0
    with fake_quantized(model, config):
        assert losses[2] == pytest.approx(model.loss(*batch()).item(), abs=1e-6)
    torch._dynamo.reset()


def test_training_steps_update_the_real_weights():
    """Small steps that quantisation would round away add up, because the optimiser sees the real weights."""
    model, config = tiny(), RULES["default"]  # the floor makes a grid of 1/31
    before = copy.deepcopy(model.state_dict())
    muon, adam = make_optimizers(model, CONFIG.train).values()
    for group in (*muon.param_groups, *adam.param_groups):
        group["lr"] = 1e-4
    with fake_quantized(model, config):
        model.loss(*batch()).backward()
    muon.step()
    adam.step()
    moved = (model.blocks[0].attn.c_q.weight - before["blocks.0.attn.c_q.weight"]).abs().max().item()
    assert 0 < moved < 1 / 62
    assert len(model.blocks[0].attn.c_q.weight.unique()) > 500  # not on the grid


def test_weights_come_back_after_an_error():
    model, config = tiny(), RULES["default"]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError), fake_quantized(model, config):
        raise ZeroDivisionError
    with torch.no_grad():
        model.blocks[1].mlp.fc.weight[0, 0] = float("nan")
    with pytest.raises(RunError, match=r"blocks\.1\.mlp\.fc\.weight"), fake_quantized(model, config):
        pass
    model.blocks[1].mlp.fc.weight.data[0, 0] = before["blocks.1.mlp.fc.weight"][0, 0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_published_switch_reaches_two_projections_that_are_not_stored_as_integers():
    model, before = tiny(), tiny().state_dict()
    with published_fake_quantized(model) as names:
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        assert changed == names == list(PUBLISHED_TARGETS)
        weight = before[names[0]]
        scale = torch.stack([row.abs().max().div(31).clamp(min=1 / 31) for row in weight])[:, None]
        expected = torch.clamp(torch.round(weight / scale), -32, 31) * scale
        assert torch.equal(model.bigram.proj.weight, expected)
    assert torch.equal(model.bigram.proj.weight, before[names[0]])
    published = GPT(load_config("pr1166_e2e_ttt_flow").model.model_copy(update={"num_layers": 2, "xsa": 2}))
    assert not set(PUBLISHED_TARGETS) & set(quantized_names(published, QuantizeConfig()))
    big = 3 * torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    ours = dequantize(
        quantize({"w": big}, {"w": "matrix"}, QuantizeConfig(passthrough_numel=0, quantizer="row_maximum"))
    )
    assert 0 < (published_fake_quantize(big) - ours["w"]).abs().max() < 0.05  # float16 scale, the same grid
