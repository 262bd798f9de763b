"""Sliding-window scoring: every target of a token stream once, in nats, and bits per byte from the sum.

Window w reads ``tokens[start : start + window]`` and scores the targets that no earlier window has scored, so all but
the first ``window`` targets have at least ``window - stride`` tokens of left context. ``stride == window`` is
contiguous scoring. The published scripts (PR 1166 section 18.3) score their last ``stride`` targets once for every
window that reaches the end, 32 times at their settings; :func:`published_windows` reproduces that for comparison.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from golfbook.errors import ConfigError, DataError, RunError
from golfbook.model.gpt import GPT

HEAD_LOGITS = 2**22  # logits that exist at the same time: 16 MiB in float32, whatever the vocabulary
CPU_TOKENS = 512  # tokens of one pass on a CPU: larger activations outgrow caches and are mapped anew each time
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Windows:
    """Which targets each window reads and scores; three int64 arrays of one length, in scoring order.

    Target i is ``tokens[i + 1]``, predicted at position i. Window w reads positions from ``starts[w]`` on and scores
    targets ``first[w] <= i < stop[w]``.
    """

    starts: NDArray[np.int64]
    first: NDArray[np.int64]
    stop: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def targets(self) -> NDArray[np.int64]:
        """Index of every scored target, window after window."""
        counts = self.stop - self.first
        before = np.cumsum(counts) - counts
        return np.repeat(self.first - before, counts) + np.arange(counts.sum())


def plan_windows(targets: int, window: int, stride: int) -> Windows:
    """Cover ``targets`` targets with windows a ``stride`` apart, each target scored exactly once, the tail included.

    The first window scores all its targets, each later one its last ``stride``; the last window holds what is left.
    Raises :class:`ConfigError` for an impossible window or stride and :class:`DataError` where there is no target.
    """
    _check_plan(targets, window, stride)
    count = 1 + max(0, -(-(targets - window) // stride))
    starts = np.arange(count, dtype=np.int64) * stride
    first = starts + window - stride
    first[0] = 0
    return Windows(starts, first, np.minimum(starts + window, targets))


def published_windows(targets: int, window: int, stride: int) -> Windows:
    """The windows of the published scripts (PR 1166 section 18.2), which score the last targets again and again.

    One window starts at every multiple of ``stride`` below ``targets``; those that the end cuts short score their last
    ``stride`` targets too, which are always the same. Only for showing the difference; raises as plan_windows does.
    """
    _check_plan(targets, window, stride)
    starts = np.arange(0, targets, stride, dtype=np.int64)
    stop = np.minimum(starts + window, targets)
    first = np.maximum(stop - stride, starts)
    first[0] = 0
    return Windows(starts, first, stop)


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
    tokens = _check_tokens(model, tokens)
    windows = plan_windows(len(tokens) - 1, window, stride)
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

    All batches have one shape, so that nothing is compiled or allocated anew: windows are padded on the right as far
    as the longest of them reaches, and get the rotary base of ``window`` tokens. Only scored positions reach the output
    head. The model is moved to ``device`` where one is given; it works in eval mode and gets the mode of
    each of its modules back. ``progress(done, total)`` is called with numbers of windows.

    Raises :class:`DataError` for tokens the model has no row for and :class:`RunError` where a loss is not finite.
    """
    tokens = _check_tokens(model, tokens)
    if batch_windows < 1:
        raise ConfigError(f"score.batch_windows must be at least 1, got {batch_windows}")
    if device is not None:
        model.to(device)
    place = next(model.parameters()).device
    total, read = len(windows), _read_length(model, windows, window)
    if place.type == "cpu":
        batch_windows = min(batch_windows, max(1, CPU_TOKENS // read))
    batches = -(-total // batch_windows)
    rows = -(-total // batches)  # equal batches: at most `batches - 1` rows are padding
    stream = np.zeros(max(len(tokens), int(windows.starts.max()) + read), dtype=np.int32)
    stream[: len(tokens)] = tokens
    ids = torch.from_numpy(stream).to(place)
    offsets = torch.arange(read, device=place)
    chunk = max(1, HEAD_LOGITS // model.config.vocab_size)
    nll = torch.empty(int((windows.stop - windows.first).sum()), dtype=torch.float32, device=place)
    filled = 0
    with evaluating(model), torch.inference_mode():
        for low in range(0, total, rows):
            high = min(low + rows, total)
            starts = np.zeros(rows, dtype=np.int64)
            starts[: high - low] = windows.starts[low:high]
            inputs = ids[torch.from_numpy(starts).to(place)[:, None] + offsets].long()
            part = Windows(windows.starts[low:high], windows.first[low:high], windows.stop[low:high])
            targets = part.targets
            owner = np.repeat(np.arange(high - low), part.stop - part.first)
            positions = owner * read + targets - part.starts[owner]
            scored = model.hidden(inputs, length=window).flatten(0, 1)[torch.from_numpy(positions).to(place)]
            wanted = ids[torch.from_numpy(targets + 1).to(place)].long()
            _fill_nll(model, scored, wanted, nll[filled : filled + len(targets)], chunk)
            filled += len(targets)
            if progress is not None:
                progress(high, total)
    result = nll.cpu().numpy()
    broken = np.flatnonzero(~np.isfinite(result))
    if len(broken):
        at = int(windows.targets[broken[0]])
        raise RunError(
            f"the loss of {len(broken)} of {len(result)} targets is not finite, first at target {at}; the weights or "
            "their activations overflow (a diverged training run?)"
        )
    return result


def bits_per_byte(nll: NDArray[Any], total_bytes: int) -> float:
    """Sum of ``nll`` (nats, added in float64) divided by ``ln 2`` and by the bytes of the text that was scored."""
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
    """Positions that a pass must compute: those of the longest window, in whole mini-batches of TTT-Linear."""
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


def _check_plan(targets: int, window: int, stride: int) -> None:
    if window < 1:
        raise ConfigError(f"score.window must be at least 1 token, got {window}")
    if not 1 <= stride <= window:
        raise ConfigError(f"score.stride must be from 1 to the window of {window} tokens, got {stride}")
    if targets < 1:
        raise DataError("there is nothing to score: the text has fewer than two tokens")


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
