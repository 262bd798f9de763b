"""The training loop, which runs as a process of its own (started by :mod:`golfbook.launcher`).

``python -m torch.distributed.run --standalone --nproc-per-node=N -m golfbook.training RUN`` is the one way a model is
trained, whoever asks: a notebook, papermill or a job. The recipe is PR 1166's, section 15.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from golfbook import corpus, scoring
from golfbook.averaging import WeightAverage
from golfbook.checkpoints import load_checkpoint, save_checkpoint
from golfbook.config import Config
from golfbook.errors import CheckpointError, GolfbookError, RunError
from golfbook.files import remove_partial
from golfbook.loaders import Prefetching, make_loader
from golfbook.model import BOS_ID, GPT, initialise
from golfbook.muon import make_optimizers
from golfbook.qat import fake_quantized
from golfbook.runs import Run, exit_with_parent, open_run
from golfbook.schedules import lr_scale, muon_momentum, qat_active


class Trainer:
    """State of one training process: model, average, optimisers, stream and clock."""

    def __init__(self, run: Run, rank: int, world: int) -> None:
        self.run, self.config, self.rank, self.world = run, run.config, rank, world
        self.device = choose_device(self.config, rank)
        torch.set_num_threads(self.config.train.threads)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.manual_seed(self.config.seed)
        self.dataset = corpus.prepare(self.config)
        if self.config.model.smear_document_mask and self.dataset.tokenizer.bos_id != BOS_ID:
            raise RunError(
                f"model.smear_document_mask needs a tokenizer whose BOS id is {BOS_ID}; this one's is "
                f"{self.dataset.tokenizer.bos_id}"
            )
        self.model = initialise(GPT(self.config.model), self.config.seed).to(self.device)
        self.model.checkpoint_activations = self.config.train.checkpoint_activations
        self.precision = choose_precision(self.config, self.device)
        self.average = WeightAverage(self.config.train, self.model.state_dict())
        muon, adam = make_optimizers(self.model, self.config.train)
        self.optimizers: dict[str, torch.optim.Optimizer] = {"muon": muon, "adam": adam}
        self.loader = Prefetching(make_loader(self.dataset.train_shards, self.config.train, self.config.seed))
        self.step, self.train_seconds, self.last_loss, self.scale = 0, 0.0, math.nan, 1.0
        self.stop_requested = False

    @property
    def identity(self) -> dict[str, str]:
        """What a checkpoint must agree with to be continued."""
        return {"config": self.config.hash, "dataset": self.dataset.fingerprint}

    def save(self) -> None:
        """Write the checkpoint (first process only)."""
        if self.rank == 0:
            progress = {
                "step": self.step,
                "loader": self.loader.state(),
                "train_seconds": self.train_seconds,
                "train_loss": self.last_loss,
                **self.identity,
            }
            save_checkpoint(self.run.checkpoint_path, self.model, self.average, self.optimizers, progress)

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
        self.step = progress["step"]
        self.loader.load_state(progress["loader"])
        self.train_seconds, self.last_loss = progress["train_seconds"], progress["train_loss"]
        self.print(f"resuming at step {self.step}")

    def train(self) -> None:
        """Run the remaining steps, validating, logging and saving on the way."""
        train = self.config.train
        started, at_start = time.perf_counter(), self.step
        while self.step < train.steps and not self.out_of_time():
            if train.validate_every and self.step % train.validate_every == 0:
                self.validate(self.model)
            begin = time.perf_counter()
            loss = self.train_step()
            self.train_seconds += time.perf_counter() - begin
            self.step += 1
            last = self.step == train.steps or self.out_of_time()
            if self.step % train.log_every == 0 or last:
                self.log(loss, (time.perf_counter() - started) / (self.step - at_start))
            stop = self.agree_to_stop()
            if stop or last or (train.checkpoint_every and self.step % train.checkpoint_every == 0):
                self.last_loss = self.mean_loss(loss)
                self.save()
            if stop and not last:
                raise StopRequested(f"training was asked to stop at step {self.step}; run it again to go on from there")
        self.loader.close()

    def elapsed(self) -> float | None:
        """Training seconds by the first process's clock, the same on all; None where the clock decides nothing."""
        if not self.config.train.max_seconds:
            return None
        seconds = torch.tensor([self.train_seconds], dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.broadcast(seconds, 0)
        return float(seconds.item())

    def out_of_time(self) -> bool:
        """Whether ``train.max_seconds`` are used up."""
        elapsed = self.elapsed()
        return elapsed is not None and elapsed >= self.config.train.max_seconds

    def train_step(self) -> Tensor:
        """One optimiser step on the next global batch; returns the loss on this process's rows before it."""
        train, step = self.config.train, self.step
        inputs, targets = (torch.from_numpy(a[self.rank :: self.world]).to(self.device) for a in self.loader.next())
        self.scale = lr_scale(step, train, self.elapsed())
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * self.scale
        self.optimizers["muon"].param_groups[0]["momentum"] = muon_momentum(step, train)
        loss = torch.zeros((), device=self.device)
        quantized = qat_active(step, self.scale, train)
        with fake_quantized(self.model, self.config.quantize) if quantized else contextlib.nullcontext():
            for x, y in zip(inputs.chunk(train.micro_batches), targets.chunk(train.micro_batches), strict=True):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                    part = self.model.loss(x, y) / train.micro_batches
                part.backward()
                loss += part.detach()
        self.average_gradients()
        if train.grad_clip:  # after averaging, so that the step does not depend on the number of processes
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.grad_clip)
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.average.update(step, self.scale, self.model.state_dict())
        return loss

    def average_gradients(self) -> None:
        """Replace every gradient by its mean over the processes, in one message."""
        if self.world == 1:
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def agree_to_stop(self) -> bool:
        """Whether any process was asked to stop; all get the same answer."""
        if self.world == 1:
            return self.stop_requested
        flag = torch.tensor([float(self.stop_requested)], device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def mean_loss(self, loss: Tensor) -> float:
        """Loss over all processes. Stops, on all of them, before a diverged model overwrites the last good state."""
        if self.world > 1:
            loss = loss.clone()
            dist.all_reduce(loss)
            loss /= self.world
        value = loss.item()
        if not math.isfinite(value):
            raise RunError(
                f"the training loss is {value} at step {self.step}; lower train.matrix_lr or train.grad_clip "
                f"(the checkpoint before it is kept)"
            )
        return value

    def log(self, loss: Tensor, seconds_per_step: float) -> None:
        """Append one training point and, on a terminal, redraw the progress line."""
        mean = self.mean_loss(loss)
        if self.rank:
            return
        train = self.config.train
        point = {
            "kind": "train",
            "step": self.step,
            "loss": mean,
            "lr_scale": self.scale,
            "tokens_per_second": train.batch_tokens / seconds_per_step,
            "seconds": self.train_seconds,
        }
        self.run.append_metrics(point)
        left = seconds_per_step * (train.steps - self.step)
        line = f"step {self.step}/{train.steps}  loss {point['loss']:.4f}  {point['tokens_per_second']:,.0f} tokens/s"
        self.print(f"{line}  {left:.0f} s left", redraw=True)

    def validate(self, model: GPT) -> dict[str, float]:
        """Score the validation split in contiguous windows (first process only) and log the point."""
        if self.rank:
            return {}
        score, window = self.config.score, self.config.window
        data = self.dataset
        nll = scoring.score(
            model, data.val_tokens, window=window, stride=window, batch_windows=score.batch_windows, device=self.device
        )
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
        train, data = self.config.train, self.dataset
        self.run.write_result(
            "training",
            {
                **final,
                "steps": self.step,
                "train_loss": self.last_loss,
                "train_seconds": self.train_seconds,
                "tokens_seen": self.step * train.batch_tokens,
                "tokens_per_second": self.step * train.batch_tokens / max(self.train_seconds, 1e-9),
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "weights": self.average.name,
                "precision": self.precision,
                "device": str(self.device),
                "processes": self.world,
                "dataset_fingerprint": data.fingerprint,
                "unigram_bpb": data.info["unigram_bpb"],
                "peak_memory_bytes": peak_memory_bytes(),
            },
            reads={"dataset": data.fingerprint},
            writes=self.run.checkpoint_path,
        )

    def print(self, line: str, redraw: bool = False) -> None:
        """Print from the first process; on a terminal progress stays on one line."""
        if self.rank == 0:
            terminal = sys.stdout.isatty()
            print(f"\r{line:<100}" if terminal else line, end="" if redraw and terminal else "\n", flush=True)


def choose_device(config: Config, rank: int = 0) -> torch.device:
    """CUDA where it is there and allowed, else the CPU; raises RunError where CUDA is demanded and missing."""
    wanted = config.train.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise RunError("train.device is 'cuda', but torch sees no CUDA device; use 'auto' or 'cpu'")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", rank % torch.cuda.device_count())


class StopRequested(RunError):
    """The trainer was asked to stop and has saved its state."""


def choose_precision(config: Config, device: torch.device) -> str:
    """Dtype of activations, "float32" or "bfloat16": what ``train.precision`` says, or what the hardware is fast at.

    "auto" takes bfloat16 on GPUs that have it and on CPUs with AMX; elsewhere bfloat16 gains little and costs accuracy.
    """
    if config.train.precision != "auto":
        return config.train.precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    return "bfloat16" if torch.cpu._is_amx_tile_supported() else "float32"


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _train(run: Run, rank: int, world: int) -> None:
    if world > 1:
        backend = "nccl" if choose_device(run.config, rank).type == "cuda" else "gloo"
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
    """Entry point of a training process; returns the exit status."""
    if len(arguments) != 1:
        print("usage: python -m golfbook.training RUN_FOLDER", file=sys.stderr)
        return 2
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        exit_with_parent()
    run = open_run(arguments[0])
    try:
        if world != run.config.train.processes:
            raise RunError(f"train.processes is {run.config.train.processes}, but {world} processes were started")
        with run.lock("trainer") if rank == 0 else contextlib.nullcontext():
            if not run.is_done("training"):
                _train(run, rank, world)
    except GolfbookError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if rank == 0 and not isinstance(error, StopRequested):
            run.write_failure("training", str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
