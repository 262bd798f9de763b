"""Training batches from token shards: the sequential stream, coprime strides over many shards, and a prefetch thread.

Every loader yields the whole global batch of a step, whatever the number of processes and micro-batches, and has a
JSON-like state from which it goes on exactly::

    with Prefetching(make_loader(dataset.train_shards, config.train, config.seed)) as loader:
        inputs, targets = loader.next()  # a process trains on inputs[rank::world]
        progress = loader.state()
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from golfbook.config.schema import TrainConfig
from golfbook.data.shards import read_shard
from golfbook.errors import CheckpointError, DataError

SPANS = 8  # of a published step: its world size times its gradient accumulation steps
MIX_FROM, MIX_TO = 8, 64  # shards a coprime batch is drawn from, first and last: max(8, W) and max(32, 8 W), W = 8 GPUs
MIX_BATCHES = 1800  # batches from the first mix to the last
EVENNESS_FROM, EVENNESS_DROP = 0.9, 0.4  # exponent on the blocks a shard has left
READY = 1  # batches the prefetch thread keeps ready

Tokens = np.ndarray[Any, Any]
Batch = tuple[Tokens, Tokens]
State = dict[str, Any]


class Loader(ABC):
    """An endless series of training batches; a context manager that closes it."""

    @abstractmethod
    def next(self) -> Batch:
        """Return the next step's inputs and targets (the tokens after them), int64 (rows, sequence length) each."""

    @abstractmethod
    def state(self) -> State:
        """Return the position after the batches returned so far, JSON-like, and not changed by what follows."""

    @abstractmethod
    def load_state(self, state: State) -> None:
        """Go on from a :meth:`state` of the same loader over the same shards.

        Raises :class:`CheckpointError` for a state of another loader or of other shards.
        """

    def close(self) -> None:  # noqa: B027
        """End threads, where there are any."""

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_loader(shards: Sequence[Path], config: TrainConfig, seed: int) -> Loader:
    """Return the loader that ``config.loader`` names, at its start; ``seed`` is of no effect on the sequential one.

    Raises :class:`DataError` for a shard that is damaged or named as validation data, and where no shard is usable.
    """
    if config.loader == "coprime":
        return CoprimeLoader(shards, config.batch_tokens, config.sequence_length, seed)
    return SequentialLoader(shards, config.batch_tokens, config.sequence_length)


def open_training_shards(shards: Sequence[Path]) -> list[Tokens]:
    """Map the shards; raises :class:`DataError` where there is none, one is damaged or its name says validation."""
    if not shards:
        raise DataError("there is no training shard to load")
    for path in shards:
        if "_val_" in Path(path).name:
            raise DataError(f"{path} is named as a validation shard; a model is never trained on one")
    return [read_shard(path) for path in shards]


class SequentialLoader(Loader):
    """One endless stream over all shards in order, as published: no shuffling, no document boundaries.

    A step takes 8 spans of L + 1 tokens, L = batch_tokens / 8; their first L tokens are inputs, their last L targets,
    and the next span begins right after (PR 1166, section 3.2; 8 = world size times accumulation steps there). A batch
    whose eighth is no whole number of sequences (published systems have none) is one span of batch_tokens + 1.
    """

    def __init__(self, shards: Sequence[Path], batch_tokens: int, sequence_length: int) -> None:
        self.tokens = open_training_shards(shards)
        self.ends = np.cumsum([len(tokens) for tokens in self.tokens])
        self.sequence_length = sequence_length
        self.spans = SPANS if batch_tokens % (SPANS * sequence_length) == 0 else 1
        self.span = batch_tokens // self.spans + 1
        self.position = 0  # tokens taken so far, over all passes

    def next(self) -> Batch:
        return _shift(self._take(self.spans * self.span).reshape(self.spans, self.span), self.sequence_length)

    def state(self) -> State:
        return {"loader": "sequential", "position": self.position}

    def load_state(self, state: State) -> None:
        position = state.get("position")
        if state.get("loader") != "sequential" or not isinstance(position, int) or position < 0:
            raise _foreign(state, "sequential")
        self.position = position

    def _take(self, count: int) -> Tokens:
        """Take the next ``count`` tokens; wraps around at the end of the last shard."""
        pieces: list[Tokens] = []
        while count:
            at = self.position % int(self.ends[-1])
            shard = int(np.searchsorted(self.ends, at, side="right"))
            start = at - int(self.ends[shard]) + len(self.tokens[shard])
            piece = self.tokens[shard][start : start + count]
            pieces.append(piece)
            count -= len(piece)
            self.position += len(piece)
        return np.concatenate(pieces)


@dataclass
class Cursor:
    """One pass over the blocks of a shard: block ``(first + taken * stride) mod blocks`` comes next."""

    phase: int  # tokens left out before block 0
    blocks: int
    first: int
    stride: int  # coprime to blocks, so that a pass meets each block once
    taken: int = 0

    @classmethod
    def draw(cls, tokens: int, length: int, generator: np.random.Generator) -> Cursor:
        """Draw a new pass over a shard of ``tokens`` >= length + 1 tokens in blocks of ``length``."""
        phase = int(generator.integers(min(length - 1, tokens - length - 1) + 1))
        blocks = (tokens - 1 - phase) // length
        first = int(generator.integers(blocks))
        stride = 1
        if blocks > 2:
            while math.gcd(stride := int(generator.integers(1, blocks)), blocks) != 1:
                pass
        return cls(phase, blocks, first, stride)

    @property
    def remaining(self) -> int:
        """Return the blocks this pass has not taken yet."""
        return self.blocks - self.taken

    def take(self, length: int) -> int:
        """Take the next block: return the first token of its window, which is ``length + 1`` tokens long."""
        block = (self.first + self.taken * self.stride) % self.blocks
        self.taken += 1
        return self.phase + block * length

    def fits(self, tokens: int, length: int) -> bool:
        """Return whether this can be a pass under way over a shard of ``tokens`` tokens."""
        return (
            0 <= self.phase < length
            and self.blocks == (tokens - 1 - self.phase) // length
            and 0 <= self.first < self.blocks
            and math.gcd(self.stride, self.blocks) == 1
            and 0 <= self.taken < self.blocks
        )


class CoprimeLoader(Loader):
    """Windows of T + 1 tokens from many shards at once, each shard walked with a stride coprime to its blocks.

    The loader of the challenge's record of 2026-03-29 (described with PR 1406, section 10.4). A batch draws some
    shards with probability proportional to (blocks left)^alpha, takes one window of each and splits the rest of the
    batch among them by the same weights; windows are permuted within their shard and dealt out round-robin. With the
    batches drawn, alpha falls from 0.9 to 0.5 and the number of shards rises from 8 to 64, both as on the record's 8
    GPUs whatever the processes here, and never above the usable shards or the rows of a batch; a single shard is
    simply read in coprime order. A pass draws phase, first block and stride anew. Neighbouring windows of a pass
    share one token, which is a target of one and an input of the other.

    The generator is PCG64 on the pair (hash of the shard names, ``seed``): names without folders, so that a run
    repeats on another machine, and both, so that neither equal seeds on other data nor other seeds on equal data meet.
    Shards shorter than one window are left out. numpy may change what its generators draw between releases.
    """

    def __init__(self, shards: Sequence[Path], batch_tokens: int, sequence_length: int, seed: int) -> None:
        self.tokens = [tokens for tokens in open_training_shards(shards) if len(tokens) > sequence_length]
        if not self.tokens:
            raise DataError(
                f"no training shard holds a window of {sequence_length + 1} tokens: give more text, or set "
                f"train.sequence_length {sequence_length} lower"
            )
        self.sequence_length, self.rows = sequence_length, batch_tokens // sequence_length
        self.generator = np.random.Generator(np.random.PCG64([hash_names(Path(path).name for path in shards), seed]))
        self.cursors = [Cursor.draw(len(tokens), sequence_length, self.generator) for tokens in self.tokens]
        self.batches = 0

    def next(self) -> Batch:
        length = self.sequence_length
        windows = np.stack([self.tokens[shard][at : at + length + 1] for shard, at in self._draw()])
        return _shift(windows, length)

    def state(self) -> State:
        return {
            "loader": "coprime",
            "batches": self.batches,
            "generator": self.generator.bit_generator.state,
            "cursors": [list(astuple(cursor)) for cursor in self.cursors],
        }

    def load_state(self, state: State) -> None:
        if state.get("loader") != "coprime":
            raise _foreign(state, "coprime")
        try:
            cursors = [Cursor(*map(int, values)) for values in state["cursors"]]
            fit = [c.fits(len(t), self.sequence_length) for c, t in zip(cursors, self.tokens, strict=True)]
            batches = int(state["batches"])
            if not all(fit) or batches < 0:
                raise ValueError("positions outside the shards")
            self.generator.bit_generator.state = state["generator"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the loader's position does not fit the training shards ({error}); delete the checkpoint to train anew"
            ) from None
        self.cursors, self.batches = cursors, batches

    def mix(self) -> int:
        """Return the number of shards the next batch is drawn from."""
        most = min(len(self.tokens), self.rows)
        low, high = min(MIX_FROM, most), min(MIX_TO, most)
        return round(low + self._progress() * (high - low))

    def _progress(self) -> float:
        return min(self.batches / MIX_BATCHES, 1.0)

    def _draw(self) -> list[tuple[int, int]]:
        """Draw the shard and first token of each window of the next batch, in the order of its rows."""
        generator, mix = self.generator, self.mix()
        left = np.array([cursor.remaining for cursor in self.cursors], dtype=np.float64)
        weights = left ** (EVENNESS_FROM - EVENNESS_DROP * self._progress())
        chosen = generator.choice(len(weights), size=mix, replace=False, p=weights / weights.sum())
        counts = 1 + generator.multinomial(self.rows - mix, weights[chosen] / weights[chosen].sum())
        piles = []
        for shard, count in zip(chosen.tolist(), counts.tolist(), strict=True):
            starts = [self._take(shard) for _ in range(count)]
            piles.append(deque((shard, starts[i]) for i in generator.permutation(count).tolist()))
        piles = [piles[i] for i in generator.permutation(mix).tolist()]
        windows = []
        while piles:
            windows += [pile.popleft() for pile in piles]
            piles = [pile for pile in piles if pile]
        self.batches += 1
        return windows

    def _take(self, shard: int) -> int:
        cursor = self.cursors[shard]
        at = cursor.take(self.sequence_length)
        if not cursor.remaining:  # at once: a shard without blocks left could never be drawn again
            self.cursors[shard] = Cursor.draw(len(self.tokens[shard]), self.sequence_length, self.generator)
        return at


class Prefetching(Loader):
    """Prepares the next ``ready`` batches of a loader in one daemon thread, without changing any of them.

    The thread starts with the first :meth:`next`. :meth:`state` is that of the batch returned last, however far the
    thread is ahead. What the wrapped loader raises surfaces in :meth:`next`, after the batches before it. The wrapped
    loader belongs to this one until :meth:`close`, which joins the thread and takes the loader back to
    :meth:`state`; a thread left unclosed sleeps and does not keep the process alive.
    """

    def __init__(self, loader: Loader, ready: int = READY) -> None:
        if ready < 1:
            raise ValueError(f"ready must be at least 1, got {ready}")
        self.loader, self.ready = loader, ready
        self._returned = loader.state()
        self._batches: deque[tuple[Batch, State]] = deque()
        self._error: BaseException | None = None
        self._closing = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def next(self) -> Batch:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="golfbook-prefetch", daemon=True)
            self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._batches or self._error)
            if not self._batches:
                assert self._error is not None
                raise self._error
            batch, self._returned = self._batches.popleft()
            self._changed.notify_all()
        return batch

    def state(self) -> State:
        return self._returned

    def load_state(self, state: State) -> None:
        self.close()
        self.loader.load_state(state)
        self._returned = self.loader.state()

    def close(self) -> None:
        if self._thread is None:
            return
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._thread, self._error, self._closing = None, None, False
        self._batches.clear()
        self.loader.load_state(self._returned)

    def _work(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing or len(self._batches) < self.ready)
                    if self._closing:
                        return
                prepared = self.loader.next(), self.loader.state()
                with self._changed:
                    self._batches.append(prepared)
                    self._changed.notify_all()
        except BaseException as error:  # whatever it is: next() would wait forever for a thread that has ended
            with self._changed:
                self._error = error
                self._changed.notify_all()


def hash_names(names: Iterable[str]) -> int:
    """Hash names as FNV does, to 64 bits: from 0, exclusive-or with each byte, then times 1099511628211."""
    value = 0
    for byte in "".join(names).encode():
        value = (value ^ byte) * 1099511628211 % 2**64
    return value


def _shift(spans: Tokens, length: int) -> Batch:
    """Return inputs and targets, int64 (rows, length), of spans (n, k * length + 1): the targets are one token on."""
    inputs, targets = spans[:, :-1].astype(np.int64), spans[:, 1:].astype(np.int64)
    return inputs.reshape(-1, length), targets.reshape(-1, length)


def _foreign(state: State, expected: str) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint holds the position of loader {state.get('loader')!r}, expected {expected!r} (train.loader); "
        "delete the checkpoint to train anew"
    )
