"""From a trained model to an artifact: the one way, taken by the stage, the tour and the notebooks alike."""

from __future__ import annotations

from pathlib import Path

from golfbook.compress.container import write_artifact
from golfbook.compress.quantizer import QuantizedTensor, Statistics, quantize
from golfbook.config.schema import Config, QuantizeConfig
from golfbook.model.component import facts_of
from golfbook.model.gpt import GPT, exported, exported_state


def export(
    path: str | Path, model: GPT, config: Config, tokenizer_sha256: str, statistics: Statistics | None = None
) -> dict[str, QuantizedTensor]:
    """Quantise ``model`` by ``config.quantize``, write the artifact ``path`` and return its tensors by name.

    What only training uses is left out. The artifact names ``config.train.sequence_length`` as its natural window. The
    same arguments give the same bytes. Raises :class:`golfbook.errors.RunError` naming a tensor that cannot be stored.
    """
    quantized = quantize_model(model, config.quantize, statistics)
    shape, length = exported(model.config), config.train.sequence_length
    write_artifact(path, shape, quantized, tokenizer_sha256, config.quantize, length)
    return quantized


def quantize_model(
    model: GPT, config: QuantizeConfig, statistics: Statistics | None = None
) -> dict[str, QuantizedTensor]:
    """Quantise all tensors of a model but those that only training uses; raises what :func:`export` raises."""
    storage = {name: facts.storage for name, facts in facts_of(model).items()}
    state = {name: tensor.cpu() for name, tensor in exported_state(model).items()}
    return quantize(state, storage, config, statistics)
