"""Fill a byte budget: the finest common step whose artifact fits, known before anything is written.

The artifact's bytes are what the entropy coder's models charge, plus its header; the loss is the quadratic form that
the steps were chosen by (:mod:`golfbook.compress.rate_distortion`). Both are computed from the integers, so a plan
costs a quantisation and no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from golfbook.compress.fit import Attempt, Fitted, Write
from golfbook.compress.quantizer import QuantizedTensor, Statistics
from golfbook.compress.rate_distortion import Relief, common_step, fisher, quantize_at, survey
from golfbook.config.schema import QuantizeConfig
from golfbook.model.component import Storage

# The expected bytes of an artifact with these tensors and settings.
Expect = Callable[[Mapping[str, QuantizedTensor], QuantizeConfig], int]
FULL = 0.9995  # share of the limit that a plan aims at: the last bytes are not worth another search
ROUNDS = 5
LEAST_BITS, MOST_BITS = 0.5, 8.0  # a weight: there is nothing left to tell, or nothing left to gain
# Matrices below which size are stored as float16: the setting, and smaller ones.
SMALL = (4096, 1024, 256)


@dataclass(frozen=True)
class Plan:
    """An artifact that is not written yet: its tensors, its expected bytes and the loss it adds, in nats a token."""

    quantized: dict[str, QuantizedTensor]
    config: QuantizeConfig
    bytes: int
    loss: float


def solve(
    state: Mapping[str, Tensor],
    storage: Mapping[str, Storage],
    config: QuantizeConfig,
    statistics: Statistics,
    limit: int,
    expect: Expect,
) -> Plan:
    """Return the plan with the least predicted loss whose artifact has at most ``limit`` bytes.

    ``expect`` tells the bytes of an artifact without making it. What is sought: which small matrices stay float16, by
    plain rounding; then the common step, with ``config.rate.states``. Where nothing fits, the plan is the smallest that
    was found, and over the limit.
    """
    sizes = sorted({config.passthrough_numel, *(size for size in SMALL if size < config.passthrough_numel)})
    rounded = config.rate.model_copy(update={"states": 1})
    tries = [config.model_copy(update={"passthrough_numel": size, "rate": rounded}) for size in sizes]
    plans = [_filled(state, storage, one, statistics, limit, expect, rounds=2) for one in tries]
    best = min(plans, key=lambda plan: (max(plan.bytes - limit, 0) // 64, plan.loss))
    final = best.config.model_copy(update={"rate": config.rate})
    return _filled(state, storage, final, statistics, limit, expect, ROUNDS, best.config.rate.bits)


def written(plan: Plan, write: Write, limit: int) -> Fitted:
    """Write the artifact of a plan; return what is stored, with what was expected of it."""
    size = write(plan.quantized, plan.config)
    found = [Attempt(f"expected {plan.bytes:,} bytes at {plan.config.rate.bits:.2f} bits a weight", size)]
    return Fitted(plan.quantized, plan.config, limit, found, expected_bytes=plan.bytes, expected_loss=plan.loss)


def _filled(
    state: Mapping[str, Tensor],
    storage: Mapping[str, Storage],
    config: QuantizeConfig,
    statistics: Statistics,
    limit: int,
    expect: Expect,
    rounds: int,
    bits: float = 0.0,
) -> Plan:
    """Return a plan that fills the limit; ``bits`` a weight are the first guess, 0: none."""
    reliefs = survey(state, storage, config, statistics)
    weights = sum(relief.weight.numel() for relief in reliefs.values())
    bits = bits or _sensible(8 * limit / max(weights, 1) - 0.3)
    step, found = common_step(reliefs, bits), list[Plan]()
    for _ in range(rounds):
        quantized = quantize_at(step, state, storage, config, reliefs)
        named = config.model_copy(update={"rate": config.rate.model_copy(update={"bits": round(bits, 4)})})
        size = expect(quantized, named)
        found.append(Plan(quantized, named, size, predicted_loss(quantized, reliefs, statistics)))
        wanted = _sensible(bits + 8 * (FULL * limit - size) / max(weights, 1))
        if 0 <= limit - size <= 2 * (1 - FULL) * limit or wanted == bits:
            break
        bits, step = wanted, step * 2 ** (bits - wanted)
    fitting = [plan for plan in found if plan.bytes <= limit]
    return max(fitting, key=lambda plan: plan.bytes) if fitting else min(found, key=lambda plan: plan.bytes)


def _sensible(bits: float) -> float:
    return min(max(bits, LEAST_BITS), MOST_BITS)


def predicted_loss(
    quantized: Mapping[str, QuantizedTensor], reliefs: Mapping[str, Relief], statistics: Statistics
) -> float:
    """Return the loss in nats a token that errors E of the quantised matrices add: ``1/2 tr(G E H E^T)`` for each.

    G holds the products of gradients where they are known, else their squares alone: ``1/2 sum_i g_i e_i H e_i^T``.
    """
    loss = 0.0
    for name, relief in reliefs.items():
        if statistics.get(name):
            rows, gram = fisher(statistics[name])
            error = (relief.weight - quantized[name].dequantize()).double()
            products = statistics[name].get("outputs")
            weighted = rows.double()[:, None] * error if products is None else products.double() @ error
            loss += 0.5 * float((error @ gram.double() * weighted).sum())
    return loss
