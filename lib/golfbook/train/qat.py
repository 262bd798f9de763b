"""Quantisation-aware training: forward and backward see the weights that the exporter would store.

Within :func:`fake_quantized` each parameter that the exporter turns into integers holds its decoded value, computed by
the exporter itself: same choice of tensors, bits, clip rule, float16 scale and floor. Gradients are taken there and
applied to the full-precision weights that come back afterwards, which is the straight-through estimator. The clip rule
while training is the one of the export, the search over five percentiles included, since another would train for a grid
that the artifact does not have; it runs once a step, not once a forward pass.

Weights are data for a compiled model, so nothing is compiled again and nothing can be folded away. That is what
happened to the switch in PR 1166 and 1406: compiled as a constant, it changed nothing, and it could only have reached
two projections that are not stored as integers at all (:func:`published_fake_quantized`, for comparison).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from golfbook.compress.quantizer import dequantize, quantize, stored_as
from golfbook.config.schema import QuantizeConfig
from golfbook.model.component import Storage, facts_of

PUBLISHED_TARGETS = ("bigram.proj.weight", "ve_shared.proj.weight")


def quantized_names(model: nn.Module, config: QuantizeConfig) -> list[str]:
    """Return the parameters of ``model`` that the exporter stores as integers, in the model's order."""
    return list(_quantized_storage(model, config))


def _quantized_storage(model: nn.Module, config: QuantizeConfig) -> dict[str, Storage]:
    """Return what each parameter of :func:`quantized_names` is stored as."""
    facts = facts_of(model)
    return {
        name: facts[name].storage
        for name, parameter in model.named_parameters()
        if stored_as(facts[name].storage, parameter.numel(), config)[0] == "int" and not facts[name].training_only
    }


@contextmanager
def fake_quantized(model: nn.Module, config: QuantizeConfig) -> Iterator[list[str]]:
    """Let parameters hold their quantised values within the block; yield the names of those that do.

    Run forward and backward inside and the optimiser outside. The values are exactly those of
    ``quantize`` followed by ``dequantize``. Raises :class:`golfbook.errors.RunError` naming a weight that cannot
    be quantised.
    """
    parameters = dict(model.named_parameters())
    storage = _quantized_storage(model, config)
    values = dequantize(quantize({name: parameters[name] for name in storage}, storage, config))
    with _substituted(parameters, values):
        yield list(storage)


@contextmanager
def published_fake_quantized(model: nn.Module) -> Iterator[list[str]]:
    """Do what the published switch does on a torch release where it takes effect (PR 1166 section 16); for comparison.

    It reaches only the two projections that run through the scripts' own linear layer, and rounds them by
    :func:`published_fake_quantize`.
    """
    parameters = dict(model.named_parameters())
    values = {n: published_fake_quantize(parameters[n].detach()) for n in PUBLISHED_TARGETS if n in parameters}
    with _substituted(parameters, values):
        yield list(values)


def published_fake_quantize(weight: Tensor) -> Tensor:
    """Round a float32 matrix as published: 6 bits with range [-32, 31], float32 scale ``max(row max, 1) / 31``.

    The exporter differs twice: its range is [-31, 31] and its scale is rounded to float16.
    """
    scale = (weight.abs().amax(dim=1, keepdim=True) / 31).clamp_min(1 / 31)
    return (weight / scale).round().clamp(-32, 31) * scale


@contextmanager
def _substituted(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let parameters hold ``values`` in their own memory, and give them their weights back whatever happens."""
    kept: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for name, value in values.items():
                kept[name] = parameters[name].detach().clone()
                parameters[name].copy_(value)
        yield
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                parameters[name].copy_(weight)
