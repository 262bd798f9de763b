"""What goes on inside a model: attention weights, gates, rows of the hashed table, sizes of the value embedding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from golfbook.config.architecture import ModelConfig
from golfbook.model.attention import causal_attention
from golfbook.model.gpt import GPT


@dataclass(frozen=True)
class Look:
    """Hold what one attention did with one sequence: its weights (H, T, T), and cosines of its output.

    ``own`` (T * H,) are those with the token's own value. ``other`` is the control: with the value of a random earlier
    token that is another piece, at the positions that have one. ``value_rms`` is the root mean square of its values.
    """

    weights: np.ndarray
    own: np.ndarray
    other: np.ndarray
    value_rms: float


class _Recorder(TorchFunctionMode):
    """Note queries, keys and values of every attention a model calls."""

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
    """Return the attention of each layer (its first pass) on one sequence of ids (T,) int64.

    The tokens of the control are drawn from a fixed seed; nothing about the model changes.
    """
    with _Recorder() as recorder:
        model(tokens[None])
    config, found, at = model.config, [], 0
    for layer in range(config.num_layers):
        found.append(_look(config, tokens, *recorder.calls[at]))
        at += 1 + (config.recurrent_layers.count(layer) if config.recurrence_place == "in_place" else 0)
    return found


def _look(model: ModelConfig, tokens: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor) -> Look:
    group = model.num_heads // model.num_kv_heads
    length = q.size(-2)
    scores = (q @ k.repeat_interleave(group, 1).mT) / q.size(-1) ** 0.5
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    outputs, own = y[0], v[0].repeat_interleave(group, 0)  # (H, T, d)
    others = ((tokens[:, None] != tokens) & ~hidden).double()  # (T, T): earlier tokens that are another piece
    some = others.any(1)
    drawn = torch.multinomial(others[some], 1, generator=torch.Generator().manual_seed(0))[:, 0]
    mine, other = F.cosine_similarity(outputs, own, -1), F.cosine_similarity(outputs[:, some], own[:, drawn], -1)
    rms = float(v.square().mean().sqrt())
    return Look(weights[0].numpy(), mine.flatten().numpy(), other.flatten().numpy(), rms)


@torch.no_grad()
def gate_values(model: GPT) -> dict[str, np.ndarray]:
    """Return gates and scales of a model by name, as numbers in use (after their sigmoid)."""
    state = model.state_dict()
    mixes = [value for name, value in state.items() if name.endswith("resid_mix")]
    found: dict[str, list[Tensor]] = {"smear gate": [state["smear.gate"].sigmoid()] if "smear.gate" in state else []}
    found["residual mix r0 (stream)"] = [m[0] for m in mixes]
    found["residual mix r1 (embedding)"] = [m[1] for m in mixes]
    for label, part in (
        ("attention scale α", "attn_scale"),
        ("MLP scale β", "mlp_scale"),
        ("query gain", "q_gain"),
        ("skip weights w", "skip_weights"),
        ("value residual", "vr_lambda"),
        ("value embedding scales", "ve_layer_scales."),
    ):
        found[label] = [value for name, value in state.items() if part in name]
    for name, key in (("TTT-Linear", "ttt_refiner"), ("FlowRefiner", "flow_refiner"), ("NativeFlow", "native_flow")):
        found[f"gate of {name}"] = [state[f"{key}.gate"].sigmoid()] if f"{key}.gate" in state else []
    joined = {name: torch.cat([v.flatten() for v in values]) for name, values in found.items() if values}
    return {name: values.float().numpy() for name, values in joined.items() if len(values)}


def row_uses(model: GPT, tokens: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each row of the bigram table, how many different pairs of ``tokens`` (n,) use it.

    Also the share of its uses that its commonest pair has; NaN for a row that no pair uses. The last row is left
    out: it stands for 'no predecessor'.
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
    """Return the root mean square of the value embedding and of all values for ids (T,), a row a layer."""
    shared = model.ve_shared(tokens[None])
    looks = look_inside(model, tokens)
    rows = []
    for scale, layer in zip(model.ve_layer_scales, model.config.value_embedding_layers, strict=True):
        added = float((scale * shared).square().mean().sqrt())
        rows.append({"layer": layer, "value embedding (rms)": added, "all values (rms)": looks[layer].value_rms})
    return pd.DataFrame(rows)
