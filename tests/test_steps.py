"""One optimiser step: compiled and eager agree, warming up leaves no trace, capabilities choose, nothing recompiles."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from golfbook import compute
from golfbook.config.load import load_config
from golfbook.config.schema import Config
from golfbook.errors import RunError
from golfbook.model.gpt import GPT, initialise
from golfbook.train import step as steps
from golfbook.train.step import TrainingStep

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import bench_training
import plain_training

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(bool(compute.why_not_compile(CPU)), reason=compute.why_not_compile(CPU))


def tiny(preset: str = "pr1166_e2e_ttt_flow", **overrides) -> Config:
    small = {"model.num_layers": 2, "model.xsa": 1, "model.recurrence": [], "machine.precision": "float32"}
    return load_config(preset, scale="tiny", overrides=small | {"train.sequence_length": 64} | overrides)


def batch(config: Config, seed: int = 0, rows: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (rows, config.train.sequence_length + 1)
    tokens = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def make(config: Config) -> TrainingStep:
    return TrainingStep(initialise(GPT(config.model), 1), config, CPU)


@needs_compiler
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_equals_eager_and_nothing_is_compiled_after_the_warm_up(precision):
    """Tolerance: the compiler orders sums differently; in bfloat16 it also rounds fewer intermediates."""
    torch._dynamo.reset()
    config = tiny(**{"machine.precision": precision, "machine.compile": True, "train.qat.start": 0.5})
    compiled, eager = make(config), make(tiny(**{"machine.precision": precision, "train.qat.start": 0.5}))
    assert compiled.compiled and not eager.compiled and compiled.warm_up(4) == compiled.warmup_seconds > 0
    graphs = steps.compiled_graphs()
    assert graphs >= 1
    tolerance = 1e-5 if precision == "float32" else 2e-2
    for seed in range(4):
        losses = [step(*batch(config, seed), lr_scale=0.1, quantized=seed > 1).item() for step in (compiled, eager)]
        assert losses[0] == pytest.approx(losses[1], abs=tolerance)
    assert steps.compiled_graphs() == graphs
    if precision == "float32":
        for name, value in eager.model.state_dict().items():
            torch.testing.assert_close(compiled.model.state_dict()[name], value, atol=1e-3, rtol=0)


@needs_compiler
def test_the_warm_up_leaves_no_trace():
    torch._dynamo.reset()
    step = make(tiny("pr1170_nfm", **{"machine.compile": True}))  # its loss draws random numbers
    step(*batch(step.config))
    generator, weights = torch.get_rng_state(), {k: v.clone() for k, v in step.model.state_dict().items()}
    rates = [group["lr"] for optimizer in step.optimizers.values() for group in optimizer.param_groups]
    states = {
        (kind, id(parameter), key): value.clone()
        for kind, optimizer in step.optimizers.items()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    step.warm_up(4)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, weights[name]) for name, value in step.model.state_dict().items())
    assert rates == [group["lr"] for optimizer in step.optimizers.values() for group in optimizer.param_groups]
    assert all(parameter.grad is None for parameter in step.model.parameters())
    found = 0
    for kind, optimizer in step.optimizers.items():
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                assert torch.equal(value, states[kind, id(parameter), key])
                found += 1
    assert found == len(states) > 0


def test_without_a_compiler_training_is_eager_and_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    step = make(tiny(**{"machine.compile": True}))
    assert not step.compiled and "not compiled: there is no C++ compiler" in step.notes
    assert step.warm_up(4) == 0.0
    assert step(*batch(step.config)).isfinite()


def test_a_compiler_that_does_not_work_means_eager_steps(monkeypatch):
    torch._dynamo.reset()

    def broken(*_, **__):
        raise torch._dynamo.exc.TorchDynamoException("Python.h: No such file")

    config = tiny(**{"machine.compile": True})
    step, eager = make(config), make(tiny())
    monkeypatch.setattr(step.module, "compute", broken)
    assert step.warm_up(4) > 0
    assert not step.compiled and any("not compiled after all" in n and "Python.h" in n for n in step.notes)
    assert step(*batch(config)).item() == eager(*batch(config)).item()


@pytest.mark.parametrize(
    ("preset", "banks"), [("pr1166_e2e_ttt_flow", True), ("pr1232_flow", False), ("quickstart", True)]
)
def test_the_straightforward_side_of_the_benchmarks_computes_the_same(preset, banks):
    """Tolerance: float32 sums in another order, carried on by Muon's iteration and by Adam where gradients are tiny."""
    config = load_config(preset, scale="tiny", overrides={"machine.precision": "float32", "train.sequence_length": 64})
    model = bench_training.unlike_zero(initialise(GPT(config.model), 1))
    plain = plain_training.PlainStep(model, config, CPU, banks)
    ours = TrainingStep(model, config, CPU)
    for seed in range(3):
        losses = [step(*batch(config, seed)).item() for step in (plain, ours)]
        assert losses[0] == pytest.approx(losses[1], abs=2e-5)
    state = plain.state()
    for name, value in ours.model.state_dict().items():
        assert (state[name] - value).norm() <= 0.01 * value.norm(), name


def test_precision_is_what_was_measured(monkeypatch):
    measured = compute.Choices(
        precision={"short": "bfloat16", "long": "float32"},
        seconds={"precision, short": {"float32": 0.06, "bfloat16": 0.04}},
    )
    config = tiny(**{"machine.precision": "auto"})
    monkeypatch.setattr(compute, "_current", compute.Choices())
    assert compute.choose_precision(config) == ("float32", "nothing was measured on this machine")
    monkeypatch.setattr(compute, "_current", measured)
    assert compute.choose_precision(config) == ("bfloat16", "measured: float32 60 ms, bfloat16 40 ms")
    long = tiny(**{"machine.precision": "auto", "train.sequence_length": 1024, "train.batch_tokens": 1024})
    assert compute.choose_precision(long)[0] == "float32"
    assert compute.choose_precision(tiny()) == ("float32", "machine.precision says so")
    with pytest.raises(RunError, match="sees no CUDA device"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        compute.choose_device(tiny(**{"machine.device": "cuda"}))


def test_float32_products_stay_float32_whatever_computes_them():
    """The setting that hands products to oneDNN permits bfloat16, so a machine where it rounds must not use it."""
    for library in ("torch", "onednn"):
        if library == "onednn" and not compute.products_are_exact(library):
            continue
        compute.prepare(1, CPU, compute.Choices(library))
        generator = torch.Generator().manual_seed(3)
        a, b = torch.randn(300, 200, generator=generator), torch.randn(200, 100, generator=generator)
        error = ((a @ b).double() - a.double() @ b.double()).norm() / (a.double() @ b.double()).norm()
        assert error < compute.EXACT


def test_rounded_products_are_refused(monkeypatch):
    assert compute.products_are_exact("torch")
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: bmm(a.bfloat16(), b.bfloat16()).float())
    assert not compute.products_are_exact("onednn")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no process to a core")
def test_the_ceiling_is_a_speed_of_products_and_busy_neighbours_do_not_lower_it():
    torch.set_num_threads(1)
    quiet = compute.product_ceiling(CPU, "float32", size=128)
    assert quiet > 1e8
    core = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    spin = f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"
    others = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(4)]
    try:
        os.sched_setaffinity(0, [core])
        assert compute.product_ceiling(CPU, "float32", size=512) > 0.5 * quiet
    finally:
        os.sched_setaffinity(0, before)
        for other in others:
            other.kill()
            other.wait()


def test_adamw_on_the_matrices_and_unknown_attention():
    step = make(tiny(**{"train.optimizer.matrix_optimizer": "adamw", "train.optimizer.matrix_lr": 0.002}))
    assert list(step.optimizers) == ["adam"]
    trained = sum(len(group["params"]) for group in step.optimizers["adam"].param_groups)
    assert trained == len(list(step.model.parameters()))
    before = step.model.blocks[0].mlp.fc.weight.detach().clone()
    step(*batch(step.config), momentum=0.9)
    assert not torch.equal(before, step.model.blocks[0].mlp.fc.weight)
    with pytest.raises(RunError, match="flash_attn_interface"):
        make(tiny(**{"machine.attention": "flash3"}))
    with pytest.raises(RunError, match="no backward pass on a CPU"):
        make(tiny(**{"machine.attention": "flex"}))


def test_backends_of_attention_train_alike():
    """Tolerance: softmax by blocks and torch's fused kernel round differently."""
    losses = [
        [step(*batch(step.config, seed)).item() for seed in range(3)]
        for step in (make(tiny(**{"machine.attention": name})) for name in ("blocked", "sdpa"))
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
