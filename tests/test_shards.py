"""The public shard format: what is written is read back, and anything else is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from golfbook.data.shards import find_shards, read_shard, write_shard
from golfbook.errors import DataError, RunError


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "x_train_000000.bin"
    write_shard(path, np.arange(1, 101, dtype=np.uint16))
    return path


def _patch(path: Path, word: int, value: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[4 * word : 4 * word + 4] = int(value).to_bytes(4, "little", signed=True)
    path.write_bytes(raw)


def test_layout_is_the_published_one(shard: Path) -> None:
    raw = shard.read_bytes()
    assert len(raw) == 1024 + 200
    assert raw[:12] == bytes.fromhex("88d834010100000064000000")  # 20240520, 1, 100, little-endian
    assert raw[12:1024] == bytes(1012)
    assert raw[1024:1028] == b"\x01\x00\x02\x00"


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.uint16, st.integers(1, 300)))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, tokens: np.ndarray) -> None:
    path = tmp_path_factory.mktemp("s") / "a.bin"
    write_shard(path, tokens)
    back = read_shard(path)
    assert back.dtype == np.uint16
    np.testing.assert_array_equal(back, tokens)
    with pytest.raises(ValueError, match="read-only"):
        back[0] = 1


@pytest.mark.parametrize(("change", "words"), [(-1, "truncated"), (-2, "truncated"), (1, "too long"), (2, "too long")])
def test_wrong_size_names_both_sizes(shard: Path, change: int, words: str) -> None:
    raw = shard.read_bytes()
    shard.write_bytes(raw[:change] if change < 0 else raw + bytes(change))
    with pytest.raises(DataError, match=rf"{shard.name} is {words}: 100 tokens need 1224 bytes, .* {1224 + change}"):
        read_shard(shard)


@pytest.mark.parametrize(
    ("word", "value", "message"),
    [
        (0, 20240521, "magic number 20240521, expected 20240520"),
        (1, 2, "shard version 2 is not supported, expected 1"),
        (2, 0, "announces 0 tokens"),
        (2, -5, "announces -5 tokens"),
        (2, 2**31 - 1, "truncated"),
    ],
)
def test_wrong_header(shard: Path, word: int, value: int, message: str) -> None:
    _patch(shard, word, value)
    with pytest.raises(DataError, match=message) as caught:
        read_shard(shard)
    assert str(shard) in str(caught.value)


def test_short_missing_and_folder(tmp_path: Path) -> None:
    short = tmp_path / "short.bin"
    short.write_bytes(b"abc")
    for path, message in (
        (short, "3 bytes are less"),
        (tmp_path / "none.bin", "No such file"),
        (tmp_path, "directory"),
    ):
        with pytest.raises(DataError, match=message):
            read_shard(path)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros(0, np.uint16), "1 to"),
        (np.zeros((2, 2), np.uint16), "flat array"),
        (np.zeros(3), "integers"),
        (np.array([1, 65536]), "0..65535"),
        (np.array([-1, 5]), "0..65535"),
    ],
)
def test_unwritable_tokens_leave_no_file(tmp_path: Path, tokens: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_shard(tmp_path / "a.bin", tokens)
    assert list(tmp_path.iterdir()) == []


def test_write_into_a_file_as_folder(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(RunError, match="cannot write"):
        write_shard(tmp_path / "f" / "a.bin", np.ones(3, np.uint16))


def test_find_shards_sorts_and_keeps_kinds_apart(tmp_path: Path) -> None:
    for name in ("fineweb_train_000001.bin", "fineweb_train_000000.bin", "fineweb_val_000000.bin", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "._fineweb_train_000000.bin").write_bytes(b"of macOS")
    assert [p.name for p in find_shards(tmp_path, "train")] == ["fineweb_train_000000.bin", "fineweb_train_000001.bin"]
    assert [p.name for p in find_shards(tmp_path, "val")] == ["fineweb_val_000000.bin"]
    (tmp_path / "fineweb_val_000000.bin").unlink()
    with pytest.raises(DataError, match=r"no shard named '\*_val_\*.bin'"):
        find_shards(tmp_path, "val")
    with pytest.raises(DataError, match="does not exist"):
        find_shards(tmp_path / "nowhere", "val")
