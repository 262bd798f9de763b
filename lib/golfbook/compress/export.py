"""From a trained model to an artifact: the one way, taken by the stage, the tour and the notebooks alike."""

from __future__ import annotations

from pathlib import Path

from golfbook.compress.container import write_artifact
from golfbook.compress.rowwise import QuantizedTensor, quantize_state
from golfbook.config.schema import Config
from golfbook.model.gpt import GPT, exported, exported_state


def export(path: str | Path, model: GPT, config: Config, tokenizer_sha256: str) -> dict[str, QuantizedTensor]:
    """Quantise ``model`` by ``config.quantize``, write the artifact ``path`` and return its tensors by name.

    What only training uses is left out. The artifact names ``config.train.sequence_length`` as its natural window. The
    same arguments give the same bytes. Raises :class:`golfbook.errors.RunError` naming a tensor that cannot be stored.
    """
    quantized = quantize_state(exported_state(model), config.quantize)
    shape, length = exported(model.config), config.train.sequence_length
    write_artifact(path, shape, quantized, tokenizer_sha256, config.quantize, length)
    return quantized
