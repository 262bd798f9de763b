"""Reading documents, and the split that no near-duplicate crosses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golfbook.data import documents
from golfbook.data.documents import cut, near_duplicates, read_documents, split_documents
from golfbook.errors import DataError

WORDS = [
    f"{a}{b}" for a in ("red", "blue", "stone", "water", "quick", "old") for b in ("fox", "hill", "ing", "er", "s")
]


def prose(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words))


def test_read_documents_keeps_every_character(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes("\ufeffone\r\ntwo\n\n".encode())
    (tmp_path / "a.jsonl").write_text('{"text": "x\\r\\n\\u2028y"}\n\n{"text": ""}\n', encoding="utf-8")
    (tmp_path / "c.md").write_text("no")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/d.TXT").write_text("deep")
    assert read_documents(tmp_path) == ["x\r\n\u2028y", "", "one\r\ntwo\n\n", "deep"]
    long = "para\n\n" * 9000
    (tmp_path / "b.txt").write_text(long)
    assert read_documents(tmp_path / "b.txt") == [long]  # to score, a file is one document


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": }\n', r"a.jsonl, line 2: no valid JSON"),
        ("a.jsonl", b'{"text": "ok"}\n\n{"texts": "x"}', r"line 3: no text under the key 'text'; did you mean 'texts'"),
        ("a.jsonl", b'{"text": 5}', "line 1: the value under 'text' is a number, not text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}', "line 2: the value under 'text' is null, not text"),
        ("a.jsonl", b'{"text": ["x"]}', "line 1: the value under 'text' is an array, not text"),
        ("a.jsonl", b'[{"text": "x"}]', "line 1: the line is an array; expected an object"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: the text is no valid Unicode"),
        ("a.txt", b"ab\ncd\xff", "a.txt, line 2: byte 5 is no UTF-8"),
        ("a.txt", "one\ntwo".encode("utf-16"), r"a.txt is UTF-16; save it as UTF-8"),
        ("a.jsonl", b"\xfe\xff" + '{"text": "x"}'.encode("utf-16-be"), r"a.jsonl is UTF-16; save it as UTF-8"),
        ("a.txt", "one".encode("utf-32"), r"a.txt is UTF-32; save it as UTF-8"),
        ("a.csv", b"x", "expected a .txt file"),
    ],
)
def test_unreadable_documents_name_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_documents(tmp_path / name)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + "\ufeffword".encode())
    assert read_documents(tmp_path / "a.txt") == ["\ufeffword"]  # one signature; what follows it is text
    (tmp_path / "b.jsonl").write_bytes(mark + b'{"text": "one"}\n' + mark + b'{"text": "two"}\n')
    assert read_documents(tmp_path / "b.jsonl") == ["one", "two"]  # two files, one appended to the other


def test_hidden_and_backup_files_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in (".x.txt", "._x.txt", "x.txt~", "#x.txt#", ".ipynb_checkpoints/x-checkpoint.txt", ".cache.jsonl"):
        (tmp_path / name).write_text("old")
    with pytest.raises(DataError, match=r"holds no .txt or .jsonl file \(4 hidden"):
        read_documents(tmp_path)
    (tmp_path / "x.txt").write_text("new")
    assert read_documents(tmp_path) == ["new"]
    assert "4 hidden" in caplog.text
    assert read_documents(tmp_path / ".x.txt") == ["old"]  # a file that is named is read


def test_links_are_followed_and_each_file_is_read_once(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    for path, text in ((folder / "a.txt", "here"), (elsewhere / "b.txt", "there"), (elsewhere / "in/c.txt", "deep")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "books").symlink_to(elsewhere)
    (folder / "more").symlink_to(elsewhere / "in")
    (folder / "z.txt").symlink_to(folder / "a.txt")
    (elsewhere / "in/circle").symlink_to(folder)
    assert sorted(read_documents(folder)) == ["deep", "here", "there"]
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match=r"gone.txt is a link to .*nowhere.txt, which does not exist"):
        read_documents(folder)


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
