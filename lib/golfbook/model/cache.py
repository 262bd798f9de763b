"""What a model keeps of the tokens it has read, so that each further one costs the arithmetic of one position.

Every part that looks back at earlier positions keeps what it needs of them under names of its own: attention its keys
and values, one set for each pass of a block that runs twice; local operators their last few inputs; TTT-Linear its fast
weights. Whatever looks at one position alone keeps nothing. For inference only: no gradient flows through a cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from golfbook.errors import RunError


class Cache:
    """The memories of one batch of sequences that are read side by side, up to ``length`` positions each.

    ``length`` is also what the rotary base is made for, so that logits equal those of a forward pass over an input of
    that length. ``position`` counts what has been read; the model moves it on.
    """

    def __init__(self, length: int) -> None:
        self.length, self.position = length, 0
        self._memories: dict[str, Memory] = {}

    def of(self, part: str) -> Memory:
        """Return the memory of a part of the model, empty at first."""
        return self._memories.setdefault(part, Memory(self))

    def check(self, time: int) -> None:
        """Raise :class:`RunError` where ``time`` further positions do not fit, or gradients are asked for."""
        if self.position + time > self.length:
            raise RunError(f"a cache of {self.length} positions holds {self.position}; {time} more do not fit")
        if torch.is_grad_enabled():
            raise RunError("no gradient flows through a cache: read under torch.inference_mode()")


class Memory:
    """Tensors of one part of the model, by name."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.tensors: dict[str, Tensor] = {}

    def all(self, name: str, x: Tensor) -> Tensor:
        """Keep ``x`` (B, T, ...) and return it after everything kept under ``name``, (B, position + T, ...)."""
        start, stop = self.cache.position, self.cache.position + x.size(1)
        if name not in self.tensors:
            self.tensors[name] = x.new_empty(x.size(0), self.cache.length, *x.shape[2:])
        self.tensors[name][:, start:stop] = x
        return self.tensors[name][:, :stop]

    def last(self, name: str, x: Tensor, count: int) -> Tensor:
        """Return ``x`` (B, T, ...) after the ``count`` positions before it, fewer near the start; keep what is next."""
        if name in self.tensors:
            x = torch.cat((self.tensors[name], x), dim=1)
        self.tensors[name] = x[:, max(0, x.size(1) - count) :]
        return x
