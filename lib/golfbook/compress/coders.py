"""Coders: the tensors of an artifact in, bytes out. An artifact names the one it was written with.

What a tensor consists of follows from its entry in the table of the artifact: a name, a code and a shape. Most coders
compress bytes and know nothing of tensors; :class:`ByteCoder` makes one from a pair of functions. Its decoder takes
bounded pieces, so that memory follows what really arrives and not what a file declares.
"""

from __future__ import annotations

import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol

import brotli
import numpy as np
import torch
import zstandard

from golfbook.compress.quantizer import Kind, QuantizedTensor

DECODER_BYTES = 2**27  # memory a decoder may ask for; preset 9 of xz needs 65 MiB
STEP_BYTES = 2**20
WIDE = np.dtype("<i2")
# "q6" and "s6" are integers of 6 bits with float16 row scales, or with one float32 scale; "t8rc" is kind "step" with a
# trellis of 8 states and logs of rows and columns; "h" and "f" are plain float16 and float32.
CODES = re.compile(r"h|f|[qs][3-8]|t(1|4|8|16|32|64|128|256)r?c?")


class Entry(NamedTuple):
    """What the table of an artifact says of one tensor; ``code`` fits :data:`CODES`."""

    name: str
    code: str
    shape: tuple[int, ...]

    @property
    def states(self) -> int:
        """Return the states of its trellis, 1 where it has none."""
        return int(self.code[1:].rstrip("rc")) if self.code[0] == "t" else 1


class Part(NamedTuple):
    """One array of a tensor: the field of :class:`QuantizedTensor` it fills, its dtype (little-endian) and shape."""

    field: str
    dtype: np.dtype
    shape: tuple[int, ...]


class Coder(Protocol):
    """One way to code tensors. The table is the entries of the tensors in their order (:func:`entry_of`).

    ``decode`` raises ValueError, with the reason, for a stream that is damaged, ends early or holds more.
    """

    def encode(self, tensors: Sequence[QuantizedTensor], level: int) -> bytes: ...

    def decode(self, stream: memoryview, table: Sequence[Entry]) -> dict[str, QuantizedTensor]: ...


def entry_of(tensor: QuantizedTensor) -> Entry:
    """Return the entry of a tensor in the table."""
    if tensor.kind == "step":
        logs = ("r" if tensor.rows is not None else "") + ("c" if tensor.columns is not None else "")
        code = f"t{tensor.states}{logs}"
    elif tensor.scale is not None:
        code = f"{'s' if tensor.scale.dtype == torch.float32 else 'q'}{tensor.bits}"
    else:
        code = "h" if tensor.kind == "float16" else "f"
    return Entry(tensor.name, code, tensor.shape)


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the rows and columns that a tensor of any shape is coded as."""
    return (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, prod(shape))


def parts(entry: Entry) -> list[Part]:
    """Return the arrays that a tensor consists of, side information first."""
    code, shape = entry.code, entry.shape
    half = np.dtype("<f2")
    if code in ("h", "f"):
        return [Part("value", half if code == "h" else np.dtype("<f4"), shape)]
    if code[0] != "t":
        scale = (shape[0],) if code[0] == "q" and len(shape) == 2 else ()
        return [Part("scale", half if code[0] == "q" else np.dtype("<f4"), scale), Part("q", np.dtype("i1"), shape)]
    logs = [("rows", shape[0])] * ("r" in code) + [("columns", shape[1])] * ("c" in code)
    found = [Part(field, np.dtype("u1"), (size,)) for field, size in logs]
    return [Part("scale", half, ()), *found, Part("q", WIDE, shape)]


def arrays_of(tensor: QuantizedTensor) -> list[tuple[Part, np.ndarray]]:
    """Return the parts of a tensor with their values, little-endian."""
    return [
        (part, getattr(tensor, part.field).numpy().astype(part.dtype, copy=False)) for part in parts(entry_of(tensor))
    ]


def assemble(entry: Entry, arrays: Mapping[str, np.ndarray]) -> QuantizedTensor:
    """Return the tensor of decoded arrays, by field; raises ValueError for values that no quantiser makes."""
    found = {k: torch.from_numpy(a.astype(a.dtype.newbyteorder("="), copy=True)) for k, a in arrays.items()}
    for tensor in found.values():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"tensor '{entry.name}' holds values that are not finite")
    code = entry.code
    kind: Kind = {"h": "float16", "f": "float32", "t": "step"}.get(code[0], "int")  # type: ignore[assignment]
    bits = {"h": 16, "f": 32, "t": 0}.get(code[0]) if code[0] in "hft" else int(code[1])
    if kind == "int":
        most = 2 ** (int(code[1]) - 1) - 1
        if int(found["q"].min()) < -most or int(found["q"].max()) > most:
            raise ValueError(f"tensor '{entry.name}' holds integers beyond {code[1]} bits")
    return QuantizedTensor(entry.name, kind, bits or 0, states=entry.states, **found)


@dataclass(frozen=True)
class ByteCoder:
    """A coder made of one for bytes.

    ``compress`` takes data and a level; ``decompress`` yields pieces of at most :data:`STEP_BYTES` and raises
    ValueError for a stream that is damaged, ends too early or has something after it. There is no bit packing: an
    integer of up to 8 bits takes a byte (PR 1166 section 17.5), a wider one a low byte and, in a plane apart, a high.
    """

    compress: Callable[[bytes, int], bytes]
    decompress: Callable[[memoryview], Iterator[bytes]]

    def encode(self, tensors: Sequence[QuantizedTensor], level: int) -> bytes:
        """Return the coded bytes of ``tensors``."""
        return self.compress(b"".join(pack(tensors)), level)

    def decode(self, stream: memoryview, table: Sequence[Entry]) -> dict[str, QuantizedTensor]:
        """Return the tensors of a coded stream; raises ValueError with the reason where it is not one of ``table``."""
        places = _layout(table)
        expected = sum(_bytes(part) for _, part in places)
        body = bytearray()
        for piece in self.decompress(stream):
            body += piece
            if len(body) > expected:
                raise ValueError("it holds more data than it declares")
        if len(body) < expected:
            raise ValueError(f"its data end after {len(body)} of {expected} bytes")
        found: dict[str, dict[str, np.ndarray]] = {entry.name: {} for entry in table}
        position = 0
        for entry, part in places:
            size = _bytes(part)
            raw = np.frombuffer(body, np.uint8, size, position)
            found[entry.name][part.field] = (_joined(raw) if part.dtype == WIDE else raw.view(part.dtype)).reshape(
                part.shape
            )
            position += size
        return {entry.name: assemble(entry, found[entry.name]) for entry in table}


def pack(tensors: Sequence[QuantizedTensor]) -> list[bytes]:
    """Return the bytes that byte coders compress: all integers, all scales, all logs, all values."""
    arrays = {tensor.name: {part.field: array for part, array in arrays_of(tensor)} for tensor in tensors}
    pieces = []
    for entry, part in _layout([entry_of(tensor) for tensor in tensors]):
        array = arrays[entry.name][part.field]
        pieces.append(_planes(array) if part.dtype == WIDE else array.tobytes())
    return pieces


def _planes(wide: np.ndarray) -> bytes:
    """Return low bytes, then high bytes that are 0 wherever the low byte, read with its sign, says it all."""
    return wide.astype(np.int8).tobytes() + ((wide.astype(np.int32) + 128) >> 8).astype(np.int8).tobytes()


def _joined(raw: np.ndarray) -> np.ndarray:
    low, high = raw.view(np.int8).reshape(2, -1).astype(np.int32)
    return (low + 256 * high).astype(WIDE)


def _layout(table: Sequence[Entry]) -> list[tuple[Entry, Part]]:
    order = ("q", "scale", "rows", "columns", "value")
    found = [(entry, part) for entry in table for part in parts(entry)]
    return sorted(found, key=lambda place: (order.index(place[1].field), place[1].dtype.itemsize))


def _bytes(part: Part) -> int:
    return prod(part.shape) * part.dtype.itemsize


def _xz(data: bytes, level: int) -> bytes:
    # the artifact's own SHA-256 makes xz's check superfluous
    return lzma.compress(data, format=lzma.FORMAT_XZ, check=lzma.CHECK_NONE, preset=level)


def _unxz(stream: memoryview) -> Iterator[bytes]:
    decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=DECODER_BYTES)
    pending: bytes | memoryview = stream
    while not decoder.eof:
        try:
            piece, pending = decoder.decompress(pending, max_length=STEP_BYTES), b""
        except (lzma.LZMAError, EOFError) as error:
            raise ValueError(str(error)) from None
        if piece:
            yield piece
        elif not decoder.eof:
            raise ValueError("its compressed stream ends too early")
    if decoder.unused_data:
        raise ValueError("its compressed stream does not end where the file ends")


def _zstd(data: bytes, level: int) -> bytes:
    return zstandard.ZstdCompressor(level=level).compress(data)


def _unzstd(stream: memoryview) -> Iterator[bytes]:
    decoder = zstandard.ZstdDecompressor(max_window_size=DECODER_BYTES)
    try:
        # what follows the first frame is read as another one: foreign bytes are an error
        with decoder.stream_reader(stream, read_across_frames=True) as reader:
            while piece := reader.read(STEP_BYTES):
                yield piece
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None


def _brotli(data: bytes, level: int) -> bytes:
    return brotli.compress(data, quality=min(level, 11), lgwin=24)


def _unbrotli(stream: memoryview) -> Iterator[bytes]:
    decoder, size = brotli.Decompressor(), 2**16
    try:
        for start in range(0, len(stream), size):
            if decoder.is_finished():
                raise ValueError("its compressed stream does not end where the file ends")
            pending = bytes(stream[start : start + size])
            while not decoder.is_finished():
                piece, pending = decoder.process(pending, output_buffer_limit=STEP_BYTES // 2), b""
                yield from (piece[at : at + STEP_BYTES] for at in range(0, len(piece), STEP_BYTES))
                if not piece and decoder.can_accept_more_data():
                    break
    except brotli.error as error:
        raise ValueError(str(error)) from None
    if not decoder.is_finished():
        raise ValueError("its compressed stream ends too early")


def deflate(data: bytes, level: int) -> bytes:
    """Compress ``data`` by zlib's method, without its frame and check."""
    coder = zlib.compressobj(min(level, 9), wbits=-zlib.MAX_WBITS, memLevel=9)
    return coder.compress(data) + coder.flush()


def inflate(stream: memoryview) -> Iterator[bytes]:
    """Undo :func:`deflate` in pieces of at most :data:`STEP_BYTES`; raises ValueError for anything else."""
    decoder, pending = zlib.decompressobj(-zlib.MAX_WBITS), bytes(stream)
    while not decoder.eof:
        try:
            piece = decoder.decompress(pending, STEP_BYTES)
        except zlib.error as error:
            raise ValueError(str(error)) from None
        pending = decoder.unconsumed_tail
        if piece:
            yield piece
        elif not decoder.eof:
            raise ValueError("its compressed stream ends too early")
    if decoder.unused_data:
        raise ValueError("its compressed stream does not end where the file ends")


XZ = ByteCoder(_xz, _unxz)
ZSTD = ByteCoder(_zstd, _unzstd)
BROTLI = ByteCoder(_brotli, _unbrotli)
ZLIB = ByteCoder(deflate, inflate)
