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

from golfbook import corpus, documents, pydocs
from golfbook.config import Config, load_config
from golfbook.corpus import Dataset, encode_for_scoring, prepare, read_documents, unigram_bits_per_byte
from golfbook.documents import cut, near_duplicates, split_documents
from golfbook.errors import ByteAccountingError, DataError
from golfbook.shards import read_shard, write_shard
from golfbook.tokenizer import Tokenizer, audit_documents

HERE = Path(__file__).parent
FINEWEB = HERE / "data/fineweb_docs_100.jsonl"
MODEL = HERE / "data/fineweb_1024_bpe.model"
TEXTS = [json.loads(line)["text"] for line in FINEWEB.read_text().splitlines()]
WORDS = [
    f"{a}{b}" for a in ("red", "blue", "stone", "water", "quick", "old") for b in ("fox", "hill", "ing", "er", "s")
]


def config_for(path: Path | str, **data: Any) -> Config:
    return load_config(overrides={"data": {"source": "text", "path": str(path), "max_validation_tokens": 0, **data}})


def shards_config(folder: Path, model: Path = MODEL, **overrides: Any) -> Config:
    return load_config(
        overrides={"data": {"source": "shards", "path": str(folder), "tokenizer": str(model)}, **overrides}
    )


def prose(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words))


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
    assert dataset.info["normalisation_loss_bytes"] == dataset.info["changed_documents"] == 0
    assert dataset.val_token_bytes.shape == (dataset.val_tokens.size - 1,)
    assert dataset.val_tokens[0] == dataset.tokenizer.bos_id
    assert dataset.tokenizer.decode(dataset.val_tokens) == "".join(split.validation)
    train = np.concatenate([read_shard(p) for p in dataset.train_shards])
    assert dataset.tokenizer.decode(train) == "".join(split.train)
    assert dataset.train_tokens == train.size == dataset.info["train_tokens"]
    assert dataset.info["documents"] == 100 and dataset.info["bytes_source"] == "documents"
    assert dataset.info["bytes_per_token"] == dataset.val_bytes / (dataset.val_tokens.size - 1)


def test_published_tokenizer_states_its_normalisation_loss(golfbook_home: Path) -> None:
    dataset = prepare(config_for(FINEWEB, tokenizer=str(MODEL), validation_fraction=0.5))
    table = int(dataset.val_token_bytes.sum(dtype=np.int64))
    assert dataset.info["normalisation_loss_bytes"] == dataset.val_bytes - table != 0
    assert dataset.info["changed_documents"] == 97  # line ends become spaces
    assert dataset.tokenizer.sha256 == Tokenizer.load(MODEL).sha256


def test_second_prepare_is_cached_and_equal(golfbook_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(config_for(FINEWEB))
    monkeypatch.setattr(corpus, "_build", lambda *_: pytest.fail("built twice"))
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
        "import time\nfrom golfbook import corpus\nfrom golfbook.config import load_config\n"
        "whole = corpus.write_shard\n"
        "def stop(path, tokens):\n    whole(path, tokens)\n    print('half', flush=True)\n    time.sleep(60)\n"
        "corpus.write_shard = stop\n"
        f"corpus.prepare(load_config(overrides={{'data': {{'source': 'text', 'path': {str(FINEWEB)!r}}}}}))\n"
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
    original = corpus._build
    corpus._build = lambda *a: (built.append(1), time.sleep(0.5), original(*a))[2]  # type: ignore[assignment]
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
    with pytest.raises(ByteAccountingError, match=r"training document \d+: .* id 300 "):
        prepare(config_for(FINEWEB))
    assert not list((golfbook_home / "cache/datasets").glob("text-*"))


# Reading


def test_read_documents_keeps_every_character(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("\ufeffone\r\ntwo\n\n".encode())
    (tmp_path / "a.jsonl").write_text('{"text": "x\\r\\n\\u2028y"}\n\n{"text": ""}\n', encoding="utf-8")
    (tmp_path / "c.md").write_text("no")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/d.TXT").write_text("deep")
    assert read_documents(tmp_path) == ["x\r\n\u2028y", "", "\ufeffone\r\ntwo\n\n", "deep"]
    long = "para\n\n" * 9000
    (tmp_path / "b.txt").write_text(long)
    assert read_documents(tmp_path / "b.txt") == [long]  # to score, a file is one document


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": }\n', r"a.jsonl, line 2: no valid JSON"),
        ("a.jsonl", b'{"text": "ok"}\n\n{"texts": "x"}', r"line 3: no text under the key 'text'; did you mean 'texts'"),
        ("a.jsonl", b'{"text": 5}', "line 1: no text under the key"),
        ("a.jsonl", b"[1]", "line 1: no text under the key"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: the text is no valid Unicode"),
        ("a.txt", b"ab\ncd\xff", "a.txt, line 2: byte 5 is no UTF-8"),
        ("a.csv", b"x", "expected a .txt file"),
    ],
)
def test_unreadable_documents_name_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_documents(tmp_path / name)


def test_missing_text(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(DataError, match=r"does not exist; did you mean 'corpus.txt'"):
        read_documents(tmp_path / "corpsu.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no .txt or .jsonl"):
        read_documents(tmp_path / "empty")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6000), st.sampled_from(["\n\n", "\r\n\r\n", "\n \t\n\n", "\n"])), max_size=12))
def test_cut_keeps_everything_and_cuts_at_blank_lines(parts: list[tuple[int, str]]) -> None:
    text = "".join("w" * n + end for n, end in parts)
    pieces = cut(text)
    assert "".join(pieces) == text
    if len(text) <= documents.CUT_ABOVE:
        assert pieces == [text]
    assert all(p.endswith("\n") and "\n" in p.rstrip("w")[-4:] and len(p) >= documents.CUT_LENGTH for p in pieces[:-1])


# Splits


def test_split_depends_on_the_text_alone() -> None:
    rng = np.random.default_rng(0)
    texts = [prose(rng, 60) for _ in range(400)]
    split = split_documents(texts, 0.2)
    assert set(split.train) | set(split.validation) == set(texts) and not set(split.train) & set(split.validation)
    assert 50 < len(split.validation) < 110
    again = split_documents([*reversed(texts), texts[0], "", " \n"], 0.2)
    assert (again.train, again.validation, again.duplicates) == (split.train, split.validation, 3)
    fewer = split_documents(texts[:200], 0.2)
    assert set(fewer.validation) == set(split.validation) & set(texts[:200])
    positions = [texts.index(t) for t in split.train]
    assert abs(np.corrcoef(positions, np.arange(len(positions)))[0, 1]) < 0.2  # mixed


@pytest.mark.parametrize("fraction", [0.0001, 0.89])
def test_both_splits_of_a_tiny_corpus_hold_something(fraction: float) -> None:
    split = split_documents(["a first text", "another one entirely"], fraction)
    assert len(split.train) == len(split.validation) == 1


def test_planted_near_duplicates_never_cross() -> None:
    rng = np.random.default_rng(1)
    originals = [prose(rng, 120) for _ in range(150)]
    planted = []
    for text in originals:
        words = text.split()
        changed = list(words)
        changed[60] = "otherword"
        planted += [
            " ".join(changed),  # one word of 120 replaced
            text.upper().replace(" ", "\n"),  # case and spacing
            " ".join(words[:80]),  # a part of it
            text + " " + prose(rng, 400),  # contained in something longer
            ", ".join(words) + "!",  # punctuation
        ]
    split = split_documents(originals + planted, 0.1)
    assert split.near_duplicates > 30
    assert len(split.train) + len(split.validation) + split.near_duplicates == len(originals) * 6
    families = {}
    for number in range(len(originals)):
        for text in (originals[number], *planted[5 * number : 5 * number + 5]):
            families[text] = number
    # (the two long relatives of one original share only 120 of 520 words with each other, so they may part)
    short = [t for t in split.validation if len(t.split()) <= 120]
    crossing = {families[t] for t in short} & {families[t] for t in split.train}
    assert crossing == set()


def test_near_duplicates_agree_with_a_slow_count() -> None:
    rng = np.random.default_rng(2)
    few = ["ab", "cd", "ef"]  # a tiny vocabulary: many accidental matches, around both thresholds
    texts = [" ".join(rng.choice(few, rng.integers(1, 30))) for _ in range(120)] + ["", "!!", "ab"]
    train, validation = texts[:80], texts[80:]

    def grams(text: str) -> set[tuple[str, ...]]:
        words = text.split() if any(c.isalnum() for c in text) else []
        return {tuple(words[i : i + 5]) for i in range(max(len(words) - 4, 1))} if words else set()

    expected = []
    for a in map(grams, train):
        pairs = [(len(a & b), len(a | b), min(len(a), len(b))) for b in map(grams, validation)]
        expected.append(any(i and (i >= 0.5 * u or i >= 0.8 * m) for i, u, m in pairs))
    assert 5 < sum(expected) < 78
    for batch in (1, 7, 1024):
        assert near_duplicates(train, validation, batch).tolist() == expected


def test_a_corpus_of_copies_is_refused() -> None:
    text = prose(np.random.default_rng(3), 300)
    with pytest.raises(DataError, match="the corpus repeats itself"):
        split_documents([text + " " + str(i) for i in range(20)], 0.2)


# Shards


def test_shards_dataset(golfbook_home: Path, shard_folder: Path) -> None:
    dataset = prepare(shards_config(shard_folder))
    stream = np.array(read_shard(shard_folder / "my_val_000000.bin"))
    cut_ = prepare(shards_config(shard_folder, **{"data.max_validation_tokens": 24_000}))
    full = prepare(shards_config(shard_folder, **{"data.max_validation_tokens": 0}))
    np.testing.assert_array_equal(full.val_tokens, stream)
    assert full.val_bytes == full.val_token_bytes.sum(dtype=np.int64) == full.info["validation_bytes"]
    assert full.info["bytes_source"] == "table"
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
    with pytest.raises(ByteAccountingError, match=r"validation .* document 0"):
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
    tokens, token_bytes, counted = encode_for_scoring(tokenizer, texts)
    assert counted == total
    assert tokens[0] == tokenizer.bos_id and (tokens == tokenizer.bos_id).sum() == len(texts)
    assert token_bytes.shape == (tokens.size - 1,)
    assert token_bytes.sum(dtype=np.int64) == sum(len(t.encode()) for t in tokenizer.decode_batch([tokens]))


def test_unigram_entropy() -> None:
    tokens = np.concatenate([[7], np.repeat([0, 1, 2, 3], 8)]).astype(np.uint16)
    assert unigram_bits_per_byte(tokens, 32) == pytest.approx(2.0)
    assert unigram_bits_per_byte(tokens, 64) == pytest.approx(1.0)


# The built-in corpus


def _stdlib(*names: str) -> list[Path]:
    return [Path(os.__file__).parent / name for name in names]


def test_pydocs_of_a_few_modules_are_prose() -> None:
    texts = pydocs.gather(_stdlib("json", "argparse.py", "typing.py", "pydoc_data"))
    assert texts == sorted(set(texts)) and len(texts) > 60
    for text in texts:
        assert pydocs.SHORTEST <= len(text) <= pydocs.LONGEST
        assert ">>>" not in text and "\r" not in text and text == text.strip()
        assert "\n\n\n" not in text
    assert any("JSON" in text for text in texts)
    assert any(text.startswith("Assignment statements") or "augmented assignment" in text for text in texts)


def test_pydocs_reads_without_importing(tmp_path: Path) -> None:
    words = "These words describe what the function does in a long and patient sentence. " * 5
    (tmp_path / "module.py").write_text(
        f'raise SystemExit\n"""{words} not a docstring"""\n'
        f'class A:\n    """{words} class\n\n    >>> A()\n    gone\n\n    last words\n    """\n'
        f'    def f(self):\n        "{words} method"\n'
        f'if True:\n    async def g():\n        """{words} nested"""\n'
        f'add_docstr(thing.sum, r"""{words} added""".format(**common))\n'
        f'def short():\n    """Short."""\n'
        f'def code():\n    """{"x[0]=1; y->z() " * 30}"""\n'
    )
    (tmp_path / "broken.py").write_text(f'def f(:\n    """{words}"""')
    (tmp_path / "latin.py").write_bytes(b'"""\xff' + words.encode() + b'"""')
    (tmp_path / "surrogate.py").write_text(f'"""\\ud800 {words}"""')
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/t.py").write_text(f'"""{words} test"""')
    found = pydocs.gather([tmp_path])
    assert sorted(text.split(". ")[-1].split()[0] for text in found) == ["added", "class", "method", "nested"]
    (text,) = [t for t in found if "class" in t]
    assert text.endswith("class\n\nlast words")


def test_pydocs_cleaning_drops_tables_and_empty_sections() -> None:
    text = pydocs.clean(
        """First line.

        Intro stays.

        ====  ====
        a     b
        ====  ====

        Examples
        --------

        >>> 1 + 1
        2

        Notes
        -----
        Kept.
        """
    )
    assert text == "First line.\n\nIntro stays.\n\nNotes\n-----\nKept."


def test_empty_gather_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        pydocs.gather([tmp_path])


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The whole built-in corpus, prepared in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOLFBOOK_CACHE", str(tmp_path_factory.mktemp("real")))
        return prepare(load_config(overrides={"data.max_validation_tokens": 65_536}))


@pytest.mark.slow
def test_the_whole_built_in_corpus(real: Dataset) -> None:
    info = real.info
    assert info["documents"] > 8000 and real.train_tokens > 3_000_000
    assert info["normalisation_loss_bytes"] == 0 and info["changed_documents"] == 0
    assert real.val_token_bytes.sum(dtype=np.int64) == real.val_bytes
    assert 40_000 < real.val_tokens.size <= 65_536
    assert 2.0 < info["bytes_per_token"] < 4.0 and 2.5 < info["unigram_bpb"] < 4.5
    assert set(pydocs.PACKAGES) < set(info["versions"])


@pytest.mark.slow
def test_nothing_near_crosses_in_the_built_in_corpus(real: Dataset) -> None:
    tokenizer = real.tokenizer

    def texts(tokens: np.ndarray) -> list[str]:
        return tokenizer.decode_batch(np.split(tokens, np.flatnonzero(tokens == tokenizer.bos_id)[1:]))

    train = texts(np.concatenate([read_shard(p) for p in real.train_shards]))
    validation = texts(np.array(read_shard(real.folder / "pydocs_val_000000.bin")))
    assert len(train) + len(validation) == real.info["documents"]
    assert not set(train) & set(validation)
    # counted again, pair by pair, with sets of words instead of hashes and matrices
    grams = [set(zip(*(t.lower().split()[i:] for i in range(5)), strict=False)) for t in validation]
    where: dict[tuple[str, ...], list[int]] = {}
    for number, found in enumerate(grams):
        for gram in found:
            where.setdefault(gram, []).append(number)
    worst = 0.0
    for text in train:
        mine = set(zip(*(text.lower().split()[i:] for i in range(5)), strict=False))
        common: dict[int, int] = {}
        for gram in mine:
            for number in where.get(gram, ()):
                common[number] = common.get(number, 0) + 1
        for number, count in common.items():
            worst = max(worst, count / (len(mine) + len(grams[number]) - count))
    assert worst < 0.6  # words are cut a little differently here, so the limit of 0.5 is not met to the digit
