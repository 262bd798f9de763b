"""Spend bits where the loss needs them: equal slope over all weights, error feedback and a trellis.

A small error E of a linear map's weights (rows, columns) raises the loss by about ``1/2 sum_i g_i e_i H e_i^T``: g_i is
the mean squared gradient at output i and H the Gram matrix of the inputs (a Fisher metric in Kronecker factors). With
``H = L^T L``, L lower triangular, the error that a column leaves after the later ones have made up for what they can is
``L_jj`` times its own; so the same loss everywhere, for each bit that is spent, means the step
``s0 / (sqrt(g_i) L_jj)`` with one s0 for the whole model (reverse water-filling; WaterSIC, arXiv 2603.04956, has the
columns of one matrix, Radio, arXiv 2505.03031, the tensors). How many bits that takes is the entropy coder's matter.

With the whole matrix G of products of gradients, errors can be fed to later rows as well (``feedback: both``). On a PR
1166 model of small scale, 1,600 steps, that lowered ``tr(G E H E^T)`` but doubled the divergence of the predictions at
equal bits (0.0014 to 0.0027 bits per byte at 3.5 bits), so the default is "columns".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from golfbook.compress.estimates import estimate_bits
from golfbook.compress.gptq import reverse_factor
from golfbook.compress.quantizer import QuantizedTensor, Statistics, check_range, finite, unquantized
from golfbook.compress.trellis import points
from golfbook.compress.viterbi import Prices, prices, search
from golfbook.config.schema import QuantizeConfig, RateConfig
from golfbook.errors import RunError
from golfbook.model.component import Storage

# k of the records' clip over the largest integer, in deviations of a row: step of matrices, MLPs and tables (PR 1855).
K_SIGMA = {"matrix": 13 / 31, "mlp": 11.5 / 31, "other": 14 / 63, "control": 14 / 63}
FAR = 32  # quarter octaves: no row's or column's step is further from the median one
# What a bit is worth where the loss falls as 4^-bits: 2 ln 2 times the error step^2 / 12, in squares of half a step.
SLOPE = 2 * math.log(2) / 12 * 4
# Deviations of a matrix's weights: no mean step is larger. The loss is a quadratic form for small errors only.
COARSEST = 2.0
LEAST_MEAN = 1e-12  # of squared gradients: what the loss does not depend on has a coarse step, and no infinite one
ROW_BLOCKS = 8
SAMPLE = 2**19  # weights on which the common step is sought


@dataclass(frozen=True, eq=False)
class Relief:
    """A matrix and how fine it must be: entry (i, j) has the step ``s0 * overall * rows[i] * columns[j]``.

    ``weight`` is float32 (R, C), ``rows`` (R,) and ``columns`` (C,) float64 with a geometric mean of 1, None where all
    are alike; ``factor`` is the lower triangular L (C, C) of the inputs' Gram matrix, None without feedback, and
    ``mixer`` the same of the gradients at the outputs, M (R, R), None without feedback over rows.
    """

    weight: Tensor
    overall: float
    rows: Tensor | None
    columns: Tensor | None
    factor: Tensor | None
    mixer: Tensor | None

    @property
    def coarsest(self) -> float:
        """Return the largest s0 that makes a difference: its mean step is two deviations of the weights."""
        return COARSEST * float(self.weight.square().mean().sqrt()) / self.overall or math.inf

    def steps(self, common: float) -> QuantizedTensor:
        """Return what is stored of the steps: a float16 scale and logs in quarter octaves; ``q`` is zeros.

        Steps are as ``common`` says, but neither coarser than makes sense nor so fine that integers pass 2^13.
        """
        scale, logs = math.log2(min(common, self.coarsest) * self.overall) * 4, list[Tensor | None]()
        for steps in (self.rows, self.columns):
            if steps is None:
                logs.append(None)
                continue
            exact = 4 * steps.double().log2()
            exact = exact.clamp(exact.median() - FAR, exact.median() + FAR)
            lowest = math.floor(exact.min())
            log = (exact - lowest).round()
            scale += float((exact - log).mean())  # rounding changes no mean step
            logs.append(log.to(torch.uint8))
        empty = torch.zeros((1, 1), dtype=torch.int16).expand_as(self.weight)
        unit = QuantizedTensor("", "step", 0, q=empty, scale=torch.ones(()).half(), rows=logs[0], columns=logs[1])
        finest = float((self.weight / unit.steps()).abs().max()) / 2**13
        return replace(unit, scale=torch.tensor(max(2 ** (scale / 4), finest, 2.0**-24)).half())

    def cost(self, stored: QuantizedTensor) -> float:
        """Return bits with what errors are worth in bits, to choose between two ways to store this at one step."""
        error = ((self.weight - stored.dequantize()) / stored.steps()).square().mean()
        return sum(estimate_bits([stored]).values()) + self.weight.numel() / 2 * math.log2(float(error) + 1e-12)

    def scaled(self, every: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return every n-th row's weights over their steps at s0 = 1, log2 of what they deviate by, and the largest s0.

        All are flat.
        """
        steps = torch.full((1, 1), self.overall)
        steps = steps if self.rows is None else steps * self.rows[::every, None].float()
        steps = steps if self.columns is None else steps * self.columns.float()
        squares = self.weight.square()
        spread = squares.mean(dim=1)[::every, None] * squares.mean(dim=0) / squares.mean().clamp_min(1e-30)
        deviations = spread.clamp_min(1e-30).log2() / 2 - steps.log2()
        values = (self.weight[::every] / steps).flatten()
        deviations = deviations.expand_as(self.weight[::every]).flatten()
        return values, deviations, torch.tensor(self.coarsest).expand_as(values)


def rate_distortion(
    state: Mapping[str, Tensor], storage: Mapping[str, Storage], config: QuantizeConfig, statistics: Statistics
) -> dict[str, QuantizedTensor]:
    """Quantise all matrices at the common step that spends ``config.rate.bits`` on a weight, in the mean.

    Small tensors, vectors and what has no inputs of its own (no statistics) are stored as float16. Raises
    :class:`RunError` naming a tensor that cannot be stored, or that its statistics do not fit.
    """
    reliefs = survey(state, storage, config, statistics)
    common = common_step(reliefs, config.rate.bits)
    return quantize_at(common, state, storage, config, reliefs)


def survey(
    state: Mapping[str, Tensor], storage: Mapping[str, Storage], config: QuantizeConfig, statistics: Statistics
) -> dict[str, Relief]:
    """Return the relief of every matrix that becomes integers, by name; raises what :func:`rate_distortion` raises."""
    found = {}
    for name, tensor in state.items():
        known = statistics.get(name, {})
        if tensor.numel() <= config.passthrough_numel or tensor.ndim != 2 or storage[name] == "control":
            continue
        if known or not config.calibrated:
            found[name] = relief(name, finite(name, tensor), storage[name], known, config.rate)
    return found


def quantize_at(
    common: float,
    state: Mapping[str, Tensor],
    storage: Mapping[str, Storage],
    config: QuantizeConfig,
    reliefs: Mapping[str, Relief],
) -> dict[str, QuantizedTensor]:
    """Quantise the matrices of ``reliefs`` at the step s0 = ``common``, and store the rest as floats."""
    stored = {}
    for name, tensor in state.items():
        if name in reliefs:
            stored[name] = coded(name, reliefs[name], common, config.rate, config.rate.states)
            if storage[name] == "other" and config.rate.states > 1:
                # rows of tokens that training never saw are alike, which the coder can use where there is no trellis
                rounded = coded(name, reliefs[name], common, config.rate, 1)
                stored[name] = min(stored[name], rounded, key=reliefs[name].cost)
        else:
            weight = finite(name, tensor)
            large = storage[name] == "control" and weight.numel() > config.passthrough_numel
            stored[name] = unquantized(name, weight, "float32" if large else "float16")
    return stored


def relief(name: str, weight: Tensor, storage: Storage, known: Mapping[str, Tensor], rate: RateConfig) -> Relief:
    """Return how fine each weight of a matrix must be by ``rate.rule``, and what feeds its errors forward."""
    factor, mixer, sensitivity = None, None, None
    if known:
        sensitivity, gram = fisher(known)
        if (len(sensitivity), len(gram)) != weight.shape:
            raise RunError(
                f"statistics of tensor '{name}' are of a matrix ({len(sensitivity)}, {len(gram)}), it has shape "
                f"{tuple(weight.shape)}"
            )
        if not torch.isfinite(sensitivity).all() or sensitivity.min() < 0:
            raise RunError(f"statistics of tensor '{name}' hold squares that are negative or not finite")
        factor = reverse_factor(gram, rate.damping, name=name)
        if rate.feedback == "both" and "outputs" in known:
            mixer = reverse_factor(known["outputs"], rate.damping, name=name)
            blocks = [mixer[part, part] for part in row_blocks(len(mixer))]
            sensitivity = torch.cat([block.double().square().sum(dim=0) for block in blocks])
        else:
            sensitivity = sensitivity.double() + rate.damping * sensitivity.double().mean().clamp_min(LEAST_MEAN)
    alone = {
        "row_maximum": lambda: weight.abs().amax(dim=1),
        "percentiles": lambda: weight.abs().quantile(0.9995, dim=1),
        "k_sigma": lambda: K_SIGMA[storage] * weight.std(dim=1),
        "equal": lambda: None,
    }
    overall, rows, columns = 1.0, None, None
    if rate.rule in alone:
        rows = alone[rate.rule]()
        if rows is not None:
            rows = rows.double().clamp_min(max(float(rows.mean()) / 64, 1e-12))
            overall = float(rows.log().mean().exp())
            rows = rows / overall
    else:
        assert sensitivity is not None and factor is not None
        parts = ("tensor", "row", "column") if rate.rule == "all" else rate.rule.split("+")
        by_row, by_column = sensitivity.rsqrt(), factor.diagonal().double().reciprocal()
        mean_row, mean_column = by_row.log().mean().exp(), by_column.log().mean().exp()  # geometric
        rows = by_row / mean_row if "row" in parts else None
        columns = by_column / mean_column if "column" in parts else None
        overall = float(mean_row * mean_column) if "tensor" in parts else 1.0
    return Relief(weight, overall, rows, columns, factor if rate.feedback != "none" else None, mixer)


def row_blocks(rows: int) -> list[slice]:
    """Return the pieces into which ``rows`` rows are cut; the errors of one reach all later ones."""
    size = -(-rows // ROW_BLOCKS)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def common_step(reliefs: Mapping[str, Relief], bits: float) -> float:
    """Return the step s0 at which plain rounding spends ``bits`` on a weight in the mean; a trellis spends the same.

    Counted is the entropy of integers whose deviation is known to half an octave, on the rows of a sample.
    """
    every = -(-sum(relief.weight.numel() for relief in reliefs.values()) // SAMPLE)
    parts = [relief.scaled(every) for relief in reliefs.values()]
    if not any(bool(values.any()) for values, _, _ in parts):
        return 1.0  # all zeros, whatever the step
    values, deviations, coarsest = (torch.cat(column) for column in zip(*parts, strict=True))  # (n,) each
    step = float(deviations.mean().exp2()) * 2 ** (2.05 - bits)
    for _ in range(12):  # an octave of the step is a bit, or less where zeros prevail
        steps = coarsest.clamp(max=step)
        found = _entropy((values / steps).round(), deviations - steps.log2())
        if abs(found - bits) < 0.001:
            break
        step *= 2 ** (found - bits)
    return step


def _entropy(q: Tensor, deviations: Tensor) -> float:
    """Return the bits an integer of ``q`` (n,) takes, with one table for each half octave of ``deviations`` (n,)."""
    contexts = (2 * deviations).round().clamp(-16, 40).long() << 20
    pairs, counts = (contexts + q.clamp(-(2**18), 2**18).long()).unique(return_counts=True)
    _, place = ((pairs + 2**19) >> 20).unique(return_inverse=True)
    totals = torch.zeros(int(place.max()) + 1, dtype=torch.int64).index_add_(0, place, counts)
    return float((counts * (totals[place] / counts).log2()).sum()) / len(q)


def fisher(known: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the Kronecker factors of a tensor's Fisher metric: of its rows (R,), and of its columns (C, C).

    A table is a linear map of one-hot inputs: its rows count as often as they are looked up, and its columns by the
    gradient that arrives. A table that serves as the head too has both terms; one product takes their place that has
    the same trace in every row, and the same sum over rows.
    """
    if "count" not in known:
        return known["gradient"], known["gram"]
    rows, columns = known["count"].double(), known["gradient"].double().diag()
    if "gram" not in known:
        return rows, columns
    output, gram = known["output"].double(), known["gram"].double()
    trace = output * gram.trace() + rows * columns.trace()  # (R,)
    return trace / trace.sum(), output.sum() * gram + rows.sum() * columns


def coded(name: str, relief: Relief, common: float, rate: RateConfig, states: int) -> QuantizedTensor:
    """Return the integers of one matrix at the step s0 = ``common``, with a trellis of ``states`` states."""
    stored = relief.steps(common)
    assert stored.scale is not None
    check_range(name, relief.weight, stored.scale)
    steps = stored.steps()
    q = _walks(relief, steps, states)
    if rate.rate_weight:
        q = _walks(relief, steps, states, prices(q, states), rate.rate_weight * SLOPE)
    return QuantizedTensor(name, "step", 0, q, stored.scale, None, stored.rows, stored.columns, states)


def _walks(relief: Relief, steps: Tensor, states: int, prices: Prices | None = None, rate: float = 0.0) -> Tensor:
    """Return the integers (R, C) int16 of all rows, block by block where rows feed each other."""
    weight, factor, mixer = relief.weight, relief.factor, relief.mixer
    if mixer is None or factor is None:
        return search(weight, steps, states, factor, None, prices, rate)
    steps = steps.expand_as(weight)
    unit = (factor / factor.diagonal()[:, None]).T
    left, q = torch.zeros_like(weight), torch.empty(weight.shape, dtype=torch.int16)
    for part in row_blocks(len(weight)):
        before = mixer[part, : part.start] @ left[: part.start]  # what errors so far do to these outputs
        offset = torch.linalg.solve_triangular(mixer[part, part], before, upper=False)
        fees = prices and prices.part(part)
        q[part] = search(weight[part], steps[part], states, factor, offset, fees, rate)
        left[part] = (weight[part] - points(q[part], states) * steps[part] / 2) @ unit
    return q
