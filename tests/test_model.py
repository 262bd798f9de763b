"""The model against published numbers, against a slow restatement, and for causality."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from golfbook.config.architecture import ModelConfig
from golfbook.config.load import load_config
from golfbook.model.component import facts_of
from golfbook.model.gpt import GPT, exported, exported_state, initialise, parameter_table
from golfbook.model.kernels import normed_heads, rms_norm
from golfbook.model.layers import BigramHash, SmearGate, rope_tables
from reference import fill_hashed, hashed_batch, sine, uniform

GOLDEN = Path(__file__).parent / "golden"
REFINERS = {"ttt_linear": {"enabled": True}, "flow": {"enabled": True}}
PR1232 = {
    "num_layers": 11,
    "xsa": 11,
    "gated_attention": True,
    "value_residual": "lambda",
    "bigram": {"vocab_size": 4096},
    "value_embedding": {"layers": ()},
}

PR1170 = {**PR1232, "native_flow": {"enabled": True}}


def model_config(**values) -> ModelConfig:
    return load_config({"model": values}).model


@pytest.mark.parametrize(
    ("values", "total"),
    [
        ({}, 24_566_868),
        (REFINERS, 25_749_398),
        ({"num_layers": 11}, 26_928_220),
        ({"num_layers": 11, **REFINERS}, 28_110_750),
        (PR1232, 27_137_223),
        ({**PR1232, "flow": {"enabled": True}}, 27_235_848),
        (PR1170, 27_530_952),
        ({**PR1232, "native_flow": {"enabled": True, "hidden_dim": 128}}, 27_334_088),
        ({**PR1232, "native_flow": {"enabled": True, "hidden_dim": 512}}, 27_924_680),
        ({"num_layers": 11, "qk_gain_init": 5.0, "recurrence": [4, 5]}, 26_928_220),
    ],
)
def test_published_parameter_totals(values, total):
    assert parameter_table(model_config(**values))["total"] == total


def test_preset_pr1166_is_the_published_model():
    assert parameter_table(load_config("pr1166_e2e_ttt_flow").model)["total"] == 25_749_398


# Rows: model, (rows, length), loss, logits at [0, 5, :4], logits at [-1, -1, :4], standard deviation of all logits.
PUBLISHED = [
    ({}, (2, 64), 7.339548, (0.28746, 0.78066, 2.09931, -0.40197), (0.93682, -0.80174, 1.89576, 1.22958), 0.996918),
    ({}, (1, 1088), 7.488140, (0.28900, 0.77985, 2.09799, -0.40256), (-0.47061, 0.45752, 0.14690, -0.64105), 1.000552),
    (REFINERS, (2, 64), 7.436307, (-0.60799, 0.79483, 2.07155, 0.35645), (-0.5209, -1.677, 1.93743, 0.5565), 1.227735),
    (PR1232, (2, 64), 7.441620, (-1.26877, -0.38032, -0.40892, -0.35088), (-0.7494, -0.5914, -0.219, 0.1753), 1.001761),
    (PR1170, (2, 64), 7.552488, (-1.4805, -0.4713, -0.9923, -0.2076), (-1.1449, -1.0712, -0.4505, 0.4659), 1.094717),
]  # fmt: skip


@pytest.mark.parametrize(("values", "shape", "loss", "early", "late", "std"), PUBLISHED)
def test_published_vectors_at_full_size(values, shape, loss, early, late, std):
    model = GPT(model_config(**values)).eval()
    fill_hashed(model)
    tokens, targets = hashed_batch(*shape)
    with torch.no_grad():
        logits = model(tokens)
        assert model.loss(tokens, targets).item() == pytest.approx(loss, abs=1e-5)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[0, 5, :4], torch.tensor(early), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[-1, -1, :4], torch.tensor(late), atol=1e-4, rtol=0)
    assert logits.std().item() == pytest.approx(std, abs=1e-4)


def pr1406_tiny(recurrence: tuple[int, ...]) -> GPT:
    """The tiny model of the PR 1406 vectors; banks are filled whole, then cut into the matrices of each block."""
    config = model_config(
        vocab_size=32, num_layers=6, model_dim=32, num_heads=4, num_kv_heads=2, mlp_mult=2.0, rope_dims=4, xsa=2,
        bigram={"vocab_size": 16, "dim": 8}, value_embedding={"dim": 8, "layers": [4, 5]}, qk_gain_init=5.0,
        recurrence=recurrence,
    )  # fmt: skip
    model = initialise(GPT(config), seed=0).eval()
    state = model.state_dict()
    banks = {
        1: [f"blocks.{i}.attn.{n}.weight" for n in ("c_q", "proj") for i in range(6)],
        2: [f"blocks.{i}.attn.{n}.weight" for n in ("c_k", "c_v") for i in range(6)],
        3: [f"blocks.{i}.mlp.fc.weight" for i in range(6)],
        4: [f"blocks.{i}.mlp.proj.weight" for i in range(6)],
    }
    banked = {name for names in banks.values() for name in names}
    for tag, names in banks.items():
        whole = 0.5 * sine(tag, len(names), *state[names[0]].shape)
        for name, value in zip(names, whole, strict=True):
            state[name].copy_(value)
    rest = [name for name in state if name not in banked]
    for position, name in enumerate(rest):
        u = sine(position + (4 if position else 0), *state[name].shape)
        control = ("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "smear", "scale")
        if any(word in name for word in control):
            state[name].add_(0.2 * u)
        else:
            state[name].copy_(u if "emb" in name and "proj" not in name else 0.5 * u)
    return model


@pytest.mark.parametrize(
    ("recurrence", "first", "loss"),
    [
        ((), (4.453151, 0.625183, -0.879929, -2.144411), 4.965837),
        ((2, 3), (3.940823, 0.358089, -0.770808, -1.806051), 4.895348),
    ],
)
def test_pr1406_tiny_vectors(recurrence, first, loss):
    model = pr1406_tiny(recurrence)
    assert sum(p.numel() for p in model.parameters()) == 45_724
    row, position = torch.arange(2)[:, None], torch.arange(12)[None, :]
    tokens = (7 * position + 3 * row + position**2) % 32
    with torch.no_grad():
        logits = model(tokens)
        assert model.loss(tokens, (5 * tokens + 1) % 32).item() == pytest.approx(loss, abs=1e-5)
    torch.testing.assert_close(logits[0, 0, :4], torch.tensor(first), atol=1e-4, rtol=0)


def test_published_small_model_logits_and_gradients():
    """Reference outputs of the published PR 1166 code, filled so that every gate is open."""
    data = load_file(GOLDEN / "small_pr1166_hot.safetensors")
    meta = json.loads((GOLDEN / "small_pr1166.json").read_text())
    model = GPT(model_config(**meta["model"])).eval()
    model.load_state_dict({k.removeprefix("state/"): v for k, v in data.items() if k.startswith("state/")})
    loss = model.loss(data["x"], data["y"])
    assert loss.item() == pytest.approx(meta["hot"]["loss"], abs=1e-5)
    with torch.no_grad():
        logits = model(data["x"])[:, meta["logit_positions"]]
    torch.testing.assert_close(logits, data["logits_at_pos"], atol=1e-4, rtol=0)
    loss.backward()
    parameters = dict(model.named_parameters())
    gradients = {k.removeprefix("grad/"): v for k, v in data.items() if k.startswith("grad/")}
    assert len(gradients) == len(parameters) - 1  # that of the token table is left out for its size
    for name, expected in gradients.items():
        torch.testing.assert_close(parameters[name].grad, expected, atol=2e-4, rtol=1e-3)


def test_bigram_rows_are_the_published_ones():
    tokens = torch.tensor([[1, 2, 3, 1023, 1023, 0, 500]])
    for rows, expected in (
        (1536, [1535, 962, 1060, 824, 121, 658, 520]),
        (4096, [4095, 412, 3580, 3074, 476, 3153, 3365]),
    ):
        table = BigramHash(model_config(bigram={"vocab_size": rows, "dim": 4}))
        assert table.rows_of(tokens).tolist() == [expected]


def test_rope_matches_published_angles_and_keeps_lengths():
    for length, expected in (
        (64, (-0.989992, 0.582754, 0.955337, 0.995503, 0.999550, 0.999955, 0.999996, 1.0)),
        (2048, (-0.989992, 0.653010, 0.969870, 0.997517, 0.999796, 0.999983, 0.999999, 1.0)),
    ):
        cos, sin = rope_tables(length, 16, 10000.0, 1024, torch.device("cpu"))
        torch.testing.assert_close(cos[3], torch.tensor(expected), atol=1e-5, rtol=0)
        x = torch.randn(1, length, 2, 64, generator=torch.Generator().manual_seed(0))
        rotated, normed = normed_heads(x, cos, sin), rms_norm(x)
        torch.testing.assert_close(rotated.norm(dim=-1), normed.norm(dim=-1))
        assert torch.equal(rotated[..., 16:], normed[..., 16:])


def test_ttt_linear_published_component_vectors():
    model = GPT(model_config(**REFINERS)).eval()
    fill_hashed(model)
    x = torch.from_numpy((2 * uniform("refx", 48 * 512) - 1) * 3**0.5).float().view(1, 48, 512)
    with torch.no_grad():
        out = model.ttt_refiner(x)
        torch.testing.assert_close(out[0, 17, :3], torch.tensor([0.34209, -0.08693, 0.32322]), atol=1e-4, rtol=0)
        assert out.norm().item() == pytest.approx(69.4174, abs=1e-3)
        short = model.ttt_refiner(x[:, :40])
        assert not short[0, 32:].any()
        torch.testing.assert_close(short[0, 31, :3], torch.tensor([-0.39703, -0.57936, 0.08553]), atol=1e-4, rtol=0)
        flow = model.flow_refiner(x)
        torch.testing.assert_close(flow[0, 0, :3], torch.tensor([0.38244, -0.09136, -0.31127]), atol=1e-4, rtol=0)
        assert flow.norm().item() == pytest.approx(81.8038, abs=1e-3)


def test_native_flow_published_component_vectors():
    model = GPT(model_config(**PR1170))
    fill_hashed(model)
    flow = model.native_flow
    x = torch.from_numpy((2 * uniform("refx", 48 * 512) - 1) * 3**0.5).float().view(1, 48, 512)
    t = torch.from_numpy(uniform("nfm_t", 48)).float().view(1, 48)
    z = torch.from_numpy((2 * uniform("nfm_z", 48 * 512) - 1) * 3**0.5).float().view(1, 48, 512)
    with torch.no_grad():
        out = flow(x)
        torch.testing.assert_close(out[0, 0, :3], torch.tensor([0.24418, 0.47323, -0.31330]), atol=1e-4, rtol=0)
        assert out.norm().item() == pytest.approx(72.8049, abs=1e-3)
        assert flow.matching_loss(x, t, z).item() == pytest.approx(2.641567, abs=1e-5)
        e = flow.time_embedding(torch.ones(()))
    expected = torch.tensor([0.841471, 0.821779, 0.801805, 0.000100, 0.540302, 0.569807, 1.0])
    torch.testing.assert_close(e[[0, 1, 2, 255, 256, 257, 511]], expected, atol=2e-6, rtol=0)
    x.requires_grad_()
    assert torch.autograd.grad(flow.matching_loss(x, t, z), x, allow_unused=True) == (None,)


def test_native_flow_adds_its_loss_in_training_only():
    model = initialise(GPT(model_config(**PR1170, model_dim=64, num_heads=4, num_kv_heads=2)), seed=1)
    tokens, targets = hashed_batch(2, 32)
    with torch.no_grad():
        plain = model.eval().loss(tokens, targets)
        torch.manual_seed(0)
        extra = model.train().loss(tokens, targets) - plain
    assert extra.item() == pytest.approx(0.2, abs=0.03)  # 0.1 times about 2 while the velocity is zero


def test_smear_gate_can_stop_at_document_starts():
    smear = SmearGate(model_config())
    x, starts = torch.randn(1, 4, 512), torch.tensor([[True, False, True, False]])
    masked, plain = smear(x, starts), smear(x)
    torch.testing.assert_close(masked[0, 2], 0.5 * x[0, 2])
    torch.testing.assert_close(plain[0, 2], 0.5 * (x[0, 1] + x[0, 2]))
    assert torch.equal(masked[0, 1], plain[0, 1])


def test_multi_token_prediction_trains_heads_that_are_not_exported():
    values = {"model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "num_layers": 2, "mtp": {"num_heads": 2}}
    model = initialise(GPT(model_config(**values, xsa=1)), seed=1)
    with torch.no_grad():
        for head in model.mtp_heads:
            head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    tokens, targets = hashed_batch(2, 32)
    with torch.no_grad():
        assert model.train().loss(tokens, targets) > model.eval().loss(tokens, targets) + 0.5  # about 0.2 log V more
    bare = GPT(exported(model.config))
    bare.load_state_dict(exported_state(model))
    assert torch.equal(bare(tokens), model(tokens))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {**REFINERS, "ttt_linear": {"enabled": True, "num_heads": 4}},
        {"gated_attention": True, "value_residual": "lambda", "recurrence": [0, 2]},
        {"canon": {"last_n": 2}, "depth_gate": True, "value_residual": "alpha", "native_flow": {"enabled": True}},
        {"bigram": {"vocab_size": 64, "dim": 16, "trigram": True}, "smear_document_mask": True, "unet_skips": False},
    ],
)
def test_causal_to_the_bit_and_rows_are_separate(values):
    config = model_config(
        vocab_size=64, num_layers=4, model_dim=64, num_heads=4, num_kv_heads=2, rope_dims=8, xsa=2,
        **{"bigram": {"vocab_size": 64, "dim": 16}, "value_embedding": {"dim": 16}, **values},
    )  # fmt: skip
    model = GPT(config).eval()
    fill_hashed(model)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 64, (2, 50)))
    with torch.no_grad():
        before = model(tokens)
        for cut in (1, 15, 16, 17, 31, 32, 49):
            changed = tokens.clone()
            changed[0, cut:] = (changed[0, cut:] + 1) % 64
            after = model(changed)
            assert torch.equal(after[0, :cut], before[0, :cut])
            assert not torch.equal(after[0, cut:], before[0, cut:])
            assert torch.equal(after[1], before[1])


def test_initial_weights_depend_on_the_seed_only():
    config = load_config("quickstart").model
    first = initialise(GPT(config), seed=3).state_dict()
    torch.manual_seed(99)
    again, other = initialise(GPT(config), seed=3).state_dict(), initialise(GPT(config), seed=4).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["tok_emb.weight"], other["tok_emb.weight"])
    assert not first["blocks.0.attn.proj.weight"].any()
    q = first["blocks.1.attn.c_q.weight"]
    torch.testing.assert_close(q @ q.T, torch.eye(128), atol=1e-5, rtol=0)
    tokens, targets = hashed_batch(4, 64)
    model = initialise(GPT(config), seed=3)
    loss = model.loss(tokens, targets)
    assert loss.item() == pytest.approx(np.log(1024), abs=0.05)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_parameter_that_no_component_speaks_for_is_named():
    model = GPT(model_config(num_layers=2, xsa=1))
    assert list(facts_of(model)) == [name for name, _ in model.named_parameters()]
    model.blocks[0].mlp.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"blocks\.0\.mlp\.extra"):
        facts_of(model)
