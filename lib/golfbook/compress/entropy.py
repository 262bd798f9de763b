"""The entropy coder: a range coder under adaptive models that know rows, columns and the trellis.

One walk (:class:`Walk`) goes through the tensors and serves writing, reading and measuring. A tensor is sent as its
scale and logs, a class a row and a column (:mod:`golfbook.compress.contexts`), and its integers: without a trellis in
blocks of rows, with one column by column, since the half-grid of a column follows from those before it. In a block the
integers of one context go together. One beyond its table is an escape, and its distance follows as an Elias-gamma code.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import numpy as np
import torch

from golfbook.compress.coders import Entry, arrays_of, assemble, entry_of, matrix, parts
from golfbook.compress.contexts import BOUNDS, CLASSES, HALVES, SHIFTS, fit, prior
from golfbook.compress.counts import UNIT, VALUES_PER_BYTE, Port, Reader, Table, Writer
from golfbook.compress.quantizer import QuantizedTensor
from golfbook.compress.trellis import points, transitions

BLOCK = 2**18  # integers of a block without a trellis
MAX_COLUMNS = 2**18  # of all tensors with a trellis: each costs a reader time, however short
TRIED = 64  # rows that a group of rows alike is looked for around
ALPHABET = 64  # symbols of side information; the last one is an escape
CHECK = struct.Struct("<I")
Arrays = dict[str, np.ndarray]


class Walk:
    """Passes tensors through a port, under tables that all of them share."""

    def __init__(self, port: Port) -> None:
        self.port, self.tables, self.check = port, dict[object, Table](), 0

    def table(self, key: object, start: Callable[[], np.ndarray], mirrored: bool = False) -> Table:
        """Return the table of ``key``, made from the counts ``start()`` at its first use."""
        if key not in self.tables:
            self.tables[key] = Table(start(), mirrored)
        return self.tables[key]

    def tensor(self, entry: Entry, arrays: Arrays) -> Arrays:
        """Pass one tensor; ``arrays`` are empty where the port reads. Returns them."""
        out = {}
        for part in parts(entry):
            given = arrays.get(part.field)
            if part.field == "q":
                out["q"] = self.integers(entry, given, part.dtype).reshape(part.shape)
            elif part.dtype.kind == "u":
                out[part.field] = self.vector(part.field, given, part.shape[0], 0, 255).astype(part.dtype)
            else:
                out[part.field] = self.floats(part.field, given, part.dtype, prod(part.shape)).reshape(part.shape)
            self.check = zlib.crc32(np.ascontiguousarray(out[part.field]).tobytes(), self.check)
        return out

    def floats(self, field: str, values: np.ndarray | None, dtype: np.dtype, count: int) -> np.ndarray:
        """Pass floats: the commonest, which are as it, and the others as planes of bytes, the highest first.

        Scales are often all at a floor. Planes and marks have tables of their field and dtype.
        """
        bits = np.dtype(f"<u{dtype.itemsize}")
        given = None if values is None else np.ascontiguousarray(values, dtype).ravel().view(bits)
        out, others = np.zeros(count, bits), np.ones(count, bool)
        if field == "scale" and count > 1:
            marks = None
            if given is not None:
                seen, times = np.unique(given, return_counts=True)
                out[:] = seen[times.argmax()]
                marks = (given != out).astype(np.int32)
            out[:] = self._planes(field, out[:1], dtype, 1)[0]
            others = self.port.code(self.table(("marks", dtype), partial(np.full, 2, UNIT)), marks, count) == 1
        out[others] = self._planes(field, None if given is None else given[others], dtype, int(others.sum()))
        return out.view(dtype)

    def _planes(self, field: str, values: np.ndarray | None, dtype: np.dtype, count: int) -> np.ndarray:
        planes = np.empty((count, dtype.itemsize), np.uint8)
        if values is not None and not self.port.reads:
            planes[:] = values.reshape(-1, 1).view(np.uint8)
        for plane in reversed(range(dtype.itemsize)):
            # low bytes are noise: to be learnt slowly
            weight = UNIT // 16 if plane == dtype.itemsize - 1 else 8 * UNIT
            table = self.table((field, dtype, plane), partial(np.full, 256, weight))
            symbols = None if self.port.reads else planes[:, plane].astype(np.int32)
            planes[:, plane] = self.port.code(table, symbols, count)
        return planes.view(f"<u{dtype.itemsize}").ravel()

    def vector(self, role: str, values: np.ndarray | None, count: int, low: int, high: int) -> np.ndarray:
        """Pass whole numbers from ``low`` to ``high``: one for all, or each by itself, or differences (int64)."""
        mode, base, steps = 0, 0, np.zeros(0, np.int64)
        if values is not None:
            values = values.astype(np.int64)
            base = int(np.sort(values)[count // 2])
            if values.min() != values.max():
                options = [values - base, np.diff(values, prepend=base)]
                mode = 1 + int(np.argmin([_entropy(option) for option in options]))
                steps = options[mode - 1]
        mode = self.number(("mode", role), mode, 3)
        base = self.number(("base", role), base - low, high - low + 1) + low
        if not mode:
            return np.full(count, base)
        shape = np.array([UNIT * 8 // (1 + k) ** 2 + 2 for k in range(ALPHABET)])
        table = self.table((role, mode), lambda: shape)
        folded = np.where(steps < 0, -2 * steps - 1, 2 * steps)
        given = None if values is None else np.minimum(folded, ALPHABET - 1).astype(np.int32)
        found = self.port.code(table, given, count).astype(np.int64)
        far = np.flatnonzero(found == ALPHABET - 1)
        if len(far):
            beyond = None if values is None else (folded[far] - found[far]).astype(np.int32)
            found[far] += self.port.plain(9, beyond, len(far))
        steps = np.where(found % 2, -(found + 1) // 2, found // 2)
        out = base + (np.cumsum(steps) if mode == 2 else steps)
        if out.min() < low or out.max() > high:
            raise ValueError("its side information is out of range")
        return out

    def number(self, key: object, value: int, size: int) -> int:
        """Pass one number from 0 to ``size - 1``."""
        table = self.table(key, partial(np.full, size, UNIT // 2))
        return int(self.port.code(table, None if self.port.reads else np.array([value], np.int32), 1)[0])

    def integers(self, entry: Entry, q: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
        """Pass the integers of a tensor (as a matrix) with the classes of its rows and columns."""
        rows, columns = matrix(entry.shape)
        a = b = alike = None
        if q is not None:
            q, alike, a, b = described(q.reshape(rows, columns), entry.states)
        if entry.states == 1:
            alike = self.vector("alike", alike, rows, 0, 1) == 1
        a = self.vector("class of a row", a, rows, 0, CLASSES - 1).astype(np.int16)
        b = self.vector("class of a column", b, columns, 1 - CLASSES, CLASSES - 1).astype(np.int16)
        out = self._columns(entry.states, a, b, q) if entry.states > 1 else self._rows(a, b, q)
        if alike is not None:
            out[alike] = np.cumsum(out[alike], axis=0)
        limits = np.iinfo(dtype)
        if out.min() < limits.min or out.max() > limits.max:
            raise ValueError(f"tensor '{entry.name}' holds integers beyond {limits.bits} bits")
        return out.astype(dtype)

    def _rows(self, a: np.ndarray, b: np.ndarray, q: np.ndarray | None) -> np.ndarray:
        out = np.empty((len(a), len(b)), np.int32)
        height = max(1, BLOCK // len(b))
        for top in range(0, len(a), height):
            block = slice(top, top + height)
            contexts = _contexts(a[block, None], b).ravel()
            given = None if q is None else q[block].ravel().astype(np.int32)
            out[block] = self._block(contexts, given).reshape(-1, len(b))
        return out

    def _columns(self, states: int, a: np.ndarray, b: np.ndarray, q: np.ndarray | None) -> np.ndarray:
        following = transitions(states).numpy().astype(np.int32).ravel()  # at 2 * state + z1
        state = np.zeros(len(a), np.int32)
        out = np.empty((len(b), len(a)), np.int32)
        given = None if q is None else np.ascontiguousarray(q.T).astype(np.int32)
        for j, shift in enumerate(b):
            contexts = _contexts(a, shift) + (state & 1).astype(np.uint8)
            out[j] = self._block(contexts, None if given is None else given[j])
            state = following[2 * state + (out[j] & 1)]
        return out.T

    def _block(self, contexts: np.ndarray, q: np.ndarray | None) -> np.ndarray:
        """Pass integers (n,) int32 of known contexts (n,) uint8, those of one context together."""
        order = np.argsort(contexts, kind="stable")
        sizes = np.bincount(contexts)
        used = np.flatnonzero(sizes)
        sent = np.empty(len(contexts), np.int32)  # symbols, in the order sent; then what they stand for
        shifts, limits = SHIFTS[contexts[order]], BOUNDS[contexts[order]]
        values = None if q is None else q[order]
        high = None if values is None else values >> shifts
        halves = HALVES[contexts[order]]
        start = 0
        for context in used.tolist():
            stop = start + int(sizes[context])
            table = self.table(context, partial(prior, context), mirrored=True)
            bound, half = int(BOUNDS[context]), int(HALVES[context])
            given = None
            if high is not None:
                given = high[start:stop] + (bound + half)
                given[(given < 0) | (given > 2 * bound + half)] = 2 * bound + half + 1
            sent[start:stop] = self.port.code(table, given, stop - start) - (bound + half)
            start = stop
        escaped = np.flatnonzero(sent > limits)
        if len(escaped):
            far = None if high is None else high[escaped]
            sent[escaped] = self._escapes(limits[escaped], halves[escaped], far)
        if shifts.any():
            for shift in np.unique(shifts[shifts > 0]).tolist():
                at = np.flatnonzero(shifts == shift)
                low = None if values is None else values[at] & ((1 << shift) - 1)
                sent[at] = (sent[at] << shift) | self.port.plain(shift, low, len(at))
        out = np.empty_like(sent)
        out[order] = sent
        return out

    def _escapes(self, limits: np.ndarray, halves: np.ndarray, values: np.ndarray | None) -> np.ndarray:
        """Pass integers (n,) beyond their limits: the sign and length of the distance, then its bits."""
        given = distance = None
        if values is not None:
            negative = values < 0
            distance = np.where(negative, -values - halves, values) - limits  # at least 1
            given = (2 * np.frexp(distance)[1] + negative).astype(np.int32)
        table = self.table("escapes", partial(np.full, 36, UNIT // 4))
        kinds = self.port.code(table, given, len(limits))
        lengths = kinds >> 1
        if lengths.min() < 1:
            raise ValueError("its coded stream is none that a writer makes")
        found = np.left_shift(1, lengths - 1)
        for length in np.unique(lengths[lengths > 1]).tolist():
            at = np.flatnonzero(lengths == length)
            low = None if distance is None else (distance[at] - found[at]).astype(np.int32)
            found[at] += self.port.plain(length - 1, low, len(at))
        found = found + limits
        return np.where(kinds & 1, -found - halves, found)


class EntropyCoder:
    """The coder "entropy", which has no levels. A CRC-32 of all that is decoded, and of its length, comes first."""

    def encode(self, tensors: Sequence[QuantizedTensor], level: int) -> bytes:
        """Return the coded bytes of ``tensors``; raises ValueError where trellises have too many columns."""
        _check_columns([entry_of(tensor) for tensor in tensors])
        writer = Writer()
        walk = through(writer, tensors)
        data = writer.data()
        return _check(walk, data) + data

    def decode(self, stream: memoryview, table: Sequence[Entry]) -> dict[str, QuantizedTensor]:
        """Return the tensors of a coded stream; raises ValueError with the reason where it is not one of ``table``."""
        if len(stream) < CHECK.size:
            raise ValueError("its coded stream ends too early")
        values = sum(prod(entry.shape) for entry in table)
        if values > VALUES_PER_BYTE * len(stream):
            raise ValueError(f"its data end too early: {len(stream)} bytes cannot hold {values} values")
        _check_columns(table)
        reader = Reader(stream[CHECK.size :])
        walk = Walk(reader)
        found = {entry.name: assemble(entry, walk.tensor(entry, {})) for entry in table}
        reader.finish()
        if stream[: CHECK.size] != _check(walk, stream[CHECK.size :]):
            raise ValueError("its decoded values do not match their checksum")
        return found


ENTROPY = EntropyCoder()


def vector_bits(values: np.ndarray) -> float:
    """Return about the bits that whole numbers take: next to nothing where they are all the same."""
    return min(_entropy(values), _entropy(np.diff(values.astype(int)))) if np.ptp(values.astype(int)) else 0.0


def _entropy(values: np.ndarray) -> float:
    counts = np.unique(values, return_counts=True)[1]
    return float((counts * np.log2(len(values) / counts)).sum() + 2 * len(counts))


def described(q: np.ndarray, states: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return what is sent of integers (rows, columns): integers, rows alike (rows,) bool, classes of rows and columns.

    Rows of tokens that training never saw end up alike. Each of them but the first is sent as its difference from the
    one before, where that pays. A trellis has its own walk in each row, so there it is not tried.
    """
    exact = q.astype(np.int32)
    doubled = 2.0 * exact if states == 1 else points(torch.from_numpy(exact), states).numpy().astype(np.float64)
    a, b, bits = fit(doubled * doubled)
    alike = np.zeros(len(q), bool) if states > 1 else _alike(exact)
    if alike.sum() > 1:
        less = exact.copy()
        less[alike] = np.diff(less[alike], axis=0, prepend=0)
        fewer_a, fewer_b, fewer_bits = fit((2.0 * less) ** 2)
        if fewer_bits + len(q) < bits:
            return less, alike, fewer_a, fewer_b
    return exact, np.zeros(len(q), bool), a, b


def _alike(q: np.ndarray) -> np.ndarray:
    """Return the largest group of rows close to one of some rows that are tried."""
    exact = q.astype(np.float64)
    tried = exact[:: max(1, len(q) // TRIED)]
    energy = (exact**2).sum(1)
    apart = energy[:, None] - 2 * exact @ tried.T + (tried**2).sum(1)
    close = apart < energy.mean() / 16
    return close[:, close.sum(0).argmax()]


def through(port: Port, tensors: Sequence[QuantizedTensor]) -> Walk:
    """Pass tensors through a port that writes or measures; return the walk, which knows their checksum."""
    walk = Walk(port)
    for tensor in tensors:
        walk.tensor(entry_of(tensor), {part.field: array for part, array in arrays_of(tensor)})
    return walk


def _contexts(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (np.clip(a + b, 0, CLASSES - 1) * 2).astype(np.uint8)


def _check(walk: Walk, data: bytes | memoryview) -> bytes:
    return CHECK.pack(zlib.crc32(CHECK.pack(len(data)), walk.check))


def _check_columns(table: Sequence[Entry]) -> None:
    columns = sum(entry.shape[1] for entry in table if entry.states > 1)
    if columns > MAX_COLUMNS:
        raise ValueError(f"its trellises have {columns} columns, more than {MAX_COLUMNS}")
