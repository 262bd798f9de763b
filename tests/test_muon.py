"""Newton-Schulz, Muon, parameter groups and schedules against published outputs and slow references."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from golfbook.config import TrainConfig, load_config
from golfbook.model import GPT
from golfbook.muon import Muon, lr_scale, make_optimizers, muon_momentum, newton_schulz, parameter_groups
from reference import fill_hashed, hashed_tokens, sine, uniform

GOLDEN = load_file(Path(__file__).parent / "golden" / "muon_pr1166.safetensors")


@pytest.mark.parametrize("shape", ["64x192", "192x64", "64x64"])
def test_newton_schulz_matches_the_published_code(shape):
    g = GOLDEN[f"ns/{shape}/input"]
    exact = newton_schulz(g, dtype=torch.float32)
    torch.testing.assert_close(exact, GOLDEN[f"ns/{shape}/fp32"], atol=2e-5, rtol=0)
    coarse = newton_schulz(g, dtype=torch.bfloat16)
    assert coarse.dtype == torch.bfloat16
    torch.testing.assert_close(coarse.float(), GOLDEN[f"ns/{shape}/bf16"], atol=2e-2, rtol=0)


def test_newton_schulz_specified_values_and_singular_values():
    g = torch.from_numpy(2 * uniform("ns32x64", 2048) - 1).float().view(32, 64)
    out = newton_schulz(g, dtype=torch.float32)
    torch.testing.assert_close(out[0, :4], torch.tensor([0.20240, -0.04183, 0.00900, -0.08238]), atol=1e-4, rtol=0)
    assert out.norm().item() == pytest.approx(4.74743, abs=1e-4)
    values = torch.linalg.svdvals(out)
    assert values.min().item() == pytest.approx(0.6819, abs=1e-3)
    assert values.max().item() == pytest.approx(1.1314, abs=1e-3)
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    assert torch.linalg.svdvals(u.T @ out @ vh.T).allclose(values, atol=1e-4)  # same singular vectors as the input
    assert not newton_schulz(torch.zeros(3, 4)).any()


@pytest.mark.parametrize("bank", [0, 1, 2])
def test_three_published_muon_steps(bank):
    parameter = torch.nn.Parameter(GOLDEN[f"muon/{bank}/start"].clone())
    optimizer = Muon([parameter], lr=0.025, weight_decay=0.04)
    for step, momentum in enumerate((0.92, 0.95, 0.99)):
        optimizer.param_groups[0]["momentum"] = momentum
        parameter.grad = GOLDEN[f"muon/{bank}/grad{step}"].clone()
        optimizer.step()
        torch.testing.assert_close(parameter.detach(), GOLDEN[f"muon/{bank}/step{step}"], atol=1e-3, rtol=0)


def test_pr1406_muon_vectors():
    parameters = [torch.nn.Parameter(p.float()) for p in sine(100, 2, 4, 6)]
    optimizer = Muon(parameters, lr=0.1, momentum=0.9, weight_decay=0.04)
    for tag, expected, total in (
        (200, (0.378117, -0.108344, 0.233447, 0.349414, 0.168780, -0.352126), 2.235784),
        (201, (0.433245, -0.092285, 0.277045, 0.324775, 0.211074, -0.312046), 2.284458),
    ):
        for parameter, gradient in zip(parameters, sine(tag, 2, 4, 6), strict=True):
            parameter.grad = gradient.float()
        optimizer.step()
        torch.testing.assert_close(parameters[0][0].detach(), torch.tensor(expected), atol=5e-3, rtol=0)
        assert sum(p.sum().item() for p in parameters) == pytest.approx(total, abs=0.05)


def slow_muon(weight, gradients, lr, momentum, decay):
    """One matrix, one formula a line."""
    m = torch.zeros_like(weight)
    for g in gradients:
        m = momentum * m + g
        x = g + momentum * m
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        weight = weight * (1 - lr * decay) - lr * max(1, weight.shape[0] / weight.shape[1]) ** 0.5 * x
    return weight


def test_batched_muon_equals_one_matrix_at_a_time():
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 10), (10, 6), (6, 10), (8, 8), (6, 10)]
    start = [torch.randn(s, generator=generator) for s in shapes]
    gradients = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(3)]
    parameters = [torch.nn.Parameter(w.clone()) for w in start]
    optimizer = Muon(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, dtype=torch.float32)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    for i, parameter in enumerate(parameters):
        expected = slow_muon(start[i], [g[i] for g in gradients], 0.1, 0.9, 0.1)
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-4, rtol=0)


def test_every_parameter_is_in_exactly_one_group():
    refiners = {"model.ttt_linear.enabled": True, "model.flow.enabled": True, "model.ttt_linear.num_heads": 4}
    gates = {"model.gated_attention": True, "model.value_residual": "lambda", "model.tie_embeddings": False}
    for values in ({}, refiners, gates):
        model = GPT(load_config("quickstart", overrides=values).model)
        groups = parameter_groups(model)
        flat = [name for names in groups.values() for name in names]
        assert sorted(flat) == sorted(name for name, _ in model.named_parameters())
        assert len(groups["matrix"]) == 6 * 4
        assert "blocks.0.resid_mix" in groups["scalar"]
        assert ("lm_head.weight" in groups["head"]) == ("model.tie_embeddings" in values)


def test_published_schedule_values():
    config = TrainConfig()
    assert [lr_scale(k, config) for k in (0, 2874)] == [1.0, 1.0]
    for step, value in ((6322, 0.20019), (6323, 0.19995), (6538, 0.15008), (6539, 0.14985), (7184, 1 / 4311)):
        assert lr_scale(step, config) == pytest.approx(value, abs=1e-5)
    assert muon_momentum(0, config) == pytest.approx(0.92)
    assert muon_momentum(750, config) == pytest.approx(0.955)
    assert muon_momentum(5000, config) == pytest.approx(0.99)


def test_three_published_training_steps_of_the_tiny_model():
    """Losses and gradient norms of three steps (PR 1166 description, section 24.6, "tinyA")."""
    overrides = {
        "vocab_size": 1024, "num_layers": 4, "model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "rope_dims": 8,
        "xsa": 2, "bigram": {"vocab_size": 64, "dim": 16}, "value_embedding": {"dim": 16, "layers": [2, 3]},
        "flow": {"enabled": True, "latent_dim": 16, "hidden_dim": 32}, "ttt_linear": {"enabled": True, "num_heads": 4},
    }  # fmt: skip
    model = GPT(load_config({"model": overrides}).model)
    fill_hashed(model)
    assert sum(p.numel() for p in model.parameters()) == 254_022
    config = TrainConfig(muon_dtype="float32")
    muon, adam = make_optimizers(model, config)
    losses, norms = [], []
    for step in range(4):
        block = torch.from_numpy(hashed_tokens(f"train{step}", 258)).view(2, 129)
        loss = model.loss(block[:, :-1], block[:, 1:])
        losses.append(loss.item())
        if step == 3:
            break
        model.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3).item())
        muon.param_groups[0]["momentum"] = muon_momentum(step, config)
        muon.step()
        adam.step()
    assert losses == pytest.approx([7.63646, 7.50638, 7.43022, 7.48923], abs=2e-5)
    assert norms == pytest.approx([2.09549, 1.70983, 1.61696], abs=2e-5)
    assert model.tok_emb.weight.norm().item() == pytest.approx(33.56178, abs=1e-4)
    assert model.blocks[1].attn.c_q.weight.norm().item() == pytest.approx(7.95437, abs=1e-4)
    assert model.blocks[2].mlp.fc.weight.norm().item() == pytest.approx(13.88375, abs=1e-4)
