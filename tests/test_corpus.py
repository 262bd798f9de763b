"""Datasets: splits that share nothing, byte counts that add up, and a cache that never lies."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer

from golfbook import activity
from golfbook.config.load import load_config
from golfbook.config.schema import Config
from golfbook.data import dataset
from golfbook.data.dataset import encode_for_scoring, prepare, unigram_bits_per_byte
from golfbook.data.documents import split_documents
from golfbook.data.shards import read_shard, write_shard
from golfbook.data.tokenizer import Tokenizer, audit_documents
from golfbook.errors import ByteAccountingError, DataError, RunError

HERE = Path(__file__).parent
FINEWEB = HERE / "data/fineweb_docs_100.jsonl"
MODEL = HERE / "data/fineweb_1024_bpe.model"
TEXTS = [json.loads(line)["text"] for line in FINEWEB.read_text().splitlines()]


def config_for(path: Path | str, **data: Any) -> Config:
    return load_config(overrides={"data": {"source": "text", "path": str(path), "max_validation_tokens": 0, **data}})


def shards_config(folder: Path, model: Path = MODEL, **overrides: Any) -> Config:
    return load_config(
        overrides={"data": {"source": "shards", "path": str(folder), "tokenizer": str(model)}, **overrides}
    )


@pytest.fixture
def shard_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    tokenizer = Tokenizer.load(MODEL)
    write_shard(folder / "my_train_000000.bin", audit_documents(tokenizer, TEXTS[10:20], "t").tokens)
    write_shard(folder / "my_train_000001.bin", audit_documents(tokenizer, TEXTS[20:25], "t").tokens)
    write_shard(folder / "my_val_000000.bin", audit_documents(tokenizer, TEXTS[:5], "v").tokens)
    return folder


# Text source, our tokenizer or theirs


def test_text_dataset_counts_every_byte(golfbook_home: Path) -> None:
    dataset = prepare(config_for(FINEWEB))
    split = split_documents(TEXTS, 0.1)
    assert dataset.val_bytes == sum(len(t.encode()) for t in split.validation)
    assert dataset.val_token_bytes.sum(dtype=np.int64) == dataset.val_bytes  # lossless: no normalisation
    assert dataset.info["decoded_bytes"] == dataset.val_bytes
    assert dataset.info["changed_documents"] == dataset.info["changed_characters"] == 0
    assert (
        dataset.info["validation_changes"]
        == f"nothing; each of {len(split.validation)} documents decodes to what it was"
    )
    assert dataset.val_token_bytes.shape == (dataset.val_tokens.size - 1,)
    assert dataset.val_tokens[0] == dataset.tokenizer.bos_id
    assert dataset.tokenizer.decode(dataset.val_tokens) == "".join(split.validation)
    train = np.concatenate([read_shard(p) for p in dataset.train_shards])
    assert dataset.tokenizer.decode(train) == "".join(split.train)
    assert dataset.train_tokens == train.size == dataset.info["train_tokens"]
    assert dataset.info["documents"] == 100 and dataset.info["bytes_source"] == "documents"
    assert dataset.info["bytes_per_token"] == dataset.val_bytes / (dataset.val_tokens.size - 1)


def test_published_tokenizer_states_what_it_changes(golfbook_home: Path) -> None:
    dataset = prepare(config_for(FINEWEB, tokenizer=str(MODEL), validation_fraction=0.5))
    table = int(dataset.val_token_bytes.sum(dtype=np.int64))
    assert dataset.info["decoded_bytes"] == table != dataset.val_bytes
    texts = split_documents(TEXTS, 0.5).validation
    changed = [
        (a, b)
        for a, b in zip(texts, dataset.tokenizer.decode_batch(list(map(dataset.tokenizer.encode, texts))), strict=True)
        if a != b
    ]
    assert dataset.info["changed_documents"] == len(changed) > 40
    assert dataset.info["changed_characters"] >= sum(a.count("\n") for a, _ in changed)
    assert dataset.info["validation_changes"].endswith(r"else, for example '\n' became ' '")
    few = prepare(config_for(FINEWEB, tokenizer=str(MODEL), validation_fraction=0.5, max_validation_tokens=3000)).info
    assert few["changed_documents"] <= few["validation_documents"] < 5  # of the documents that are scored, no others
    assert f" of {few['validation_documents']} documents " in few["validation_changes"]
    assert dataset.tokenizer.sha256 == Tokenizer.load(MODEL).sha256


def test_second_prepare_is_cached_and_equal(golfbook_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activity, "_folder", golfbook_home)
    first = prepare(config_for(FINEWEB))
    said = [json.loads(line)["doing"] for line in (golfbook_home / activity.FILE).read_text().splitlines()]
    steps = ["reading documents", "leaving out duplicates", "training the tokenizer", "encoding the text"]
    assert said[0] == "opening the text" and said[2:-1] == steps and said[-1] == activity.NOTEBOOK
    monkeypatch.setattr(dataset, "_build", lambda *_: pytest.fail("built twice"))
    second = prepare(config_for(FINEWEB))
    assert first.fingerprint == second.fingerprint and first.info == second.info
    np.testing.assert_array_equal(first.val_tokens, second.val_tokens)


def test_an_independent_build_is_identical(golfbook_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(config_for(FINEWEB))
    copy = golfbook_home / "elsewhere" / "renamed.jsonl"
    copy.parent.mkdir()
    rows = FINEWEB.read_text().splitlines()
    copy.write_text("\n".join(reversed(rows)) + "\n")  # the order of the file does not matter
    monkeypatch.setenv("GOLFBOOK_CACHE", str(golfbook_home / "other"))
    second = prepare(config_for(copy))
    assert second.folder != first.folder
    assert second.fingerprint == first.fingerprint
    assert [p.read_bytes() for p in second.train_shards] == [p.read_bytes() for p in first.train_shards]


@pytest.mark.parametrize("most", [1, 3000, 8000])
def test_validation_is_cut_at_whole_documents(golfbook_home: Path, most: int) -> None:
    whole, part = prepare(config_for(FINEWEB)), prepare(config_for(FINEWEB, max_validation_tokens=most))
    assert part.folder == whole.folder and part.fingerprint != whole.fingerprint
    np.testing.assert_array_equal(part.val_tokens, whole.val_tokens[: part.val_tokens.size])
    following = whole.val_tokens[part.val_tokens.size :]
    assert following[0] == whole.tokenizer.bos_id
    kept = part.info["validation_documents"]
    assert kept == (part.val_tokens == whole.tokenizer.bos_id).sum() >= 1
    assert part.val_tokens.size <= most or kept == 1
    next_document = np.flatnonzero(np.append(following[1:] == whole.tokenizer.bos_id, True))[0] + 1
    assert part.val_tokens.size + next_document > most  # one more would not fit
    assert part.val_bytes == sum(len(t.encode()) for t in split_documents(TEXTS, 0.1).validation[:kept])


def test_cached_files_that_are_damaged_are_built_again(golfbook_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = golfbook_home / "few.jsonl"
    path.write_text("\n".join(FINEWEB.read_text().splitlines()[1:14]))
    config = config_for(path, tokenizer=str(MODEL))
    first = prepare(config)
    for name in ("tokenizer.model", "text_train_000000.bin", "text_val_000000.bin", "validation_documents.npz"):
        file = first.folder / name
        file.write_bytes(file.read_bytes()[:-1])
        again = prepare(config)
        assert again.fingerprint == first.fingerprint and again.val_bytes == first.val_bytes
    for content in ("{}", "not json", "[]"):
        (first.folder / "dataset.json").write_text(content)
        assert prepare(config).fingerprint == first.fingerprint
    (first.folder / "dataset.json").unlink()
    assert prepare(config).fingerprint == first.fingerprint
    assert "is damaged" in caplog.text and "is incomplete" in caplog.text and "is unreadable" in caplog.text


def test_killed_build_leaves_nothing_that_is_believed(golfbook_home: Path) -> None:
    script = (
        "import time\nfrom golfbook.data import dataset\nfrom golfbook.config.load import load_config\n"
        "whole = dataset.write_shard\n"
        "def stop(path, tokens):\n    whole(path, tokens)\n    print('half', flush=True)\n    time.sleep(60)\n"
        "dataset.write_shard = stop\n"
        f"dataset.prepare(load_config(overrides={{'data': {{'source': 'text', 'path': {str(FINEWEB)!r}}}}}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    root = golfbook_home / "cache/datasets"
    assert [p.name for p in root.iterdir() if ".building-" in p.name] and not list(root.glob("text-*"))
    dataset = prepare(config_for(FINEWEB))
    assert dataset.train_tokens > 0
    assert [p.name for p in root.iterdir() if p.is_dir()] == [dataset.folder.name]


def _prepare_in_child(queue: Any) -> None:
    built = []
    original = dataset._build
    dataset._build = lambda *a: (built.append(1), time.sleep(0.5), original(*a))[2]  # type: ignore[assignment]
    queue.put((prepare(config_for(FINEWEB)).fingerprint, len(built)))


def test_parallel_prepares_build_once(golfbook_home: Path) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_prepare_in_child, args=(queue,)) for _ in range(3)]
    for child in children:
        child.start()
    results = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert len({fingerprint for fingerprint, _ in results}) == 1
    assert sum(count for _, count in results) == 1


def test_cache_that_cannot_be_written(golfbook_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (golfbook_home / "file").write_text("")
    monkeypatch.setenv("GOLFBOOK_CACHE", str(golfbook_home / "file"))
    with pytest.raises(DataError, match=r"cannot write the cache .*GOLFBOOK_CACHE"):
        prepare(config_for(FINEWEB))


def test_changed_text_is_another_dataset(golfbook_home: Path) -> None:
    path = golfbook_home / "d.jsonl"
    rows = FINEWEB.read_text().splitlines()
    path.write_text("\n".join(rows))
    first = prepare(config_for(path))
    path.write_text("\n".join(rows[:-1]))
    assert prepare(config_for(path)).fingerprint != first.fingerprint


def test_one_long_text_file_becomes_documents(golfbook_home: Path) -> None:
    path = golfbook_home / "book.txt"
    path.write_bytes("\r\n\r\n".join(TEXTS).encode())
    dataset = prepare(config_for(path))
    assert dataset.info["documents"] > 50
    assert dataset.info["train_bytes"] + dataset.val_bytes == path.stat().st_size


@pytest.mark.parametrize(
    ("content", "overrides", "message"),
    [
        ("one short document", {}, r"holds 1 distinct document\(s\)"),
        ("  \n ", {}, r"holds 0 distinct document\(s\)"),
    ],
)
def test_too_little_text(golfbook_home: Path, content: str, overrides: dict[str, Any], message: str) -> None:
    path = golfbook_home / "t.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        prepare(config_for(path))


def test_too_few_training_tokens_and_too_small_vocabulary(golfbook_home: Path) -> None:
    folder = golfbook_home / "few"
    folder.mkdir()
    for i, text in enumerate(TEXTS[1:4]):
        (folder / f"{i}.txt").write_text(text[:600])
    with pytest.raises(DataError, match="fewer than 4 sequences"):
        prepare(config_for(folder, tokenizer=str(MODEL)))
    large = load_config(overrides={"data": {"source": "text", "path": str(folder)}, "model.vocab_size": 8192})
    with pytest.raises(DataError, match=r"too small for a vocabulary of 8192 pieces \(at most \d+\)"):
        prepare(large)
    small = load_config(
        overrides={"data": {"source": "text", "path": str(FINEWEB), "tokenizer": str(MODEL)}, "model.vocab_size": 512}
    )
    with pytest.raises(DataError, match=r"has 1024 pieces, but model.vocab_size is 512"):
        prepare(small)


def test_bytes_that_do_not_add_up_stop_everything(golfbook_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Tokenizer._build_table

    def wrong(self: Tokenizer) -> Any:
        table = original(self)
        table.base[300] += 1
        return table

    monkeypatch.setattr(Tokenizer, "_build_table", wrong)
    with pytest.raises(ByteAccountingError, match=r"training document \d+, which begins '.*: .* id 300 "):
        prepare(config_for(FINEWEB))
    assert not list((golfbook_home / "cache/datasets").glob("text-*"))


def test_errors_name_no_temporary_folder(golfbook_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = golfbook_home / "mine.model"
    with mine.open("wb") as stream:
        SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS[0].split("\n")), model_writer=stream, vocab_size=150, minloglevel=2
        )
    text = golfbook_home / "few.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"{number} \u6f22 unseen"}) for number in range(9)))
    with pytest.raises(ByteAccountingError, match=rf"begins '\d \u6f22 unseen': the byte table of {mine} ") as caught:
        prepare(config_for(text, tokenizer=str(mine)))
    assert "building" not in str(caught.value)

    def full(path: Path, _: Any) -> None:
        try:
            raise OSError(28, "No space left on device")
        except OSError as error:
            raise RunError(f"cannot write {path}") from error

    monkeypatch.setattr(dataset, "write_shard", full)
    with pytest.raises(DataError, match=r"cannot write the cache .*: No space left on device") as caught:
        prepare(config_for(FINEWEB))
    assert "building" not in str(caught.value)


# Shards


def test_shards_dataset(golfbook_home: Path, shard_folder: Path) -> None:
    dataset = prepare(shards_config(shard_folder))
    stream = np.array(read_shard(shard_folder / "my_val_000000.bin"))
    cut_ = prepare(shards_config(shard_folder, **{"data.max_validation_tokens": 24_000}))
    full = prepare(shards_config(shard_folder, **{"data.max_validation_tokens": 0}))
    np.testing.assert_array_equal(full.val_tokens, stream)
    assert full.val_bytes == full.val_token_bytes.sum(dtype=np.int64) == full.info["validation_bytes"]
    assert full.info["bytes_source"] == "table" and full.info["validation_changes"].startswith("unknown")
    assert cut_.info["validation_documents"] == 2 and cut_.val_tokens.size <= 24_000
    assert dataset.train_shards == sorted(shard_folder.glob("my_train_*"))
    assert dataset.train_tokens == sum(read_shard(p).size for p in dataset.train_shards)
    assert dataset.info["train_documents_checked"] == 15


def test_shards_cut_in_the_middle_of_documents(golfbook_home: Path, shard_folder: Path) -> None:
    path = shard_folder / "my_val_000000.bin"
    stream = np.array(read_shard(path))
    emoji = Tokenizer.load(MODEL).encode("😀")
    write_shard(path, np.concatenate([stream[100:], [1], stream[1:50], emoji[:2]]).astype(np.uint16))
    dataset = prepare(shards_config(shard_folder, **{"data.max_validation_tokens": 0}))
    assert dataset.val_tokens.size == stream.size - 100 + 52


def test_fragments_inside_shards_are_refused(golfbook_home: Path, shard_folder: Path) -> None:
    path = shard_folder / "my_val_000000.bin"
    emoji = Tokenizer.load(MODEL).encode("😀")
    write_shard(path, np.concatenate([[1], emoji[:2], np.array(read_shard(path))]).astype(np.uint16))
    with pytest.raises(ByteAccountingError, match=r"validation .* document 0.* bytes f0 9f.* was cut inside one"):
        prepare(shards_config(shard_folder))


def test_shards_with_foreign_ids_or_tokenizer(golfbook_home: Path, shard_folder: Path) -> None:
    path = shard_folder / "my_train_000001.bin"
    stream = np.array(read_shard(path))
    stream[77] = 1024
    write_shard(path, stream)
    with pytest.raises(DataError, match=r"my_train_000001.bin: token 77 has id 1024, .* 1024 pieces"):
        prepare(shards_config(shard_folder))
    write_shard(path, np.full(5000, 300, np.uint16))
    with pytest.raises(DataError, match="no BOS token"):
        prepare(shards_config(shard_folder))


def test_shards_under_a_tokenizer_without_space_are_refused(golfbook_home: Path, shard_folder: Path) -> None:
    tokenizer = Tokenizer.load(MODEL)
    spelt = [tokenizer.bos_id] + [4 + b for b in "a\u2581b".encode()]
    write_shard(shard_folder / "my_val_000000.bin", np.array(spelt * 20 + [486], np.uint16))
    with pytest.raises(ByteAccountingError, match="no piece for a space"):
        prepare(shards_config(shard_folder))


def test_truncated_shard_is_named_even_after_it_was_cached(golfbook_home: Path, shard_folder: Path) -> None:
    prepare(shards_config(shard_folder))
    path = shard_folder / "my_train_000000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"my_train_000000.bin is truncated"):
        prepare(shards_config(shard_folder))


def test_changed_shards_have_another_fingerprint(golfbook_home: Path, shard_folder: Path) -> None:
    first = prepare(shards_config(shard_folder))
    copy = golfbook_home / "copy"
    shutil.copytree(shard_folder, copy)
    assert prepare(shards_config(copy)).fingerprint == first.fingerprint
    path = copy / "my_train_000000.bin"
    stream = np.array(read_shard(path))
    stream[5] = 300
    write_shard(path, stream)
    os.utime(path, ns=(1, 1))
    assert prepare(shards_config(copy)).fingerprint != first.fingerprint


# Scoring any text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=4))
def test_encode_for_scoring_divides_by_the_original(texts: list[str]) -> None:
    tokenizer = Tokenizer.load(MODEL)
    total = sum(len(t.encode()) for t in texts)
    if not any(tokenizer.encode(t).size for t in texts) and (total == 0 or len(texts) < 2):
        with pytest.raises(DataError, match="empty"):
            encode_for_scoring(tokenizer, texts)
        return
    tokens, token_bytes, counted, changes = encode_for_scoring(tokenizer, texts)
    assert counted == total
    assert changes.startswith("nothing") == all(tokenizer.decode(tokenizer.encode(t)) == t for t in texts)
    assert tokens[0] == tokenizer.bos_id and (tokens == tokenizer.bos_id).sum() == len(texts)
    assert token_bytes.shape == (tokens.size - 1,)
    assert token_bytes.sum(dtype=np.int64) == sum(len(t.encode()) for t in tokenizer.decode_batch([tokens]))


def test_unigram_entropy() -> None:
    tokens = np.concatenate([[7], np.repeat([0, 1, 2, 3], 8)]).astype(np.uint16)
    assert unigram_bits_per_byte(tokens, 32) == pytest.approx(2.0)
    assert unigram_bits_per_byte(tokens, 64) == pytest.approx(1.0)
