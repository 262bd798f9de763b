"""Where bits go and what they buy: feedback, equal slope, the trellis, coders, calibration texts, low rank, a cap."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from golfbook.analysis.frontier import Yardstick, bytes_at, settings
from golfbook.analysis.sizes import entropy_bits, group_of
from golfbook.compress import calibration, export, gptq, rowwise
from golfbook.compress.budget import code_bytes
from golfbook.compress.coders import Coder
from golfbook.compress.estimates import cross_entropy_bits, estimate_bits
from golfbook.compress.export import quantize_model
from golfbook.compress.quantizer import QuantizedTensor, Statistics, dequantize
from golfbook.compress.rate_distortion import Relief, survey
from golfbook.compress.solver import SMALL, Plan, predicted_loss
from golfbook.compress.statistics import collect
from golfbook.compress.trellis import points
from golfbook.compress.viterbi import search
from golfbook.config.schema import Config
from golfbook.config.tables import CODERS, named
from golfbook.data.dataset import Dataset
from golfbook.model.component import facts_of
from golfbook.model.gpt import GPT, exported, exported_state

CHOSEN_CODERS = ("xz", "zstd", "brotli", "entropy")
RATES = {  # names of frontier.RECIPES, and bits of the grid, or of the entropy: about equal quality
    "no floor, xz": (4.0, 5.0, 6.0),
    "one step, GPTQ": (3.0, 4.0, 5.0),
    "records: k sigma, GPTQ": (3.0, 4.0, 5.0),
    "equal slope": (2.0, 3.0, 4.0),
    "equal slope, trellis 8": (2.0, 3.0, 4.0),
}


def learnt(
    model: GPT, config: Config, data: Dataset, source: calibration.Source = "training", *, sequences: int, seed: int = 1
) -> Statistics:
    """Return all that ``sequences`` windows of a calibration text tell of ``model``, whatever its quantiser asks."""
    length, heat = config.train.sequence_length, config.quantize.calibration.temperature
    text = calibration.batches(source, model, data, sequences=sequences, length=length, seed=seed, temperature=heat)
    return collect(model, text, gradients=True)


def reliefs_of(model: GPT, config: Config, known: Statistics) -> dict[str, Relief]:
    """Return the relief of every matrix of ``model`` that ``config.quantize`` turns into integers, by name."""
    storage = {name: facts.storage for name, facts in facts_of(model).items()}
    return survey(exported_state(model), storage, config.quantize, known)


def feedback_effect(state: Mapping[str, Tensor], known: Statistics, bits: int) -> pd.DataFrame:
    """Compare GPTQ with rounding on the same row scales, for each linear map that text was collected for.

    Columns: ``name``, ``plain``: squared error of GPTQ over that of rounding, and ``weighted``: the same of the squared
    change of the outputs, ``tr(E H E^T)``.
    """
    rows, qmax = [], 2 ** (bits - 1) - 1
    for name, weight in state.items():
        if "gram" not in known.get(name, {}) or "count" in known[name] or not weight.any():
            continue
        factor = gptq.reverse_factor(known[name]["gram"], gptq.DAMPING, name=name, dtype=torch.float64)
        q, scale = rowwise.clip_quantize(weight, bits, 1.0)
        rounded = weight.double() - q.double() * scale.double()[:, None]
        fed = gptq.feedback(weight, scale[:, None], factor, qmax)[1]
        plain = float(fed.square().sum() / rounded.square().sum())
        rows.append((name, plain, gptq.output_loss(fed, factor) / gptq.output_loss(rounded, factor)))
    return pd.DataFrame(rows, columns=["name", "plain", "weighted"])


def allocation(model: GPT, config: Config, known: Statistics, recipes: Sequence[str], bits: float) -> pd.DataFrame:
    """Say where each recipe of :data:`golfbook.analysis.frontier.RECIPES` puts its bits, tensor by tensor.

    Columns: ``recipe``, ``name``, ``group``, ``bits`` a weight, and ``slope``: the predicted loss that one more
    kilobyte of this tensor would save, in millionths of a nat a token: where the loss falls as ``4^-bits``, a bit for
    each of n weights saves ``2 ln 2`` times the loss, at n bits.
    """
    rows, reliefs = [], reliefs_of(model, settings(config, "equal slope", bits), known)
    for recipe in recipes:
        stored = quantize_model(model, settings(config, recipe, bits).quantize, known)
        spent = estimate_bits([stored[name] for name in reliefs])
        for name, relief in reliefs.items():
            loss = predicted_loss(stored, {name: relief}, known)
            count = relief.weight.numel()
            slope = 2 * math.log(2) * loss / count * 8000 * 1e6
            rows.append((recipe, name, group_of(name), spent[name] / count, slope))
    return pd.DataFrame(rows, columns=["recipe", "name", "group", "bits", "slope"])


def trellis_gain(states: Iterable[int], weights: int = 2**16, step: float = 0.5, seed: int = 0) -> pd.DataFrame:
    """Measure what a trellis gains over rounding on normal weights, in dB of squared error at equal entropy.

    Columns: ``states``, ``gain`` (dB); rounding at step ``step`` is the zero. One bit is 6.02 dB.
    """
    weight = torch.randn((weights // 256, 256), generator=torch.Generator().manual_seed(seed))
    steps, rows = torch.full((1, 1), step), list[tuple[int, float, float]]()
    for count in (1, *states):
        q = search(weight, steps, count)
        p = points(q, count)
        error = float((weight - p * step / 2).square().mean())
        half = (p - 2 * q.int()).bool()  # the half of the grid is known from the walk so far: it costs nothing
        bits = sum(entropy_bits(q[part]) * float(part.float().mean()) for part in (half, ~half) if part.any())
        rows.append((count, error, bits))
    _, error, bits = rows[0]
    gains = [(count, 10 * math.log10(error / e) - 20 * math.log10(2) * (b - bits)) for count, e, b in rows[1:]]
    return pd.DataFrame(gains, columns=["states", "gain"])


def coders(quantized: Mapping[str, QuantizedTensor], level: int, names: Iterable[str] = CODERS) -> pd.DataFrame:
    """Code the same tensors by every coder of ``names``; columns ``coder``, ``bytes``, ``seconds`` of one encoding."""
    rows, tensors = [], list(quantized.values())
    for name in names:
        coder: Coder = named(CODERS, name)
        started = time.perf_counter()
        size = len(coder.encode(tensors, level))
        rows.append((name, size, time.perf_counter() - started))
    return pd.DataFrame(rows, columns=["coder", "bytes", "seconds"])


def ways(model: GPT, config: Config, data: Dataset, known: Statistics, targets: int) -> pd.DataFrame:
    """Quantise by the recipes and rates of :data:`RATES`, score each model once and size its tensors by some coders.

    Columns: ``rule``, ``bits``, ``coder``, ``bytes`` (coded tensors, without header), ``tax_bpb``, ``val_bpb`` and
    ``divergence_bpb`` on the first ``targets`` targets.
    """
    yardstick, probe, rows = Yardstick(model, config, data, targets), GPT(exported(model.config)), []
    for recipe, rates in RATES.items():
        for rate in rates:
            chosen = settings(config, recipe, rate).quantize
            stored = quantize_model(model, chosen, known)
            probe.load_state_dict(dequantize(stored))
            found = yardstick.measure(probe)
            for coder in coders(stored, chosen.coder_level, CHOSEN_CODERS).itertuples():
                rows.append({"rule": recipe, "bits": rate, "coder": coder.coder, "bytes": coder.bytes, **found})
    return pd.DataFrame(rows)


def saving(table: pd.DataFrame, coder: str = "entropy") -> str:
    """Say in a sentence how many bytes the last rule of a table of :func:`ways` needs at the other rules' quality."""
    mine = table[table["coder"] == coder]
    rules, best = list(dict.fromkeys(mine["rule"])), mine[mine["rule"] == mine["rule"].iloc[-1]]
    said = []
    for rule in rules[:-1]:
        other = mine[mine["rule"] == rule]
        loss = other["divergence_bpb"].clip(lower=1e-9)
        qualities = np.geomspace(float(loss.min()), float(loss.max()), 9)[1:-1]
        shares = [bytes_at(best, q, size="bytes") / bytes_at(other, q, size="bytes") for q in qualities]
        if np.isfinite(shares).any():
            said.append(f"{np.nanmean(shares) - 1:+.0%} against *{rule.removesuffix(', xz')}*")
    if not said:
        return f"*{rules[-1]}* and the other rules were not measured at a common quality."
    return f"Bytes that *{rules[-1]}* needs at equal divergence, one seed: {', '.join(said)}."


def sources(
    model: GPT, config: Config, data: Dataset, bits: float, targets: int, *, sequences: int = 8, draws: int = 2
) -> pd.DataFrame:
    """Calibrate on each source of text, quantise by equal slope and score.

    Columns: ``source``, ``seed`` of the text, and the tax and divergence of
    :class:`golfbook.analysis.frontier.Yardstick` on ``targets`` targets.
    """
    yardstick, probe, rows = Yardstick(model, config, data, targets), GPT(exported(model.config)), []
    chosen = settings(config, "equal slope", bits).quantize
    for source in get_args(calibration.Source):
        for seed in range(1, draws + 1):
            known = learnt(model, config, data, source, sequences=sequences, seed=seed)
            probe.load_state_dict(dequantize(quantize_model(model, chosen, known)))
            rows.append({"source": source, "seed": seed, **yardstick.measure(probe)})
    return pd.DataFrame(rows)


def plan(model: GPT, config: Config, data: Dataset, known: Statistics, cap: int) -> Plan:
    """Return what the solver would store of ``model`` in ``cap`` bytes, code included, by equal slope, no trellis."""
    # small matrices become integers too: the solver need not try which ones should stay float16, which takes longer
    changed = {"fit": "solve", "passthrough_numel": min(SMALL)}
    chosen = settings(config, "equal slope", 3.0).quantize.model_copy(update=changed)
    config = config.model_copy(update={"quantize": chosen})
    return export.plan(model, config, data.tokenizer.sha256, known, cap - code_bytes())


def parts(plan: Plan) -> dict[str, int]:
    """Return the expected bytes of a plan by kind: code, integers, side information (steps), floats, header."""
    tensors = list(plan.quantized.values())
    coded = [tensor for tensor in tensors if tensor.q is not None]
    integers = sum(estimate_bits(coded).values())
    floats = cross_entropy_bits([tensor for tensor in tensors if tensor.q is None])
    total = cross_entropy_bits(tensors)
    header = plan.bytes - math.ceil(total / 8)
    shares = {"integers": integers, "side information": total - integers - floats, "floats": floats}
    return {"code": code_bytes(), **{name: max(0, round(bits / 8)) for name, bits in shares.items()}, "header": header}
