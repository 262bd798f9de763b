"""What the rest of the library must know about a part of the model, said beside its class.

A :class:`Component` says of each of its tensors how it starts, which optimiser trains it, how it is stored and whether
only training needs it, and of itself how much it computes. Optimisers, quantisers, exporters, checkpoints and costs ask
here and never look at names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Group = Literal["matrix", "embed", "head", "scalar"]
Storage = Literal["matrix", "mlp", "other", "control"]
Draw = Callable[[Tensor, torch.Generator], object]


@dataclass(frozen=True)
class Facts:
    """What holds for one tensor.

    ``group`` is the optimiser that trains it (PR 1166 section 14.1), ``storage`` the kind that a quantiser treats it
    as: "control" tensors (scales, gates, residual mixes) stay float32 where they are large, "matrix" and "mlp" are the
    projections of blocks, "other" is the rest. ``draw`` fills it with its initial values; None leaves those it was
    built with. ``dtype`` is that of the published checkpoints. Tensors that are ``training_only`` are not exported.
    """

    group: Group = "scalar"
    storage: Storage = "other"
    draw: Draw | None = None
    dtype: torch.dtype = torch.float32
    training_only: bool = False


@dataclass(frozen=True)
class Work:
    """Operations of one part, forward and backward; a multiplication and its addition are two."""

    label: str
    forward: float
    backward: float


class Component(nn.Module):
    """A part of the model that owns its facts."""

    def facts(self) -> dict[str, Facts]:
        """Return the facts of every parameter that is not another component's, by its name below this module."""
        return {}

    def work(self, length: int, pairs: int, training: bool) -> Iterable[Work]:
        """Return what this module computes for one sequence of ``length`` tokens, other components left out.

        ``pairs`` counts the pairs of positions that attention multiplies. ``training`` asks for what only a training
        step computes, too.
        """
        return ()


def facts_of(model: nn.Module) -> dict[str, Facts]:
    """Return the facts of all parameters of ``model`` by full name, in the model's order.

    Raises RuntimeError naming the parameters that no component speaks for.
    """
    said: dict[str, Facts] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Component):
            said |= {f"{prefix}.{name}".removeprefix("."): facts for name, facts in module.facts().items()}
    names = [name for name, _ in model.named_parameters()]
    if set(said) != set(names):
        raise RuntimeError(
            f"no component speaks for these parameters, or there are none: {', '.join(sorted(set(said) ^ set(names)))}"
        )
    return {name: said[name] for name in names}


def product(label: str, tokens: int, inputs: int, outputs: int, times: float = 2) -> Work:
    """Return the work of a linear map; backward is ``times`` the forward: gradients of input and weight, one each."""
    operations = 2 * tokens * inputs * outputs
    return Work(label, operations, times * operations)


def orthogonal(tensor: Tensor, generator: torch.Generator) -> None:
    """Fill a matrix with a random semi-orthogonal one."""
    nn.init.orthogonal_(tensor, generator=generator)


def constant(value: float) -> Draw:
    """Return what fills a tensor with one number."""
    return lambda tensor, _: tensor.fill_(value)


def normal(std: float) -> Draw:
    """Return what fills a tensor with N(0, std^2)."""
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


ZERO = constant(0.0)
