"""Every combination of components: trains, is causal to the bit, keeps rows apart, survives quantise, save and load.

And TTT-Linear's scan against the published loop written plainly, in float64.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from golfbook import artifact, quantization
from golfbook.config import ModelConfig, load_config, preset_names
from golfbook.errors import ConfigError
from golfbook.model import BOS_ID, GPT, exported, exported_state, initialise
from golfbook.muon import make_optimizers
from golfbook.refiners import TTTLinear
from golfbook.scan import GROUP, _Scan, ttt_scan

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from bench_ttt_linear import plain_loop

LENGTH = 40  # two whole mini-batches of 16 and a rest
WINDOW = 32


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def model_config(**values) -> ModelConfig:
    return load_config({"model": values}).model


def open_model(config: ModelConfig, seed: int = 0) -> GPT:
    """A model in which every part has an effect: nothing is left at the zeros and ones it starts from."""
    model = initialise(GPT(config), seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 and "weight" in name else 0.3
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
            if name.endswith("refiner.gate") or name.endswith("native_flow.gate"):
                parameter.fill_(0.5)
    return model


def documents(vocabulary: int, rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    """Random tokens with documents that start at positions 0, 15, 16 and 33."""
    tokens = torch.randint(2, vocabulary, (rows, length), generator=torch.Generator().manual_seed(5))
    tokens[:, [p for p in (0, 15, 16, 33) if p < length]] = BOS_ID
    return tokens


@torch.no_grad()
def assert_causal(model: GPT, tokens: torch.Tensor, cuts: list[int]) -> None:
    """Changing tokens from a cut on changes no logit before it by a single bit, and does change one after it."""
    before = model(tokens)
    for cut in cuts:
        changed = tokens.clone()
        changed[:, cut:] = torch.where(tokens[:, cut:] == 2, 3, 2)
        after = model(changed)
        assert torch.equal(after[:, :cut], before[:, :cut]), f"a change at {cut} is seen before it"
        assert not torch.equal(after[:, cut:], before[:, cut:])


# -- every combination of components -----------------------------------------------------------------------------------


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Any valid model section of a few thousand parameters."""
    layers = draw(st.integers(1, 4))
    which = st.lists(st.integers(-layers, layers - 1), max_size=3)
    switch = st.booleans()
    heads, groups = draw(st.sampled_from([(2, 1), (4, 2), (2, 2), (4, 1)]))
    recurrence = draw(which)
    rows = draw(st.sampled_from([0, 2, 29]))
    smear = draw(switch)
    values = {
        "vocab_size": draw(st.integers(12, 40)),
        "num_layers": layers,
        "model_dim": 16,
        "num_heads": heads,
        "num_kv_heads": groups,
        "mlp_mult": draw(st.sampled_from([1.0, 1.7, 2.0])),
        "tie_embeddings": draw(switch),
        "rope_dims": draw(st.sampled_from([0, 4])),
        "rope_train_length": draw(st.sampled_from([16, 1024])),
        "ln_scale": draw(switch),
        "xsa": draw(st.one_of(st.integers(0, layers), which)),
        "smear": smear,
        "smear_document_mask": smear and draw(switch),
        "unet_skips": layers > 1 and draw(switch),
        "gated_attention": draw(switch),
        "value_residual": draw(st.sampled_from(["none", "lambda", "alpha"])),
        "depth_gate": draw(switch),
        "leaky_slope": draw(st.sampled_from([0.0, 0.5, 1.0])),
        "recurrence": recurrence,
        "recurrence_place": draw(st.sampled_from(["after", "in_place"])) if recurrence else "after",
        "bigram": {"vocab_size": rows, "dim": 5, "trigram": bool(rows) and draw(switch), "scaled_init": draw(switch)},
        "value_embedding": {"dim": 3, "layers": draw(which)},
        "ttt_linear": {
            "enabled": draw(switch),
            "num_heads": draw(st.sampled_from([1, 2, 4])),
            "mini_batch": draw(st.sampled_from([1, 7, 16])),
        },
        "flow": {"enabled": draw(switch), "latent_dim": 3, "hidden_dim": 5},
        "native_flow": {"enabled": draw(switch), "hidden_dim": 5},
        "canon": {"last_n": draw(st.integers(0, layers)), "kernel": draw(st.integers(1, 5))},
        "mtp": {"num_heads": draw(st.integers(0, 2))},
    }
    return model_config(**values)


def unused(config: ModelConfig) -> set[str]:
    """Parameters of an exported model that no output depends on, as published."""
    return {"blocks.0.attn.vr_lambda", "blocks.0.attn.vrl_alpha"}  # layer 0 has no earlier values to mix in


def train_one_step(config: ModelConfig) -> None:
    """One step from open weights: the loss is finite, and every parameter but the documented ones gets a gradient."""
    model = open_model(config).train()
    tokens = documents(config.vocab_size)
    torch.manual_seed(0)  # of the noise of flow matching
    loss = model.loss(tokens, tokens.roll(-1, 1))
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        if name in unused(config):
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    train = load_config("quickstart").train
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for optimizer in make_optimizers(model, train):
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all() and (name in unused(config) or not torch.equal(parameter, before[name])), name


def survives_the_artifact(config: ModelConfig, folder: Path) -> None:
    """Quantised, written, read and built, the model gives the logits of its decoded weights in memory, to the bit."""
    model = open_model(config)
    settings_ = load_config("quickstart", overrides={"quantize.passthrough_numel": 20}).quantize
    quantized = quantization.quantize_state(exported_state(model), settings_)
    path = folder / "model.golf"
    artifact.write_artifact(path, exported(config), quantized, "0" * 64, settings_, WINDOW)
    loaded = artifact.read_artifact(path).build()
    assert loaded.config == exported(config)
    model.load_state_dict(quantization.dequantize(quantized), strict=config.mtp.num_heads == 0)
    tokens = documents(config.vocab_size)
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(config=models(), cut=st.integers(1, LENGTH - 1))
def test_any_valid_combination_works(config: ModelConfig, cut: int) -> None:
    train_one_step(config)
    model, tokens = open_model(config), documents(config.vocab_size)
    assert_causal(model, tokens, [cut])
    other = tokens.clone()
    other[1] = tokens[1].flip(0)
    with torch.no_grad():
        assert torch.equal(model(other)[0], model(tokens)[0])  # rows never see each other
    with tempfile.TemporaryDirectory() as folder:
        survives_the_artifact(config, Path(folder))


def test_an_invalid_combination_is_refused_with_the_key() -> None:
    with pytest.raises(ConfigError, match=r"model\.bigram\.trigram has no effect"):
        model_config(bigram={"vocab_size": 0, "trigram": True})
    with pytest.raises(ConfigError, match=r"model\.recurrence names layer 9"):
        model_config(num_layers=4, xsa=0, value_embedding={"layers": []}, recurrence=[9])


# -- causality of the published systems --------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", preset_names())
def test_presets_are_causal_at_all_edges(preset: str) -> None:
    """Cuts on and around the mini-batch (16), the start of documents (15, 16, 33) and the window (32)."""
    config = load_config(preset, scale="tiny").model
    model, tokens = open_model(config), documents(config.vocab_size, length=LENGTH)
    assert_causal(model, tokens, [1, 14, 15, 16, 17, 31, 32, 33, 34, LENGTH - 1])
    with torch.no_grad():
        # window after window of one text: what one holds does not reach into the other
        windows = tokens[:, :WINDOW].reshape(-1, WINDOW)
        alone = [model(row[None])[0] for row in windows]
        torch.testing.assert_close(model(windows), torch.stack(alone), atol=1e-5, rtol=0)


@pytest.mark.parametrize("length", [1023, 1024, 1025])
def test_causal_where_the_rotary_rule_changes(length: int) -> None:
    """The rotary base depends on the length of the input, not on its tokens, so no token sees a later one."""
    model = open_model(model_config(num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, rope_dims=4, xsa=1,
                                    mlp_mult=1.0, bigram={"vocab_size": 16, "dim": 4}, vocab_size=16,
                                    value_embedding={"layers": []}))  # fmt: skip
    assert_causal(model, documents(16, rows=1, length=length), [1, length // 2, length - 1])


# -- TTT-Linear: the scan against the loop -----------------------------------------------------------------------------


def refiner(dtype: torch.dtype = torch.float64, *, size: int = 16, heads: int = 2) -> TTTLinear:
    config = model_config(
        model_dim=24, num_heads=heads, num_kv_heads=heads, rope_dims=4,
        ttt_linear={"enabled": True, "num_heads": heads, "mini_batch": size},
    )  # fmt: skip
    module = TTTLinear(config).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.2 if parameter.ndim < 2 or name == "ttt_ln_b" else 0.2 * parameter.shape[-1] ** -0.5
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=dtype))
        for linear in (module.theta_K, module.theta_V, module.theta_Q, module.o_proj):
            torch.nn.init.orthogonal_(linear.weight, generator=generator)
        module.W1.copy_(0.3 * torch.randn(module.W1.shape, generator=generator, dtype=dtype))
    return module


def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the scan compute in the dtype it is given: its arithmetic, without its rounding to float32."""

    def scan(*tensors_and_rate):
        *tensors, eta = tensors_and_rate
        return _Scan.apply(*(t.contiguous() for t in tensors), eta)

    monkeypatch.setattr("golfbook.refiners.ttt_scan", scan)


def gradients(function, module: TTTLinear, x: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype))
    return {"output": y.detach(), "x": x.grad, **{n: p.grad.clone() for n, p in module.named_parameters()}}


@pytest.mark.parametrize(
    ("length", "size", "heads"),
    [
        (16, 16, 2),
        (47, 16, 2),  # a rest of 15 tokens
        (16 * GROUP, 16, 1),
        (16 * GROUP + 16, 16, 2),  # one mini-batch more than a group
        (2 * 16 * GROUP + 21, 16, 3),
        (50, 3, 2),
        (19, 1, 2),
    ],
)
def test_scan_equals_the_loop_in_float64(monkeypatch, length, size, heads):
    in_float64(monkeypatch)
    module = refiner(size=size, heads=heads)
    x = torch.randn(3, length, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours, theirs = gradients(module, module, x), gradients(lambda x: plain_loop(module, x), module, x)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, atol=1e-10, rtol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    assert not ours["output"][:, length - length % size :].any()


def test_scan_in_float32_is_close_to_the_loop_in_float64():
    module = refiner(torch.float32)
    x = torch.randn(2, 300, 24, generator=torch.Generator().manual_seed(2))
    ours = gradients(module, module, x)
    module.double()
    theirs = gradients(lambda x: plain_loop(module, x), module, x.double())
    for name, expected in theirs.items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(ours[name].double(), expected, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 127, 128, 129, 159, 160])
def test_scan_is_causal_to_the_bit(cut):
    """Around the edges of tokens, mini-batches, groups, and the rest that is no whole mini-batch."""
    module = refiner(torch.float32)
    x = torch.randn(2, 165, 24, generator=torch.Generator().manual_seed(2))
    changed = x.clone()
    changed[:, cut:] = torch.randn(2, 165 - cut, 24, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        before, after = module(x), module(changed)
    assert torch.equal(before[:, :cut], after[:, :cut])
    assert cut == 160 or not torch.equal(before[:, cut:160], after[:, cut:160])
    assert not before[:, 160:].any() and not after[:, 160:].any()


def test_fast_weights_stay_float32_under_bfloat16_autocast():
    module = refiner(torch.float32)
    x = torch.randn(2, 160, 24, generator=torch.Generator().manual_seed(2))
    seen: dict[int, torch.Tensor] = {}
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: seen.setdefault(len(seen), t), lambda t: t),
    ):
        assert module.theta_K(x).dtype == torch.bfloat16
        y = module(x)
    states = [t for t in seen.values() if t.shape[-2:] == (module.width, module.width) and t.ndim == 3]
    assert len(states) >= 2 and all(t.dtype == torch.float32 for t in states)
    assert y.isfinite().all()
    # and the arithmetic between them is that of the scan without autocast
    q, k, v = (torch.randn(10, 4, 16, 12, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (1, 2, 3))
    rest = (torch.randn(4, 12, 12), torch.zeros(4, 1, 12), torch.ones(4, 1, 12), torch.zeros(4, 1, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = ttt_scan(q, k, v, *rest, 1 / 12)
    assert under.dtype == torch.float32
    assert torch.equal(under, ttt_scan(q.float(), k.float(), v.float(), *rest, 1 / 12))
