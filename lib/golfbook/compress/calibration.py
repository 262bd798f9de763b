"""The text that a quantiser measures a model on: training text, text that the model writes itself, or random tokens.

None of them is validation text: what is scored must not have shaped the artifact. Text of the model's own needs no data
at all (a sibling of PR 1406, section 23 of its description, calibrates on it).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from golfbook.compress.quantizer import Statistics
from golfbook.compress.statistics import collect
from golfbook.config.schema import Config
from golfbook.data.batches import CoprimeLoader
from golfbook.data.dataset import Dataset
from golfbook.errors import ConfigError
from golfbook.evaluate.generate import draw, next_logits
from golfbook.evaluate.scoring import evaluating
from golfbook.model.cache import Cache
from golfbook.model.gpt import GPT

BATCH_TOKENS = 2**14  # of one batch, which is one forward pass: 8 published sequences
Source = Literal["training", "generated", "random"]


def calibrate(model: GPT, config: Config, dataset: Dataset) -> Statistics | None:
    """Return what the quantiser of ``config`` asks to know of ``model``, measured as its settings say; None: nothing.

    The text is drawn from the run's seed. Raises what :func:`batches` raises.
    """
    settings = config.quantize.calibration
    if not config.quantize.calibrated:
        return None
    text = batches(
        settings.source,
        model,
        dataset,
        sequences=settings.sequences,
        length=config.train.sequence_length,
        seed=config.seed,
        temperature=settings.temperature,
    )
    gradients, outputs = config.quantize.quantizer == "rate_distortion", config.quantize.rate.feedback == "both"
    return collect(model, text, gradients=gradients, outputs=outputs, recurrence=settings.recurrence)


def batches(
    source: Source, model: GPT, dataset: Dataset, *, sequences: int, length: int, seed: int, temperature: float = 1.0
) -> list[tuple[Tensor, Tensor]]:
    """Return tokens and targets (B, T) int64 of ``sequences`` sequences of ``length`` tokens, drawn from ``seed``.

    "training": windows of the training shards, none twice before all were drawn. "generated": what ``model`` writes at
    ``temperature`` after a first token drawn uniformly, its logits being those of inputs of that length. "random":
    uniform token ids. Raises :class:`ConfigError` for settings out of range and :class:`golfbook.errors.DataError`
    where no shard holds a window.
    """
    if sequences < 1 or length < 1 or temperature < 0:
        raise ConfigError(
            f"calibration needs at least 1 sequence of 1 token and a temperature of at least 0; got {sequences} "
            f"sequences, length {length}, temperature {temperature}"
        )
    rows, generator = max(1, BATCH_TOKENS // length), torch.Generator().manual_seed(seed)
    vocab_size = dataset.tokenizer.vocab_size
    if source == "training":
        loader = CoprimeLoader(dataset.train_shards, sequences * length, length, seed)
        tokens, targets = (torch.from_numpy(part) for part in loader.next())
        return list(zip(tokens.split(rows), targets.split(rows), strict=True))
    if source == "random":
        text = torch.randint(vocab_size, (sequences, length + 1), generator=generator)
        return [(part[:, :-1], part[:, 1:]) for part in text.split(rows)]
    first = torch.randint(vocab_size, (sequences, 1), generator=generator)
    texts = (write(model, part, length, vocab_size, temperature, generator) for part in first.split(rows))
    return [(part[:, :-1], part[:, 1:]) for part in texts]


def write(
    model: GPT, first: Tensor, count: int, vocab_size: int, temperature: float, generator: torch.Generator
) -> Tensor:
    """Return ``first`` (B, 1) int64 and ``count`` tokens below ``vocab_size`` that ``model`` writes after it.

    They stand in windows of ``count`` positions; a BOS is a token like any other.
    """
    cache, text = Cache(count), first
    with evaluating(model):
        for _ in range(count):
            logits = next_logits(model, text[:, -1:], cache)[:, :vocab_size]
            text = torch.cat((text, draw(logits, temperature, 0, generator)[:, None]), dim=1)
    return text
