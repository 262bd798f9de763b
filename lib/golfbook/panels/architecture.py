"""The panel to build a model from components, and what the pictures of attention and gates are drawn from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from golfbook.analysis.statistics import paired_difference
from golfbook.config.load import load_config
from golfbook.config.schema import Config, ModelConfig
from golfbook.model import costs
from golfbook.model.attention import causal_attention
from golfbook.model.gpt import GPT, parameter_table
from golfbook.model.kernels import remove_own_value
from golfbook.panels.base import Choice, Panel, Slider, Switch
from golfbook.plots import architecture as architecture_plots
from golfbook.plots.style import Picture
from golfbook.train import speed

# What each component is switched by, away from the plain stack: label -> (settings, whether the stack has it already).
COMPONENTS: dict[str, tuple[dict[str, Any], bool]] = {
    "bigram hash": ({"model.bigram.vocab_size": 0}, True),
    "trigram rows": ({"model.bigram.trigram": True}, False),
    "smear gate": ({"model.smear": False}, True),
    "U-Net skips": ({"model.unet_skips": False}, True),
    "value embedding": ({"model.value_embedding.layers": []}, True),
    "exclusive self-attention (last 4)": ({"model.xsa": 0}, True),
    "gated attention": ({"model.gated_attention": True}, False),
    "value residual": ({"model.value_residual": "lambda"}, False),
    "depth gate": ({"model.depth_gate": True}, False),
    "Canon in every layer": ({"model.canon.last_n": 11}, False),
    "recurrence of two blocks": ({"model.recurrence": [4, 5]}, False),
    "untied head": ({"model.tie_embeddings": False}, False),
    "TTT-Linear": ({"model.ttt_linear.enabled": True}, False),
    "FlowRefiner": ({"model.flow.enabled": True}, False),
    "NativeFlowMatcher": ({"model.native_flow.enabled": True}, False),
    "one head for later targets": ({"model.mtp.num_heads": 1}, False),
}
# Published runs that the estimated step time is compared with: label, preset, variant in runs.csv, GPU, their number.
STEPS = (
    ("PR 1232 base, 1 A100 *", "pr1232_base", "base_20k", "A100 PCIe 40GB", 1),
    ("PR 1406, 8 H100 *", "pr1406", "dttt_recur", "H100 SXM 80GB", 8),
    ("PR 1232 flow, 1 A100", "pr1232_flow", "flow_20k", "A100 PCIe 40GB", 1),
    ("PR 1170, 1 A100", "pr1170_nfm", "nfm_7k", "A100 PCIe 40GB", 1),
    ("PR 1166, 2 A100", "pr1166_e2e_ttt_flow", "varB_10L", "A100 PCIe 40GB", 2),
    ("PR 1166 variant A, 2 A100", "pr1166_11l_a", "varA_11L", "A100 PCIe 40GB", 2),
)
RECURRENCE = {"none": "none", "middle two, after": "after", "middle two, in place": "in_place"}


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


def summary(config: Config) -> dict[str, dict[str, float]]:
    """Costs of a model for :func:`golfbook.plots.architecture.model_costs`: nothing is allocated."""
    model, length = config.model, config.train.sequence_length
    groups = parameter_table(model)
    total = groups.pop("total")
    names = {
        "blocks.attn": "attention", "blocks.mlp": "MLP", "tok_emb": "tokens", "lm_head": "head", "bigram": "bigram",
        "ve_shared": "value embedding", "ttt_refiner": "TTT-Linear", "flow_refiner": "FlowRefiner",
        "native_flow": "NativeFlow", "mtp_heads": "later targets",
    }  # fmt: skip
    parameters: dict[str, float] = {}
    for group, count in groups.items():
        name = names.get(group, "scales and gates")
        parameters[name] = parameters.get(name, 0) + count
    flops = dict(costs.per_token(model, length, training=False).forward)
    return {"parameters": parameters, "flops": flops, "totals": {"parameters": total, **speed.totals(config)}}


def build(preset: str) -> Panel:
    """Put a model together at its published size and watch parameters, arithmetic, artifact, memory and time change."""
    start = load_config(preset)
    before = summary(start)
    model = start.model

    def draw(**state: Any) -> Picture:
        return architecture_plots.model_costs(summary(assemble(preset, state)), before)

    own = "as preset"
    return Panel(
        draw,
        {
            "layers": Slider("layers", model.num_layers, 2, 16),
            "width": Choice(
                "width", model.model_dim, {str(w): w for w in sorted({256, 384, 512, 768, model.model_dim})}
            ),
            "mlp": Slider("MLP factor", model.mlp_mult, 1, 4, 0.5),
            "bigram_rows": Choice(
                "bigram rows",
                model.bigram.vocab_size,
                {str(n) if n else "off": n for n in sorted({0, 1536, 4096, 10240, model.bigram.vocab_size})},
            ),
            "value_embedding": Switch("value embedding", bool(model.value_embedding.layers)),
            "gated_attention": Switch("gated attention", model.gated_attention),
            "value_residual": Switch("value residual", model.value_residual != "none"),
            "tied": Switch("tied head", model.tie_embeddings),
            "recurrence": Choice("recurrence", own, {own: own, **RECURRENCE}),
            "ttt_linear": Switch("TTT-Linear", model.ttt_linear.enabled),
            "flow": Switch("FlowRefiner", model.flow.enabled),
            "native_flow": Switch("NativeFlow", model.native_flow.enabled),
            "bits": Slider("matrix bits", start.quantize.matrix_bits, 3, 8),
        },
        height=460,
    )


def assemble(preset: str, state: Mapping[str, Any]) -> Config:
    """The configuration that the controls of :func:`build` stand for."""
    published = load_config(preset).model
    layers = int(state["layers"])
    middle = sorted({layers // 2 - 1, layers // 2})
    repeated = {"none": [], "after": middle, "in_place": middle}.get(
        state["recurrence"], [i for i in published.recurrence if -layers <= i < layers]
    )
    place = "in_place" if state["recurrence"] == "in_place" else published.recurrence_place
    kept = published.value_residual if published.value_residual != "none" else "lambda"
    xsa = min(published.xsa, layers) if isinstance(published.xsa, int) else [i for i in published.xsa if i < layers]
    overrides = {
        "num_layers": layers,
        "model_dim": int(state["width"]),
        "mlp_mult": float(state["mlp"]),
        "xsa": layers if published.xsa == published.num_layers else xsa,
        "tie_embeddings": bool(state["tied"]),
        "gated_attention": bool(state["gated_attention"]),
        "value_residual": kept if state["value_residual"] else "none",
        "bigram.vocab_size": int(state["bigram_rows"]),
        "value_embedding.layers": [-2, -1] if state["value_embedding"] else [],
        "recurrence": repeated,
        "recurrence_place": place if repeated else "after",
        "ttt_linear.enabled": bool(state["ttt_linear"]),
        "flow.enabled": bool(state["flow"]),
        "native_flow.enabled": bool(state["native_flow"]),
    }
    values: dict[str, Any] = {f"model.{name}": value for name, value in overrides.items()}
    if int(state["bits"]) != load_config(preset).quantize.matrix_bits:
        values |= {"quantize.matrix_bits": int(state["bits"]), "quantize.mlp_bits": 0}
    return load_config(preset, overrides=values)


def component_costs(preset: str = "pr1166_11l_base") -> pd.DataFrame:
    """What each component adds to the published plain stack: parameters, operations and activation bytes a token."""
    config = load_config(preset)
    length, rows = config.train.sequence_length, []
    for label, (settings, present) in COMPONENTS.items():
        other = load_config(preset, overrides=settings)
        without, with_it = (other.model, config.model) if present else (config.model, other.model)
        work = [costs.per_token(m, length) for m in (without, with_it)]
        saved = [costs.activation_bytes(m, 1_000_000) for m in (without, with_it)]
        rows.append(
            {
                "component": label,
                "switch": ", ".join(settings),
                "parameters": parameter_table(with_it)["total"] - parameter_table(without)["total"],
                "forward, kFLOP a token": (work[1].inference - work[0].inference) / 1e3,
                "training, kFLOP a token": (work[1].training - work[0].training) / 1e3,
                "activations, bytes a token": (saved[1] - saved[0]) / 1e6,
            }
        )
    return pd.DataFrame(rows)


def step_errors(published: pd.DataFrame) -> pd.DataFrame:
    """Published and estimated step times of :data:`STEPS`, each term as a share of the published time."""
    rows = []
    for label, preset, variant, gpu, gpus in STEPS:
        measured = float(published.loc[published["variant"] == variant, "step_ms"].mean())
        estimate = speed.step_time(load_config(preset), speed.GPUS[gpu], gpus)
        terms = {f"{n}_share": 1000 * getattr(estimate, n) / measured for n in ("products", "traffic", "launches")}
        total = 1000 * estimate.seconds
        rows.append({"label": label, "published_ms": measured, "estimated_ms": total, **terms})
    return pd.DataFrame(rows).assign(error=lambda t: t["estimated_ms"] / t["published_ms"] - 1)


def switch_effects(runs: pd.DataFrame, *, base: str = "base", value: str = "val_bpb") -> pd.DataFrame:
    """Paired difference of every variant from ``base`` over equal seeds, with its 95 % t-interval."""
    reference = runs.loc[runs["variant"] == base].set_index("seed")[value]
    rows = []
    for variant, group in runs.loc[runs["variant"] != base].groupby("variant", sort=False):
        pairs = pd.concat([group.set_index("seed")[value], reference], axis=1, join="inner")
        d = paired_difference(pairs.iloc[:, 0], pairs.iloc[:, 1])
        rows.append({"variant": variant, "mean": d.mean, "low": d.low, "high": d.high, "n": d.n, "p_value": d.p_value})
    return pd.DataFrame(rows)


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
