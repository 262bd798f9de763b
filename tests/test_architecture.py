"""Every combination of components: trains, is causal to the bit, keeps rows apart, survives quantise, save and load.

And TTT-Linear's scan against the published loop written plainly, in float64.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from golfbook.analysis import comparisons, components, probes
from golfbook.compress import container as artifact
from golfbook.compress.export import quantize_model
from golfbook.compress.quantizer import dequantize
from golfbook.config.architecture import ModelConfig
from golfbook.config.load import load_config, preset_names, read_yaml
from golfbook.errors import ConfigError
from golfbook.model.gpt import BOS_ID, GPT, exported, initialise, parameter_table
from golfbook.model.refiners import TTTLinear
from golfbook.model.ttt_scan import GROUP, _Scan, ttt_scan
from golfbook.panels import architecture as architecture_panels
from golfbook.panels.base import Switch
from golfbook.plots import architecture as architecture_plots
from golfbook.plots import style
from golfbook.train.muon import make_optimizers

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
        "unet_skips": draw(switch),
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
    for optimizer in make_optimizers(model, train).values():
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all() and (name in unused(config) or not torch.equal(parameter, before[name])), name


def survives_the_artifact(config: ModelConfig, folder: Path) -> None:
    """Quantised, written, read and built, the model gives the logits of its decoded weights in memory, to the bit."""
    model = open_model(config)
    settings_ = load_config("quickstart", overrides={"quantize.passthrough_numel": 20}).quantize
    quantized = quantize_model(model, settings_)
    path = folder / "model.golf"
    artifact.write_artifact(path, exported(config), quantized, "0" * 64, settings_, WINDOW)
    loaded = artifact.read_artifact(path).build()
    assert loaded.config == exported(config)
    model.load_state_dict(dequantize(quantized), strict=config.mtp.num_heads == 0)
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

    monkeypatch.setattr("golfbook.model.refiners.ttt_scan", scan)


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


# -- what the notebook shows -------------------------------------------------------------------------------------------

PROJECT = Path(__file__).parents[1]


def test_recorded_attention_is_the_attention_that_was_computed():
    """Weights times values give the output the kernel gave; recurrence in place is skipped over."""
    config = model_config(
        vocab_size=16, num_layers=3, model_dim=16, num_heads=4, num_kv_heads=2, rope_dims=4, xsa=[1],
        bigram={"vocab_size": 8, "dim": 4}, value_embedding={"dim": 4, "layers": [2]}, recurrence=[0, 0],
        recurrence_place="in_place", value_residual="lambda",
    )  # fmt: skip
    model, tokens = open_model(config), documents(16, rows=1, length=12)[0]
    seen = []
    handle = model.blocks[2].attn.proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    looks = probes.look_inside(model, tokens)
    handle.remove()
    assert len(looks) == 3 and len(seen) == 1
    for look in looks:
        assert look.weights.shape == (4, 12, 12)
        np.testing.assert_allclose(look.weights.sum(-1), 1, atol=1e-5)
        assert not np.triu(look.weights, 1).any()
    values = torch.zeros(2, 12, 4)

    def keep(module, given, result):
        raw = model.ve_layer_scales[0] * model.ve_shared(tokens[None]) + result
        mix = model.blocks[2].attn.vr_lambda
        values.copy_((mix[0] * first[0] + mix[1] * raw).view(12, 2, 4).transpose(0, 1))

    first = []
    hooks = [
        model.blocks[0].attn.c_v.register_forward_hook(lambda m, g, r: first.append(r)),
        model.blocks[2].attn.c_v.register_forward_hook(keep),
    ]
    with torch.no_grad():
        model(tokens[None])
    for hook in hooks:
        hook.remove()
    expected = torch.from_numpy(looks[2].weights) @ values.repeat_interleave(2, 0)
    torch.testing.assert_close(seen[0][0], expected.transpose(0, 1).flatten(1), atol=1e-5, rtol=1e-4)
    outputs, own = expected, values.repeat_interleave(2, 0)
    np.testing.assert_allclose(looks[2].own, torch.cosine_similarity(outputs, own, -1).flatten(), atol=1e-4)
    np.testing.assert_allclose(looks[2].own.reshape(4, 12)[:, 0], 1, atol=1e-5)  # the first token sees only itself
    pieces = tokens.tolist()
    some = [t for t in range(12) if any(p != pieces[t] for p in pieces[:t])]
    possible = torch.cosine_similarity(outputs[:, :, None], own[:, None], -1).numpy()  # (H, T, T)
    for t, cosines in zip(some, looks[2].other.reshape(4, -1).T, strict=True):
        ways = [s for s in range(t) if pieces[s] != pieces[t]]
        assert any(np.allclose(cosines, possible[:, t, s], atol=1e-4) for s in ways)
    table = probes.value_embedding_sizes(model, tokens)
    assert table["layer"].tolist() == [2] and (table.to_numpy() > 0).all()


def test_row_uses_count_what_a_dictionary_counts():
    model = open_model(
        model_config(vocab_size=16, num_layers=1, unet_skips=False, model_dim=16, num_heads=2, num_kv_heads=1,
                     rope_dims=4, xsa=0, bigram={"vocab_size": 6, "dim": 4}, value_embedding={"layers": []})
    )  # fmt: skip
    tokens = torch.randint(0, 16, (200,), generator=torch.Generator().manual_seed(0))
    rows: dict[int, dict[tuple[int, int], int]] = {}
    for a, b in zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True):
        uses = rows.setdefault(((36313 * b) ^ (27191 * a)) % 5, {})
        uses[a, b] = uses.get((a, b), 0) + 1
    different, share = probes.row_uses(model, tokens)
    assert different.tolist() == [len(rows.get(r, ())) for r in range(5)]
    assert share == pytest.approx([max(rows[r].values()) / sum(rows[r].values()) for r in range(5)])


def test_gate_values_are_in_use():
    config = load_config("pr1170_nfm", scale="tiny", overrides={"model.ttt_linear.enabled": True}).model
    model = initialise(GPT(config), 1)
    found = probes.gate_values(model)
    assert found["smear gate"] == pytest.approx(0.5)
    assert found["gate of TTT-Linear"] == found["gate of NativeFlow"] == pytest.approx(0.0066929, abs=1e-6)
    assert len(found["residual mix r0 (stream)"]) == 11 * 64 and "gate of FlowRefiner" not in found


@pytest.mark.parametrize("preset", ["pr1166_e2e_ttt_flow", "pr1232_flow", "pr1406"])
def test_panel_starts_at_the_preset_and_each_control_changes_the_model(preset):
    panel = architecture_panels.build(preset)
    assert architecture_panels.assemble(preset, panel.state) == load_config(preset)
    before = components.summary(load_config(preset))
    assert before["totals"]["parameters"] == sum(before["parameters"].values())
    changes = {
        "layers": 7, "width": 384, "mlp": 2.0, "bigram_rows": 0, "tied": False, "bits": 4,
        "recurrence": "none" if load_config(preset).model.recurrence else "in_place",
        **{name: not panel.state[name] for name, control in panel.controls.items() if isinstance(control, Switch)},
    }  # fmt: skip
    assert set(changes) == set(panel.controls) - {"guess"}
    for name, value in changes.items():
        config = architecture_panels.assemble(preset, {**panel.state, name: value})
        after = components.summary(config)["totals"]
        assert any(after[k] != before["totals"][k] for k in after), name
        if name == "bits":
            assert after["artifact, bytes (estimate)"] < before["totals"]["artifact, bytes (estimate)"]
    assert panel.png(layers=7) != panel.png()
    controls, message, image = panel.widget().children
    controls.children[list(panel.controls).index("layers")].value = 7
    assert bytes(image.value) == panel.png(layers=7) and message.value == ""


def test_published_parameters_appear_in_the_panel():
    totals = components.summary(load_config("pr1166_e2e_ttt_flow"))
    assert totals["totals"]["parameters"] == 25_749_398
    assert totals["parameters"]["TTT-Linear"] == 1_083_905 and totals["parameters"]["FlowRefiner"] == 98_625


def test_component_costs_have_the_published_sizes():
    table = components.component_costs().set_index("component")
    assert table.loc["TTT-Linear", "parameters"] == 1_083_905
    assert table.loc["NativeFlowMatcher", "parameters"] == 393_729
    assert table.loc["recurrence of two blocks", "parameters"] == 0
    # PR 1166 section 8.6: 2.10 MFLOP of projections and 0.246 of the loop, which sums by a product what we sum directly
    assert table.loc["TTT-Linear", "forward, kFLOP a token"] == pytest.approx(2097 + 246 - 16, rel=1e-3)


def test_reference_results_are_those_of_the_job():
    job = read_yaml(PROJECT / "papermill_jobs" / "architecture.yaml")
    table = pd.read_csv(PROJECT / "runs" / "reference" / "architecture" / "results.csv")
    assert {(v, s) for v in job["variants"] for s in job["seeds"]} == set(
        zip(table["variant"], table["seed"], strict=True)
    )
    assert set(table["steps"]) == {job["overrides"]["train.steps"]} and table["val_bpb"].between(1, 8).all()
    for variant, changes in job["variants"].items():
        config = load_config(job["preset"], scale=job["scale"], overrides={**job["overrides"], **changes})
        assert set(table.loc[table["variant"] == variant, "parameters"]) == {parameter_table(config.model)["total"]}
    effects = comparisons.switch_effects(table).set_index("variant")
    assert len(effects) == len(job["variants"]) - 1 and set(effects["n"]) == {len(job["seeds"])}
    wide = table.pivot(index="seed", columns="variant", values="val_bpb")
    assert effects.loc["no_xsa", "mean"] == pytest.approx((wide["no_xsa"] - wide["base"]).mean())


def test_switches_in_words():
    table = pd.DataFrame(
        {
            "variant": ["base"] * 3 + ["up"] * 3 + ["down"] * 3 + ["same"] * 3,
            "seed": [1, 2, 3] * 4,
            "val_bpb": [2.0, 2.1, 2.2, 2.101, 2.2, 2.299, 1.9, 2.001, 2.1, 1.9, 2.3, 2.1],
            "parameters": [100] * 3 + [100] * 3 + [90] * 3 + [1200] * 3,
        }
    )
    effects = comparisons.switch_effects(table)
    up, down, same, absent = (comparisons.switch_in_words(effects, name) for name in ("up", "down", "same", "other"))
    assert "`up` is **worse** than the base model: +0.1000" in up and "n = 3 pairs, +0 parameters" in up
    assert "**better** than" in down and "-10 parameters" in down
    assert "not to be told apart from" in same and "+1,100 parameters" in same
    assert absent == "`other` is not in this study"
    found = comparisons.switch_findings(effects)
    assert "1 of 3 intervals contain 0" in found[0]
    assert "Faster at first, in bits per byte: `down` (-0.0997). Slower: `up` (+0.1000)" in found[1]
    assert "p below 0.05/3) leaves `up` (+0.1000), `down` (-0.0997)" in found[2]


def test_the_guess_hides_the_effect_until_it_is_made():
    table = pd.read_csv(PROJECT / "runs" / "reference" / "architecture" / "results.csv")
    panel = architecture_panels.guess(comparisons.switch_effects(table))
    hidden, shown = panel.figure(switch="no_xsa"), panel.figure(switch="no_xsa", guessed="better")
    assert len(hidden.axes[0].lines) == 1 and len(shown.axes[0].lines) == 3
    assert "guess first" in hidden.axes[0].get_title("left")
    assert shown.axes[0].get_title("left") == "no_xsa: worse, you guessed 'better'"
    assert panel.figure(switch="canon", guessed="no difference").axes[0].get_title("left").endswith("as you guessed")
    assert panel.figure(switch="untied_head").axes[0].get_xlim() == hidden.axes[0].get_xlim()


def test_step_errors_are_small_and_reported():
    table = components.step_errors(pd.read_csv(PROJECT / "runs" / "published" / "runs.csv"))
    shares = table[["products_share", "traffic_share", "launches_share"]].sum(axis=1)
    assert shares.to_numpy() == pytest.approx((1 + table["error"]).to_numpy())
    assert table["error"].abs().max() < 0.15


def texts(figure: style.Picture) -> str:
    return " ".join(t.get_text() for axes in figure.axes for t in axes.texts)


@pytest.mark.parametrize("preset", preset_names())
def test_the_diagram_has_every_block_refiner_and_skip(preset):
    model = load_config(preset).model
    picture = architecture_plots.data_flow(model)
    shown = texts(picture)
    for i in range(model.num_layers):
        assert f"block {i}" in shown
    assert shown.count("again") == len(model.recurrence)
    for name, on in (("TTT-Linear", model.ttt_linear), ("FlowRefiner", model.flow), ("NativeFlow", model.native_flow)):
        assert (f"+ {name}" in shown) == on.enabled
    skips = [p for p in picture.axes[0].patches if matplotlib.colors.to_hex(p.get_edgecolor()) == "#cc79a7"]
    assert len(skips) == model.num_layers // 2
    assert style.png(picture)[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 1, "xsa": 0, "value_embedding": {"layers": []}},
        {"num_layers": 5, "unet_skips": False, "recurrence": [1, 1, 4], "recurrence_place": "in_place"},
        {"num_layers": 2, "xsa": 0, "smear": False, "bigram": {"vocab_size": 0}, "tie_embeddings": False},
    ],
)
def test_the_diagram_of_unusual_models(changes):
    shown = texts(architecture_plots.data_flow(model_config(**changes)))
    assert ("block 1 x3" in shown) == ("recurrence" in changes)
    assert ("smear gate" in shown) == changes.get("smear", True)


def test_pictures_are_pure():
    """The same data gives the same bytes, and a picture leaves its data alone."""
    rng = np.random.default_rng(0)
    weights = np.tril(rng.random((2, 30, 30)))
    table = pd.DataFrame(
        {"variant": ["a", "b"], "mean": [0.1, -0.2], "low": [0.0, -0.3], "high": [0.2, -0.1], "n": [3, 3]}
    )
    draws = [
        lambda: architecture_plots.attention(weights, [str(i) for i in range(30)], layer=0),
        lambda: architecture_plots.own_value([weights[0]] * 2, [weights[1]] * 2, (1,)),
        lambda: architecture_plots.gates(
            {"many": weights[0], "one": np.array([0.007]), "two": [1.0, 2.0]},
            {"many": 0.5, "one": 0.006, "two": [0, 1]},
        ),
        lambda: architecture_plots.rope({64: [1.0, 0.1], 128: [1.0, 0.05]}, 64),
        lambda: architecture_plots.collisions([0, 3, 2], [np.nan, 0.4, 0.9]),
        lambda: architecture_plots.effects(table),
        lambda: architecture_plots.guess(table.iloc[0].to_dict(), "better", 1.0),
    ]
    before = weights.copy(), table.copy()
    for draw in draws:
        assert style.png(draw()) == style.png(draw())
    np.testing.assert_array_equal(weights, before[0])
    pd.testing.assert_frame_equal(table, before[1])
