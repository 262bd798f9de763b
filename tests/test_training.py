"""Training as a process and in-process: repeatable, resumable after any kill, the same for any number of processes."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.elastic.utils.api import macros

from fixture_project import start_trainer
from golfbook import compute, files
from golfbook import run as runs
from golfbook.config.load import load_config
from golfbook.errors import CheckpointError, RunError
from golfbook.files import atomic_write_json
from golfbook.model.gpt import GPT, initialise
from golfbook.run import Run
from golfbook.study import stages
from golfbook.train import launcher, loop
from golfbook.train.checkpoints import load_model, read_progress
from golfbook.train.step import TrainingStep

WORDS = ("the", "model", "reads", "a", "token", "and", "learns", "to", "guess", "what", "comes", "next", "from", "it")


@pytest.fixture
def corpus_file(golfbook_home: Path) -> Path:
    """A text file of many short documents, made from a fixed seed."""
    generator = np.random.default_rng(0)
    lines = [" ".join(generator.choice(WORDS, size=60)) + f" number {i}." for i in range(120)]
    path = golfbook_home / "documents.jsonl"
    path.write_text("\n".join(f'{{"text": "{line}"}}' for line in lines), encoding="utf-8")
    return path


def make_run(corpus_file: Path, variant: str = "tiny", seed: int = 1, **overrides) -> Run:
    settings = {
        "data": {"source": "text", "path": str(corpus_file), "max_validation_tokens": 600},
        "model": {
            "vocab_size": 300, "num_layers": 3, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "rope_dims": 8,
            "xsa": 1, "bigram": {"vocab_size": 64, "dim": 8}, "value_embedding": {"dim": 8, "layers": [-1]},
        },
        "train": {
            "steps": 12, "batch_tokens": 256, "sequence_length": 64, "schedule": {"warmdown_steps": 6},
            "averaging": {"ema_decay": 0.5}, "optimizer": {"muon_dtype": "float32", "muon_momentum_dtype": "float32"},
        },
        "machine": {
            "validate_every": 6, "checkpoint_every": 3, "log_every": 2, "device": "cpu", "precision": "float32",
        },
        "quantize": {"passthrough_numel": 256, "scale_floor": False},
        "score": {"stride": 16},
    }  # fmt: skip
    return runs.create_run("test", variant, load_config(settings, seed=seed, overrides=overrides))


def train_here(run: Run) -> dict:
    """Train in this process, as the worker does."""
    loop._train(run, 0, 1)
    return load_file(run.checkpoint_path)


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_one_seed_gives_one_model_and_averaging_is_what_it_says(corpus_file, monkeypatch):
    history: list[dict] = []
    step = loop.Trainer.train_step

    def recorded(self):
        if not history:
            history.append({k: v.clone() for k, v in self.model.state_dict().items()})
        loss = step(self)
        history.append({k: v.clone() for k, v in self.model.state_dict().items()})
        return loss

    monkeypatch.setattr(loop.Trainer, "train_step", recorded)
    first = train_here(make_run(corpus_file, "first"))
    average = history[0]
    for weights in history[1:]:
        average = {k: 0.5 * average[k] + 0.5 * weights[k] for k in average}
    for name, value in average.items():
        torch.testing.assert_close(first[f"average/ema/{name}"], value)
    assert same(first, train_here(make_run(corpus_file, "second")))
    assert not same(first, train_here(make_run(corpus_file, "third", seed=2)))
    run = make_run(corpus_file, "first")
    assert torch.equal(load_model(run).tok_emb.weight, first["average/ema/tok_emb.weight"])
    assert torch.equal(load_model(run, "last").tok_emb.weight, first["model/tok_emb.weight"])
    points = run.read_metrics()
    assert [p["step"] for p in points if p["kind"] == "train"] == [2, 4, 6, 8, 10, 12]
    assert [p["step"] for p in points if p["kind"] == "validation"] == [0, 6, 12]
    assert points[-1]["val_bpb"] < points[0]["val_bpb"]


def test_stopping_and_resuming_changes_no_bit(corpus_file, monkeypatch):
    whole = train_here(make_run(corpus_file, "whole"))
    run, step = make_run(corpus_file, "parts"), loop.Trainer.train_step
    for stop_at in (2, 7):

        def stopping(self, stop_at=stop_at):
            self.stop_requested = self.step + 1 == stop_at
            return step(self)

        monkeypatch.setattr(loop.Trainer, "train_step", stopping)
        with pytest.raises(loop.StopRequested, match=f"step {stop_at}"):
            train_here(run)
        assert not run.is_done("training")
        torch.manual_seed(stop_at)  # whatever else happened in between must not matter
    monkeypatch.setattr(loop.Trainer, "train_step", step)
    assert same(train_here(run), whole)
    assert run.is_done("training")


def workers(run: Run) -> list[psutil.Process]:
    return [
        p
        for p in psutil.process_iter(["cmdline"])
        if "golfbook.train.loop" in (p.info["cmdline"] or []) and str(run.path) in p.info["cmdline"]
    ]


@pytest.mark.parametrize("victim", ["worker", "launcher"])
def test_killed_trainer_is_reported_and_resumes_to_the_same_weights(corpus_file, victim, tmp_path, monkeypatch):
    temporary = tmp_path / "t"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    whole = train_here(make_run(corpus_file, "whole", **{"train.steps": 300}))
    run = make_run(corpus_file, "killed", **{"train.steps": 300})
    launcher.launch(run)
    deadline = time.monotonic() + 60
    while not run.checkpoint_path.exists():
        assert time.monotonic() < deadline, launcher.log_tail(run.log_path)
        time.sleep(0.01)
    agent = psutil.Process(json.loads((run.path / "trainer.json").read_text())["pid"])
    targets = agent.children(recursive=True) if victim == "worker" else [agent]
    for process in targets:
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(RunError, match="run it again to resume"):  # 300 steps outlast the half second to notice
        launcher.follow(run, poll=0.05)
    assert not launcher.is_running(run)
    launcher.launch(run)
    updates: list[int] = []
    result = launcher.follow(run, on_update=lambda points: updates.append(len(points)), poll=0.05)
    assert result["steps"] == 300
    assert updates
    assert same(load_file(run.checkpoint_path), whole)
    assert launcher.follow(run) == result  # re-attaching to a finished run reads its result
    assert not workers(run) and not list(temporary.iterdir())


def test_a_trainer_found_dying_is_started_again(corpus_file, monkeypatch):
    run, launch = make_run(corpus_file, "dying"), launcher.launch
    calls: list[bool] = []

    def first_attaches(run: Run) -> bool:
        calls.append(bool(calls) and launch(run))
        return calls[-1]

    monkeypatch.setattr(launcher, "launch", first_attaches)
    assert stages.run_training(run)["steps"] == 12
    assert calls == [False, True]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model.value_residual": "lambda", "machine.checkpoint_activations": True},
        {"train.qat.start": 0.9, "train.optimizer.grad_clip": 0.0},
    ],
    ids=["plain", "unused parameters, recomputed", "fake quantised, not clipped"],
)
def test_two_processes_take_the_steps_of_one_with_two_pieces(corpus_file, overrides, monkeypatch):
    """To the bit: each process has every other row, halving is exact, and two numbers have one sum in any order."""
    following = loop.Prefetching.next

    def every_other_row_first(self):
        return tuple(np.concatenate((rows[0::2], rows[1::2])) for rows in following(self))

    alone = make_run(corpus_file, "one", **overrides, **{"train.micro_batches": 2})
    with monkeypatch.context() as patch:
        patch.setattr(loop.Prefetching, "next", every_other_row_first)
        one = train_here(alone)
    run = make_run(corpus_file, "two", **overrides, **{"machine.processes": 2})
    launcher.launch(run)
    launcher.follow(run, poll=0.05)
    two = load_file(run.checkpoint_path)
    for name, value in one.items():
        if name.startswith("model/"):
            torch.testing.assert_close(two[name], value, atol=0, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_two_processes_with_two_pieces_each(corpus_file):
    """The mean of four pieces is summed in another order: the first loss and gradient tell whether each one counts."""
    settings = {
        "train.steps": 1,
        "train.schedule.warmdown_steps": 0,
        "train.optimizer.grad_clip": 0.0,
        "train.averaging.method": "none",
    }
    one = train_here(make_run(corpus_file, "one", **settings))
    run = make_run(corpus_file, "two", **settings, **{"machine.processes": 2, "train.micro_batches": 2})
    launcher.launch(run)
    launcher.follow(run, poll=0.05)
    two = load_file(run.checkpoint_path)
    moments = [name for name in one if name.endswith(("momentum_buffer", "exp_avg"))]
    assert moments
    for name in moments:  # after one step they are the gradient times a constant
        assert (two[name] - one[name]).norm() <= 1e-4 * one[name].norm(), name


def wait_for_points(run: Run, more_than: int) -> None:
    deadline = time.monotonic() + 120
    while len(run.read_metrics()) <= more_than:
        assert time.monotonic() < deadline and launcher.is_running(run), launcher.log_tail(run.log_path)
        time.sleep(0.005)


def test_a_rank_that_dies_ends_the_run_by_name_and_it_resumes(corpus_file):
    settings = {"machine.processes": 2, "train.steps": 400, "machine.checkpoint_every": 20}
    whole, run = (make_run(corpus_file, name, **settings) for name in ("whole", "widowed"))
    launcher.launch(whole)
    launcher.follow(whole, poll=0.05)
    launcher.launch(run)
    wait_for_points(run, 10)
    victim = next(p for p in workers(run) if p.environ().get("RANK") == "1")
    os.kill(victim.pid, signal.SIGKILL)
    with pytest.raises(RunError, match=r"the process of rank 1 was killed by SIGKILL\); run it again to resume"):
        launcher.follow(run, poll=0.05)
    assert not workers(run)
    launcher.launch(run)
    assert launcher.follow(run, poll=0.05)["steps"] == 400
    assert same(load_file(run.checkpoint_path), load_file(whole.checkpoint_path))


def test_a_trainer_is_known_by_its_command_line(corpus_file, monkeypatch):
    """Whatever becomes of the note about it and of the clock: nobody starts a second one, and stopping ends it."""
    run = make_run(corpus_file, "known", **{"train.steps": 100_000})
    try:
        assert launcher.launch(run)
        first = launcher.trainers()[run.path]
        (run.path / "trainer.json").unlink()  # as if the process had died that started it
        assert not launcher.launch(run) and launcher.is_running(run)
        assert json.loads((run.path / "trainer.json").read_text())["pid"] == first
        created = psutil.Process.create_time
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: created(self) + 3600)
        assert launcher.is_running(run) and not launcher.launch(run)
        assert launcher.stop(run) == []
        assert not workers(run) and not launcher.is_running(run)
    finally:
        for process in workers(run):
            process.kill()


def test_trainers_that_do_not_heed_are_killed_together(corpus_file):
    pair = [make_run(corpus_file, name) for name in ("one", "two")]
    processes = [start_trainer(run.path, stubborn=True) for run in pair]
    try:
        assert launcher.stop(pair[0], timeout=0.5) == []
        assert not workers(pair[0]) and workers(pair[1])
        assert launcher.stop(*pair, hurry=lambda: True) == [] and not workers(pair[1])
    finally:
        for process in processes:
            process.kill()


def test_a_worker_without_its_launcher_trains_nothing(corpus_file):
    run = make_run(corpus_file, "orphan")
    done = subprocess.run(
        [sys.executable, "-m", "golfbook.train.loop", str(run.path)], env={**os.environ, "TORCHELASTIC_RUN_ID": "gone"}
    )
    assert done.returncode == 3 and run.state("training") == "missing" and not run.checkpoint_path.exists()


def test_the_trainer_gets_nothing_that_launchers_leave_in_the_environment(corpus_file, monkeypatch):
    foreign = ("PET_NNODES", "MASTER_ADDR", "RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID", "LOGLEVEL")
    for name in (*foreign, "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "nowhere")
    monkeypatch.setenv("MY_RANK", "kept")
    given = launcher.environment(make_run(corpus_file, "shielded"))
    assert not given.keys() & set(foreign) and given["MY_RANK"] == "kept"
    addresses = psutil.net_if_addrs()[given["GLOO_SOCKET_IFNAME"]]
    assert "127.0.0.1" in [address.address for address in addresses]


def test_a_run_folder_is_no_template(corpus_file, monkeypatch):
    monkeypatch.setenv("GOLFBOOK_RUNS", str(corpus_file.parent / "$$ ${local_rank} {x} [y]*"))
    run = make_run(corpus_file, "odd")
    words = launcher.command(run)
    assert macros.substitute(words, "7")[-1] == str(run.path)
    assert launcher._works_on(words) == (run.path, True)
    assert launcher._works_on(["python", "-u", "-m", "golfbook.train.loop", str(run.path)]) == (run.path, False)


CAN_RENAME = shutil.which("unshare") and subprocess.run(["unshare", "-u", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not CAN_RENAME, reason="NOT TESTED: only root may give a process another host name, by unshare -u")
def test_two_processes_train_where_the_host_name_does_not_resolve(corpus_file, monkeypatch):
    popen = subprocess.Popen

    def renamed(command, **options):
        return popen(["unshare", "-u", "sh", "-c", 'hostname no-such-name; exec "$@"', "sh", *command], **options)

    monkeypatch.setattr(subprocess, "Popen", renamed)
    monkeypatch.setenv("PET_NNODES", "2")
    run = make_run(corpus_file, "nameless", **{"machine.processes": 2})
    launcher.launch(run)
    deadline = time.monotonic() + 60  # the wait for a name takes ten minutes
    try:
        while not run.is_done("training"):
            assert time.monotonic() < deadline, launcher.log_tail(run.log_path)
            time.sleep(0.1)
    finally:
        launcher.stop(run, hurry=lambda: True)


@pytest.mark.slow
def test_killed_twenty_times_at_random_points_the_weights_are_those_of_a_straight_run(corpus_file):
    settings = {"train.steps": 1500, "machine.checkpoint_every": 7, "machine.log_every": 5}
    whole, run = (make_run(corpus_file, name, **settings) for name in ("whole", "killed"))
    train_here(whole)
    generator, steps = np.random.default_rng(0), []
    for kill in range(20):
        launcher.launch(run)
        if kill % 4:  # every fourth time wherever it is after up to four seconds: in imports, in the first steps
            wait_for_points(run, len(run.read_metrics()))
        time.sleep(float(generator.uniform(0, 0.4 if kill % 4 else 4.0)))
        assert launcher.is_running(run), "finished before the last kill: more steps are needed"
        agent = psutil.Process(json.loads((run.path / "trainer.json").read_text())["pid"])
        family = [*agent.children(recursive=True), agent]
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=30)
        steps.append(read_progress(run.checkpoint_path)["step"] if run.checkpoint_path.exists() else 0)
    launcher.launch(run)
    assert launcher.follow(run, poll=0.05)["steps"] == 1500
    assert steps == sorted(steps) and len(set(steps)) > 5 and steps[-1] < 1500
    assert same(load_file(run.checkpoint_path), load_file(whole.checkpoint_path))


def test_gradient_accumulation_equals_the_large_batch(corpus_file):
    """Tolerance: 256 terms of a mean, added in another order in float32, are off by a few times 1e-7 of their size."""
    gradients = []
    for parts in (1, 4):
        config = make_run(corpus_file, "parts", **{"train.micro_batches": parts}).config
        step = TrainingStep(initialise(GPT(config.model), 1), config, torch.device("cpu"))
        tokens = torch.randint(300, (4, 65), generator=torch.Generator().manual_seed(0))
        step.backward(tokens[:, :-1], tokens[:, 1:])
        gradients.append({name: p.grad for name, p in step.model.named_parameters() if p.grad is not None})
    whole, cut = gradients
    assert whole.keys() == cut.keys()
    for name, value in whole.items():
        assert (cut[name] - value).norm() <= 1e-4 * value.norm(), name


def test_recomputing_activations_changes_no_bit(corpus_file):
    run = make_run(corpus_file, "recompute", **{"machine.checkpoint_activations": True})
    recomputed, plain = train_here(run), train_here(make_run(corpus_file, "plain"))
    assert same({k: v for k, v in recomputed.items()}, plain)


@pytest.mark.parametrize(
    "overrides",
    [
        {"train.averaging.method": "swa", "train.averaging.swa_every": 1, "train.averaging.swa_start": 0.9},
        {"train.averaging.method": "swa_of_ema", "train.averaging.swa_every": 1, "train.averaging.swa_start": 0.9},
        {"train.averaging.method": "none"},
        {"train.qat.start": 0.9},
        {"train.qat.start": 0.9, "train.qat.rule": "published"},
        {"train.loader": "coprime"},
        {"machine.precision": "bfloat16"},
        {"train.optimizer.matrix_optimizer": "adamw", "train.optimizer.matrix_lr": 0.005},
        {"train.optimizer.muon_row_norm": True},
        {"train.optimizer.newton_schulz_coefficients": "polar_express"},
        {
            "train.schedule.lr_warmup_steps": 3,
            "train.schedule.warmdown_shape": "cosine",
            "train.schedule.min_lr_scale": 0.1,
        },
    ],
    ids=lambda o: "-".join(f"{key.removeprefix('train.')}={value}" for key, value in o.items()),
)
def test_every_way_to_train_matters_and_resumes_exactly(corpus_file, monkeypatch, overrides):
    plain = load_averaged(make_run(corpus_file, "plain"))
    whole = load_averaged(make_run(corpus_file, "whole", **overrides))
    assert not same(whole, plain)
    run, step = make_run(corpus_file, "stopped", **overrides), loop.Trainer.train_step

    def stopping(self):
        self.stop_requested = self.step + 1 == 8
        return step(self)

    monkeypatch.setattr(loop.Trainer, "train_step", stopping)
    with pytest.raises(loop.StopRequested):
        train_here(run)
    monkeypatch.setattr(loop.Trainer, "train_step", step)
    assert same(load_averaged(run), whole)


def load_averaged(run: Run) -> dict:
    train_here(run)
    return load_model(run).state_dict()


@pytest.mark.slow
@pytest.mark.skipif(
    bool(compute.why_not_compile(torch.device("cpu"))), reason=compute.why_not_compile(torch.device("cpu"))
)
def test_a_compiled_run_trains_alike_with_its_compile_time_apart(corpus_file):
    """Validation, fake quantisation and resuming happen around the compiled step, and none makes it compile again."""
    settings = {"train.qat.start": 0.5, "machine.compile_warmup_steps": 3}
    eager, run = (
        make_run(corpus_file, "eager", **settings),
        make_run(corpus_file, "compiled", **settings, **{"machine.compile": True}),
    )
    train_here(eager)
    launcher.launch(run)
    result = launcher.follow(run, poll=0.05)
    assert result["compiled"] and result["recompilations"] == 0
    assert result["train_seconds"] < result["warmup_seconds"]  # compiling takes longer than these twelve steps
    losses = [[p["loss"] for p in r.read_metrics() if p["kind"] == "train"] for r in (eager, run)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert "compiled by torch.compile" in launcher.log_tail(run.log_path, 50)


def test_the_clock_ends_training(corpus_file, monkeypatch):
    """By a clock on which every step takes 5 ms, whatever this machine is doing: 0.5 s are 100 steps."""
    ticks = itertools.count()
    monkeypatch.setattr(loop, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks) * 0.005))
    run = make_run(
        corpus_file, "clock", **{"train.steps": 100000, "train.max_seconds": 0.5, "train.schedule.warmdown_steps": 10}
    )
    train_here(run)
    result = run.read_result("training")
    assert result["steps"] == pytest.approx(100, abs=1)
    assert result["train_seconds"] == pytest.approx(0.5, abs=0.006)
    points = [p for p in run.read_metrics() if p["kind"] == "train"]
    assert points[0]["lr_scale"] == 1.0 > points[-1]["lr_scale"]
    flat = [p["step"] for p in points if p["lr_scale"] == 1.0]
    assert flat[-1] == pytest.approx(90, abs=3)  # ten steps' worth of time is warmdown
    assert points[0]["tokens_per_second"] == pytest.approx(256 / 0.005)  # the mean of training since the last point
    assert stages.run_training(run) == result


def test_divergence_names_the_tensor_and_keeps_the_last_good_checkpoint(corpus_file, monkeypatch):
    """The seventh update overflows in one weight: the checkpoint of step 6 is the last good one."""
    step = loop.Trainer.train_step

    def overflowing(self):
        loss = step(self)
        if self.step == 6:
            self.model.tok_emb.weight.data[5, 2] = math.inf
        return loss

    monkeypatch.setattr(loop.Trainer, "train_step", overflowing)
    run = make_run(corpus_file, "diverges", **{"machine.checkpoint_every": 1})
    assert loop.main([str(run.path)]) == 2
    message = run.read_result("training")["message"]
    assert "not finite after step 7: weight tok_emb.weight (1 of 9,600 values)" in message
    assert "the checkpoint of step 6 is kept" in message and "in train.optimizer" in message
    kept = load_file(run.checkpoint_path)
    assert all(t.isfinite().all() for name, t in kept.items() if name.startswith("model/"))
    assert read_progress(run.checkpoint_path)["step"] == 6
    monkeypatch.undo()
    assert train_here(run) and run.is_done("training")  # a sane rate goes on from there


@pytest.mark.parametrize(
    ("spoil", "culprit"),
    [
        (
            lambda model: model.blocks[1].mlp.fc.weight.data.view(-1)[3:5].fill_(math.nan),
            r"blocks.1.mlp.fc.weight \(2 ",
        ),
        (lambda model: model.blocks[1].attn.c_v.weight.fill_(1e38), "output of blocks.1.attn.c_v"),
        (
            lambda model: model.blocks[2].attn.proj.weight.register_hook(lambda g: g * math.inf),
            "gradient of blocks.2.attn.proj.weight",
        ),
    ],
    ids=["weight", "activation", "gradient"],
)
def test_a_step_that_is_not_finite_touches_nothing_and_names_the_first_tensor(corpus_file, spoil, culprit):
    trainer = loop.Trainer(make_run(corpus_file, "spoilt"), 0, 1)
    trainer.train_step()
    with torch.no_grad():
        spoil(trainer.model)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(RunError, match=f"step 0 the norm of the gradient is (nan|inf); not finite first: .*{culprit}"):
        trainer.train_step()
    trainer.loader.close()
    after = trainer.model.state_dict()
    assert all(torch.equal(before[n].nan_to_num(7), after[n].nan_to_num(7)) for n in before)


def test_full_disk_is_named_and_keeps_the_old_checkpoint(corpus_file):
    run = make_run(corpus_file, "full")
    train_here(run)
    before = run.checkpoint_path.read_bytes()
    run.result_path("training").unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:  # no file may grow beyond this: what a full disk looks like, without one
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
        model = loop.Trainer(run, 0, 1)
        with pytest.raises(RunError, match=r"cannot write .*checkpoint.safetensors: .*; check free space"):
            model.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert run.checkpoint_path.read_bytes() == before
    assert not list(run.path.glob(".*.tmp"))


def test_what_killed_processes_leave_behind_is_cleaned_and_read_over(corpus_file):
    run = make_run(corpus_file, "torn")
    left = run.path / ".checkpoint.safetensors.abc123.tmp"
    left.write_bytes(b"half a checkpoint")
    train_here(run)
    assert not left.exists()
    odd = run.path / ".a[1].bin.abc123.tmp"
    odd.touch()
    files.remove_partial(run.path / "a[1].bin")
    assert not odd.exists()
    points = run.read_metrics()
    with run.metrics_path.open("ab") as stream:
        stream.write(b'{"kind": "train", "st')
    run.append_metrics({"kind": "validation", "step": 99, "val_bpb": 1.0})
    assert run.read_metrics() == [*points, {"kind": "validation", "step": 99, "val_bpb": 1.0}]


def test_a_changed_dataset_is_refused_by_name(corpus_file):
    run = make_run(corpus_file, "data")
    headline = stages.run_scoring(run)
    assert stages.run_scoring(run) == headline
    corpus_file.write_text(corpus_file.read_text() + '\n{"text": "one more document of quite a few words"}\n')
    for stage in (stages.run_training, stages.run_quantization, stages.run_scoring):
        with pytest.raises(RunError, match=r"used dataset .* but its data are now .* another study name"):
            stage(run)
    assert run.read_result("test_time_training") == headline


def test_results_of_another_schema_or_config_are_stale(corpus_file):
    run = make_run(corpus_file, "schema")
    train_here(run)
    result = run.read_result("training")
    assert result["environment"]["torch"] == torch.__version__ and len(result["environment"]["code_sha256"]) == 64
    for change in ({"schema_version": 99}, {"config_hash": "0" * 10}):
        atomic_write_json(run.result_path("training"), result | change)
        assert run.state("training") == "stale"
    atomic_write_json(run.result_path("training"), {"status": "ok"})
    assert run.state("training") == "stale"


def test_a_folder_that_cannot_be_written_still_shows_finished_work(corpus_file, monkeypatch):
    run = make_run(corpus_file, "readonly")
    headline = stages.run_scoring(run)

    def refuse(self, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(runs.FileLock, "acquire", refuse)
    assert stages.run_scoring(run) == headline
    assert not launcher.is_running(run)
    run.result_path("test_time_training").unlink()
    with pytest.raises(RunError, match="Read-only file system; check its permissions"):
        stages.run_scoring(run)


def test_damaged_or_foreign_checkpoint_is_refused(corpus_file):
    run = make_run(corpus_file, "damaged")
    train_here(run)
    good = run.checkpoint_path.read_bytes()
    run.checkpoint_path.write_bytes(good[: len(good) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(run)
    assert loop.main([str(run.path)]) == 2
    assert "delete it to train anew" in run.read_result("training")["message"]
    other = make_run(corpus_file, "other", **{"train.optimizer.matrix_lr": 0.01})
    other.checkpoint_path.write_bytes(good)
    with pytest.raises(CheckpointError, match="another config"):
        train_here(other)
    smaller = make_run(corpus_file, "smaller", **{"model.num_layers": 2})
    smaller.checkpoint_path.write_bytes(good)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        train_here(smaller)


def test_stages_skip_what_is_done_and_redo_what_changed(corpus_file):
    run = make_run(corpus_file, "stages")
    headline = stages.run_scoring(run)  # runs the two stages before it
    assert [run.state(s) for s in runs.STAGES] == ["done"] * 3
    quantized = run.read_result("quantization")
    assert quantized["val_loss"] == quantized["dequantized_val_loss"]
    assert headline["val_bpb"] == pytest.approx(headline["contiguous_val_bpb"], abs=0.1)
    assert headline["contiguous_val_bpb"] == pytest.approx(quantized["val_bpb"], abs=1e-6)
    times = {s: run.result_path(s).stat().st_mtime_ns for s in runs.STAGES}
    assert stages.run_scoring(run) == headline
    assert times == {s: run.result_path(s).stat().st_mtime_ns for s in runs.STAGES}
    run.artifact_path.write_bytes(run.artifact_path.read_bytes()[:-1])
    assert run.state("training") == "done"
    assert [run.state(s) for s in runs.STAGES[1:]] == ["stale", "stale"]
    again = stages.run_scoring(run)
    assert again["val_bpb"] == headline["val_bpb"]


def test_wrong_number_of_processes_is_refused(corpus_file, capsys):
    run = make_run(corpus_file, "count", **{"machine.processes": 2})
    assert loop.main([str(run.path)]) == 2
    assert "2, but 1 processes were started" in capsys.readouterr().err
    assert loop.main([]) == 2
