"""From a trained model to an artifact: the one way, taken by the stage, the tour and the notebooks alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from golfbook.compress.container import expected_bytes, write_artifact
from golfbook.compress.fit import Fitted, fit
from golfbook.compress.quantizer import QuantizedTensor, Statistics, quantize
from golfbook.compress.solver import Plan, solve, written
from golfbook.config.schema import Config, QuantizeConfig
from golfbook.errors import RunError
from golfbook.model.component import Storage, facts_of
from golfbook.model.gpt import GPT, exported, exported_state


def export(
    path: str | Path,
    model: GPT,
    config: Config,
    tokenizer_sha256: str,
    statistics: Statistics | None = None,
    limit: int | None = None,
) -> Fitted:
    """Quantise ``model`` by ``config.quantize``, write the artifact ``path``, and return its tensors and what fitted.

    What only training uses is left out. The artifact names ``config.train.sequence_length`` as its natural window. It
    may have ``limit`` bytes (None: the whole budget, as if code took nothing), and ``config.quantize.fit`` says what is
    done where it has more. The same arguments give the same bytes. Raises :class:`golfbook.errors.RunError` naming a
    tensor that cannot be stored, and where a quantiser that needs ``statistics`` is given none.
    """
    state, storage = _parts(model, config.quantize, statistics)
    shape, length = exported(model.config), config.train.sequence_length

    def write(quantized: Mapping[str, QuantizedTensor], quantize_config: QuantizeConfig) -> int:
        return write_artifact(path, shape, quantized, tokenizer_sha256, quantize_config, length)

    limit = config.budget.limit_bytes if limit is None else limit
    if config.quantize.fit == "solve":
        return written(plan(model, config, tokenizer_sha256, statistics, limit), write, limit)
    return fit(state, storage, config.quantize, statistics, write, limit)


def plan(model: GPT, config: Config, tokenizer_sha256: str, statistics: Statistics | None, limit: int) -> Plan:
    """Return what :func:`export` would store of ``model`` in ``limit`` bytes with ``config.quantize.fit`` "solve"."""
    state, storage = _parts(model, config.quantize, statistics)
    shape, length = exported(model.config), config.train.sequence_length

    def expect(quantized: Mapping[str, QuantizedTensor], quantize_config: QuantizeConfig) -> int:
        return expected_bytes(shape, quantized, tokenizer_sha256, quantize_config, length)

    return solve(state, storage, config.quantize, statistics or {}, limit, expect)


def quantize_model(
    model: GPT, config: QuantizeConfig, statistics: Statistics | None = None
) -> dict[str, QuantizedTensor]:
    """Quantise all tensors of a model but those that only training uses; raises what :func:`export` raises."""
    state, storage = _parts(model, config, statistics)
    return quantize(state, storage, config, statistics)


def _parts(
    model: GPT, config: QuantizeConfig, statistics: Statistics | None
) -> tuple[dict[str, Tensor], dict[str, Storage]]:
    """Return the tensors that are exported, on the CPU, and what each of all is stored as."""
    if config.calibrated and statistics is None:
        raise RunError(
            f"quantize.quantizer '{config.quantizer}' needs statistics of a calibration text, and was given none: "
            "collect them first, or choose a quantiser that looks at weights alone (percentiles, row_maximum)"
        )
    state = {name: tensor.cpu() for name, tensor in exported_state(model).items()}
    return state, {name: facts.storage for name, facts in facts_of(model).items()}
