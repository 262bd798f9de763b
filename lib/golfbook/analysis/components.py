"""What the components of a model cost, alone and together, and how well step times are estimated."""

from __future__ import annotations

from typing import Any

import pandas as pd

from golfbook.config.load import load_config
from golfbook.config.schema import Config
from golfbook.model import costs
from golfbook.model.gpt import parameter_table
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


def summary(config: Config) -> dict[str, dict[str, float]]:
    """Return the costs of a model for :func:`golfbook.plots.architecture.model_costs`: nothing is allocated."""
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


def component_costs(preset: str = "pr1166_11l_base") -> pd.DataFrame:
    """Return what each component adds: parameters, operations and activation bytes a token.

    It is added to the published plain stack, or, where that has it already, to the stack without it.
    """
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
                "in the plain stack": "yes" if present else "",
                "switch": ", ".join(settings),
                "parameters": parameter_table(with_it)["total"] - parameter_table(without)["total"],
                "forward, kFLOP a token": (work[1].inference - work[0].inference) / 1e3,
                "training, kFLOP a token": (work[1].training - work[0].training) / 1e3,
                "activations, bytes a token": (saved[1] - saved[0]) / 1e6,
            }
        )
    return pd.DataFrame(rows)


def step_errors(published: pd.DataFrame) -> pd.DataFrame:
    """Return published and estimated step times of :data:`STEPS`, terms as shares of the published."""
    rows = []
    for label, preset, variant, gpu, gpus in STEPS:
        measured = float(published.loc[published["variant"] == variant, "step_ms"].mean())
        estimate = speed.step_time(load_config(preset), speed.GPUS[gpu], gpus)
        terms = {f"{n}_share": 1000 * getattr(estimate, n) / measured for n in ("products", "traffic", "launches")}
        total = 1000 * estimate.seconds
        rows.append({"label": label, "published_ms": measured, "estimated_ms": total, **terms})
    return pd.DataFrame(rows).assign(error=lambda t: t["estimated_ms"] / t["published_ms"] - 1)
