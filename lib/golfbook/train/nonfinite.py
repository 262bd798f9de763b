"""Why a training step went wrong: the first tensor that is not finite, and where it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def first_nonfinite(named: Iterable[tuple[str, Tensor | None]]) -> str:
    """Return the name of the first tensor with NaN or infinity, and how many of its values are; empty without one."""
    for name, tensor in named:
        if tensor is None or not tensor.is_floating_point():
            continue
        bad = int((~tensor.isfinite()).sum().item())
        if bad:
            return f"{name} ({bad:,} of {tensor.numel():,} values)"
    return ""


@torch.no_grad()
def first_nonfinite_output(model: nn.Module, forward: Callable[[], Any]) -> str:
    """Run ``forward`` and name the first module of ``model`` whose output is not finite; empty where all are.

    Modules report when they return, so an inner module comes before the one that contains it.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
            tensors = outputs if isinstance(outputs, tuple) else (outputs,)
            if not found:
                bad = first_nonfinite((f"output of {name}", t) for t in tensors if isinstance(t, Tensor))
                found.extend([bad] if bad else [])

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def explain(model: nn.Module, forward: Callable[[], Any]) -> str:
    """Say where the trouble of a step starts: a weight, else an activation of ``forward``, else a gradient.

    A weight that is not finite was spoilt by an earlier step; an activation overflowed in this one; a gradient alone
    overflowed in the backward pass.
    """
    weight = first_nonfinite(model.named_parameters())
    if weight:
        return f"weight {weight}"
    activation = first_nonfinite_output(model, forward)
    if activation:
        return activation
    gradient = first_nonfinite((name, parameter.grad) for name, parameter in model.named_parameters())
    return f"gradient of {gradient}" if gradient else "the loss alone"


def largest(model: nn.Module) -> str:
    """Find the parameter with the largest absolute value and that value, to see what grew."""
    sizes = {name: parameter.detach().abs().max().item() for name, parameter in model.named_parameters()}
    name = max(sizes, key=lambda key: sizes[key] if sizes[key] == sizes[key] else float("inf"))
    return f"{name} ({sizes[name]:.3g})"
