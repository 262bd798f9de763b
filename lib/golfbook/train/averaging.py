"""Averages of the weights over training, which are what the training stage hands on.

``train.averaging.method`` chooses (PR 1166 section 16): "none" the last weights; "ema" an exponential moving average,
started at the initial weights, without bias correction; "swa" the plain mean of snapshots taken late in the warmdown;
"swa_of_ema" the mean of snapshots of the moving average, as PR 1170's code does. PR 1166 and 1406 collect snapshots and
never use them; here they are the result.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from golfbook.config.schema import TrainConfig
from golfbook.train.schedules import snapshot_due


class WeightAverage:
    """Running averages in float32 of named weights; ``weights`` are those that training starts from.

    With "ema" and a decay of 0 the average would be the last weights, so nothing is stored, as with "none".
    """

    def __init__(self, config: TrainConfig, weights: Mapping[str, Tensor]) -> None:
        self.config = config
        self.snapshots = 0
        self._ema: dict[str, Tensor] = {}
        self._sum: dict[str, Tensor] = {}  # of the snapshots; empty before the first one
        if config.averaging.method == "swa_of_ema" or (config.averaging.method == "ema" and config.averaging.ema_decay):
            self._ema = _copy(weights)

    @torch.no_grad()
    def update(self, step: int, lr_scale: float, weights: Mapping[str, Tensor]) -> None:
        """Take in ``weights`` as they are after 0-based ``step``, which ran at ``lr_scale``."""
        if self._ema:
            torch._foreach_lerp_(
                list(self._ema.values()), _floats(weights, self._ema), 1 - self.config.averaging.ema_decay
            )
        if self.config.averaging.method not in ("swa", "swa_of_ema") or not snapshot_due(step, lr_scale, self.config):
            return
        source = self._ema or weights
        if self._sum:
            torch._foreach_add_(list(self._sum.values()), _floats(source, self._sum))
        else:
            self._sum = _copy(source)
        self.snapshots += 1

    @torch.no_grad()
    def result(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights handed on, named and typed as ``weights``, the last ones; :attr:`name` says which."""
        if self.snapshots:
            chosen: Mapping[str, Tensor] = {name: total / self.snapshots for name, total in self._sum.items()}
        else:
            chosen = self._ema or weights
        return {name: chosen[name].to(last.dtype, copy=True) for name, last in weights.items()}

    @property
    def name(self) -> str:
        """Return what :meth:`result` gives, for a report."""
        source = "moving average" if self._ema else "last weights"
        if self.snapshots:
            what = "the moving average" if self._ema else "the weights"
            return f"mean of {self.snapshots} snapshots of {what}" if self.snapshots > 1 else f"one snapshot of {what}"
        if self.config.averaging.method in ("swa", "swa_of_ema"):
            return f"{source} (no snapshot was taken)"
        return f"{source} (decay 0)" if self.config.averaging.method == "ema" and not self._ema else source

    def state_tensors(self) -> dict[str, Tensor]:
        """Return all but :meth:`state_numbers`, for a checkpoint: ``ema/<weight>`` and ``swa/<weight>``, float32."""
        ema = {f"ema/{name}": tensor for name, tensor in self._ema.items()}
        return ema | {f"swa/{name}": tensor for name, tensor in self._sum.items()}

    def state_numbers(self) -> dict[str, int]:
        """Return the counters that belong to :meth:`state_tensors`."""
        return {"snapshots": self.snapshots}

    def load_state_tensors(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
        """Restore what the two state methods gave, onto the device of this object's tensors or of ``tensors``.

        Raises ValueError where the state is not one of this kind of average of these weights.
        """
        ema, total = _section(tensors, "ema/"), _section(tensors, "swa/")
        snapshots = int(numbers["snapshots"])
        if (
            ema.keys() != self._ema.keys()
            or bool(total) != bool(snapshots)
            or (ema and total and ema.keys() != total.keys())
        ):
            raise ValueError(f"the saved average does not fit train.averaging.method '{self.config.averaging.method}'")
        self._ema = {name: ema[name].to(own.device, torch.float32, copy=True) for name, own in self._ema.items()}
        self._sum = {
            name: value.to(self._ema[name].device if self._ema else value.device, torch.float32, copy=True)
            for name, value in total.items()
        }
        self.snapshots = snapshots


def _copy(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to(torch.float32, copy=True) for name, tensor in weights.items()}


def _floats(weights: Mapping[str, Tensor], order: Mapping[str, Tensor]) -> list[Tensor]:
    return [weights[name].detach().to(torch.float32) for name in order]


def _section(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
