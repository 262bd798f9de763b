"""Documents of the user's own, and the split into training and validation that no near-duplicate crosses.

A document's place depends on its text alone: a hash decides its split and its rank. Training documents that share much
with a validation document are dropped, because a model that has seen them is not tested on text it has never seen.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from golfbook.data.tokenizer import to_utf8
from golfbook.errors import DataError, nearest
from golfbook.files import decode_text

SUFFIXES = (".txt", ".jsonl")
SHINGLE_WORDS = 5
JACCARD = 0.5  # shingles in common / shingles of either
CONTAINMENT = 0.8  # shingles in common / shingles of the shorter document
CUT_ABOVE = 20_000  # characters: longer .txt files are cut at blank lines into documents ...
CUT_LENGTH = 2_000  # ... that end at the first blank line behind this many characters

_WORD = re.compile(r"\w+")
_BLANK = re.compile(r"\n[ \t\r]*\n\s*")

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Split:
    """Documents in the order of their token streams."""

    train: list[str]
    validation: list[str]
    duplicates: int  # exact copies left out, empty documents included
    near_duplicates: int  # training documents left out because they are close to a validation document


def text_files(path: str | Path) -> list[Path]:
    """List the text files at ``path``: itself, or all .txt and .jsonl files below a folder, by name.

    Linked files and folders count like others, and each real file once. Left out are names that begin with a dot:
    hidden files and folders, and what editors, JupyterLab and macOS keep beside a file. Raises :class:`DataError`
    where nothing is left, and for a folder that cannot be read or a text file that is a link to nothing.
    """
    path = Path(path)
    if path.is_dir():
        found, hidden = _walk(path)
        note = f"{hidden} hidden .txt or .jsonl file(s) and folder(s) below it were left out" if hidden else ""
        if not found:
            raise DataError(f"folder {path} holds no .txt or .jsonl file{f' ({note})' if note else ''}")
        if note:
            log.info("folder %s: %s", path, note)
        return found
    if not path.is_file():
        siblings = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"text file or folder {path} does not exist{nearest(path.name, siblings)}")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path}: expected a .txt file, a .jsonl file or a folder of them")
    return [path]


def _walk(root: Path) -> tuple[list[Path], int]:
    """List the text files below a folder, by name, and how many hidden files and folders were passed over."""

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read folder {error.filename}: {error.strerror}")

    seen, found, hidden = {root.resolve()}, [], 0  # real folders, so that links in a circle come to an end
    for name, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        folder = Path(name)
        texts = [folder / f for f in files if Path(f.lstrip(".")).suffix.lower() in SUFFIXES]
        found += [f for f in texts if not f.name.startswith(".")]
        hidden += sum(f.name.startswith(".") for f in texts) + sum(f.startswith(".") for f in folders)
        visible = [folder / f for f in sorted(folders) if not f.startswith(".")]
        fresh = {f.resolve(): f.name for f in visible if f.resolve() not in seen}
        seen |= fresh.keys()
        folders[:] = fresh.values()
    real: dict[Path, Path] = {}
    for file in sorted(found):
        if file.is_symlink() and not file.exists():
            raise DataError(f"{file} is a link to {file.readlink()}, which does not exist; mend or remove it")
        if file.is_file():
            real.setdefault(file.resolve(), file)
    return list(real.values()), hidden


def read_documents(path: str | Path, text_field: str = "text") -> list[str]:
    """Read the documents of a .txt file (one), a .jsonl file (one a line, under ``text_field``), or a folder of both.

    Nothing is changed: line ends and blanks stay as they are, so that bytes can be counted. A byte-order mark at the
    beginning of a file, or of a line of JSON, is no part of any document, and its bytes do not count.
    Raises :class:`DataError` naming the file and the line of anything that is no document.
    """
    return [text for file in text_files(path) for text in _read(file, text_field)]


def read_corpus(path: str | Path, text_field: str) -> list[str]:
    """Read as :func:`read_documents` does, but with .txt files of more than 20,000 characters cut at blank lines."""
    documents = []
    for file in text_files(path):
        texts = _read(file, text_field)
        documents += texts if file.suffix.lower() == ".jsonl" else [piece for text in texts for piece in cut(text)]
    return documents


def cut(text: str) -> list[str]:
    """Cut a long text into documents of a few thousand characters, at blank lines only; all of it is kept."""
    if len(text) <= CUT_ABOVE:
        return [text]
    pieces, start = [], 0
    for blank in _BLANK.finditer(text):
        if blank.end() - start >= CUT_LENGTH:
            pieces.append(text[start : blank.end()])
            start = blank.end()
    return [*pieces, text[start:]] if start < len(text) else pieces


def split_documents(documents: Iterable[str], validation_fraction: float) -> Split:
    """Leave out copies, split by hash, order by hash, and drop training documents close to a validation document.

    Both splits hold at least one document. Raises :class:`DataError` where that is impossible.
    """
    given = list(documents)
    ranked = sorted(
        (hashlib.sha256(text.encode()).hexdigest(), text)
        for text in dict.fromkeys(given)
        if text and not text.isspace()
    )
    if len(ranked) < 2:
        raise DataError(
            f"the corpus holds {len(ranked)} distinct document(s), and training and validation need one each: give "
            "more files, a .jsonl file with one document a line, or one .txt file of more than 20,000 characters with "
            "blank lines between its parts"
        )
    limit = validation_fraction * 2.0**64
    # the last digits choose the split, the first ones the order, so that order says nothing about the split
    held = [int(digest[-16:], 16) < limit for digest, _ in ranked]
    if not any(held):
        held[min(range(len(ranked)), key=lambda i: ranked[i][0][-16:])] = True
    if all(held):
        held[max(range(len(ranked)), key=lambda i: ranked[i][0][-16:])] = False
    validation = [text for (_, text), out in zip(ranked, held, strict=True) if out]
    train = [text for (_, text), out in zip(ranked, held, strict=True) if not out]
    close = near_duplicates(train, validation)
    kept = [text for text, near in zip(train, close, strict=True) if not near]
    if not kept:
        raise DataError(
            f"all {len(train)} training documents are near-duplicates of validation documents: the corpus repeats "
            "itself; give text with more variety"
        )
    return Split(kept, validation, len(given) - len(ranked), len(train) - len(kept))


def near_duplicates(train: Sequence[str], validation: Sequence[str], batch: int = 1024) -> Array:
    """Find which training documents are close to some validation document: bool (len(train),).

    Close means a Jaccard index of at least 0.5 between the sets of word 5-grams, or at least 0.8 of the 5-grams of the
    shorter document found in the longer one. All pairs are compared, by sparse matrix products over 64-bit hashes of
    the 5-grams; a document of less than five words counts as one shingle.
    """
    words: dict[str, int] = {}
    reference = [shingles(text, words) for text in validation]
    known = np.unique(np.concatenate(reference)) if reference else np.zeros(0, np.uint64)
    columns = _incidence(reference, known).T.tocsc()
    sizes = np.array([s.size for s in reference], np.int64)
    close = np.zeros(len(train), bool)
    for start in range(0, len(train), batch):
        part = [shingles(text, words) for text in train[start : start + batch]]
        common = (_incidence(part, known) @ columns).tocoo()
        mine = np.array([s.size for s in part], np.int64)[common.row]
        other, both = sizes[common.col], common.data
        near = (both >= JACCARD * (mine + other - both)) | (both >= CONTAINMENT * np.minimum(mine, other))
        close[start + common.row[near]] = True
    return close


def shingles(text: str, words: dict[str, int]) -> Array:
    """Return the distinct 64-bit hashes of a text's word 5-grams, sorted. ``words`` numbers the words seen so far."""
    ids = np.array([words.setdefault(w, len(words) + 1) for w in _WORD.findall(text.lower())], np.uint64)
    if ids.size == 0:
        return ids
    count = max(ids.size - SHINGLE_WORDS + 1, 1)
    value = np.zeros(count, np.uint64)
    for k in range(min(SHINGLE_WORDS, ids.size)):
        value = _mix(value + ids[k : k + count])
    return np.unique(value)


def _mix(x: Array) -> Array:
    """Apply the finaliser of splitmix64: every input bit changes every output bit (uint64, wraps around)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _incidence(sets: Sequence[Array], known: Array) -> sparse.csr_array:
    """Return the matrix (documents, known shingles) of 0 and 1."""
    flat = np.concatenate(sets) if sets else np.zeros(0, np.uint64)
    rows = np.repeat(np.arange(len(sets)), [s.size for s in sets])
    places = np.searchsorted(known, flat)
    found = places < known.size
    found[found] = known[places[found]] == flat[found]
    ones = np.ones(int(found.sum()), np.int32)
    return sparse.csr_array((ones, (rows[found], places[found])), shape=(len(sets), known.size))


def _read(path: Path, text_field: str) -> list[str]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    text = decode_text(raw, path)
    if path.suffix.lower() != ".jsonl":
        return [text]
    documents = []
    for number, row in enumerate(text.split("\n"), 1):
        row = row.removeprefix("\ufeff")  # of a file that was appended to another one
        if not row.strip():
            continue
        try:
            documents.append(_document(row, text_field))
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    return documents


def _document(row: str, text_field: str) -> str:
    """Return the document in one line of JSON."""
    try:
        record = json.loads(row)
    except ValueError as error:
        raise DataError(f"no valid JSON ({error})") from None
    except RecursionError:
        raise DataError("JSON is nested too deeply") from None
    if not isinstance(record, dict):
        raise DataError(
            f"the line is {_kind(record)}; expected an object with the document under '{text_field}', "
            f'such as {{"{text_field}": "..."}}'
        )
    if text_field not in record:
        raise DataError(
            f"no text under the key '{text_field}'{nearest(text_field, record)}; "
            "set data.text_field to the key that holds the document"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(f"the value under '{text_field}' is {_kind(text)}, not text; give it text or remove the line")
    to_utf8(text)
    return text


def _kind(value: object) -> str:
    """Return what a value of JSON is called."""
    names = {type(None): "null", bool: "true or false", str: "a text", list: "an array", dict: "an object"}
    return names.get(type(value), "a number")
