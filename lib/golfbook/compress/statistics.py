"""What text says of a model's matrices: how large their inputs are together, and how much the loss cares about outputs.

An error E of a linear map ``y = x W^T`` changes ``y`` by ``x E^T``, and the loss to second order by about ``1/2 sum_i
g_i E_i H E_i^T`` a position, where H = mean of ``x^T x`` is the Gram matrix of the inputs and g_i the mean squared
gradient of the summed loss at output i (the Fisher information, with inputs and gradients taken as independent). GPTQ
needs H alone. Both are measured in the one model, by hooks on its linear maps; a table is one whose inputs are one-hot,
so that its H is diagonal and holds how often each row is looked up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from golfbook.compress.quantizer import Statistics
from golfbook.errors import DataError
from golfbook.evaluate.scoring import HEAD_LOGITS, evaluating
from golfbook.model.gpt import GPT

Key = tuple[str, str]  # a tensor, and what is known of it


def collect(
    model: GPT,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    gradients: bool,
    outputs: bool = False,
    recurrence: bool = True,
) -> Statistics:
    """Return what a quantiser can know of each tensor, by state-dict name; float32 on the CPU.

    ``batches`` are pairs of tokens and targets (B, T) int64. All kinds are sums over everything that the tensor was
    applied to, so that a block which runs twice adds both passes:

    - linear maps (R, C): "gram" (C, C), the sum of ``x^T x`` over inputs, divided by the positions of the text; maps
      that share their input (q, k, v) share the tensor. "gradient" (R,), the mean over inputs of the squared gradient
      of the summed loss of all next tokens;
    - tables (V, D): "count" (V,), how often each row is looked up, divided by the positions, and "gradient" (D,), as
      above, at the vectors looked up;
    - the head: "gram" (D, D) of the final state and its squared gradient at each logit before the soft cap, (V,):
      "gradient" of an untied head, "output" of a table that is the head too.

    Gradients come only with ``gradients``; with ``outputs`` linear maps other than the head also have "outputs" (R, R),
    the mean of the products of each two of them, whose diagonal is "gradient". Without ``recurrence`` the second passes
    of blocks are left out, as the published runs have it (PR 1406 section 14.1). What only training uses is not run.
    Where processes work together the sums are over all of them. The model works in eval mode on its own device and is
    left as it was. Raises :class:`DataError` where there is no batch.
    """
    tally = _Tally(model, gradients, outputs, recurrence)
    with evaluating(model), tally.watching(), torch.set_grad_enabled(gradients):
        for tokens, targets in batches:
            tally.batch(tokens.to(tally.device), targets.to(tally.device))
    if not tally.positions:
        raise DataError("statistics need at least one batch of text")
    return tally.result()


class _Tally:
    """Running sums over the inputs of each tensor and over the gradients at its outputs."""

    def __init__(self, model: GPT, gradients: bool, crossed: bool, recurrence: bool) -> None:
        self.model, self.gradients, self.crossed, self.recurrence = model, gradients, crossed, recurrence
        self.device = next(model.parameters()).device
        self.blocks = set(model.blocks.modules())
        self.positions = torch.zeros((), dtype=torch.float64, device=self.device)
        self.inputs: dict[Key, Tensor] = {}  # Gram matrices and counts
        self.shared: dict[Key, Key] = {}  # where the sum of a tensor's inputs stands: another's, where they are equal
        self.outputs: dict[Key, Tensor] = {}  # sums of squared gradients, and last the number of inputs
        self.products: dict[Key, Tensor] = {}  # sums of products of each two gradients
        self.passes: set[nn.Module] = set()
        self.last: tuple[Tensor, Key] | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Tap the model's linear maps and tables while the context lasts; its parameters get no gradients."""
        model, flags = self.model, [(p, p.requires_grad) for p in self.model.parameters()]
        tapped = [(f"{n}.weight", m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
        handles = [module.register_forward_hook(partial(self.see, name)) for name, module in tapped]
        recompute, model.checkpoint_activations = model.checkpoint_activations, False  # it would see everything twice
        model.requires_grad_(False)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            model.checkpoint_activations = recompute
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def batch(self, tokens: Tensor, targets: Tensor) -> None:
        """Add a batch of text: tokens and targets (B, T) int64."""
        self.positions += tokens.numel()
        self.passes.clear()
        hidden = self.model.hidden(tokens)  # (B, T, D)
        self.last = None
        with torch.autocast(self.device.type, enabled=False):  # it is for the forward pass alone
            self.head(hidden, targets)

    def head(self, hidden: Tensor, targets: Tensor) -> None:
        """Add the head's own statistics for final states (B, T, D), and send the loss's gradient back from there."""
        tied = self.model.config.tie_embeddings
        name = "tok_emb.weight" if tied else "lm_head.weight"
        states, wanted = hidden.detach().flatten(0, 1), targets.flatten()  # (n, D), (n,)
        self.add_inputs((name, "gram"), states)
        if not self.gradients:
            return
        weight, backward = self.model.head.detach().to(states.dtype), torch.empty_like(states)
        rows = max(1, HEAD_LOGITS // len(weight))
        for start in range(0, len(states), rows):
            part = slice(start, start + rows)
            z = F.linear(states[part], weight).float().requires_grad_()  # (rows, V)
            loss = F.cross_entropy(self.model.capped(z), wanted[part], reduction="sum")
            (slope,) = torch.autograd.grad(loss, z)
            self.add_outputs((name, "output" if tied else "gradient"), slope)
            torch.mm(slope.to(weight.dtype), weight, out=backward[part])
        hidden.backward(backward.view_as(hidden))

    def see(self, name: str, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        """Add what goes into a linear map or a table, and ask for the gradient at what comes out."""
        if not self.recurrence and module in self.passes and module in self.blocks:
            return
        self.passes.add(module)
        x = arguments[0]
        if isinstance(module, nn.Embedding):
            self.add_inputs((name, "count"), x, module.num_embeddings)
        else:
            key = (name, "gram")
            if self.last is None or not _same(x, self.last[0]):
                self.last = x, key
                self.add_inputs(key, x.detach())
            self.shared[key] = self.last[1]
        if self.gradients:
            if not output.requires_grad:  # the weights are frozen: the graph begins here
                output.requires_grad_()
            output.register_hook(partial(self.add_outputs, (name, "gradient")))
            if self.crossed and not isinstance(module, nn.Embedding):
                output.register_hook(partial(self.add_products, (name, "outputs")))

    def add_inputs(self, key: Key, x: Tensor, rows: int = 0) -> None:
        """Add the Gram matrix of inputs (..., C), or the counts of each of ``rows`` indices."""
        self.shared.setdefault(key, key)
        if rows:
            self._sum(self.inputs, key, torch.bincount(x.flatten(), minlength=rows).double())
        else:
            with torch.autocast(x.device.type, enabled=False):
                x = x.reshape(-1, x.size(-1)).float()
                self._sum(self.inputs, key, x.mT @ x)

    def add_outputs(self, key: Key, gradient: Tensor) -> None:
        """Add the squares of a gradient (..., R)."""
        gradient = gradient.detach().reshape(-1, gradient.size(-1)).float()
        squares = gradient.square().sum(0, dtype=torch.float64)
        self._sum(self.outputs, key, F.pad(squares, (0, 1), value=len(gradient)))

    def add_products(self, key: Key, gradient: Tensor) -> None:
        """Add the products of each two entries of a gradient (..., R)."""
        gradient = gradient.detach().reshape(-1, gradient.size(-1)).float()
        with torch.autocast(gradient.device.type, enabled=False):
            self._sum(self.products, key, gradient.mT @ gradient)

    def _sum(self, sums: dict[Key, Tensor], key: Key, value: Tensor) -> None:
        sums[key] = sums[key].add_(value) if key in sums else value

    def result(self) -> Statistics:
        """Return the means over all processes."""
        if dist.is_available() and dist.is_initialized():
            for value in (self.positions, *self.inputs.values(), *self.outputs.values(), *self.products.values()):
                dist.all_reduce(value)  # in one order everywhere
        means = {key: (value / self.positions).float().cpu() for key, value in self.inputs.items()}
        found: dict[str, dict[str, Tensor]] = {}
        for (name, kind), place in self.shared.items():
            found.setdefault(name, {})[kind] = means[place]
        for (name, kind), value in self.outputs.items():
            found[name][kind] = (value[:-1] / value[-1]).float().cpu()
        for (name, kind), value in self.products.items():
            found[name][kind] = (value / self.outputs[name, "gradient"][-1]).float().cpu()
        return found


def _same(x: Tensor, y: Tensor) -> bool:
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()
