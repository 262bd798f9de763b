"""Training batches: every loader's order, its exact resumption, and a thread that changes nothing but the time."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from by_name import train_config
from golfbook.config.load import load_config
from golfbook.config.schema import TrainConfig
from golfbook.data.batches import CoprimeLoader, Cursor, Loader, Prefetching, SequentialLoader, hash_names, make_loader
from golfbook.data.dataset import prepare
from golfbook.data.documents import read_documents
from golfbook.data.shards import read_shard, write_shard
from golfbook.errors import CheckpointError, DataError

DATA = Path(__file__).parent / "data"
SIZES = st.lists(st.integers(9, 150), min_size=1, max_size=12)
KINDS = ("sequential", "coprime")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


def write(folder: Path, sizes: Sequence[int]) -> list[Path]:
    """Shards whose tokens all differ, so that a token tells where it came from: 1000 * shard + place."""
    paths = []
    for i, size in enumerate(sizes):
        path = folder / f"x_train_{i:06d}.bin"
        write_shard(path, 1000 * i + np.arange(size) if size <= 1000 else np.arange(size) % 65536)
        paths.append(path)
    return paths


def config(rows: int, length: int, **values: Any) -> TrainConfig:
    return train_config(batch_tokens=rows * length, sequence_length=length, **values)


def batches(loader: Loader, count: int) -> list[np.ndarray]:
    return [np.stack(loader.next()) for _ in range(count)]


def assert_windows(inputs: np.ndarray, targets: np.ndarray, sizes: Sequence[int]) -> None:
    """Each row with its last target is a contiguous slice of one shard."""
    windows = np.concatenate([inputs, targets[:, -1:]], axis=1)
    shards, places = np.divmod(windows, 1000)
    assert (np.diff(places, axis=1) == 1).all()
    assert (shards == shards[:, :1]).all()
    assert (places[:, -1] < np.array(sizes)[shards[:, 0]]).all()
    assert np.array_equal(windows[:, 1:], targets)


# Every loader


@settings(max_examples=60, deadline=None)
@given(
    SIZES, st.integers(1, 9), st.integers(1, 8), st.integers(0, 12), st.integers(0, 6), st.sampled_from(KINDS),
    st.booleans(),
)  # fmt: skip
def test_resumes_exactly_from_any_point(
    folder: Path, sizes: list[int], rows: int, length: int, before: int, between: int, kind: str, prefetch: bool
) -> None:
    paths, train = write(folder, sizes), config(rows, length, loader=kind)

    def make() -> Loader:
        loader = make_loader(paths, train, 5)
        return Prefetching(loader) if prefetch else loader

    with make() as loader, make() as other:
        batches(loader, before)
        text = json.dumps(loader.state())
        expected = batches(loader, 8)
        batches(other, between)  # wherever the loader was, the state decides
        other.load_state(json.loads(text))
        assert json.dumps(other.state()) == text
        assert np.array_equal(batches(other, 8), expected)
        assert other.state() == loader.state()


@pytest.mark.parametrize("kind", KINDS)
def test_batches_do_not_depend_on_their_pieces(folder: Path, kind: str) -> None:
    paths = write(folder, [120, 90, 70])
    pieces = (1, 2, 4)
    results = [batches(make_loader(paths, config(8, 4, loader=kind, micro_batches=m), 1), 10) for m in pieces]
    assert all(np.array_equal(result, results[0]) for result in results)
    assert results[0][0].shape == (2, 8, 4)
    assert results[0][0].dtype == np.int64
    assert all(part.flags.c_contiguous and part.flags.writeable for part in make_loader(paths, config(8, 4), 1).next())


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_what_is_no_training_shard(tmp_path: Path, kind: str) -> None:
    train = config(2, 4, loader=kind)
    paths = write(tmp_path, [50])
    held_out = tmp_path / "fineweb_val_000000.bin"
    write_shard(held_out, np.arange(50))
    with pytest.raises(DataError, match=r"fineweb_val_000000.bin is named as a validation shard"):
        make_loader([*paths, held_out], train, 1)
    with pytest.raises(DataError, match="no training shard"):
        make_loader([], train, 1)
    paths[0].write_bytes(paths[0].read_bytes()[:-1])
    with pytest.raises(DataError, match="truncated"):
        make_loader(paths, train, 1)


@pytest.mark.parametrize("source", ["text", "shards"])
def test_prepared_training_shards_hold_nothing_of_validation(golfbook_home: Path, tmp_path: Path, source: str) -> None:
    """The paths are disjoint, every loader accepts them, and no document is on both sides."""
    path = DATA / "fineweb_docs_100.jsonl"
    data: dict[str, Any] = {"source": "text", "path": str(path), "tokenizer": str(DATA / "fineweb_1024_bpe.model")}
    dataset = prepare(load_config(overrides={"data": data, "train.sequence_length": 64}))
    if source == "shards":
        foreign = tmp_path / "foreign"
        foreign.mkdir()
        for shard in dataset.folder.glob("*.bin"):
            kind = "train" if shard in dataset.train_shards else "val"
            write_shard(foreign / f"my_{kind}_000000.bin", read_shard(shard))
        data |= {"source": "shards", "path": str(foreign)}
        dataset = prepare(load_config(overrides={"data": data, "train.sequence_length": 64}))
        every = set(foreign.glob("*.bin"))
    else:
        every = set(dataset.folder.glob("*.bin"))
    held_out = every - set(dataset.train_shards)
    assert held_out and set(dataset.train_shards) < every
    for kind in KINDS:
        make_loader(dataset.train_shards, config(4, 64, loader=kind), 1)
        for shard in held_out:
            with pytest.raises(DataError, match="validation"):
                make_loader([shard], config(4, 64, loader=kind), 1)
    documents = [d.tobytes() for d in documents_of(dataset.val_tokens, dataset.tokenizer.bos_id)]
    trained = {d.tobytes() for p in dataset.train_shards for d in documents_of(read_shard(p), dataset.tokenizer.bos_id)}
    assert len(documents) + len(trained) == len(read_documents(path, "text"))
    assert not trained & set(documents)


def documents_of(tokens: np.ndarray, bos: int) -> list[np.ndarray]:
    return np.split(np.asarray(tokens), np.flatnonzero(tokens == bos))[1:]


# Sequential


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 24), st.integers(1, 8))
def test_sequential_equals_spans_of_the_concatenated_shards(
    folder: Path, sizes: list[int], rows: int, length: int
) -> None:
    paths = write(folder, sizes)
    spans = 8 if rows % 8 == 0 else 1
    loader = make_loader(paths, config(rows, length), 1)
    stream = itertools.cycle(np.concatenate([read_shard(path) for path in paths]).tolist())
    for step in range(5):
        inputs, targets = [], []
        for _ in range(spans):
            span = [next(stream) for _ in range(rows * length // spans + 1)]
            inputs += span[:-1]
            targets += span[1:]
        expected = np.array([inputs, targets]).reshape(2, rows, length)
        assert np.array_equal(np.stack(loader.next()), expected)
        assert loader.state()["position"] == (step + 1) * (rows * length + spans)


def test_published_step_takes_eight_spans(tmp_path: Path) -> None:
    """786,440 tokens a step; the last token of a span is a target only (PR 1166, section 3.2)."""
    (path,) = write(tmp_path, [800_000])
    loader = make_loader([path], TrainConfig(), 1)
    inputs, targets = loader.next()
    assert inputs.shape == (384, 2048)
    assert loader.state()["position"] == 786_440
    assert (inputs[47, -1], targets[47, -1], inputs[48, 0]) == (98_303 % 65536, 98_304 % 65536, 98_305 % 65536)


# Coprime


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(0, 400), st.integers(0, 2**32))
def test_a_pass_meets_each_block_once(length: int, more: int, seed: int) -> None:
    tokens = length + 1 + more
    cursor = Cursor.draw(tokens, length, np.random.default_rng(seed))
    assert 0 <= cursor.phase <= min(length - 1, tokens - length - 1)
    assert cursor.blocks == (tokens - 1 - cursor.phase) // length
    assert math.gcd(cursor.stride, cursor.blocks) == 1
    starts = []
    while cursor.remaining:
        assert cursor.fits(tokens, length)
        starts.append(cursor.take(length))
    assert sorted(starts) == [cursor.phase + length * i for i in range(cursor.blocks)]
    assert max(starts) + length + 1 <= tokens
    assert not cursor.fits(tokens, length)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 30), st.integers(1, 8), st.integers(0, 5))
def test_coprime_windows_are_slices_of_one_shard(
    folder: Path, sizes: list[int], rows: int, length: int, seed: int
) -> None:
    loader = CoprimeLoader(write(folder, sizes), rows * length, length, seed)
    for _ in range(10):
        inputs, targets = loader.next()
        assert inputs.shape == targets.shape == (rows, length)
        assert_windows(inputs, targets, sizes)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(9, 60), min_size=1, max_size=4), st.integers(1, 8), st.integers(0, 5))
def test_each_shard_is_read_in_whole_passes(folder: Path, sizes: list[int], length: int, seed: int) -> None:
    """With one window a batch the order shows: every pass over a shard takes each of its blocks once."""
    loader = CoprimeLoader(write(folder, sizes), length, length, seed)
    passes: dict[int, list[list[int]]] = {}
    for _ in range(120):
        before = [list(c) for c in loader.state()["cursors"]]
        shard, place = divmod(int(loader.next()[0][0, 0]), 1000)
        phase, blocks, taken = before[shard][0], before[shard][1], before[shard][4]
        if taken == 0:
            passes.setdefault(shard, []).append([])
        passes[shard][-1].append((place - phase) // length)
        assert (place - phase) % length == 0
        if len(passes[shard][-1]) == blocks:
            assert sorted(passes[shard][-1]) == list(range(blocks))
            assert loader.state()["cursors"][shard][4] == 0
        after = loader.state()["cursors"]
        assert [c for i, c in enumerate(after) if i != shard] == [c for i, c in enumerate(before) if i != shard]


def test_mix_follows_the_published_schedule(tmp_path: Path) -> None:
    """8 shards at first, 64 from batch 1800 on; a batch holds every one of its shards, dealt out in rounds."""
    paths = write(tmp_path, [60] * 65)
    loader = CoprimeLoader(paths, 130 * 4, 4, 1)
    seen = {}
    for batch in (0, 900, 1800, 5000):
        loader.batches = batch
        shards = loader.next()[0][:, 0] // 1000
        mix = len(set(shards.tolist()))
        assert len(set(shards[:mix].tolist())) == mix  # the first round has a window of each
        seen[batch] = mix
    assert seen == {0: 8, 900: 36, 1800: 64, 5000: 64}
    few = CoprimeLoader(paths[:3], 130 * 4, 4, 1)
    assert few.mix() == 3
    assert CoprimeLoader(paths, 2 * 4, 4, 1).mix() == 2  # no more shards than rows


def test_weights_prefer_shards_with_more_left(tmp_path: Path) -> None:
    """One shard of two a batch: drawn in the ratio of (blocks left)^0.9 at first, of their square roots at last."""
    paths = write(tmp_path, [900, 101])
    for batch, exponent in ((0, 0.9), (1800, 0.5)):
        loader = CoprimeLoader(paths, 1, 1, 3)
        start = loader.state()
        count, share, expected = 1500, 0, 0.0
        for _ in range(count):
            loader.batches = batch
            left = np.array([c.remaining for c in loader.cursors], dtype=float) ** exponent
            expected += left[0] / left.sum()
            share += int(loader.next()[0][0, 0]) < 1000
            loader.load_state(start | {"generator": loader.state()["generator"]})
        assert abs(share - expected) < 4.5 * math.sqrt(expected * (1 - expected / count))


def test_rows_are_in_random_order(tmp_path: Path) -> None:
    """Neither the walk through a shard nor the weights of the shards show in the order of a batch's rows."""
    paths = write(tmp_path, [900, 101])
    alone = CoprimeLoader(paths[:1], 20, 1, 1)
    (cursor,) = alone.cursors
    walk = [cursor.phase + (cursor.first + i * cursor.stride) % cursor.blocks for i in range(20)]
    rows = alone.next()[0][:, 0].tolist()
    assert sorted(rows) == sorted(walk) and rows != walk
    both = CoprimeLoader(paths, 2, 1, 1)
    start, first = both.state(), 0
    for _ in range(1000):
        first += int(both.next()[0][0, 0]) < 1000
        both.load_state(start | {"generator": both.state()["generator"]})
    assert abs(first - 500) < 4.5 * math.sqrt(250)  # dealt by weight it would be 880


def test_seed_and_shards_decide_the_order_and_folders_do_not(tmp_path: Path) -> None:
    paths = write(tmp_path, [200, 200])
    other = tmp_path / "elsewhere"
    other.mkdir()
    moved = write(other, [200, 200])
    renamed = [path.rename(path.with_name("y" + path.name)) for path in write(tmp_path / "elsewhere", [200, 200])]
    write(other, [200, 200])

    def first(paths: list[Path], seed: int) -> list:
        return np.array(batches(CoprimeLoader(paths, 32, 8, seed), 3)).tolist()

    assert first(paths, 1) == first(moved, 1)
    assert first(paths, 1) != first(paths, 2)
    assert first(paths, 1) != first(renamed, 1)


def test_hash_of_names() -> None:
    """From 0, xor then multiply: a byte b alone gives b times the prime; worked out by hand for the second."""
    prime = 1099511628211
    assert hash_names([]) == 0
    assert hash_names(["a"]) == 97 * prime
    assert hash_names(["a", "b"]) == hash_names(["ab"]) == (((97 * prime) ^ 98) * prime) % 2**64


def test_shards_shorter_than_a_window_are_left_out(tmp_path: Path) -> None:
    paths = write(tmp_path, [8, 9, 8, 30])
    loader = CoprimeLoader(paths, 16, 8, 1)
    assert {int(x) // 1000 for _ in range(30) for x in loader.next()[0][:, 0]} == {1, 3}
    with pytest.raises(DataError, match=r"no training shard holds a window of 9 tokens: .* train.sequence_length 8"):
        CoprimeLoader([paths[0], paths[2]], 16, 8, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"loader": "sequential"},
        {"cursors": [[0, 4, 0, 1, 0]]},
        {"cursors": [[0, 4, 0, 1, 0], [0, 40, 0, 1, 0]]},
        {"cursors": [[0, 4, 0, 2, 0], [0, 4, 0, 1, 0]]},
        {"cursors": [[0, 4, 0, 1], [0, 4, 0]]},
        {"generator": {"bit_generator": "MT19937"}},
        {"batches": None},
    ],
)
def test_foreign_coprime_state_is_refused_and_changes_nothing(tmp_path: Path, change: dict[str, Any]) -> None:
    loader = CoprimeLoader(write(tmp_path, [33, 33]), 8, 8, 1)
    good = loader.state() | {"cursors": [[0, 4, 0, 1, 0], [0, 4, 0, 1, 0]]}
    loader.load_state(good)
    with pytest.raises(CheckpointError, match="delete the checkpoint"):
        loader.load_state(good | change)
    assert loader.state() == good


def test_foreign_sequential_state_is_refused(tmp_path: Path) -> None:
    loader = SequentialLoader(write(tmp_path, [33]), 8, 8)
    for state in (
        {"loader": "coprime", "position": 0},
        {"loader": "sequential"},
        {"loader": "sequential", "position": -1},
    ):
        with pytest.raises(CheckpointError, match=r"expected 'sequential' \(train.loader\)"):
            loader.load_state(state)


# Prefetching


class Counting(Loader):
    """Batch n holds n; raises on reaching ``bad``; waits for ``gate`` before each batch."""

    def __init__(self, bad: int = -1) -> None:
        self.position, self.made, self.bad = 0, 0, bad
        self.gate = threading.Event()
        self.gate.set()

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        self.gate.wait()
        if self.position == self.bad:
            raise OSError("disk gone")
        self.position, self.made = self.position + 1, self.made + 1
        return np.array([[self.position - 1]]), np.array([[self.position]])

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "golfbook-prefetch"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ready", [1, 3])
def test_prefetching_changes_nothing(folder: Path, kind: str, ready: int) -> None:
    paths, train = write(folder, [140, 100]), config(3, 5, loader=kind)
    plain = make_loader(paths, train, 2)
    with Prefetching(make_loader(paths, train, 2), ready) as loader:
        for _ in range(40):
            assert loader.state() == plain.state()
            assert np.array_equal(loader.next(), plain.next())
        assert len(threads()) == 1 and threads()[0].daemon
    assert threads() == []
    assert np.array_equal(loader.loader.next(), plain.next())  # closing took the wrapped loader back


@pytest.mark.parametrize("ready", [1, 2])
def test_it_prepares_that_many_batches_and_no_more(ready: int) -> None:
    inner = Counting()
    with Prefetching(inner, ready) as loader:
        assert inner.made == 0
        loader.next()
        wait_until(lambda: inner.made == 1 + ready)
        time.sleep(0.05)
        assert inner.made == 1 + ready
        assert loader.state() == {"position": 1}
        loader.load_state({"position": 10})  # what lies ready is of the old position
        assert int(loader.next()[0][0, 0]) == 10
    with pytest.raises(ValueError, match="at least 1"):
        Prefetching(inner, 0)


def test_errors_surface_after_the_batches_before_them() -> None:
    with Prefetching(Counting(bad=3), 5) as loader:
        assert [int(loader.next()[0][0, 0]) for _ in range(3)] == [0, 1, 2]
        for _ in range(2):  # and again, instead of waiting for a thread that has ended
            with pytest.raises(OSError, match="disk gone"):
                loader.next()
        assert loader.state() == {"position": 3}
        loader.load_state({"position": 7})
        assert int(loader.next()[0][0, 0]) == 7
    assert threads() == []


def test_closing_joins_and_may_be_repeated() -> None:
    inner = Counting()
    loader = Prefetching(inner)
    loader.close()  # before the first batch
    loader.next()
    wait_until(lambda: inner.made == 2)
    inner.gate.clear()
    loader.next()  # the one that was ready; the thread goes on to wait at the gate
    threading.Timer(0.05, inner.gate.set).start()
    loader.close()
    loader.close()
    assert threads() == [] and inner.position == 2
    assert int(loader.next()[0][0, 0]) == 2
    loader.close()


@pytest.mark.parametrize("blocked", [False, True])
def test_a_process_ends_with_an_unclosed_loader(tmp_path: Path, blocked: bool) -> None:
    """Whether the thread waits for next() or hangs in the wrapped loader."""
    (path,) = write(tmp_path, [200])
    code = f"""
import threading
from pathlib import Path
from golfbook.data.batches import Prefetching, SequentialLoader
inner = SequentialLoader([Path({str(path)!r})], 8, 4)
take, reached = inner.next, threading.Event()
def next_or_hang():
    if inner.position:
        reached.set()
        if {blocked}:
            threading.Event().wait()
    return take()
inner.next = next_or_hang
loader = Prefetching(inner)
loader.next()
reached.wait()
raise SystemExit(7)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 7
