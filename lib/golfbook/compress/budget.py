"""The byte budget: bytes of code, and of an artifact that is there or only planned.

The challenge counts the training script; here the script is a package, so every module that a score needs counts.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from pathlib import Path

import torch

from golfbook.compress.coders import matrix
from golfbook.compress.quantizer import stored_as
from golfbook.config.architecture import ModelConfig
from golfbook.config.schema import QuantizeConfig
from golfbook.config.tables import CODERS, QUANTIZERS
from golfbook.model.gpt import GPT, exported, model_facts

PACKAGE = Path(__file__).parents[1]
CODE_ROOTS = ("train.loop", "compress.export", "evaluate.scoring")
# Bits that a coded integer needs, as a share of its nominal bits; float16 values hardly compress.
CODED_SHARE = 0.73
CODED_SHARE_FLOAT = 0.93
SIDE_BITS = 6  # of a row or column under the entropy coder: the log of its step and the class of its deviation


def size_report(artifact_bytes: int, limit_bytes: int) -> dict[str, int | bool]:
    """Compare code bytes plus artifact bytes with the limit, counted as the challenge does."""
    code = code_bytes()
    total = code + artifact_bytes
    return {
        "code_bytes": code,
        "artifact_bytes": artifact_bytes,
        "total_bytes": total,
        "limit_bytes": limit_bytes,
        "within_budget": total <= limit_bytes,
    }


@functools.cache
def code_bytes() -> int:
    """Count the UTF-8 bytes of all modules that training, exporting and scoring import, uncompressed.

    The tokenizer is not counted, as in the challenge (its hash is inside the artifact); notebooks and plots are not
    either.
    """
    return sum(path.stat().st_size for path in code_modules().values())


def code_modules() -> dict[str, Path]:
    """Return all modules whose bytes count, those that settings name included, by dotted name."""
    by_name = [place.rpartition(".")[0] for table in (QUANTIZERS, CODERS) for place in table.values()]
    return import_closure([*CODE_ROOTS, *by_name], PACKAGE)


def import_closure(roots: Iterable[str], package: Path) -> dict[str, Path]:
    """Return the modules of the folder ``package`` that ``roots`` import, directly or not, themselves included.

    Found in the sources, wherever an import stands, without importing anything. Keys are dotted names below the
    package (``"train.loop"``; a package's own ``__init__`` counts with every module in it), sorted.
    """
    found: dict[str, Path] = {}
    waiting = ["__init__", *roots]
    while waiting:
        name = waiting.pop()
        path = package / f"{name.replace('.', '/')}.py"
        if name in found or not path.is_file():
            continue
        found[name] = path
        if "." in name:
            waiting.append(f"{name.rpartition('.')[0]}.__init__")
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            below = [name.removeprefix(f"{package.name}.") for name in names if name.startswith(f"{package.name}.")]
            waiting += [*below, *(f"{name}.__init__" for name in below)]
    return dict(sorted(found.items()))


def artifact_bytes(model: ModelConfig, quantize: QuantizeConfig) -> int:
    """Estimate the size of the artifact: every tensor as the quantiser will store it, at the coder's usual share.

    Integers of b bits take ``CODED_SHARE * b`` bits, which holds within some 15 % for trained models of the published
    size; weights that training has not spread, or a scale floor that squeezes them, take less. Where the quantiser is
    told an entropy (``quantize.rate.bits``), integers take that, and each row and column ``SIDE_BITS``.
    """
    with torch.device("meta"):
        state = GPT(exported(model)).state_dict()
    facts = model_facts(model)
    bits = 0.0
    for name, tensor in state.items():
        kind, width = stored_as(facts[name].storage, tensor.numel(), quantize)
        if kind == "int" and quantize.quantizer == "rate_distortion":
            bits += tensor.numel() * quantize.rate.bits + SIDE_BITS * sum(matrix(tuple(tensor.shape)))
        else:
            bits += tensor.numel() * width * (CODED_SHARE if kind == "int" else CODED_SHARE_FLOAT)
            bits += 16 * tensor.shape[0] if kind == "int" else 0
    return round(bits / 8)
