"""Panels of architectures: guess what a component does, and build a model from components."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from golfbook.analysis.components import summary
from golfbook.config.load import load_config
from golfbook.config.schema import Config
from golfbook.panels.base import Choice, Control, Panel, Slider, Switch, guessing
from golfbook.plots import architecture as architecture_plots
from golfbook.plots.style import Picture
from golfbook.train.speed import artifact_bytes

BITS = range(3, 9)
RECURRENCE = {"none": "none", "middle two, after": "after", "middle two, in place": "in_place"}


def guess(effects: pd.DataFrame) -> Panel:
    """Show what each switch of :func:`golfbook.analysis.comparisons.switch_effects` does, once it is guessed."""
    rows = {str(row["variant"]): row for row in effects.to_dict("records")}
    reach = 1.1 * float(effects[["low", "high"]].abs().max().max())

    def draw(switch: str, guessed: str) -> Picture:
        return architecture_plots.guess(rows[switch], guessed, reach)

    answers = {"(choose)": "", **{name: name for name in ("better", "worse", "no difference")}}
    names = {name: name for name in rows}
    return Panel(draw, {"switch": Choice("switch", next(iter(names)), names), "guessed": Choice("it is", "", answers)})


def build(preset: str) -> Panel:
    """Show parameters, arithmetic, artifact, memory and time of a model put together at its published size.

    To guess beforehand: the most bits of matrices at which it fits into the preset's budget, 0 if none of 3 to 8 does.
    """
    start = load_config(preset)
    before = summary(start)
    model = start.model

    def draw(**state: Any) -> Picture:
        return architecture_plots.model_costs(summary(assemble(preset, state)), before)

    def most_bits(**state: Any) -> float:
        built = {bits: assemble(preset, state | {"bits": bits}) for bits in BITS}
        sizes = {bits: artifact_bytes(config.model, config.quantize) for bits, config in built.items()}
        return max((bits for bits, size in sizes.items() if size <= start.budget.limit_bytes), default=0)

    own = "as preset"
    widths = {str(w): w for w in sorted({256, 384, 512, 768, model.model_dim})}
    rows = {str(n) if n else "off": n for n in sorted({0, 1536, 4096, 10240, model.bigram.vocab_size})}
    controls: dict[str, Control] = {
        "layers": Slider("layers", model.num_layers, 2, 16),
        "width": Choice("width", model.model_dim, widths),
        "mlp": Slider("MLP factor", model.mlp_mult, 1, 4, 0.5),
        "bigram_rows": Choice("bigram rows", model.bigram.vocab_size, rows),
        "value_embedding": Switch("value embedding", bool(model.value_embedding.layers)),
        "gated_attention": Switch("gated attention", model.gated_attention),
        "value_residual": Switch("value residual", model.value_residual != "none"),
        "tied": Switch("tied head", model.tie_embeddings),
        "recurrence": Choice("recurrence", own, {own: own, **RECURRENCE}),
        "ttt_linear": Switch("TTT-Linear", model.ttt_linear.enabled),
        "flow": Switch("FlowRefiner", model.flow.enabled),
        "native_flow": Switch("NativeFlow", model.native_flow.enabled),
        "bits": Slider("matrix bits", start.quantize.matrix_bits, BITS[0], BITS[-1]),
    }
    panel = Panel(draw, controls, height=460)
    return guessing(panel, Slider("my guess: most bits that fit", -1, -1, BITS[-1]), most_bits)


def assemble(preset: str, state: Mapping[str, Any]) -> Config:
    """Return the configuration that the controls of :func:`build` stand for."""
    published = load_config(preset).model
    layers, bits = state["layers"], state["bits"]
    middle = sorted({layers // 2 - 1, layers // 2})
    own = [i for i in published.recurrence if -layers <= i < layers]
    repeated = {"none": [], "after": middle, "in_place": middle}.get(state["recurrence"], own)
    place = "in_place" if state["recurrence"] == "in_place" else published.recurrence_place
    kept = published.value_residual if published.value_residual != "none" else "lambda"
    xsa = min(published.xsa, layers) if isinstance(published.xsa, int) else [i for i in published.xsa if i < layers]
    overrides = {
        "num_layers": layers,
        "model_dim": state["width"],
        "mlp_mult": state["mlp"],
        "xsa": layers if published.xsa == published.num_layers else xsa,
        "tie_embeddings": state["tied"],
        "gated_attention": state["gated_attention"],
        "value_residual": kept if state["value_residual"] else "none",
        "bigram.vocab_size": state["bigram_rows"],
        "value_embedding.layers": [-2, -1] if state["value_embedding"] else [],
        "recurrence": repeated,
        "recurrence_place": place if repeated else "after",
        **{f"{name}.enabled": state[name] for name in ("ttt_linear", "flow", "native_flow")},
    }
    values: dict[str, Any] = {f"model.{name}": value for name, value in overrides.items()}
    if bits != load_config(preset).quantize.matrix_bits:
        values |= {"quantize.matrix_bits": bits, "quantize.mlp_bits": 0, "quantize.fit": "none"}
    return load_config(preset, overrides=values)
