"""Adaptive tables of counts, and those who use them: a writer and a reader.

Everything between a table and the bits is exact, so that what one machine writes every other reads: counts and
frequencies are integers that sum to 2^20, and the range coder is handed their quotient by 2^20 in float64, which is
exact, as are its products with numbers below 2^24. Nothing here calls a function of libm.

A table is refreshed when what waits is an eighth of what it has seen. No frequency exceeds 2^(-1/64) of the total: a
symbol costs at least 1/64 bit, and a reader can refuse a table of contents that declares more than
:data:`VALUES_PER_BYTE` values a byte.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import constriction
import numpy as np

TOTAL = 2**20
MOST = 1_037_200  # below TOTAL * 2^(-1/64), with room for the coder's rounding
VALUES_PER_BYTE = 512
UNIT = 64  # weight of one symbol, so that priors can weigh less
FIRST = 8  # symbols before the first refresh


def frequencies(counts: np.ndarray) -> np.ndarray:
    """Return positive frequencies (n,) int64 that sum to :data:`TOTAL`, none above :data:`MOST`, like ``counts``."""
    found = 1 + counts * (TOTAL - len(counts)) // int(counts.sum())
    top = int(found.argmax())
    found[top] += TOTAL - int(found.sum())
    if found[top] > MOST:
        share, rest = divmod(int(found[top]) - MOST, len(found) - 1)
        found += share
        found[top] = MOST
        found[top - 1 if top else 1] += rest
    return found


class Table:
    """Counts of the symbols 0 to n-1, which start from a prior (n,) int64 in units of 1/:data:`UNIT` symbol.

    With ``mirrored`` the last symbol is an escape and the others are as likely as their mirror images.
    """

    def __init__(self, prior: np.ndarray, mirrored: bool = False) -> None:
        self.counts, self.mirrored = prior.copy(), mirrored
        self.seen, self.left, self.waiting = 0, FIRST, [np.zeros(0, np.int32)]
        self._refresh()

    def _refresh(self) -> None:
        self.frequencies = frequencies(self.counts)
        self.model = constriction.stream.model.Categorical(self.frequencies / TOTAL, perfect=False)

    def add(self, symbols: np.ndarray) -> None:
        """Count symbols, at most ``left`` of them."""
        self.waiting.append(symbols)
        self.left -= len(symbols)
        if not self.left:
            new = np.bincount(np.concatenate(self.waiting), minlength=len(self.counts)) * UNIT
            self.counts += folded(new) if self.mirrored else new
            self.seen += int(new.sum()) // UNIT
            self.waiting, self.left = [], max(FIRST, self.seen >> 3)
            self._refresh()


def folded(counts: np.ndarray) -> np.ndarray:
    """Return twice the mean of counts and their mirror image; the last one, an escape, stands for itself."""
    out = 2 * counts
    out[:-1] = counts[:-1] + counts[-2::-1]
    return out


class Port(ABC):
    """Takes symbols to or from somewhere; one walk through the tensors serves writing, reading and measuring."""

    reads = False

    def code(self, table: Table, symbols: np.ndarray | None, count: int) -> np.ndarray:
        """Pass ``count`` symbols (int32) under an adaptive table; a reader is given None. Returns them."""
        if count <= table.left:
            out = self._pass(table, symbols, count)
            table.add(out)
            return out
        found, start = [], 0
        while start < count:
            stop = min(count, start + table.left)
            found.append(self._pass(table, None if symbols is None else symbols[start:stop], stop - start))
            table.add(found[-1])
            start = stop
        return np.concatenate(found)

    @abstractmethod
    def _pass(self, table: Table, symbols: np.ndarray | None, count: int) -> np.ndarray: ...

    @abstractmethod
    def plain(self, bits: int, symbols: np.ndarray | None, count: int) -> np.ndarray:
        """Pass ``count`` numbers of ``bits`` bits (1 to 16) as they are."""


class Writer(Port):
    """Writes symbols by range coding."""

    def __init__(self) -> None:
        self.coder = constriction.stream.queue.RangeEncoder()

    def _pass(self, table: Table, symbols: np.ndarray | None, count: int) -> np.ndarray:
        assert symbols is not None
        self.coder.encode(symbols, table.model)
        return symbols

    def plain(self, bits: int, symbols: np.ndarray | None, count: int) -> np.ndarray:
        assert symbols is not None
        self.coder.encode(symbols, constriction.stream.model.Uniform(2**bits))
        return symbols

    def data(self) -> bytes:
        """Return all that was written."""
        return self.coder.get_compressed().astype("<u4").tobytes()


class Reader(Port):
    """Reads what a :class:`Writer` wrote; raises ValueError where no writer can have."""

    reads = True

    def __init__(self, stream: memoryview) -> None:
        if len(stream) % 4:
            raise ValueError("its coded stream is not made of whole words")
        self.coder = constriction.stream.queue.RangeDecoder(np.frombuffer(stream, "<u4").astype(np.uint32))

    def _pass(self, table: Table, symbols: np.ndarray | None, count: int) -> np.ndarray:
        return self._decode(table.model, count)

    def plain(self, bits: int, symbols: np.ndarray | None, count: int) -> np.ndarray:
        return self._decode(constriction.stream.model.Uniform(2**bits), count)

    def _decode(self, model: constriction.stream.model.Model, count: int) -> np.ndarray:
        try:
            return self.coder.decode(model, count)
        except AssertionError:
            raise ValueError("its coded stream is none that a writer makes") from None

    def finish(self) -> None:
        """Check that nothing is left."""
        if not self.coder.maybe_exhausted():
            raise ValueError("it holds more data than it declares")
