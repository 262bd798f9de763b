"""The byte budget: bytes of code, and of an artifact that is there or only planned.

The challenge counts one script that trains and scores; here it is what :mod:`golfbook.compress.packing` makes.
"""

from __future__ import annotations

import torch

from golfbook.compress.coders import matrix
from golfbook.compress.packing import script
from golfbook.compress.quantizer import stored_as
from golfbook.config.architecture import ModelConfig
from golfbook.config.schema import QuantizeConfig
from golfbook.model.gpt import GPT, exported, model_facts

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


def code_bytes() -> int:
    """Count the bytes of the script that holds the code, as ``golfbook export`` writes it: minified and compressed.

    The tokenizer is not counted, as in the challenge (its hash is inside the artifact); notebooks and plots are not
    either.
    """
    return len(script())


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
