"""The cost model against torch's own counters, against real runs on a CPU, and against the published logs."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from golfbook import cli
from golfbook.compress import budget
from golfbook.config.architecture import ModelConfig
from golfbook.config.load import load_config, preset_names
from golfbook.evaluate.scoring import score
from golfbook.evaluate.windows import plan_windows
from golfbook.model import costs, layers
from golfbook.model.gpt import GPT, initialise, parameter_table
from golfbook.train import speed

PUBLISHED = Path(__file__).parents[1] / "runs" / "published" / "runs.csv"
TINY = {"model.vocab_size": 96, "model.bigram": {"vocab_size": 64}}
EVERYTHING = {
    "model.gated_attention": True,
    "model.depth_gate": True,
    "model.canon.last_n": 2,
    "model.mtp.num_heads": 2,
    "model.tie_embeddings": False,
    "model.native_flow.enabled": True,
    "model.recurrence": [1, 1, 2],
    "model.ttt_linear.mini_batch": 8,
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def published() -> pd.DataFrame:
    return pd.read_csv(PUBLISHED)


def tiny(preset: str, **overrides) -> ModelConfig:
    return load_config(preset, scale="tiny", overrides={**TINY, **overrides}).model


def counted(model: ModelConfig, length: int, training: bool) -> int:
    """Operations that torch counts for one sequence; the plain attention kernel is one it knows on a CPU."""
    network = initialise(GPT(model), 1).train(training)
    tokens = torch.arange(length)[None] % model.vocab_size
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        if training:
            network.loss(tokens, tokens).backward()
        else:
            with torch.no_grad():
                network(tokens)
    return counter.get_total_flops()


@pytest.mark.parametrize("preset", preset_names())
def test_operations_are_those_torch_counts(preset):
    check_operations(tiny(preset))


def test_operations_of_every_component_together():
    check_operations(tiny("pr1166_e2e_ttt_flow", **EVERYTHING), length=44)  # 44 is no multiple of the mini-batch of 8


def check_operations(model: ModelConfig, length: int = 48) -> None:
    work = costs.per_sequence(model, length)
    inference = costs.per_sequence(model, length, training=False).inference
    assert counted(model, length, training=False) == inference
    # the plain kernel computes four products in its backward pass where a fused one computes five
    fused = (layers.ATTENTION_BACKWARD - 2) * work.forward["attention products"]
    assert counted(model, length, training=True) == work.training - fused


def test_causal_attention_counts_each_pair_once():
    model = tiny("pr1406")
    full, causal = (costs.per_sequence(model, 64, causal=c).forward["attention products"] for c in (False, True))
    assert full == 4 * 64 * 64 * model.model_dim * 13
    assert causal / full == (64 * 65 / 2) / 64**2


def test_scoring_counts_what_the_scorer_computes():
    """All windows but the first score ``stride`` targets each; on whole windows the count is the scorer's own."""
    model = load_config("quickstart").model
    network = initialise(GPT(model), 1).eval()
    window, stride, targets = 64, 16, 64 + 16 * 39  # 40 windows: whole batches, which the scorer need not fill up
    tokens = torch.randint(0, model.vocab_size, (targets + 1,), generator=torch.Generator().manual_seed(0)).numpy()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        score(network, tokens, window=window, stride=stride, batch_windows=8)
    windows = len(plan_windows(targets, window, stride).starts)
    head = costs.per_sequence(model, window).forward["head"] / window
    expected = windows * stride * (costs.scoring(model, window, stride) - head) + targets * head
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("preset", ["pr1166_e2e_ttt_flow", "pr1170_nfm", "pr1406"])
def test_saved_bytes_are_what_a_real_step_saves(preset, monkeypatch):
    model, rows, length = tiny(preset, **{"model.canon.last_n": 1, "model.depth_gate": True}), 2, 48
    estimate = costs.saved_bytes(model, rows, length)

    # with torch's fused attention, which is what the estimate stands for; the blocked one of CPUs keeps its weights
    def fused(q, k, v, backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    monkeypatch.setattr(layers, "causal_attention", fused)
    network = initialise(GPT(model), 1)
    tokens = torch.arange(rows * length).view(rows, length) % model.vocab_size
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = network.loss(tokens, tokens)
    own = {p.untyped_storage().data_ptr() for p in network.parameters()} | {tokens.untyped_storage().data_ptr()}
    real = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in own)
    assert loss.isfinite()
    assert estimate == pytest.approx(real, rel=0.002)


def test_activation_memory_grows_with_tokens():
    model = tiny("pr1166_e2e_ttt_flow")
    estimate = costs.activation_bytes(model, 2 * 384, torch.float32)
    assert estimate == pytest.approx(costs.saved_bytes(model, 2, 384), rel=0.01)
    assert 0.45 < costs.activation_bytes(model, 768) / estimate < 0.8


def test_optimizer_operations_are_those_of_newton_schulz(monkeypatch):
    from golfbook.train import muon
    from golfbook.train.muon import make_optimizers, newton_schulz, parameter_groups

    monkeypatch.setattr(muon, "GRAM_RATIO", 1000)  # the formula's count, without the products that long matrices save
    config = load_config("pr1166_e2e_ttt_flow", scale="tiny", overrides={"model.mtp.num_heads": 1})
    network = initialise(GPT(config.model), 1)
    assert make_optimizers(network, config.train)
    with FlopCounterMode(display=False) as counter:
        for name in parameter_groups(network, config.train)["matrix"]:
            newton_schulz(
                network.get_parameter(name).detach(), config.train.optimizer.newton_schulz_steps, torch.float32
            )
    assert speed.optimizer_flops(config.model) == counter.get_total_flops()


# preset, variant and system in the published table, GPU, how many, and the error the estimate is known to have
STEPS = [
    ("pr1232_base", "base_20k", "A100 PCIe 40GB", 1, 0.01),  # one of the two runs the constants were chosen on
    ("pr1406", "dttt_recur", "H100 SXM 80GB", 8, 0.01),  # the other one
    ("pr1232_flow", "flow_20k", "A100 PCIe 40GB", 1, 0.03),
    ("pr1170_nfm", "nfm_7k", "A100 PCIe 40GB", 1, 0.03),
    ("pr1166_e2e_ttt_flow", "varB_10L", "A100 PCIe 40GB", 2, 0.15),  # its own loop is slower than our scan
    ("pr1166_11l_a", "varA_11L", "A100 PCIe 40GB", 2, 0.15),
]


@pytest.mark.parametrize(("preset", "variant", "gpu", "gpus", "known"), STEPS)
def test_step_times_against_the_published_ones(published, preset, variant, gpu, gpus, known):
    measured = published.loc[published["variant"] == variant, "step_ms"].mean()
    estimate = 1000 * speed.step_time(load_config(preset), speed.GPUS[gpu], gpus).seconds
    error = estimate / measured - 1
    print(f"{preset}: estimated {estimate:.0f} ms, published {measured:.0f} ms, error {error:+.1%}")
    assert abs(error) < known


@pytest.mark.parametrize(("preset", "variant"), [(row[0], row[1]) for row in STEPS])
def test_activation_memory_against_the_published_peaks(published, preset, variant):
    """The published peak holds weights, optimiser and logits too: activations are most of it, and less than all."""
    peak = published.loc[published["variant"] == variant, "peak_mem_mib"].mean() * 2**20
    ratio = costs.activation_bytes(load_config(preset).model, speed.MICRO_BATCH_TOKENS) / peak
    print(f"{preset}: {ratio - 1:+.0%}")
    assert 0.8 < ratio < 1.0


@pytest.mark.parametrize(
    ("preset", "variant"),
    [
        *((row[0], row[1]) for row in STEPS),
        ("pr1166_11l_c", "varC_11L_int5mlp"),
    ],
)
def test_artifact_bytes_against_the_published_ones(published, preset, variant):
    config = load_config(preset)
    measured = published.loc[published["variant"] == variant, "model_bytes"].mean()
    estimate = budget.artifact_bytes(config.model, config.quantize)
    print(f"{preset}: estimated {estimate:,}, published {measured:,.0f} bytes, error {estimate / measured - 1:+.1%}")
    assert abs(estimate / measured - 1) < 0.08


def test_published_parameter_counts_are_ours(published):
    for preset, variant, *_ in STEPS:
        (logged,) = set(published.loc[published["variant"] == variant, "params"])
        assert parameter_table(load_config(preset).model)["total"] == logged


def test_gpus_are_data_with_a_source():
    for name, gpu in speed.GPUS.items():
        assert gpu.name == name and "data sheet" in gpu.source
        assert 1e14 < gpu.flops < 1e16 and 1e12 < gpu.bandwidth < 1e13 and gpu.memory_bytes >= 4e10


def test_the_command_shows_every_preset_within_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(cli.app, ["presets", "--cost"], catch_exceptions=False).output
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line.strip()}
    assert set(preset_names()) <= set(rows) and "…" not in shown
    config = load_config("pr1406")
    params, forward, train, score_, file, _, a100, *_ = rows["pr1406"]
    work = costs.per_token(config.model, 2048)
    assert params == "26.9" and float(forward) == round(work.inference / 1e6) and float(train) == 379
    assert float(score_.replace(",", "")) == round(costs.scoring(config.model, 2048, 64) / 1e6)
    assert file == f"{budget.artifact_bytes(config.model, config.quantize) / 1e6:.3g}"
    seconds = speed.step_time(config, speed.GPUS["A100 PCIe 40GB"]).seconds
    assert float(a100.replace(",", "")) == pytest.approx(1000 * seconds, abs=1)


def test_the_command_shows_one_preset_by_component():
    shown = CliRunner().invoke(cli.app, ["presets", "pr1166_e2e_ttt_flow", "--cost"], catch_exceptions=False).output
    for name in costs.per_token(load_config("pr1166_e2e_ttt_flow").model, 2048).forward:
        assert f"forward: {name}" in shown
    for name in speed.GPUS:
        assert f"step on {name}, ms" in shown
