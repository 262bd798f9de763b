"""One optimiser step of one process: forward, backward, averaging over processes, clipping, update.

The training loop, the benchmarks and the GPU check all take their steps here, so what is measured is what trains.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from golfbook import compute
from golfbook.config.schema import Config
from golfbook.errors import RunError
from golfbook.model import attention
from golfbook.model.gpt import GPT
from golfbook.train import nonfinite
from golfbook.train.muon import make_optimizers
from golfbook.train.qat import fake_quantized, published_fake_quantized

Loss = Callable[[Tensor, Tensor], Tensor]


class _Loss(nn.Module):
    """The model's loss as a module, which is what torch's data-parallel engine wraps."""

    def __init__(self, model: GPT, loss: Loss) -> None:
        super().__init__()
        self.model, self.compute = model, loss

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.compute(inputs, targets)


class TrainingStep:
    """A model with its optimisers, ready to take steps on ``device``; call it with a batch.

    With ``world`` > 1 the process group must be initialised; gradients are then averaged by torch's
    DistributedDataParallel while the backward pass is still running. ``notes`` holds one line for each choice that was
    made for this machine.
    """

    def __init__(self, model: GPT, config: Config, device: torch.device, *, world: int = 1) -> None:
        train, machine = config.train, config.machine
        self.model, self.config, self.device = model.to(device), config, device
        model.checkpoint_activations = machine.checkpoint_activations
        model.use_attention(machine.attention)
        self.precision, reason = compute.choose_precision(config)
        attention.require(machine.attention, device, getattr(torch, self.precision))
        self.attention = machine.attention
        if machine.attention == "auto":
            self.attention = compute.attention_backend(True, getattr(torch, self.precision), train.sequence_length)
        self.notes = [f"activations in {self.precision}: {reason}", f"attention by {self.attention}"]
        self.optimizers = make_optimizers(model, train)
        self.compiled = False
        loss: Loss = model.loss
        if machine.compile:
            obstacle = compute.why_not_compile(device)
            self.compiled = not obstacle
            self.notes.append(f"not compiled: {obstacle}" if obstacle else "compiled by torch.compile")
            if self.compiled:
                # random numbers as in eager mode, for flow matching
                loss = torch.compile(model.loss, dynamic=False, fullgraph=True, options={"fallback_random": True})
        self.module: nn.Module = _Loss(model, loss)
        if world > 1:
            # layer 0 has no use for its mix of values, so its parameters never get a gradient
            unused = config.model.value_residual != "none"
            devices_ = [device.index] if device.type == "cuda" else None
            self.module = DistributedDataParallel(
                self.module, device_ids=devices_, find_unused_parameters=unused, gradient_as_bucket_view=True
            )
        self.warmup_seconds = 0.0

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean loss in nats, as training does: ``inputs`` and ``targets`` (rows, T) int64 on the device."""
        with self._autocast():
            return self.module(inputs, targets)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    def __call__(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        lr_scale: float = 1.0,
        momentum: float | None = None,
        quantized: bool = False,
        check: bool = True,
    ) -> Tensor:
        """Take one step; returns the mean loss before it over this process's rows, float32 and detached.

        ``lr_scale`` multiplies every group's base rate, ``momentum`` is Muon's (None: as it is), ``quantized``
        fake-quantises the weights. With ``check`` a gradient that is not finite raises :class:`RunError` naming the
        tensor it comes from, before any weight is touched; on a GPU that waits for the step to finish.
        """
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * lr_scale
        if momentum is not None and "muon" in self.optimizers:
            self.optimizers["muon"].param_groups[0]["momentum"] = momentum
        with self._fake_quantized() if quantized else contextlib.nullcontext():
            loss = self.backward(inputs, targets)
            trained = [p for p in self.model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
            if check and not math.isfinite(norm.item()):
                raise RunError(self._explain(norm, inputs, targets))
        clip = self.config.train.optimizer.grad_clip
        if clip:  # after averaging, so that the step does not depend on the number of processes
            torch.nn.utils.clip_grads_with_norm_(trained, clip, norm)
        for optimizer in self.optimizers.values():
            optimizer.step()
        return loss

    def backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Replace all gradients by those of this batch, averaged over processes; returns the loss as a call does."""
        self.model.zero_grad(set_to_none=True)
        parts = self.config.train.micro_batches
        loss = torch.zeros((), device=self.device)
        pieces = list(zip(inputs.chunk(parts), targets.chunk(parts), strict=True))
        for number, (x, y) in enumerate(pieces, start=1):
            with self._averaging_at(last=number == parts):
                part = self.loss(x, y) / parts
                part.backward()
            loss += part.detach()
        return loss

    def _fake_quantized(self) -> contextlib.AbstractContextManager[object]:
        if self.config.train.qat.rule == "published":
            return published_fake_quantized(self.model)
        return fake_quantized(self.model, self.config.quantize)

    def _averaging_at(self, last: bool) -> contextlib.AbstractContextManager[None]:
        if isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        return contextlib.nullcontext()

    def _explain(self, norm: Tensor, inputs: Tensor, targets: Tensor) -> str:
        """Say which tensor the trouble of this batch starts in."""

        parts = self.config.train.micro_batches

        def forward() -> None:
            with self._autocast():
                for x, y in zip(inputs.chunk(parts), targets.chunk(parts), strict=True):
                    self.model.loss(x, y)

        return (
            f"the norm of the gradient is {norm.item()}; not finite first: {nonfinite.explain(self.model, forward)}; "
            f"largest weight: {nonfinite.largest(self.model)}"
        )

    def warm_up(self, rows: int) -> float:
        """Compile and fill caches by steps on synthetic tokens, then undo them; returns the seconds that it took.

        ``rows`` is the number of sequences that a call will get. Weights, optimisers and random numbers are as before
        to the bit. Synthetic tokens, because text of the validation split has no business here. Where compiling fails,
        steps are eager from then on and ``notes`` says why. Does nothing where nothing is compiled.
        """
        if not self.compiled:
            return 0.0
        started, train = time.perf_counter(), self.config.train
        weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        states = {name: copy.deepcopy(optimizer.state_dict()) for name, optimizer in self.optimizers.items()}
        generators = torch.get_rng_state(), torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        generator = torch.Generator().manual_seed(0)
        shape = (rows, train.sequence_length + 1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lru_cache.*")  # what it caches here never changes
            for number in range(self.config.machine.compile_warmup_steps):
                tokens = torch.randint(self.config.model.vocab_size, shape, generator=generator).to(self.device)
                inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
                if number == 0:
                    self._require_compiled(inputs, targets)
                self(inputs, targets)
        self.model.load_state_dict(weights)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(states[name])
        self.model.zero_grad(set_to_none=True)
        torch.set_rng_state(generators[0])
        if generators[1]:
            torch.cuda.set_rng_state_all(generators[1])
        self.warmup_seconds = time.perf_counter() - started
        return self.warmup_seconds

    def _require_compiled(self, inputs: Tensor, targets: Tensor) -> None:
        """Compile on one piece of a batch, outside the data-parallel engine; go back to eager where that fails.

        A compiler that is there may still not work (no headers, no OpenMP, no ptxas). All processes take the same way.
        """
        module = self.module.module if isinstance(self.module, DistributedDataParallel) else self.module
        assert isinstance(module, _Loss)
        parts, failure = self.config.train.micro_batches, ""
        try:
            with self._autocast():
                loss = module.compute(inputs.chunk(parts)[0], targets.chunk(parts)[0])
            # gradients without the hooks of the data-parallel engine, which counts them
            torch.autograd.grad(loss, list(self.model.parameters()), allow_unused=True)
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError, OSError) as error:
            failure = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
        failed = torch.tensor([float(bool(failure))], device=self.device)
        if dist.is_initialized():
            dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if failed.item():
            module.compute, self.compiled = self.model.loss, False
            self.notes.append(f"not compiled after all: {failure or 'it failed in another process'}")


def compiled_graphs() -> int:
    """Count the graphs torch.compile has made in this process: it must not grow after the warm-up."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
