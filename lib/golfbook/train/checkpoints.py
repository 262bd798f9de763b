"""Checkpoints of a training run: one safetensors file with weights, their average, optimiser state and position.

Nothing is pickled, so a checkpoint from elsewhere can be opened safely; those of the published systems are read
by :mod:`golfbook.published.checkpoints`. Tensor names: ``model/<parameter>``, ``average/<kind>/<parameter>``,
``muon/<parameter>``, ``adam/<parameter>/<moment>``; scalars travel as JSON in the metadata.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from golfbook.errors import CheckpointError
from golfbook.files import atomic_path
from golfbook.model.gpt import GPT
from golfbook.run import Run
from golfbook.train.averaging import WeightAverage

Optimizers = Mapping[str, torch.optim.Optimizer]


def save_checkpoint(
    path: Path, model: nn.Module, average: WeightAverage, optimizers: Optimizers, progress: Mapping[str, Any]
) -> None:
    """Write everything a run needs to go on, atomically; ``progress`` is JSON-like (step, position, times)."""
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average/{name}": value for name, value in average.state_tensors().items()}
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for kind, optimizer in optimizers.items():
        for parameter, state in optimizer.state.items():
            tensors |= {f"{kind}/{names[parameter]}/{key}": value for key, value in state.items()}
    tensors["rng/torch"] = torch.get_rng_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors["rng/cuda"] = torch.cuda.get_rng_state()
    with atomic_path(path) as temporary:
        _save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary,
                  metadata={"progress": json.dumps({**progress, "average": average.state_numbers()})})  # fmt: skip


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # its own kind, also where the disk is full
        raise OSError(errno.ENOSPC if "No space" in str(error) else errno.EIO, str(error)) from error


def load_checkpoint(path: Path, model: nn.Module, average: WeightAverage, optimizers: Optimizers) -> dict[str, Any]:
    """Restore what :func:`save_checkpoint` wrote, in place; returns ``progress``.

    Raises :class:`CheckpointError` for a damaged file or one whose tensors do not fit the model.
    """
    tensors, progress = _read(path)
    model.load_state_dict(_section(tensors, "model", model.state_dict(), path))
    _load_average(average, tensors, progress, path)
    named = dict(model.named_parameters())
    for kind, optimizer in optimizers.items():
        for key, value in tensors.items():
            if key.startswith(f"{kind}/"):
                name, moment = key.removeprefix(f"{kind}/").rsplit("/", 1)
                if name not in named:
                    raise CheckpointError(f"{path}: optimiser state of '{name}', which this model does not have")
                optimizer.state[named[name]][moment] = value.to(named[name].device)
    torch.set_rng_state(tensors["rng/torch"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    return progress


def load_model(run: Run, which: Literal["averaged", "last"] = "averaged") -> GPT:
    """Load the model a finished or interrupted training left behind, in evaluation mode on the CPU.

    ``averaged`` gives the weights the training stage hands on, as ``train.averaging.method`` says. Raises
    :class:`CheckpointError` where there is no usable checkpoint.
    """
    tensors, progress = _read(run.checkpoint_path)
    model = GPT(run.config.model)
    model.load_state_dict(_section(tensors, "model", model.state_dict(), run.checkpoint_path))
    if which == "averaged":
        average = WeightAverage(run.config.train, model.state_dict())
        _load_average(average, tensors, progress, run.checkpoint_path)
        model.load_state_dict(average.result(model.state_dict()))
    return model.eval()


def read_progress(path: Path) -> dict[str, Any]:
    """Read the JSON part of a checkpoint without its tensors."""
    try:
        with safe_open(path, framework="pt") as stream:
            return json.loads(stream.metadata()["progress"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    progress = read_progress(path)
    try:
        with safe_open(path, framework="pt") as stream:
            return {key: stream.get_tensor(key) for key in stream.keys()}, progress  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def _load_average(
    average: WeightAverage, tensors: Mapping[str, Tensor], progress: Mapping[str, Any], path: Path
) -> None:
    found = {k.removeprefix("average/"): v for k, v in tensors.items() if k.startswith("average/")}
    try:
        average.load_state_tensors(found, progress["average"])
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: {error}; delete it to train anew") from None


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} is missing, damaged or no golfbook checkpoint ({error}); delete it to train anew")


def _section(
    tensors: Mapping[str, Tensor], section: str, template: Mapping[str, Tensor], path: Path
) -> dict[str, Tensor]:
    found = {k.removeprefix(f"{section}/"): v for k, v in tensors.items() if k.startswith(f"{section}/")}
    missing, extra = sorted(template.keys() - found.keys()), sorted(found.keys() - template.keys())
    shapes = [k for k in template.keys() & found.keys() if template[k].shape != found[k].shape]
    if missing or extra or shapes:
        raise CheckpointError(
            f"{path} does not fit this model: missing {missing[:5]}, extra {extra[:5]}, other shapes {shapes[:5]}"
        )
    return found
