"""Newton-Schulz, Muon and parameter groups against published outputs and slow references."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from by_name import train_config
from golfbook.config.load import load_config
from golfbook.config.schema import TrainConfig
from golfbook.model.gpt import GPT
from golfbook.plain import muon as plain_muon
from golfbook.train import muon
from golfbook.train.muon import Muon, iteration_coefficients, make_optimizers, newton_schulz, parameter_groups
from golfbook.train.schedules import muon_momentum
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


def spectrum(values: torch.Tensor, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A float64 matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, rows, generator=generator).double())[0][:, : len(values)]
    v = torch.linalg.qr(torch.randn(columns, columns, generator=generator).double())[0][:, : len(values)]
    return (u * values.double()) @ v.T


def plain_newton_schulz(matrix: torch.Tensor, coefficients: str) -> torch.Tensor:
    polar = coefficients == "polar_express"
    polynomials = plain_muon.polar_express(5) if polar else [plain_muon.QUINTIC] * 5
    return plain_muon.newton_schulz(matrix, polynomials, plain_muon.SAFETY if polar else 1.0)


def test_polar_express_coefficients_and_singular_values():
    """Steps carry the safety factor of the paper; five steps come nearer to 1 than five of the quintic."""
    table = iteration_coefficients(9, "polar_express")
    np.testing.assert_allclose(plain_muon.polar_express(9), table, atol=1e-9)  # found anew from their definition
    assert table[0] == pytest.approx((8.28721201814563 / 1.01, -23.595886519098837 / 1.01**3, 17.3003873 / 1.01**5))
    assert table[6][0] == pytest.approx(1.8750014808534479 / 1.01)
    assert table[7] == table[8] == (1.875, -1.25, 0.375)
    assert iteration_coefficients(2) == [(3.4445, -4.7750, 2.0315)] * 2
    worst = {}
    for name in ("quintic", "polar_express"):
        matrix = spectrum(torch.logspace(0, -2, 24), 24, 40).float()
        values = torch.linalg.svdvals(newton_schulz(matrix, 5, torch.float32, name))
        expected = torch.linalg.svdvals(plain_newton_schulz(matrix.double(), name))
        torch.testing.assert_close(values.double(), expected, atol=2e-4, rtol=0)
        worst[name] = (values - 1).abs().max().item()
    assert worst["polar_express"] < 0.13 < 0.3 < worst["quintic"]


@pytest.mark.parametrize("coefficients", ["quintic", "polar_express"])
@pytest.mark.parametrize("shape", [(16, 48), (64, 16)])
@pytest.mark.parametrize("kind", ["wide", "rank", "noise"])
def test_steps_taken_together_stay_near_the_formula(coefficients, shape, kind, monkeypatch):
    """Long matrices share products between steps; hard spectra come out about as well as step by step.

    In float32 both are exact to about 1 % even for singular values of a millionth, where bfloat16 is off by 20 %.
    """
    count = min(shape)
    values = {
        "wide": torch.logspace(0, -6, count),
        "rank": torch.cat((torch.ones(3), torch.zeros(count - 3))),
        "noise": torch.cat((torch.ones(1), torch.full((count - 1,), 1e-2))),
    }[kind]
    matrix = spectrum(values, *shape).bfloat16().double()
    x = plain_newton_schulz(matrix, coefficients)
    together = {d: newton_schulz(matrix, 5, d, coefficients).double() for d in (torch.float32, torch.bfloat16)}
    monkeypatch.setattr(muon, "GRAM_RATIO", 1000)
    for dtype, tolerance in ((torch.float32, 0.01), (torch.bfloat16, 0.04)):
        direct = newton_schulz(matrix, 5, dtype, coefficients).double()
        assert not torch.equal(direct, together[dtype])  # two ways indeed
        bound = max(2.0 * (direct - x).norm(), tolerance * x.norm())
        assert (together[dtype] - x).norm() < bound
        assert torch.linalg.matrix_norm(together[dtype], 2) < 1.3


def test_newton_schulz_leaves_its_input_alone_and_takes_any_batch():
    matrices = torch.randn(2, 3, 12, 4, generator=torch.Generator().manual_seed(0))
    before = matrices.clone()
    out = newton_schulz(matrices, 5, torch.float32)
    assert torch.equal(matrices, before) and out.shape == matrices.shape
    torch.testing.assert_close(out[1, 2], newton_schulz(matrices[1, 2], 5, torch.float32), atol=1e-6, rtol=0)
    assert not newton_schulz(torch.zeros(2, 3, 12), dtype=torch.float32).any()


@pytest.mark.parametrize("row_norm", [False, True])
@pytest.mark.parametrize(
    ("kept", "dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-4),
        (torch.bfloat16, torch.bfloat16, 0.02),  # PR 1166 and 1406
        (torch.float32, torch.bfloat16, 0.02),  # PR 1170 and 1232
    ],
)
def test_batched_muon_equals_one_matrix_at_a_time(row_norm, kept, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 10), (10, 6), (6, 10), (8, 8), (6, 24), (24, 6), (6, 10)]
    start = [torch.randn(s, generator=generator) for s in shapes]
    gradients = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(3)]
    parameters = [torch.nn.Parameter(w.clone()) for w in start]
    idle = torch.nn.Parameter(torch.ones(6, 10))  # has no gradient
    names = {"muon_dtype": str(dtype)[6:], "muon_momentum_dtype": str(kept)[6:], "muon_row_norm": row_norm}
    rates = {"matrix_lr": 0.1, "muon_momentum": 0.9, "muon_weight_decay": 0.1}
    plain = plain_muon.PlainMuon(start, train_config(**names, **rates))
    optimizer = Muon(
        [*parameters, idle], lr=0.1, momentum=0.9, weight_decay=0.1, dtype=dtype, momentum_dtype=kept, row_norm=row_norm
    )
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        for parameter, gradient, weight in zip(parameters, step, start, strict=True):
            assert torch.equal(parameter.grad, gradient)
            weight.grad = gradient
        plain.step()
    assert torch.equal(idle, torch.ones(6, 10)) and idle not in optimizer.state
    for i, parameter in enumerate(parameters):
        torch.testing.assert_close(parameter, plain.parameters[i], atol=tolerance, rtol=0)
        assert optimizer.state[parameter]["momentum"].dtype == kept


def test_row_norm_makes_rows_count_alike():
    """A row a thousand times smaller gets the update of its direction, not of its size (PR 1406 section 11.6)."""
    gradient = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for factor in (1.0, 1e-3):
        for row_norm in (False, True):
            parameter = torch.nn.Parameter(torch.zeros(4, 16))
            parameter.grad = gradient.clone()
            parameter.grad[0] *= factor
            Muon([parameter], lr=1.0, weight_decay=0.0, dtype=torch.float32, row_norm=row_norm).step()
            results.append(parameter.detach())
    plain, normed, plain_small, normed_small = results
    torch.testing.assert_close(normed, normed_small, atol=1e-4, rtol=0)
    assert (plain - plain_small).abs().max() > 0.1


def test_momenta_survive_a_state_dict_in_their_own_dtype():
    parameters = [torch.nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(i))) for i in range(2)]
    options = {"lr": 0.1, "dtype": torch.float32, "momentum_dtype": torch.bfloat16}
    first = Muon([parameters[0]], **options)
    parameters[0].grad = torch.ones(4, 6)
    first.step()
    second = Muon([parameters[1]], **options)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.state[parameters[1]]["momentum"], first.state[parameters[0]]["momentum"])
    assert second.state[parameters[1]]["momentum"].dtype == torch.bfloat16


def test_every_parameter_is_in_exactly_one_group():
    refiners = {"model.ttt_linear.enabled": True, "model.flow.enabled": True, "model.ttt_linear.num_heads": 4}
    gates = {"model.gated_attention": True, "model.value_residual": "lambda", "model.tie_embeddings": False}
    for values in ({}, refiners, gates):
        model = GPT(load_config("quickstart", overrides=values).model)
        groups = parameter_groups(model, TrainConfig())
        flat = [name for names in groups.values() for name in names]
        assert sorted(flat) == sorted(name for name, _ in model.named_parameters())
        assert len(groups["matrix"]) == 6 * 4
        assert "blocks.0.resid_mix" in groups["scalar"]
        assert ("lm_head.weight" in groups["head"]) == ("model.tie_embeddings" in values)
        moved = parameter_groups(model, train_config(muon_bigram_proj=True))
        assert moved["matrix"] == sorted(
            [*groups["matrix"], "bigram.proj.weight"], key=[n for n, _ in model.named_parameters()].index
        )
        assert "bigram.proj.weight" in groups["scalar"] and "bigram.proj.weight" not in moved["scalar"]


SHARED = {
    "vocab_size": 1024, "model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "rope_dims": 8,
    "bigram": {"vocab_size": 64, "dim": 16},
}  # fmt: skip
TINY_A = SHARED | {
    "num_layers": 4, "xsa": 2, "value_embedding": {"dim": 16, "layers": [2, 3]},
    "flow": {"enabled": True, "latent_dim": 16, "hidden_dim": 32}, "ttt_linear": {"enabled": True, "num_heads": 4},
}  # fmt: skip
TINY_B = SHARED | {
    "num_layers": 5, "xsa": 5, "value_embedding": {"layers": []}, "gated_attention": True, "value_residual": "lambda",
    "smear_document_mask": False,
}  # fmt: skip
# architecture, parameters, bigram projection by Muon, losses, gradient norms, norms of four weights afterwards
PUBLISHED_STEPS = {
    "PR 1166": (TINY_A, 254_022, False, [7.63646, 7.50638, 7.43022, 7.48923], [2.09549, 1.70983, 1.61696],
                [33.56178, 8.11341, 7.95437, 13.88375]),
    "PR 1170": (TINY_B, 254_707, True, [7.36433, 7.48189, 7.67290, 7.60135], [1.24616, 1.27434, 1.74084],
                [35.00012, 7.96338, 7.97428, 13.87883]),
}  # fmt: skip


@pytest.mark.parametrize("system", PUBLISHED_STEPS)
def test_three_published_training_steps_of_a_tiny_model(system):
    """Losses and gradient norms of three steps (PR 1166 and 1170 description, section 24.6, "tinyA" and "tinyB")."""
    architecture, parameters, by_muon, expected_losses, expected_norms, expected_weights = PUBLISHED_STEPS[system]
    model = GPT(load_config({"model": architecture}).model)
    fill_hashed(model)
    assert sum(p.numel() for p in model.parameters()) == parameters
    config = train_config(muon_dtype="float32", muon_momentum_dtype="float32", muon_bigram_proj=by_muon)
    optimizers = make_optimizers(model, config)
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
        optimizers["muon"].param_groups[0]["momentum"] = muon_momentum(step, config)
        for optimizer in optimizers.values():
            optimizer.step()
    assert losses == pytest.approx(expected_losses, abs=2e-5)
    assert norms == pytest.approx(expected_norms, abs=2e-5)
    names = ("tok_emb", "bigram.proj", "blocks.1.attn.c_q", "blocks.2.mlp.fc")
    weights = [model.get_parameter(f"{name}.weight").norm().item() for name in names]
    assert weights == pytest.approx(expected_weights, abs=1e-4)
