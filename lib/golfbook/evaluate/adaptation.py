"""Adaptation at test time: a model learns from text only after it has been scored on it.

:func:`adapt_and_score` is the one driver. It scores a chunk, hands exactly the tokens of that chunk to a rule, and goes
on; a rule never sees a token whose score is still to come. A rule is a module and a line in
:mod:`golfbook.config.tables`.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from golfbook.errors import ConfigError
from golfbook.evaluate.scoring import Progress, Scorer
from golfbook.evaluate.windows import plan_windows
from golfbook.model.gpt import GPT


class Rule(Protocol):
    """Changes ``model`` in place by what it learns from ``tokens`` (n + 1,) int64, all of them scored already."""

    def __call__(self, model: GPT, tokens: Tensor) -> None: ...


def keep(model: GPT, tokens: Tensor) -> None:
    """Learn nothing: the rule of plain scoring."""


def adapt_and_score(
    model: GPT,
    tokens: NDArray[Any],
    rule: Rule,
    *,
    window: int,
    stride: int,
    chunk: int,
    batch_windows: int = 32,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Return the losses of all targets in nats, (n,) float32, of a model that adapts on the way; it stays adapted.

    After every ``chunk`` or more scored targets ``rule`` gets the tokens of these targets and the one before them;
    never after the last chunk, whose lesson nothing would use. Other arguments and errors are those of
    :func:`golfbook.evaluate.scoring.score`; raises :class:`ConfigError` for a chunk below one token.
    """
    if chunk < 1:
        raise ConfigError(f"a chunk must be at least 1 token, got {chunk}")
    windows = plan_windows(len(tokens) - 1, window, stride)
    scorer = Scorer(model, tokens, windows, window=window, batch_windows=batch_windows, device=device)
    losses, learnt, done = [], 0, 0
    for batch in scorer:
        losses.append(scorer(batch))
        done += len(batch)
        scored = int(batch.stop[-1])  # targets are scored in order, so all before it are, too
        if scored - learnt >= chunk and scored < len(tokens) - 1:
            rule(model, scorer.ids[learnt : scored + 1].long())
            learnt = scored
        if progress is not None:
            progress(done, len(windows))
    return scorer.checked(torch.cat(losses))
