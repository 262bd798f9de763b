"""The training loop, which runs as a process of its own (started by :mod:`golfbook.train.launcher`).

``python -m torch.distributed.run --nproc-per-node=N ... -m golfbook.train.loop RUN``, as the launcher says it, is the
one way a model is trained, whoever asks: a notebook, papermill or a job. The recipe is PR 1166's, section 15.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from golfbook import activity, compute
from golfbook.data import dataset
from golfbook.data.batches import Prefetching, make_loader
from golfbook.errors import CheckpointError, GolfbookError, RunError
from golfbook.evaluate import scoring
from golfbook.files import remove_partial
from golfbook.model import costs
from golfbook.model.gpt import BOS_ID, GPT, initialise
from golfbook.run import Run, exit_with_parent, open_run
from golfbook.train import choices
from golfbook.train.averaging import WeightAverage
from golfbook.train.checkpoints import load_checkpoint, save_checkpoint
from golfbook.train.launcher import is_launcher_of
from golfbook.train.nonfinite import first_nonfinite
from golfbook.train.schedules import lr_scale, muon_momentum, qat_active
from golfbook.train.step import TrainingStep, compiled_graphs


class Trainer:
    """State of one training process: model, average, optimisers, stream and clock."""

    def __init__(self, run: Run, rank: int, world: int) -> None:
        self.run, self.config, self.rank, self.world = run, run.config, rank, world
        train = self.config.train
        self.device = compute.choose_device(self.config, rank)
        self.chosen = choices.set_up(self.config.machine.threads, self.device, run)
        torch.manual_seed(self.config.seed)
        self.dataset = dataset.prepare(self.config)
        if self.config.model.smear_document_mask and self.dataset.tokenizer.bos_id != BOS_ID:
            raise RunError(
                f"model.smear_document_mask needs a tokenizer whose BOS id is {BOS_ID}; this one's is "
                f"{self.dataset.tokenizer.bos_id}"
            )
        self.model = initialise(GPT(self.config.model), self.config.seed)
        self.take_step = TrainingStep(self.model, self.config, self.device, world=world)
        self.optimizers = self.take_step.optimizers
        self.average = WeightAverage(train, self.model.state_dict())
        self.loader = Prefetching(make_loader(self.dataset.train_shards, train, self.config.seed))
        self.step, self.train_seconds, self.last_loss, self.scale = 0, 0.0, math.nan, 1.0
        self.saved, self.stop_requested = 0, False
        self.logged = 0, 0.0  # step and training seconds of the last point
        activity.doing("compiling" if self.take_step.compiled else "warming up")
        self.take_step.warm_up(train.batch_tokens // train.sequence_length // world)
        where = f"measured on {self.chosen.identity.get('device', 'an unknown machine')}:"
        for note in (*self.take_step.notes, where, *choices.describe(self.chosen)):
            self.print(note)
        self.graphs = compiled_graphs()
        work = costs.per_token(self.config.model, train.sequence_length, causal=True).training
        ceiling = compute.product_ceiling(self.device, self.take_step.precision)
        self.possible_tokens_per_second = world * ceiling / work  # were there nothing but products at full speed

    @property
    def identity(self) -> dict[str, str]:
        """Return what a checkpoint must agree with to be continued."""
        return {"config": self.config.hash, "dataset": self.dataset.fingerprint}

    def save(self) -> None:
        """Write the checkpoint (first process only); raises RunError before spoilt weights replace good ones."""
        spoilt = first_nonfinite(self.model.named_parameters())
        if spoilt:
            raise RunError(self.diverged(f"not finite after step {self.step}: weight {spoilt}"))
        if self.rank == 0:
            progress = {
                "step": self.step,
                "loader": self.loader.state(),
                "train_seconds": self.train_seconds,
                "train_loss": self.last_loss,
                **self.identity,
            }
            save_checkpoint(self.run.checkpoint_path, self.model, self.average, self.optimizers, progress)
        self.saved = self.step

    def resume(self) -> None:
        """Continue from the checkpoint where there is one; raises CheckpointError where it is another run's."""
        path = self.run.checkpoint_path
        if self.rank == 0:
            remove_partial(path)
        if not path.is_file():
            if self.rank == 0:
                self.run.metrics_path.unlink(missing_ok=True)
            return
        progress = load_checkpoint(path, self.model, self.average, self.optimizers)
        for what, value in self.identity.items():
            if progress[what] != value:
                raise CheckpointError(f"{path} was made with another {what}; delete it to train anew")
        self.step = self.saved = progress["step"]
        self.loader.load_state(progress["loader"])
        self.train_seconds, self.last_loss = progress["train_seconds"], progress["train_loss"]
        self.logged = self.step, self.train_seconds
        self.print(f"resuming at step {self.step}")

    def train(self) -> None:
        """Run the remaining steps, validating, logging and saving on the way."""
        train, machine = self.config.train, self.config.machine
        activity.doing("training")
        started, at_start = time.perf_counter(), self.step
        while self.step < train.steps and not self.out_of_time():
            if machine.validate_every and self.step % machine.validate_every == 0:
                self.validate(self.model)
            begin = time.perf_counter()
            loss = self.train_step()
            if self.device.type == "cuda":  # the clock is about work done, not about work queued
                torch.cuda.synchronize(self.device)
            self.train_seconds += time.perf_counter() - begin
            self.step += 1
            last = self.step == train.steps or self.out_of_time()
            if self.step % machine.log_every == 0 or last:
                self.log(loss, (time.perf_counter() - started) / (self.step - at_start))
            stop = self.agree_to_stop()
            if stop or last or (machine.checkpoint_every and self.step % machine.checkpoint_every == 0):
                self.last_loss = self.mean_loss(loss)
                self.save()
            if stop and not last:
                raise StopRequested(f"training was asked to stop at step {self.step}; run it again to go on from there")
        self.loader.close()

    def elapsed(self) -> float | None:
        """Return the seconds trained by the first process's clock, on all; None where the clock decides nothing."""
        if not self.config.train.max_seconds:
            return None
        if self.world == 1:
            return self.train_seconds
        seconds = torch.tensor([self.train_seconds], dtype=torch.float64, device=self.device)
        dist.broadcast(seconds, 0)
        return float(seconds.item())

    def out_of_time(self) -> bool:
        """Return whether ``train.max_seconds`` are used up."""
        elapsed = self.elapsed()
        return elapsed is not None and elapsed >= self.config.train.max_seconds

    def train_step(self) -> Tensor:
        """Take one optimiser step on the next global batch; returns the loss on this process's rows before it."""
        train, step = self.config.train, self.step
        if self.model.draws_numbers:  # others in each step and process
            sequence = np.random.SeedSequence([self.config.seed, step, self.rank])
            torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        inputs, targets = (torch.from_numpy(a[self.rank :: self.world]).to(self.device) for a in self.loader.next())
        self.scale = lr_scale(step, train, self.elapsed())
        try:
            loss = self.take_step(
                inputs,
                targets,
                lr_scale=self.scale,
                momentum=muon_momentum(step, train),
                quantized=qat_active(step, self.scale, train),
                check=self.device.type == "cpu" or (step + 1) % self.config.machine.log_every == 0,
            )
        except RunError as error:
            raise RunError(self.diverged(f"at step {step} {error}")) from None
        self.average.update(step, self.scale, self.model.state_dict())
        return loss

    def agree_to_stop(self) -> bool:
        """Ask whether any process was asked to stop; all get the same answer."""
        if self.world == 1:
            return self.stop_requested
        flag = torch.tensor([float(self.stop_requested)], device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def mean_loss(self, loss: Tensor) -> float:
        """Average the loss over all processes; stop them all before a diverged model overwrites the last good state."""
        if self.world > 1:
            loss = loss.clone()
            dist.all_reduce(loss)
            loss /= self.world
        value = loss.item()
        if not math.isfinite(value):
            raise RunError(self.diverged(f"the loss is {value} at step {self.step}"))
        return value

    def diverged(self, what: str) -> str:
        """Return the message of a run that cannot go on."""
        kept = f"; the checkpoint of step {self.saved} is kept" if self.saved else ""
        return f"training diverged: {what}. Lower matrix_lr, embed_lr or grad_clip in train.optimizer{kept}"

    def log(self, loss: Tensor, seconds_per_step: float) -> None:
        """Append one training point and, on a terminal, redraw the progress line.

        Speed and MFU are those of training since the last point; the time left counts ``seconds_per_step``, the mean
        with validations and checkpoints in it.
        """
        mean = self.mean_loss(loss)
        if self.rank:
            return
        train = self.config.train
        last_step, last_seconds = self.logged
        speed = (self.step - last_step) * train.batch_tokens / max(self.train_seconds - last_seconds, 1e-9)
        self.logged = self.step, self.train_seconds
        left = seconds_per_step * (train.steps - self.step)
        if train.max_seconds:
            left = min(left, train.max_seconds - self.train_seconds)
        point = {
            "kind": "train",
            "step": self.step,
            "loss": mean,
            "lr_scale": self.scale,
            "tokens_per_second": speed,
            "mfu": speed / self.possible_tokens_per_second,
            "memory_bytes": compute.peak_memory_bytes(self.device),
            "seconds": self.train_seconds,
            "seconds_left": max(left, 0.0),
        }
        self.run.append_metrics(point)
        line = f"step {self.step}/{train.steps}  loss {mean:.4f}  {speed:,.0f} tokens/s  MFU {point['mfu']:.0%}"
        self.print(f"{line}  {point['seconds_left']:.0f} s left", redraw=True)

    def validate(self, model: GPT) -> dict[str, float]:
        """Score the validation split in contiguous windows (first process only) and log the point."""
        if self.rank:
            return {}
        score, window = self.config.score, self.config.window
        data = self.dataset
        with activity.step("validating") as progress:
            nll = scoring.score(
                model, data.val_tokens, window=window, stride=window, batch_windows=score.batch_windows,
                device=self.device, progress=progress,
            )  # fmt: skip
        summary = scoring.summarize(nll, data.val_bytes)
        values = {"val_loss": summary["val_loss"], "val_bpb": summary["val_bpb"]}
        self.run.append_metrics({"kind": "validation", "step": self.step, "seconds": self.train_seconds, **values})
        self.print(f"step {self.step}/{self.config.train.steps}  validation {values['val_bpb']:.4f} bits per byte")
        return values

    def finish(self) -> None:
        """Score the weights that are handed on and write the stage's result."""
        self.model.load_state_dict(self.average.result(self.model.state_dict()))
        final = self.validate(self.model)
        if self.rank:
            return
        data, tokens = self.dataset, self.step * self.config.train.batch_tokens
        speed = tokens / max(self.train_seconds, 1e-9)
        self.run.write_result(
            "training",
            {
                **final,
                "steps": self.step,
                "train_loss": self.last_loss,
                "train_seconds": self.train_seconds,
                "tokens_seen": tokens,
                "tokens_per_second": speed,
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "weights": self.average.name,
                "precision": self.take_step.precision,
                "products": self.chosen.products,
                "attention": self.take_step.attention,
                "device": str(self.device),
                "mfu": speed / self.possible_tokens_per_second,
                "compiled": self.take_step.compiled,
                "warmup_seconds": self.take_step.warmup_seconds,
                "recompilations": compiled_graphs() - self.graphs if self.take_step.compiled else 0,
                "processes": self.world,
                "dataset_fingerprint": data.fingerprint,
                "unigram_bpb": data.info["unigram_bpb"],
                "validation_changes": data.info["validation_changes"],
                "peak_memory_bytes": compute.peak_memory_bytes(self.device),
            },
            reads={"dataset": data.fingerprint},
            writes=self.run.checkpoint_path,
        )

    def print(self, line: str, redraw: bool = False) -> None:
        """Print from the first process; on a terminal progress stays on one line."""
        if self.rank == 0:
            terminal = sys.stdout.isatty()
            print(f"\r{line:<100}" if terminal else line, end="" if redraw and terminal else "\n", flush=True)


class StopRequested(RunError):
    """The trainer was asked to stop and has saved its state."""


def _train(run: Run, rank: int, world: int) -> None:
    if world > 1:
        device = compute.choose_device(run.config, rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=6))  # the first process validates while others wait
    try:
        trainer = Trainer(run, rank, world)
        signal.signal(signal.SIGTERM, lambda *_: setattr(trainer, "stop_requested", True))
        trainer.resume()
        trainer.train()
        trainer.finish()
    finally:
        if world > 1:
            dist.destroy_process_group()


def main(arguments: list[str]) -> int:
    """Run a training process; return the exit status."""
    if len(arguments) != 1:
        print("usage: python -m golfbook.train.loop RUN_FOLDER", file=sys.stderr)
        return 2
    run = open_run(arguments[0])
    if "TORCHELASTIC_RUN_ID" in os.environ:
        exit_with_parent()
        if not is_launcher_of(run, os.getppid()):  # it died before this process began to watch it
            return 3
    return train(run)


def train(run: Run) -> int:
    """Train a run in this process, which is one of ``machine.processes``; return the exit status."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank == 0:
        activity.record_in(run.path, "starting the trainer")
    try:
        if world != run.config.machine.processes:
            raise RunError(f"machine.processes is {run.config.machine.processes}, but {world} processes were started")
        with run.lock("trainer") if rank == 0 else contextlib.nullcontext():
            if not run.is_done("training"):
                _train(run, rank, world)
    except GolfbookError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if not isinstance(error, StopRequested):
            run.write_failure("training", f"rank {rank}: {error}" if rank else str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
