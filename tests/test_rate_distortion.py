"""Steps by every rule against plain formulas, what they cost, what is refused, and what the artifact keeps of them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from golfbook.compress.container import read_artifact
from golfbook.compress.estimates import estimate_bits
from golfbook.compress.export import export, quantize_model
from golfbook.compress.gptq import reverse_factor
from golfbook.compress.quantizer import Statistics, dequantize, quantize
from golfbook.compress.rate_distortion import K_SIGMA, fisher, relief
from golfbook.compress.statistics import collect
from golfbook.config.load import load_config
from golfbook.config.schema import Config, QuantizeConfig, RateConfig
from golfbook.errors import ConfigError, RunError
from golfbook.model.gpt import GPT, initialise
from golfbook.plain import trellis as plain
from golfbook.train.qat import fake_quantized

ALONE = ["row_maximum", "percentiles", "k_sigma", "equal"]
FISHER = ["tensor", "row", "column", "tensor+row", "tensor+column", "row+column", "all"]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product(size: int, seed: int) -> Tensor:
    """A matrix of products of things that hang together and are of different sizes."""
    x = drawn(6 * size, size, seed=seed) @ (torch.eye(size) + drawn(size, size, seed=seed + 1) / size**0.5)
    x = x * (0.5 * drawn(size, seed=seed + 2)).exp()
    return x.T @ x / len(x)


def known(rows: int, columns: int, seed: int = 0) -> dict[str, Tensor]:
    outputs = 0.01 * product(rows, seed + 10)
    return {"gram": product(columns, seed), "gradient": outputs.diagonal().clone(), "outputs": outputs}


def settings(**rate: object) -> QuantizeConfig:
    return QuantizeConfig(quantizer="rate_distortion", passthrough_numel=0, rate=RateConfig(**rate))


# -- rules -------------------------------------------------------------------------------------------------------------


def steps_of(rule: str, weight: Tensor, facts: dict[str, Tensor] | None = None) -> Tensor:
    """Exact steps at s0 = 1, (rows, columns) or what broadcasts to it."""
    found = relief("w", weight, "mlp", facts or {}, RateConfig(rule=rule, feedback="none", damping=0.02))
    rows, columns = (torch.ones(1).double() if part is None else part for part in (found.rows, found.columns))
    return found.overall * rows[:, None] * columns


@pytest.mark.parametrize("rule", FISHER)
def test_rules_of_the_loss_are_means_of_equal_slope(rule: str) -> None:
    """What a rule leaves out has the geometric mean in its place, and without "tensor" the mean of all steps is 1."""
    facts = known(9, 7)
    g, gram = facts["gradient"].double(), facts["gram"].double()
    damped = g + 0.02 * g.mean(), gram + 0.02 * gram.diagonal().mean() * torch.eye(7, dtype=torch.float64)
    logs = plain.equal_slope(*damped, 1.0).log()  # (rows, columns)
    overall, parts = logs.mean(), FISHER[:3] if rule == "all" else rule.split("+")
    expected = torch.zeros(9, 7, dtype=torch.float64)
    expected += (overall if "tensor" in parts else 0) + (logs.mean(1, keepdim=True) - overall if "row" in parts else 0)
    expected += logs.mean(0) - overall if "column" in parts else 0
    torch.testing.assert_close(steps_of(rule, drawn(9, 7), facts).expand(9, 7), expected.exp(), rtol=1e-5, atol=0)


def test_rules_of_weights_alone() -> None:
    weight = drawn(6, 400) * torch.tensor([0.1, 1, 2, 3, 4, 0])[:, None]
    rows = {
        "row_maximum": [float(row.abs().max()) for row in weight],
        "percentiles": [float(torch.quantile(row.abs(), 0.9995)) for row in weight],
        "k_sigma": [K_SIGMA["mlp"] * float(row.std()) for row in weight],
    }
    for rule, expected in rows.items():
        found = steps_of(rule, weight)[:, 0].tolist()
        assert found[:5] == pytest.approx(expected[:5], rel=1e-5), rule
        assert found[5] == pytest.approx(sum(expected) / 6 / 64, rel=1e-5), "rows of zeros have a step too"
    assert steps_of("equal", weight).tolist() == [[1.0]]


def test_equal_slope_weighs_every_error_alike() -> None:
    """sqrt(g_i) L_jj step_ij is the same for all weights of all matrices, to the quarter octaves that are stored."""
    shapes = {"a": (30, 40), "b": (50, 20)}
    state = {name: (k + 1) * drawn(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}
    statistics = {name: known(*shape, seed=3 * k) for k, (name, shape) in enumerate(shapes.items())}
    stored = quantize(state, dict.fromkeys(state, "matrix"), settings(bits=4, states=4), statistics)
    logs = []
    for name, facts in statistics.items():
        g, factor = facts["gradient"] + 0.01 * facts["gradient"].mean(), reverse_factor(facts["gram"], 0.01)
        logs.append((g.sqrt()[:, None] * factor.diagonal() * stored[name].steps()).log2().flatten())
    assert (torch.cat(logs) - torch.cat(logs).mean()).abs().max() < 0.27  # the scale is a float16, the logs integers
    spread = torch.cat([tensor.steps().log2().flatten() for tensor in stored.values()])
    assert spread.max() - spread.min() > 3, "steps differ by several octaves, or this shows nothing"


@pytest.mark.parametrize("feedback", ["none", "columns", "both"])
def test_both_is_the_diagonal_where_outputs_do_not_hang_together(feedback: str) -> None:
    """Then nothing is left for later rows to make up for."""
    facts = known(40, 30)
    facts["outputs"] = facts["gradient"].diag()
    steps = relief("w", drawn(40, 30), "mlp", facts, RateConfig(feedback=feedback)).steps(0.01).steps()
    expected = relief("w", drawn(40, 30), "mlp", facts, RateConfig(feedback="columns")).steps(0.01).steps()
    assert torch.equal(steps, expected)


def test_feeding_rows_lowers_the_quadratic_form_below_feeding_columns() -> None:
    """tr(G E H E^T) of a metric in Kronecker factors, at the same bits."""
    weight, facts = drawn(96, 64), known(96, 64)
    losses, bits = {}, {}
    for feedback in ("none", "columns", "both"):
        stored = quantize({"w": weight}, {"w": "mlp"}, settings(states=4, feedback=feedback), {"w": facts})["w"]
        error = (weight - stored.dequantize()).double()
        losses[feedback] = float((facts["outputs"].double() @ error @ facts["gram"].double() * error).sum())
        bits[feedback] = sum(estimate_bits([stored]).values()) / weight.numel()
    fair = {name: loss * 4 ** (bits[name] - bits["columns"]) for name, loss in losses.items()}
    assert fair["both"] < 0.9 * fair["columns"] and fair["columns"] < 0.9 * fair["none"], (fair, bits)


# -- tables ------------------------------------------------------------------------------------------------------------


def test_metric_of_tables() -> None:
    count, gradient = torch.rand(12), torch.rand(5)
    rows, columns = fisher({"count": count, "gradient": gradient})
    assert torch.equal(rows, count.double()) and torch.equal(columns, gradient.double().diag())


def test_metric_of_a_table_that_is_the_head_too_has_the_traces_of_both_terms() -> None:
    count, gradient, output, gram = torch.rand(12), torch.rand(5), torch.rand(12), product(5, 0)
    rows, columns = fisher({"count": count, "gradient": gradient, "output": output, "gram": gram})
    for i in range(12):
        both = output[i] * gram.trace() + count[i] * gradient.sum()
        assert float(rows[i] * columns.trace()) == pytest.approx(float(both), rel=1e-5)
    together = output.sum() * gram + count.sum() * gradient.diag()
    torch.testing.assert_close(rows.sum() * columns, together.double(), rtol=1e-5, atol=1e-6)


def test_tables_are_finer_where_rows_are_looked_up_more() -> None:
    count = torch.cat([torch.full((20,), 0.04), torch.full((20,), 0.0004)])
    facts = {"tok_emb.weight": {"count": count, "gradient": torch.rand(16) + 0.5}}
    state = {"tok_emb.weight": drawn(40, 16)}
    stored = quantize(state, {"tok_emb.weight": "other"}, settings(damping=0.001), facts)["tok_emb.weight"]
    steps = stored.steps()
    assert float(steps[20:].mean() / steps[:20].mean()) == pytest.approx(math.sqrt(0.0404 / 0.0008), rel=0.6)
    assert steps[20:].min() > 4 * steps[:20].max()


# -- bits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("states", [1, 8])
@pytest.mark.parametrize(("bits", "feedback"), [(2.5, "none"), (3.5, "columns"), (5.0, "columns")])
def test_the_common_step_spends_the_bits_that_are_asked_for(bits: float, feedback: str, states: int) -> None:
    """Below three bits feedback spends more: what it adds to the weights is then no longer small beside them."""
    shapes = {"a": (256, 256), "b": (512, 256), "c": (256, 512)}
    state = {name: 0.1 * 1.5**k * drawn(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}
    statistics = {name: known(*shape, seed=20 * k) for k, (name, shape) in enumerate(shapes.items())}
    stored = quantize(
        state, dict.fromkeys(state, "matrix"), settings(bits=bits, states=states, feedback=feedback), statistics
    )
    found = sum(estimate_bits(list(stored.values())).values()) / sum(w.numel() for w in state.values())
    assert found == pytest.approx(bits, rel=0.02)


@pytest.mark.parametrize("rule", ALONE)
def test_weights_alone_spend_the_bits_that_are_asked_for(rule: str) -> None:
    state = {"a": 0.05 * drawn(256, 512), "b": 0.1 * drawn(256, 256, seed=1)}
    stored = quantize(state, dict.fromkeys(state, "mlp"), settings(rule=rule, feedback="none", states=1))
    found = sum(estimate_bits(list(stored.values())).values()) / sum(w.numel() for w in state.values())
    assert found == pytest.approx(3.5, rel=0.02)


def test_what_the_loss_does_not_depend_on_is_stored_coarsely() -> None:
    """A map behind a gate that is still zero has no gradients at all."""
    dead = {"gram": product(30, 5), "gradient": torch.zeros(20)}
    state = {"alive": drawn(200, 100), "dead": drawn(20, 30, seed=1)}
    stored = quantize(state, dict.fromkeys(state, "matrix"), settings(), {"alive": known(200, 100), "dead": dead})
    assert stored["dead"].dequantize().isfinite().all()
    fine, coarse = (float(stored[name].steps().log2().mean()) for name in ("alive", "dead"))
    assert fine < -1 and coarse == pytest.approx(1, abs=0.1), "two deviations"


def test_zeros_are_stored() -> None:
    state = {"w": torch.zeros(20, 30)}
    stored = quantize(state, {"w": "matrix"}, settings(), {"w": known(20, 30)})["w"]
    assert torch.equal(stored.dequantize(), state["w"])


# -- what is refused ---------------------------------------------------------------------------------------------------


BROKEN: list[tuple[dict[str, Tensor], str]] = [
    ({"gram": torch.eye(51)}, r"are of a matrix \(40, 51\), it has shape \(40, 50\)"),
    ({"gradient": torch.ones(41)}, r"are of a matrix \(41, 50\)"),
    ({"gram": torch.eye(50) - 2}, r"not positive definite"),
    ({"gram": torch.full((50, 50), math.nan)}, r"not positive definite"),
    ({"gradient": torch.full((40,), math.nan)}, r"not finite"),
    ({"gradient": -torch.ones(40)}, r"negative"),
    ({"outputs": torch.eye(40) - 2}, r"not positive definite"),
]


@pytest.mark.parametrize(("change", "reason"), BROKEN)
def test_statistics_that_do_not_fit_name_the_tensor(change: dict[str, Tensor], reason: str) -> None:
    name = "blocks.0.mlp.fc.weight"
    with pytest.raises(RunError, match=rf"'{name}'.*{reason}"):
        quantize({name: drawn(40, 50)}, {name: "mlp"}, settings(feedback="both"), {name: known(40, 50) | change})


def test_weights_that_cannot_be_stored_name_the_tensor() -> None:
    with pytest.raises(RunError, match=r"'w'.*not finite"):
        quantize({"w": torch.full((4, 5), math.inf)}, {"w": "mlp"}, settings(rule="equal", feedback="none"))
    wide = drawn(40, 50)
    wide[0, 0] = 1e5
    with pytest.raises(RunError, match=r"'w'.*step is too small.*quantize.rate.bits"):
        quantize({"w": wide}, {"w": "mlp"}, settings(rule="equal", feedback="none", bits=12))


def test_what_has_no_statistics_and_what_is_no_matrix_stays_float() -> None:
    state = {"seen": drawn(8, 9), "unseen": drawn(8, 9), "taps": drawn(3, 4, 5), "gain": drawn(9), "mix": drawn(2, 9)}
    storage = {"seen": "matrix", "unseen": "matrix", "taps": "matrix", "gain": "control", "mix": "control"}
    kinds = {name: t.kind for name, t in quantize(state, storage, settings(), {"seen": known(8, 9)}).items()}
    expected = {"seen": "step", "unseen": "float16", "taps": "float16", "gain": "float32", "mix": "float32"}
    assert kinds == expected and list(kinds) == list(state)
    stored = quantize(state, storage, settings(rule="k_sigma", feedback="none"))
    assert [name for name, t in stored.items() if t.kind == "step"] == ["seen", "unseen"]


# -- whole models ------------------------------------------------------------------------------------------------------

SMALL = {
    "model.model_dim": 32, "model.num_layers": 3, "model.num_heads": 2, "model.num_kv_heads": 1, "model.rope_dims": 8,
    "model.xsa": 1, "model.vocab_size": 300, "model.bigram.vocab_size": 128, "model.bigram.dim": 16,
    "model.value_embedding.dim": 16, "quantize.passthrough_numel": 200, "quantize.quantizer": "rate_distortion",
    "quantize.coder": "entropy",
}  # fmt: skip


def configured(**rate: object) -> Config:
    return load_config("quickstart", overrides=SMALL | {f"quantize.rate.{key}": value for key, value in rate.items()})


def built(config: Config) -> tuple[GPT, Statistics]:
    model = initialise(GPT(config.model), 0)
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * drawn(*parameter.shape, seed=k))
    text = torch.randint(300, (4, 33), generator=torch.Generator().manual_seed(0))
    return model, collect(model, [(text[:, :-1], text[:, 1:])], gradients=True, outputs=True)


@pytest.mark.parametrize("rate", [{}, {"states": 1}, {"feedback": "both", "rate_weight": 1.0}, {"rule": "row"}])
def test_an_artifact_gives_back_the_values_that_were_chosen(rate: dict[str, object], tmp_path: Path) -> None:
    """Bit for bit, and they are step / 2 times the points of the walk, with steps from scale and logs."""
    config = configured(**rate)
    model, statistics = built(config)
    fitted = export(tmp_path / "a.golf", model, config, "0" * 64, statistics)
    artifact = read_artifact(tmp_path / "a.golf")
    values = dequantize(fitted.quantized)
    assert artifact.state.keys() == values.keys()
    assert all(torch.equal(artifact.state[name], value) for name, value in values.items())
    steps = [name for name, tensor in artifact.quantized.items() if tensor.kind == "step"]
    assert "tok_emb.weight" in steps and len(steps) > 12
    for name in steps:
        tensor = artifact.quantized[name]
        rows, columns = (torch.zeros(1) if log is None else log.double() for log in (tensor.rows, tensor.columns))
        exact = tensor.scale.double() * 2 ** ((rows[:, None] + columns) / 4)
        p = torch.tensor([plain.decode(row, tensor.states) for row in tensor.q.tolist()])
        torch.testing.assert_close(artifact.state[name].double(), p * exact / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", ALONE)
def test_training_rehearses_what_is_stored(rule: str) -> None:
    config = configured(rule=rule, feedback="none", states=1)
    assert config.quantize.weights_alone
    model, _ = built(config)
    stored = dequantize(quantize_model(model, config.quantize))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with fake_quantized(model, config.quantize) as names:
        assert "blocks.0.attn.c_q.weight" in names
        for name in names:
            assert torch.equal(model.get_parameter(name), stored[name]), name
            assert not torch.equal(stored[name], before[name]), name
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("rate", [{"states": 8}, {"states": 1, "feedback": "columns"}, {"states": 1, "rule": "all"}])
def test_training_cannot_rehearse_a_trellis_feedback_or_statistics(rate: dict[str, object]) -> None:
    rate = {"rule": "k_sigma", "feedback": "none"} | rate
    assert configured(**rate).train.qat.start == 0
    qat = {"train.qat.start": 0.1} | {f"quantize.rate.{key}": value for key, value in rate.items()}
    with pytest.raises(ConfigError, match=r"cannot rehearse quantize.quantizer 'rate_distortion'"):
        load_config("quickstart", overrides=SMALL | qat)
    load_config("quickstart", overrides=SMALL | qat | {"train.qat.rule": "published"})
