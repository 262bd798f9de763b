"""Token shards: the public ``.bin`` format of the speedrun and parameter-golf repositories.

A shard is 256 little-endian int32 values (magic 20240520, version 1, number of tokens, the rest 0), then that many
little-endian uint16 tokens, and nothing else (PR 1166, section 3.1). Documents follow one another, each after one BOS.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

from golfbook.errors import DataError
from golfbook.files import atomic_path

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
MAX_TOKENS = 2**31 - 1


def write_shard(path: str | Path, tokens: np.ndarray[Any, Any]) -> None:
    """Write ``tokens`` (n,) as one shard, atomically.

    Raises :class:`DataError` for an array that is empty, not flat, not of integers or holds ids outside 0..65535.
    """
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise DataError(f"{path}: a shard holds a flat array of integers, got {tokens.dtype} of shape {tokens.shape}")
    if not 0 < tokens.size <= MAX_TOKENS:
        raise DataError(f"{path}: a shard holds 1 to {MAX_TOKENS} tokens, got {tokens.size}")
    if tokens.dtype != np.uint16 and (int(tokens.min()) < 0 or int(tokens.max()) > 65535):
        raise DataError(f"{path}: token ids must lie in 0..65535, got {int(tokens.min())}..{int(tokens.max())}")
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        stream.write(header.tobytes())
        stream.write(tokens.astype("<u2", copy=False).tobytes())


def read_shard(path: str | Path) -> np.memmap[Any, Any]:
    """Map the tokens of a shard, uint16 (n,), read-only, without loading them.

    Raises :class:`DataError` naming the file and what is wrong: missing, foreign magic, other version, wrong size.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(HEADER_BYTES)
    except OSError as error:
        raise DataError(f"cannot read shard {path}: {error.strerror}") from None
    if len(head) < HEADER_BYTES:
        raise DataError(f"{path} is no token shard: {size} bytes are less than the header of {HEADER_BYTES} bytes")
    magic, version, count = (int(x) for x in np.frombuffer(head, dtype="<i4", count=3))
    if magic != MAGIC:
        raise DataError(f"{path} is no token shard: magic number {magic}, expected {MAGIC}")
    if version != VERSION:
        raise DataError(f"{path}: shard version {version} is not supported, expected {VERSION}")
    if count <= 0:
        raise DataError(f"{path}: the header announces {count} tokens; a shard holds at least one")
    expected = HEADER_BYTES + 2 * count
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise DataError(
            f"{path} is {state}: {count} tokens need {expected} bytes, the file has {size}; copy or download it again"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def find_shards(folder: str | Path, kind: Literal["train", "val"]) -> list[Path]:
    """List the shards named ``*_<kind>_*.bin`` in ``folder``, in the order they are read: by name.

    Raises :class:`DataError` when the folder is missing or holds none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"shard folder {folder} does not exist")
    found = sorted(folder.glob(f"[!.]*_{kind}_*.bin"))  # macOS keeps ._NAME beside a file on foreign disks
    if not found:
        raise DataError(f"{folder} holds no shard named '*_{kind}_*.bin' (for example fineweb_{kind}_000000.bin)")
    return found
