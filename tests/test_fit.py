"""Fitting an artifact into its budget: the published ladder and pruning, what is written last, and honest warnings."""

from __future__ import annotations

import lzma
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golfbook.compress.container import read_artifact
from golfbook.compress.export import export, quantize_model
from golfbook.compress.fit import Fitted, fit, middle_out
from golfbook.compress.quantizer import QuantizedTensor, dequantize, quantize
from golfbook.config.load import load_config
from golfbook.config.schema import Config, QuantizeConfig
from golfbook.errors import ConfigError, RunError
from golfbook.model.gpt import GPT, initialise

SHA = "0" * 64


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


# -- the ladder --------------------------------------------------------------------------------------------------------


def test_layers_from_the_middle_outwards():
    """PR 1170 section 17.5, and other numbers of layers."""
    assert middle_out(11) == [5, 6, 4, 7, 3, 8, 2, 9, 1, 10, 0]
    assert middle_out(4) == [2, 3, 1, 0]
    assert [middle_out(n) for n in (0, 1)] == [[], [0]]


LADDER = QuantizeConfig(quantizer="row_maximum", fit="ladder", coder="zstd", coder_level=16, passthrough_numel=4)
SHAPES = {f"blocks.{i}.{part}": (6, 8) for i in range(11) for part in ("attn.c_q.weight", "mlp.fc.weight")}
SHAPES |= {"tok_emb.weight": (9, 8), "bigram.proj.weight": (5, 8), "blocks.5.attn_scale": (3,)}
STORAGE = {name: "mlp" if ".mlp." in name else "matrix" for name in SHAPES}
STORAGE |= {"tok_emb.weight": "other", "blocks.5.attn_scale": "control"}


def weights(shapes: Mapping[str, tuple[int, ...]], size: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def coarse(quantized: Mapping[str, QuantizedTensor]) -> set[int]:
    return {int(name.split(".")[1]) for name, tensor in quantized.items() if tensor.bits == 5}


class Sizes:
    """Stands in for the container: sizes by hand, and a record of what was asked for."""

    def __init__(self, sizes: Mapping[tuple[int, int], int]) -> None:
        self.sizes, self.asked = sizes, []

    def __call__(self, quantized: Mapping[str, QuantizedTensor], config: QuantizeConfig) -> int:
        self.asked.append((len(coarse(quantized)), config.coder_level))
        self.last = quantized
        return self.sizes.get(self.asked[-1], 10**9)


# Bytes that S1170 logged, by number of layers at 5 bits and level.
S1170 = {
    (0, 16): 16_242_245, (0, 1): 16_298_729, (0, 17): 16_250_339, (0, 2): 16_301_974,
    (1, 16): 15_927_696, (1, 1): 15_990_000, (1, 17): 15_930_000, (1, 2): 15_990_000, (2, 16): 15_630_744,
}  # fmt: skip


def test_ladder_takes_the_steps_of_the_published_run():
    """PR 1170: four levels at six bits, four with layer 5 at five bits, then layers 5 and 6 fit at the first level."""
    write = Sizes(S1170)
    fitted = fit(weights(SHAPES), STORAGE, LADDER, None, write, 15_884_968)
    assert write.asked == list(S1170)
    assert fitted.coarse_layers == (5, 6) and fitted.artifact_bytes == 15_630_744 and not fitted.warning
    assert fitted.config.coder_level == 16 and fitted.report()["fit_attempts"] == 9
    both = ("attn.c_q.weight", "mlp.fc.weight")
    assert {n for n, t in fitted.quantized.items() if t.bits == 5} == {f"blocks.{i}.{p}" for i in (5, 6) for p in both}
    expected = quantize(weights(SHAPES), STORAGE, LADDER.model_copy(update={"matrix_bits": 5}))
    for name, tensor in fitted.quantized.items():
        if tensor.bits == 5:
            assert torch.equal(tensor.q, expected[name].q) and torch.equal(tensor.scale, expected[name].scale)
    assert write.last == fitted.quantized


def test_ladder_stops_at_the_first_level_that_fits_and_names_it():
    write = Sizes({(0, 16): 200, (0, 1): 150, (0, 17): 90})
    fitted = fit(weights(SHAPES), STORAGE, LADDER, None, write, 100)
    assert write.asked == [(0, 16), (0, 1), (0, 17)]
    assert (fitted.config.coder_level, fitted.coarse_layers, fitted.artifact_bytes) == (17, (), 90)


def test_ladder_that_never_fits_keeps_its_last_step_and_says_by_how_much():
    write = Sizes({})
    fitted = fit(weights(SHAPES), STORAGE, LADDER, None, write, 100)
    assert len(write.asked) == 48 and write.asked[-1] == (11, 2)
    assert fitted.coarse_layers == (5, 6, 4, 7, 3, 8, 2, 9, 1, 10, 0) and write.last == fitted.quantized
    assert "999,999,900 bytes over the 100" in fitted.warning and "11 layers are at 5 bits already" in fitted.warning


def test_each_tensor_is_quantised_once_for_each_number_of_bits(monkeypatch):
    from golfbook.compress import fit as module

    seen: list[tuple[str, int]] = []

    def counted(state, storage, config, statistics):
        seen.extend((name, config.matrix_bits) for name in state)
        return quantize(state, storage, config, statistics)

    monkeypatch.setattr(module, "quantize", counted)
    fit(weights(SHAPES), STORAGE, LADDER, None, Sizes({}), 100)
    assert len(seen) == len(set(seen)) == len(SHAPES) + 22


# -- pruning -----------------------------------------------------------------------------------------------------------

PRUNE = QuantizeConfig(quantizer="gptq", fit="prune", passthrough_numel=4, scale_floor=False)


def xz(quantized: Mapping[str, QuantizedTensor], config: QuantizeConfig) -> int:
    integers = b"".join(t.q.numpy().tobytes() for t in quantized.values() if t.q is not None)
    return len(lzma.compress(integers, preset=9))


def zeroed(quantized: Mapping[str, QuantizedTensor], storage: Mapping[str, str], count: int) -> dict[str, torch.Tensor]:
    """PR 1406 section 17 in its own way: a list of every -1 and 1 with its squared scale, sorted, the first zeroed."""
    found = []
    for name, tensor in quantized.items():
        if storage[name] in ("matrix", "mlp"):
            for row, column in (tensor.q.abs() == 1).nonzero().tolist():
                found.append((float(tensor.scale[row]) ** 2, name, row, column))
    found.sort(key=lambda entry: entry[0])  # stable
    q = {name: tensor.q.clone() for name, tensor in quantized.items()}
    for _, name, row, column in found[:count]:
        q[name][row, column] = 0
    return q


@given(share=st.floats(0.0, 1.0), size=st.sampled_from([0.3, 1.0]))
@settings(max_examples=12, deadline=None)
def test_pruning_zeroes_the_fewest_that_fit_in_published_order(share, size):
    """A size that falls by one for each zero, so the fewest is known; rows with equal scales keep their order."""
    shapes = {"a": (7, 30), "table": (8, 9), "b": (5, 20)}
    storage = {"a": "mlp", "table": "other", "b": "matrix"}
    state = weights(shapes, size)
    state["b"][2] = state["b"][0]
    quantized = quantize(state, storage, PRUNE)

    def count(tensors, config):
        return sum(int((t.q != 0).sum()) for t in tensors.values())

    ones = sum(int((quantized[name].q.abs() == 1).sum()) for name in ("a", "b"))
    fewest = round(share * ones)
    fitted = fit(state, storage, PRUNE, None, count, count(quantized, PRUNE) - fewest)
    assert fitted.pruned == fewest and not fitted.warning
    for name, q in zeroed(quantized, storage, fewest).items():
        assert torch.equal(fitted.quantized[name].q, q), name
        assert torch.equal(fitted.quantized[name].scale, quantized[name].scale)


def test_pruning_measures_a_real_coder_a_few_times():
    """Neighbours of what was found do not fit better, as far as a coder's size falls with the number of zeros."""
    state, storage = weights({"a": (200, 300), "b": (300, 200)}, 0.2), {"a": "mlp", "b": "matrix"}
    quantized = quantize(state, storage, QuantizeConfig(**PRUNE.model_dump() | {"matrix_bits": 4}))
    config = PRUNE.model_copy(update={"matrix_bits": 4})
    whole = xz(quantized, config)
    limit = int(0.97 * whole)
    fitted = fit(state, storage, config, None, xz, limit)
    assert limit - limit / 2**12 <= fitted.artifact_bytes <= limit
    assert xz(fitted.quantized, config) == fitted.artifact_bytes
    assert 0 < fitted.pruned < fitted.candidates and len(fitted.attempts) <= 12


def test_pruning_that_cannot_reach_the_limit_zeroes_all_and_says_so():
    state, storage = weights({"a": (20, 30)}), {"a": "mlp"}
    fitted = fit(state, storage, PRUNE, None, xz, 10)
    ones = int((quantize(state, storage, PRUNE)["a"].q.abs() == 1).sum())
    assert fitted.pruned == fitted.candidates == ones > 0
    assert int((fitted.quantized["a"].q.abs() == 1).sum()) == 0
    assert f"all {ones:,} integers" in fitted.warning and "bits for each of its integers" in fitted.warning


def test_pruning_where_there_is_nothing_to_prune():
    for state, storage in (
        ({"table": torch.randn(5, 8)}, {"table": "other"}),
        ({"a": torch.eye(8)}, {"a": "mlp"}),
    ):
        fitted = fit(state, storage, PRUNE, None, xz, 10)
        assert fitted.pruned == 0 and fitted.over_bytes > 0


@pytest.mark.parametrize("config", [PRUNE, LADDER, QuantizeConfig(passthrough_numel=4)])
def test_what_fits_is_left_alone(config):
    state, storage = weights({"a": (20, 30)}), {"a": "mlp"}
    fitted = fit(state, storage, config, None, xz, 10**6)
    assert torch.equal(fitted.quantized["a"].q, quantize(state, storage, config)["a"].q)
    assert len(fitted.attempts) == 1 and fitted.config == config and not fitted.warning


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"quantizer": "row_maximum"}, "quantize.fit: ladder"),
        ({"quantizer": "gptq"}, "quantize.fit: prune"),
        ({"quantizer": "percentiles"}, "set fewer quantize.matrix_bits"),
    ],
)
def test_no_rule_keeps_what_it_has_and_names_one(settings, advice):
    fitted = fit(weights({"a": (20, 30)}), {"a": "mlp"}, QuantizeConfig(passthrough_numel=4, **settings), None, xz, 100)
    assert advice in fitted.warning
    assert f"{fitted.artifact_bytes - 100:,} bytes over the 100" in fitted.warning


# -- the whole way -----------------------------------------------------------------------------------------------------


def grams(model: GPT, config: Config, sequences: int = 8) -> dict[str, dict[str, torch.Tensor]]:
    """Mean of x x^T at the input of every linear map that is a module, on random tokens."""
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def add(name: str):
        def hook(module, args):
            x = args[0].detach().float().reshape(-1, args[0].shape[-1])
            sums[name] = sums.get(name, 0) + x.T @ x
            counts[name] = counts.get(name, 0) + len(x)

        return hook

    hooks = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim == 2 and not isinstance(module, torch.nn.Embedding):
            hooks.append(module.register_forward_pre_hook(add(f"{name}.weight")))
    with torch.no_grad():
        model(torch.randint(0, config.model.vocab_size, (sequences, 64), generator=torch.Generator().manual_seed(0)))
    for hook in hooks:
        hook.remove()
    return {name: {"gram": total / counts[name]} for name, total in sums.items()}


def trained(preset: str, **overrides) -> tuple[GPT, Config]:
    config = load_config(preset, scale="tiny", overrides={"model.vocab_size": 300, **overrides})
    model = initialise(GPT(config.model), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model, config


def over_budget(config: Config, whole: int, share: float) -> Config:
    """The same settings with a limit that leaves ``share`` of the bytes ``whole`` to the artifact."""
    limit = int(share * whole)
    return config.model_copy(update={"budget": config.budget.model_copy(update={"limit_bytes": limit})})


def check_file(path: Path, fitted: Fitted, config: Config) -> None:
    loaded = read_artifact(path)
    assert loaded.bytes == fitted.artifact_bytes == path.stat().st_size <= fitted.limit_bytes
    assert fitted.limit_bytes == config.budget.limit_bytes
    assert loaded.quantize_config == fitted.config
    for name, value in dequantize(fitted.quantized).items():
        assert torch.equal(loaded.state[name], value), name


def test_pr1406_is_quantised_by_gptq_and_pruned_into_its_budget(tmp_path):
    model, config = trained("pr1406")
    found = grams(model, config)
    whole = export(tmp_path / "a.golf", model, config, SHA, found)
    fed = [n for n in found if whole.quantized.get(n) is not None and whole.quantized[n].bits == 6]
    rounded = quantize_model(model, config.quantize, {})
    assert len(fed) >= 6 * config.model.num_layers
    assert sum(not torch.equal(whole.quantized[n].q, rounded[n].q) for n in fed) > len(fed) / 2
    check_file(tmp_path / "a.golf", whole, config)
    config = over_budget(config, whole.artifact_bytes, 0.995)
    fitted = export(tmp_path / "b.golf", model, config, SHA, found)
    assert 0 < fitted.pruned < fitted.candidates
    check_file(tmp_path / "b.golf", fitted, config)


def test_pr1170_goes_down_its_ladder(tmp_path):
    model, config = trained("pr1170_nfm")
    whole = export(tmp_path / "a.golf", model, config, SHA)
    config = over_budget(config, whole.artifact_bytes, 0.98)
    fitted = export(tmp_path / "b.golf", model, config, SHA)
    assert (
        fitted.coarse_layers and fitted.coarse_layers == (5, 6, 4, 7, 3, 8, 2, 9, 1, 10, 0)[: len(fitted.coarse_layers)]
    )
    assert coarse(fitted.quantized) == set(fitted.coarse_layers)
    check_file(tmp_path / "b.golf", fitted, config)


def test_a_quantiser_that_needs_statistics_says_so(tmp_path):
    model, config = trained("pr1406")
    for work in (
        lambda: export(tmp_path / "a.golf", model, config, SHA),
        lambda: quantize_model(model, config.quantize),
    ):
        with pytest.raises(RunError, match=r"'gptq' needs statistics of a calibration text"):
            work()
    assert not list(tmp_path.iterdir())


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"quantize.quantizer": "row_maximum", "quantize.fit": "ladder"}, "needs quantize.coder 'zstd'"),
        (
            {"quantize": {"quantizer": "row_maximum", "fit": "ladder", "coder": "zstd", "matrix_bits": 5}},
            "matrix_bits above 5",
        ),
        ({"quantize.fit": "prune"}, "not made for quantize.quantizer 'percentiles'"),
        ({"quantize.quantizer": "gptq", "train.qat.start": 0.1}, "depend on a calibration text.*train.qat.start: 0"),
    ],
)
def test_settings_that_do_not_go_together(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config("quickstart", overrides=overrides)


def test_late_qat_of_pr1406_follows_its_published_rule():
    overrides = {"train.qat.start": 0.15, "train.qat.rule": "published"}
    assert load_config("pr1406", overrides=overrides).quantize.quantizer == "gptq"
    for quantizer in ("percentiles", "row_maximum"):
        load_config("quickstart", overrides={"quantize.quantizer": quantizer, "train.qat.start": 0.15})


def test_scales_shrink_the_calibration_of_presets_that_have_one():
    assert load_config("pr1406").quantize.calibration.sequences == 256 * 48
    for scale in ("tiny", "small"):
        assert load_config("pr1406", scale=scale).quantize.calibration.sequences == 32
        assert not load_config("pr1166_e2e_ttt_flow", scale=scale).quantize.calibrated
    assert not load_config("pr1406").quantize.calibration.recurrence
