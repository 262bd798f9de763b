"""The seam of quantisers: what one takes and gives, and which tensors it turns into integers.

A quantiser is a function of a state dict, of what each tensor is stored as (:class:`golfbook.model.component.Facts`),
of the settings and of statistics; a new one is a module and a line in :mod:`golfbook.config.tables`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from golfbook.compress.trellis import points
from golfbook.config.schema import QuantizeConfig
from golfbook.config.tables import QUANTIZERS, named
from golfbook.errors import RunError
from golfbook.model.component import Storage

Kind = Literal["int", "step", "float16", "float32"]
Statistics = Mapping[str, Mapping[str, Tensor]]  # tensor -> what was measured on training text, by name
QUARTERS = torch.tensor([1.0, 1.1892071, 1.4142135, 1.6817929])  # 2^(k/4) in float32


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """One stored tensor.

    ``kind`` "int": ``q`` is int8 of the tensor's shape with values of ``bits`` bits, and ``scale`` is float16 (rows,)
    for a matrix, 0-D float16 or float32 otherwise. Other kinds: ``value`` holds the tensor in that dtype.

    ``kind`` "step", where an entropy coder spends the bits: ``q`` is int16 of a matrix's shape, ``bits`` is 0, and the
    step of entry (i, j) is ``scale * 2^((rows[i] + columns[j]) / 4)`` with ``scale`` 0-D float16 and ``rows`` and
    ``columns`` uint8 or None for zeros. ``states`` counts the states of the trellis along each row; 1: there is none,
    and values are whole multiples of the step (:mod:`golfbook.compress.trellis` says what they are otherwise).
    """

    name: str
    kind: Kind
    bits: int
    q: Tensor | None = None
    scale: Tensor | None = None
    value: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    states: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the tensor this stands for."""
        return tuple((self.value if self.q is None else self.q).shape)  # type: ignore[union-attr]

    def dequantize(self) -> Tensor:
        """Return the decoded tensor in float32, in memory of its own."""
        if self.q is None or self.scale is None:
            assert self.value is not None
            return self.value.to(torch.float32, copy=True)
        if self.kind == "step":
            return (self.q if self.states == 1 else points(self.q, self.states) / 2) * self.steps()
        scale = self.scale.float()
        return self.q.float() * (scale[:, None] if scale.ndim else scale)

    def steps(self) -> Tensor:
        """Return the steps of a tensor of kind "step", float32 that broadcasts to its shape; exact on any machine."""
        assert self.scale is not None
        logs = torch.zeros((1, 1), dtype=torch.int32)
        if self.rows is not None:
            logs = logs + self.rows.int()[:, None]
        if self.columns is not None:
            logs = logs + self.columns.int()
        return self.scale.float() * torch.ldexp(QUARTERS[logs % 4], logs // 4)


class Quantizer(Protocol):
    """Integers and side information of a state dict of float tensors, in the order of its names.

    ``storage`` says for each name what it is stored as, ``statistics`` what training text tells of it; a rule that
    looks at weights alone is given none. Raises :class:`RunError` naming a tensor that cannot be stored.
    """

    def __call__(
        self,
        state: Mapping[str, Tensor],
        storage: Mapping[str, Storage],
        config: QuantizeConfig,
        statistics: Statistics,
    ) -> dict[str, QuantizedTensor]: ...


@torch.no_grad()
def quantize(
    state: Mapping[str, Tensor],
    storage: Mapping[str, Storage],
    config: QuantizeConfig,
    statistics: Statistics | None = None,
) -> dict[str, QuantizedTensor]:
    """Quantise a state dict by the quantiser that ``config`` names, on the device its tensors are on.

    Raises :class:`RunError` naming the tensor that is not finite, not a float tensor, or too large for float16.
    """
    quantizer: Quantizer = named(QUANTIZERS, config.quantizer)
    return quantizer({name: tensor.detach() for name, tensor in state.items()}, storage, config, statistics or {})


def dequantize(quantized: Mapping[str, QuantizedTensor]) -> dict[str, Tensor]:
    """Return the decoded float32 tensors, exactly what a reader of the artifact gets."""
    return {name: tensor.dequantize() for name, tensor in quantized.items()}


def stored_as(storage: Storage, numel: int, config: QuantizeConfig) -> tuple[Kind, int]:
    """Return how a tensor of ``numel`` values is stored and in how many bits (PR 1166 section 17.1).

    Up to ``passthrough_numel`` values float16; larger control tensors float32, of which the published limit of 65,536
    leaves none; everything else integers of ``matrix_bits``, ``mlp_bits`` where they differ, or ``other_bits``.
    """
    if numel <= config.passthrough_numel:
        return "float16", 16
    if storage == "control":
        return "float32", 32
    if storage == "other":
        return "int", config.other_bits
    return "int", (config.mlp_bits if storage == "mlp" else 0) or config.matrix_bits


def finite(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor in contiguous float32; raises :class:`RunError` where it holds anything but finite floats."""
    if not tensor.is_floating_point():
        raise RunError(f"cannot store tensor '{name}': expected float values, found {tensor.dtype}")
    weight = tensor.float().contiguous()
    if not torch.isfinite(weight).all():
        raise RunError(f"cannot quantise tensor '{name}': it holds values that are not finite (diverged training?)")
    return weight


def unquantized(name: str, weight: Tensor, kind: Kind) -> QuantizedTensor:
    """Return a float32 tensor stored as it is or as float16; raises :class:`RunError` where float16 is too small."""
    if kind == "float32":
        return QuantizedTensor(name, "float32", 32, value=weight.clone())
    half = weight.half()
    check_range(name, weight, half)
    return QuantizedTensor(name, "float16", 16, value=half)


def check_range(name: str, weight: Tensor, stored: Tensor) -> None:
    """Raise :class:`RunError` naming the tensor where ``stored``, its float16 values or scales, overflowed."""
    if not torch.isfinite(stored).all():
        raise RunError(
            f"cannot quantise tensor '{name}': its largest magnitude {weight.abs().max().item():.3g} does not fit "
            "float16, whose largest number is 65504 (diverged training?)"
        )
