"""What goes on inside a model: attention weights, gates, rows of the hashed table, sizes of the value embedding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from golfbook.config.architecture import ModelConfig
from golfbook.model.attention import causal_attention
from golfbook.model.gpt import GPT
from golfbook.model.kernels import remove_own_value


@dataclass(frozen=True)
class Look:
    """What one attention did with one sequence: weights (H, T, T), cosines (T * H,) with the token's own value.

    ``before`` is its output, ``after`` what the layer passes on; ``value_rms`` the root mean square of its values.
    """

    weights: np.ndarray
    before: np.ndarray
    after: np.ndarray
    value_rms: float


class _Recorder(TorchFunctionMode):
    """Notes queries, keys and values of every attention a model calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is causal_attention:
            self.calls.append((*args[:3], result))
        return result


@torch.no_grad()
def look_inside(model: GPT, tokens: Tensor) -> list[Look]:
    """Attention of each layer (its first pass) on one sequence of ids (T,) int64; nothing about the model changes."""
    with _Recorder() as recorder:
        model(tokens[None])
    config, found, at = model.config, [], 0
    for layer in range(config.num_layers):
        found.append(_look(config, layer, *recorder.calls[at]))
        at += 1 + (config.recurrent_layers.count(layer) if config.recurrence_place == "in_place" else 0)
    return found


def _look(model: ModelConfig, layer: int, q: Tensor, k: Tensor, v: Tensor, y: Tensor) -> Look:
    group = model.num_heads // model.num_kv_heads
    length = q.size(-2)
    scores = (q @ k.repeat_interleave(group, 1).mT) / q.size(-1) ** 0.5
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    outputs, values = y.transpose(1, 2), v.transpose(1, 2)
    passed = remove_own_value(outputs, values) if layer in model.xsa_layers else outputs
    own = values.repeat_interleave(group, 2)
    scale = outputs.norm(dim=-1) * own.norm(dim=-1)
    before, after = ((x * own).sum(-1) / scale.clamp_min(1e-12) for x in (outputs, passed))
    rms = float(values.square().mean().sqrt())
    return Look(weights[0].numpy(), before.flatten().numpy(), after.flatten().numpy(), rms)


@torch.no_grad()
def gate_values(model: GPT) -> dict[str, np.ndarray]:
    """Gates and scales of a model by name, as numbers in use (after their sigmoid)."""
    found: dict[str, Tensor] = {}
    state = model.state_dict()
    if "smear.gate" in state:
        found["smear gate"] = state["smear.gate"].sigmoid()

    def joined(part: str) -> Tensor | None:
        parts = [value.flatten() for name, value in state.items() if part in name]
        return torch.cat(parts) if parts else None

    mixes = [value for name, value in state.items() if name.endswith("resid_mix")]
    found["residual mix: stream"] = torch.cat([m[0] for m in mixes])
    found["residual mix: embedding"] = torch.cat([m[1] for m in mixes])
    for label, part in (
        ("attention scale", "attn_scale"),
        ("MLP scale", "mlp_scale"),
        ("query gain", "q_gain"),
        ("skip weights", "skip_weights"),
        ("value residual", "vr_lambda"),
        ("value embedding scales", "ve_layer_scales."),
    ):
        value = joined(part)
        if value is not None and value.numel():
            found[label] = value
    for label, name in (
        ("gate of TTT-Linear", "ttt_refiner.gate"),
        ("gate of FlowRefiner", "flow_refiner.gate"),
        ("gate of NativeFlow", "native_flow.gate"),
    ):
        if name in state:
            found[label] = state[name].sigmoid()
    return {name: value.float().numpy() for name, value in found.items()}


def row_uses(model: GPT, tokens: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """For each row of the bigram table: how many different pairs of ``tokens`` (n,) use it, and its commonest's share.

    The share is NaN for a row that no pair uses. The last row, for 'no predecessor', is left out.
    """
    rows = model.bigram.rows_of(tokens[None])[0, 1:].numpy()
    pairs = (tokens[:-1] * model.config.vocab_size + tokens[1:]).numpy()
    _, index, uses = np.unique(pairs, return_index=True, return_counts=True)
    count = model.config.bigram.vocab_size - 1
    where = rows[index]
    total, largest = np.bincount(where, uses, minlength=count)[:count], np.zeros(count)
    np.maximum.at(largest, where, uses)
    share = np.divide(largest, total, out=np.full(count, np.nan), where=total > 0)
    return np.bincount(where, minlength=count)[:count], share


@torch.no_grad()
def value_embedding_sizes(model: GPT, tokens: Tensor) -> pd.DataFrame:
    """Root mean square of the value embedding and of the values it is part of, a row a layer, for ids (T,) int64."""
    shared = model.ve_shared(tokens[None])
    looks = look_inside(model, tokens)
    rows = []
    for scale, layer in zip(model.ve_layer_scales, model.config.value_embedding_layers, strict=True):
        added = float((scale * shared).square().mean().sqrt())
        rows.append({"layer": layer, "value embedding (rms)": added, "all values (rms)": looks[layer].value_rms})
    return pd.DataFrame(rows)
