"""What is done where an artifact is over budget: nothing, fewer bits layer by layer, or small integers to zero.

A rule measures whole artifacts and stops at the first that fits; where none does, the smallest that it can make is kept
and says by how much it is too large. All counts of bytes are those of the artifact alone: code is taken off the limit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor

from golfbook.compress.quantizer import QuantizedTensor, Statistics, quantize
from golfbook.config.schema import QuantizeConfig
from golfbook.model.component import Storage

LEVELS = (1, 17, 2)  # of zstd, tried after the one that is set (PR 1170 and 1232: 16)
COARSE_BITS = 5
INTERPOLATIONS = 8  # sizes that pruning measures where it expects the limit, before it halves what is left
SLACK = 2**-14  # share of the limit that pruning may leave free: a kilobyte of 16 million
# Writes an artifact of these tensors with these settings and returns its bytes; the last one that is written stays.
Write = Callable[[Mapping[str, QuantizedTensor], QuantizeConfig], int]


@dataclass(frozen=True)
class Attempt:
    """One artifact that was measured: what it was, in words, and its size in bytes."""

    what: str
    bytes: int


@dataclass(frozen=True)
class Fitted:
    """What was stored and what was done to make it fit.

    ``config`` holds the settings that the artifact names, with the level of the coder that was used; ``coarse_layers``
    are at 5 bits, ``pruned`` counts the integers -1 and 1 that became 0, out of ``candidates``. A solved budget knew
    ``expected_bytes``, and the loss that quantising adds, in nats a token, before anything was written.
    """

    quantized: dict[str, QuantizedTensor]
    config: QuantizeConfig
    limit_bytes: int
    attempts: list[Attempt] = field(default_factory=list)
    coarse_layers: tuple[int, ...] = ()
    pruned: int = 0
    candidates: int = 0
    expected_bytes: int = 0
    expected_loss: float = 0.0

    @property
    def artifact_bytes(self) -> int:
        """Return the size of the artifact that was kept: the last one that was measured."""
        return self.attempts[-1].bytes

    @property
    def over_bytes(self) -> int:
        """Return the bytes above the limit, 0 where it fits."""
        return max(0, self.artifact_bytes - self.limit_bytes)

    @property
    def warning(self) -> str:
        """Return by how much the artifact is over its limit, and what would help; empty where it fits."""
        if not self.over_bytes:
            return ""
        count = sum(tensor.q.numel() for tensor in self.quantized.values() if tensor.q is not None)
        each = f", {8 * self.over_bytes / count:.2f} bits for each of its integers" if count else ""
        next_rule = {"row_maximum": "ladder", "gptq": "prune", "rate_distortion": "solve"}.get(self.config.quantizer)
        done = {
            "none": f"set quantize.fit: {next_rule}, or " if next_rule else "set ",
            "ladder": f"its {len(self.coarse_layers)} layers are at {COARSE_BITS} bits already: set ",
            "solve": "no step is coarse enough: set ",
            "prune": f"all {self.candidates:,} integers that may become zero are zero already: set ",
        }.get(self.config.fit, "set ")
        fewer = "fewer quantize.matrix_bits"
        if self.config.quantizer == "rate_distortion":
            fewer = "a smaller quantize.passthrough_numel" if self.config.fit == "solve" else "fewer quantize.rate.bits"
        return (
            f"the artifact is {self.over_bytes:,} bytes over the {self.limit_bytes:,} that code leaves of the budget"
            f"{each}; {done}{fewer}, or make the model smaller"
        )

    def report(self) -> dict[str, object]:
        """Return what a result tells of it, by keys with their units in the names."""
        return {
            "fit_attempts": len(self.attempts),
            "coder_level": self.config.coder_level,
            "coarse_layers": list(self.coarse_layers),
            "pruned_integers": self.pruned,
            "artifact_limit_bytes": self.limit_bytes,
            "over_bytes": self.over_bytes,
            "expected_artifact_bytes": self.expected_bytes,
            "expected_loss_increase": self.expected_loss,
        }


def fit(
    state: Mapping[str, Tensor],
    storage: Mapping[str, Storage],
    config: QuantizeConfig,
    statistics: Statistics | None,
    write: Write,
    limit: int,
) -> Fitted:
    """Quantise a state dict so that its artifact has at most ``limit`` bytes, by the rule ``config.fit``.

    The last artifact that ``write`` was called for is the one that is returned. Raises what the quantiser raises.
    """
    start = Fitted(quantize(state, storage, config, statistics), config, limit)
    _measure(start, write, "as quantised")
    if start.artifact_bytes <= limit:
        return start
    if config.fit == "ladder":
        return _ladder(start, state, storage, statistics, write)
    if config.fit == "prune":
        return _prune(start, storage, write)
    return start


def _measure(fitted: Fitted, write: Write, what: str) -> Fitted:
    """Write an artifact and note its size."""
    fitted.attempts.append(Attempt(what, write(fitted.quantized, fitted.config)))
    return fitted


def middle_out(layers: int) -> list[int]:
    """Return the layers from the middle outwards: 5, 6, 4, 7, 3, ... of eleven (PR 1170 section 17.5)."""
    middle = layers // 2
    found = chain([middle], *((middle + i, middle - i) for i in range(1, layers + 1)))
    return [layer for layer in found if 0 <= layer < layers]


def _ladder(
    start: Fitted,
    state: Mapping[str, Tensor],
    storage: Mapping[str, Storage],
    statistics: Statistics | None,
    write: Write,
) -> Fitted:
    """Try other levels of the coder, then one more layer at 5 bits and all levels again (PR 1170 section 17.5)."""
    config, fitted = start.config, start
    bits = {name: min(COARSE_BITS, getattr(config, name)) for name in ("matrix_bits", "mlp_bits")}
    coarse = config.model_copy(update=bits)
    layer_of = {name: int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name))}
    for layer in (None, *middle_out(max(layer_of.values(), default=-1) + 1)):
        if layer is not None:
            mine = {name: state[name] for name, of in layer_of.items() if of == layer and _is_matrix(name, storage)}
            fitted = replace(
                fitted,
                quantized=fitted.quantized | quantize(mine, storage, coarse, statistics),
                coarse_layers=(*fitted.coarse_layers, layer),
            )
        first = () if layer is None else (config.coder_level,)
        for level in (*first, *LEVELS):
            fitted = replace(fitted, config=config.model_copy(update={"coder_level": level}))
            named = ", ".join(map(str, fitted.coarse_layers)) or "none"
            if _measure(fitted, write, f"level {level}, layers at {COARSE_BITS} bits: {named}").over_bytes == 0:
                return fitted
    return fitted


def _is_matrix(name: str, storage: Mapping[str, Storage]) -> bool:
    return storage[name] in ("matrix", "mlp")


class _Ones:
    """The integers -1 and 1 of matrices, those with the smallest steps first (PR 1406 section 17)."""

    def __init__(self, quantized: Mapping[str, QuantizedTensor], storage: Mapping[str, Storage]) -> None:
        self.quantized = quantized
        chosen = {name: t.q for name, t in quantized.items() if t.q is not None and _is_matrix(name, storage)}
        self.names, self.places, values, steps = list(chosen), [], [], []
        for name, q in chosen.items():
            place = (q.flatten().abs() == 1).nonzero()[:, 0]
            scale = quantized[name].scale
            assert scale is not None
            rows = place // q.shape[-1] if scale.ndim else torch.zeros_like(place)
            self.places.append(place)
            values.append(q.flatten()[place] > 0)
            steps.append(scale.float().reshape(-1)[rows])
        if not chosen:
            return
        self.counts = torch.stack([torch.bincount(q.flatten().long() + 128, minlength=256) for q in chosen.values()])
        self.order = torch.cat(steps).argsort(stable=True)  # scale^2 sorts positive scales as scale does
        of = torch.repeat_interleave(torch.arange(len(chosen)), torch.tensor([len(p) for p in self.places]))
        self.kinds = (2 * of + torch.cat(values))[self.order]  # tensor and sign of each, in this order

    def zeroed(self, count: int) -> dict[str, QuantizedTensor]:
        """Return the tensors with the first ``count`` of these integers set to 0."""
        gone = torch.zeros(len(self.order), dtype=torch.bool)
        gone[self.order[:count]] = True
        found = dict(self.quantized)
        for name, place, mine in zip(self.names, self.places, gone.split([len(p) for p in self.places]), strict=True):
            q = found[name].q
            assert q is not None
            changed = q.flatten().index_fill(0, place[mine], 0).view_as(q)
            found[name] = replace(found[name], q=changed)
        return found

    def entropy_bytes(self, count: int) -> float:
        """Return the bytes that the integers need with ``count`` of these at 0, coded one by one tensor by tensor."""
        gone = torch.bincount(self.kinds[:count], minlength=2 * len(self.names)).view(-1, 2)
        counts = self.counts.clone()
        counts[:, 127] -= gone[:, 0]
        counts[:, 129] -= gone[:, 1]
        counts[:, 128] += gone.sum(dim=1)
        share = counts / counts.sum(dim=1, keepdim=True)
        return float(torch.special.entr(share).sum(dim=1) @ counts.sum(dim=1).float()) / (8 * 0.6931471805599453)


def _prune(start: Fitted, storage: Mapping[str, Storage], write: Write) -> Fitted:
    """Set as few of the integers -1 and 1 to zero as it takes, those with the smallest steps first.

    Sizes are measured where entropy, scaled by the sizes known so far, expects the limit.
    """
    ones = _Ones(start.quantized, storage)
    if not ones.names:
        return start
    total, limit = len(ones.order), start.limit_bytes
    sizes, best = {0: start.artifact_bytes}, start

    def attempt(count: int) -> Fitted:
        fitted = replace(start, quantized=ones.zeroed(count), pruned=count, candidates=total)
        return _measure(fitted, write, f"{count:,} of {total:,} integers -1 and 1 set to 0")

    low, high = 0, total + 1  # too large at low; fits at high, or is not known to fit anywhere
    while high - low > 1 and limit - sizes.get(high, -limit) > SLACK * limit:
        if len(sizes) <= INTERPOLATIONS:
            count = _expected(ones, sizes, low, high, limit - int(SLACK * limit / 2))
        else:
            count = (low + high) // 2
        best = attempt(count)
        sizes[count] = best.artifact_bytes
        low, high = (low, count) if sizes[count] <= limit else (count, high)
    last = min(high, total)  # where nothing fits, all of them
    return best if best.pruned == last else attempt(last)


def _expected(ones: _Ones, sizes: Mapping[int, int], low: int, high: int, wanted: int) -> int:
    """Return the count between ``low`` and ``high`` whose artifact should have ``wanted`` bytes."""
    entropy = {count: ones.entropy_bytes(count) for count in sizes}
    other = high if high in sizes else max((count for count in sizes if count < low), default=low)
    run = entropy[other] - entropy[low]
    rate = (sizes[other] - sizes[low]) / run if run else 1.0  # bytes of the artifact for a byte of entropy
    aim = entropy[low] + (wanted - sizes[low]) / (rate if rate > 0 else 1.0)
    first, last = low + 1, high - 1
    while first < last:  # the first count whose entropy is at most what is aimed at
        middle = (first + last) // 2
        first, last = (first, middle) if ones.entropy_bytes(middle) <= aim else (middle + 1, last)
    return first
