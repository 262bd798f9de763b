"""Coders: bytes in, fewer bytes out. An artifact names the one it was written with.

A decoder hands out bounded pieces, so that memory follows what really arrives and not what a file declares.
"""

from __future__ import annotations

import lzma
from collections.abc import Callable, Iterator
from typing import NamedTuple

import zstandard

DECODER_BYTES = 2**27  # memory a decoder may ask for; preset 9 of xz needs 65 MiB
STEP_BYTES = 2**20


class Coder(NamedTuple):
    """One way to code bytes. ``decode`` raises ValueError for a stream that is damaged or ends too early."""

    encode: Callable[[bytes, int], bytes]  # data, level
    decode: Callable[[memoryview], Iterator[bytes]]  # pieces of at most STEP_BYTES


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


XZ = Coder(_xz, _unxz)
ZSTD = Coder(_zstd, _unzstd)
