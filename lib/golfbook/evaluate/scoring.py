"""The score: every target of a token stream once, in nats, and bits per byte from the sum.

:class:`Scorer` hands out batches of windows and scores one at a time; :func:`score` runs through them all. What adapts
a model between batches is :mod:`golfbook.evaluate.adaptation`, which alone owns the order of scoring and learning.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from golfbook.errors import ConfigError, DataError, RunError
from golfbook.evaluate.windows import Windows, plan_windows
from golfbook.model.gpt import GPT

HEAD_LOGITS = 2**22  # logits that exist at the same time: 16 MiB in float32, whatever the vocabulary
CPU_TOKENS = 512  # tokens of one pass on a CPU: larger activations outgrow caches and are mapped anew each time
Progress = Callable[[int, int], None]


def score(
    model: GPT,
    tokens: NDArray[Any],
    *,
    window: int,
    stride: int,
    batch_windows: int = 32,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Return the negative log-probability of every target, (n,) float32 in nats, for ``tokens`` (n + 1,).

    ``batch_windows`` is the largest number of windows of one forward pass (a CPU takes fewer where they are long); it
    changes speed and the order of float32 operations, nothing else. See :func:`score_windows` for the other arguments
    and the errors.
    """
    windows = plan_windows(len(_check_tokens(model, tokens)) - 1, window, stride)
    return score_windows(
        model, tokens, windows, window=window, batch_windows=batch_windows, device=device, progress=progress
    )


def score_windows(
    model: GPT,
    tokens: NDArray[Any],
    windows: Windows,
    *,
    window: int,
    batch_windows: int = 32,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Return the negative log-probability in nats of ``windows.targets``, float32, in that order.

    The model is moved to ``device`` where one is given. ``progress(done, total)`` is called with numbers of windows.
    Raises :class:`DataError` for tokens the model has no row for and :class:`RunError` where a loss is not finite.
    """
    scorer = Scorer(model, tokens, windows, window=window, batch_windows=batch_windows, device=device)
    losses, done = [], 0
    for batch in scorer:
        losses.append(scorer(batch))
        done += len(batch)
        if progress is not None:
            progress(done, len(windows))
    return scorer.checked(torch.cat(losses))


class Scorer:
    """Scores batches of windows of one token stream.

    All batches have one shape, so that nothing is compiled or allocated anew: windows are padded on the right as far
    as the longest of them reaches, and get the rotary base of ``window`` tokens. Only scored positions reach the output
    head.
    """

    def __init__(
        self,
        model: GPT,
        tokens: NDArray[Any],
        windows: Windows,
        *,
        window: int,
        batch_windows: int = 32,
        device: torch.device | str | None = None,
    ) -> None:
        tokens = _check_tokens(model, tokens)
        if batch_windows < 1:
            raise ConfigError(f"score.batch_windows must be at least 1, got {batch_windows}")
        if device is not None:
            model.to(device)
        self.model, self.windows, self.window = model, windows, window
        self.device = next(model.parameters()).device
        self.read = _read_length(model, windows, window)
        if self.device.type == "cpu":
            batch_windows = min(batch_windows, max(1, CPU_TOKENS // self.read))
        self.rows = -(-len(windows) // -(-len(windows) // batch_windows))
        stream = np.zeros(max(len(tokens), int(windows.starts.max()) + self.read), dtype=np.int32)
        stream[: len(tokens)] = tokens
        self.ids = torch.from_numpy(stream).to(self.device)
        self.offsets = torch.arange(self.read, device=self.device)

    def __iter__(self) -> Iterator[Windows]:
        """Return the batches, in scoring order."""
        return self.windows.batches(self.rows)

    def __call__(self, batch: Windows) -> Tensor:
        """Return the losses in nats of ``batch.targets`` (n,) float32 on the model's device.

        The model works in eval mode and gets the mode of each of its modules back.
        """
        starts = np.zeros(self.rows, dtype=np.int64)
        starts[: len(batch)] = batch.starts
        targets = batch.targets
        owner = np.repeat(np.arange(len(batch)), batch.stop - batch.first)
        positions = torch.from_numpy(owner * self.read + targets - batch.starts[owner]).to(self.device)
        nll = torch.empty(len(targets), dtype=torch.float32, device=self.device)
        chunk = max(1, HEAD_LOGITS // self.model.config.vocab_size)
        with evaluating(self.model), torch.inference_mode():
            inputs = self.ids[torch.from_numpy(starts).to(self.device)[:, None] + self.offsets].long()  # (rows, read)
            scored = self.model.hidden(inputs, length=self.window).flatten(0, 1)[positions]  # (n, D)
            wanted = self.ids[torch.from_numpy(targets + 1).to(self.device)].long()
            _fill_nll(self.model, scored, wanted, nll, chunk)
        return nll

    def checked(self, nll: Tensor) -> NDArray[np.float32]:
        """Return the losses of all windows as an array; raises :class:`RunError` where one is not finite."""
        result = nll.cpu().numpy()
        broken = np.flatnonzero(~np.isfinite(result))
        if len(broken):
            at = int(self.windows.targets[broken[0]])
            raise RunError(
                f"the loss of {len(broken)} of {len(result)} targets is not finite, first at target {at}; the weights "
                "or their activations overflow (a diverged training run?)"
            )
        return result


def bits_per_byte(nll: NDArray[Any], total_bytes: int) -> float:
    """Divide the sum of ``nll`` (nats, added in float64) by ``ln 2`` and by the bytes of the text that was scored."""
    if total_bytes <= 0:
        raise DataError(f"bits per byte need a text of at least one byte, got {total_bytes}")
    return float(np.sum(nll, dtype=np.float64)) / (math.log(2.0) * total_bytes)


def summarize(nll: NDArray[Any], total_bytes: int) -> dict[str, float | int]:
    """Return ``val_bpb``, ``val_loss`` (mean nats a target), ``tokens`` (targets) and ``bytes``."""
    if not len(nll):
        raise DataError("there is no target to summarise")
    return {
        "val_bpb": bits_per_byte(nll, total_bytes),
        "val_loss": float(np.sum(nll, dtype=np.float64)) / len(nll),
        "tokens": len(nll),
        "bytes": int(total_bytes),
    }


def _read_length(model: GPT, windows: Windows, window: int) -> int:
    """Return the positions a pass must compute: those of the longest window, in whole mini-batches of TTT-Linear."""
    refiner = model.config.ttt_linear
    batch = refiner.mini_batch if refiner.enabled else 1
    longest = int((windows.stop - windows.starts).max())
    return min(window, -(-longest // batch) * batch)


def _fill_nll(model: GPT, hidden: Tensor, targets: Tensor, out: Tensor, chunk: int) -> None:
    for low in range(0, len(targets), chunk):
        part = slice(low, low + chunk)
        out[part] = F.cross_entropy(model.logits(hidden[part]).float(), targets[part], reduction="none")


def _check_tokens(model: GPT, tokens: NDArray[Any]) -> NDArray[Any]:
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "ui":
        raise DataError(f"tokens must be one row of integers, got shape {tokens.shape} of {tokens.dtype}")
    vocab_size = model.config.vocab_size
    lowest, highest = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise DataError(f"token {wrong} is outside the model's vocabulary of {vocab_size}; was another tokenizer used?")
    return tokens


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode and give each of its modules its own mode back in the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
