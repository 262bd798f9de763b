"""What the bytes of a model are worth: entropy, bytes by group, whole models stored in several ways, sensitivity."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike

from golfbook.analysis.statistics import describe
from golfbook.compress.calibration import calibrate
from golfbook.compress.coders import Coder
from golfbook.compress.container import read_artifact
from golfbook.compress.export import export, quantize_model
from golfbook.compress.quantizer import QuantizedTensor, dequantize
from golfbook.config.schema import Config, QuantizeConfig
from golfbook.config.tables import CODERS, named
from golfbook.data.dataset import Dataset
from golfbook.evaluate import scoring
from golfbook.model.gpt import GPT, exported

GROUPS = {"attention": ".attn.", "MLP": ".mlp.", "embedding tables": "."}  # first infix that fits; integers only
PLAIN = "float16 tensors"


def entropy_bits(integers: ArrayLike) -> float:
    """Return the order-0 entropy of integers in bits each: the least a coder can spend that sees one at a time."""
    counts = np.unique(np.asarray(integers).ravel(), return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0  # no negative zero for a constant


def relative_error(weights: ArrayLike, decoded: ArrayLike) -> float:
    """Return the root mean square of the error over that of the weights (0: exact, 1: as bad as storing zeros)."""
    w, d = np.asarray(weights, np.float64), np.asarray(decoded, np.float64)
    return float(np.sqrt(((w - d) ** 2).mean() / max(float((w**2).mean()), 1e-30)))


def group_of(name: str) -> str:
    """Return the group of :data:`GROUPS` that the quantised tensor ``name`` belongs to."""
    return next(group for group, infix in GROUPS.items() if infix in name)


def constant(tensor: QuantizedTensor) -> QuantizedTensor:
    """Return an integer tensor with one constant scale, which costs next to nothing, in place of its steps."""
    dtype = torch.float16 if tensor.kind == "step" else torch.float32
    return replace(tensor, scale=torch.zeros((), dtype=dtype), rows=None, columns=None)


def group_bytes(quantized: Mapping[str, QuantizedTensor], config: QuantizeConfig) -> pd.DataFrame:
    """Count the bytes of integers and plain values by group, without scales.

    Columns ``group``, ``nominal_bytes`` (one an integer, two a wide one), ``entropy_bytes`` and ``coded_bytes`` by the
    coder that ``config`` names, each group alone. Plain values have no entropy here: their first two counts are equal.
    """
    coder: Coder = named(CODERS, config.coder)
    members: dict[str, list[QuantizedTensor]] = {}
    for name, tensor in quantized.items():
        group = PLAIN if tensor.q is None else group_of(name)
        members.setdefault(group, []).append(constant(tensor) if tensor.q is not None else tensor)
    rows = []
    for group in (*GROUPS, PLAIN):
        if not (tensors := members.get(group)):
            continue
        stored = [tensor.value if tensor.q is None else tensor.q for tensor in tensors]
        nominal = sum(part.nbytes for part in stored if part is not None)
        bits = sum(entropy_bits(tensor.q) * tensor.q.numel() for tensor in tensors if tensor.q is not None)
        coded = len(coder.encode(tensors, config.coder_level))
        rows.append((group, nominal, nominal if group == PLAIN else bits / 8, coded))
    return pd.DataFrame(rows, columns=["group", "nominal_bytes", "entropy_bytes", "coded_bytes"])


def store_and_score(model: GPT, config: Config, data: Dataset, targets: int) -> tuple[int, float]:
    """Export ``model`` by ``config.quantize``, read the file back; return its bytes and its bits per byte.

    Scored are the first ``targets`` targets of the validation text (all, where it has fewer) in contiguous windows.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.golf"
        export(path, model, config, data.tokenizer.sha256, calibrate(model, config, data))
        loaded = read_artifact(path)
    tokens = data.val_tokens[: targets + 1]
    nll = scoring.score(loaded.build(), tokens, window=config.window, stride=config.window)
    total = int(data.val_token_bytes[: len(nll)].sum(dtype=np.int64))
    return loaded.bytes, scoring.bits_per_byte(nll, total)


@torch.no_grad()
def sensitivity(model: GPT, config: Config, data: Dataset, targets: int, bits: int = 4) -> pd.DataFrame:
    """Store one tensor at a time with ``bits`` bits and all others as ``config.quantize`` says; see what it costs.

    A row a tensor of more bits: ``name``, ``group``, ``saved_kb`` (thousand bytes of entropy), ``lost`` (bits per byte;
    mean over windows of the first ``targets`` targets) with its paired 95 % interval ``low``, ``high`` over ``n``
    windows. What only training uses is left out, as in the artifact.
    """
    window, known = config.window, calibrate(model, config, data)
    stored = quantize_model(model, config.quantize, known)
    probe = GPT(exported(model.config))
    probe.load_state_dict(dequantize(stored))
    places = probe.state_dict()  # shares memory with the model
    coarse = {"matrix_bits": bits, "mlp_bits": 0, "other_bits": bits}
    smaller = quantize_model(model, config.quantize.model_copy(update=coarse), known)
    count = min(targets, len(data.val_tokens) - 1) // window * window or len(data.val_tokens) - 1
    tokens, per_window = data.val_tokens[: count + 1], min(window, count)
    to_bpb = count / (math.log(2) * int(data.val_token_bytes[:count].sum(dtype=np.int64)))

    def losses() -> np.ndarray:
        return scoring.score(probe, tokens, window=window, stride=window).reshape(-1, per_window).mean(axis=1)

    before, rows = losses(), []
    for name, tensor in stored.items():
        fewer = smaller[name]
        if tensor.q is None or fewer.q is None or tensor.bits <= bits:
            continue
        places[name].copy_(fewer.dequantize())
        lost = describe((losses() - before) * to_bpb)
        places[name].copy_(tensor.dequantize())
        saved = (entropy_bits(tensor.q) - entropy_bits(fewer.q)) * tensor.q.numel() / 8000
        rows.append((name, group_of(name), saved, lost.mean, lost.low, lost.high, lost.n))
    return pd.DataFrame(rows, columns=["name", "group", "saved_kb", "lost", "low", "high", "n"])


def above_line(table: pd.DataFrame, line: list[str], variant: str) -> pd.DataFrame:
    """Compare a variant with the line through others, seed by seed, at its own size.

    ``table`` has ``variant``, ``seed``, ``artifact_bytes`` and ``quantization_val_bpb``. The line joins the points of
    the variants ``line`` by straight pieces. Returns ``seed``, ``score`` of the variant and ``on_line``, the line's at
    the variant's bytes; a seed that lacks one of them is left out.
    """
    rows = []
    for seed, mine in table.groupby("seed"):
        points = mine.set_index("variant")
        if not {*line, variant} <= set(points.index):
            continue
        joined, own = points.loc[line].sort_values("artifact_bytes"), points.loc[variant]
        at = np.interp(own["artifact_bytes"], joined["artifact_bytes"], joined["quantization_val_bpb"])
        rows.append((seed, own["quantization_val_bpb"], float(at)))
    return pd.DataFrame(rows, columns=["seed", "score", "on_line"])
