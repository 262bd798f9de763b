"""Datasets: documents or shards in, token streams and exact byte counts out, prepared once and cached.

:func:`prepare` is the one door. Whatever decides the content of a dataset is hashed into the name of its folder under
``<cache>/datasets``; the folder is built aside and renamed, so it is there and whole, or not there. Bits per byte
divides by ``Dataset.val_bytes``: the UTF-8 bytes of the original documents where we have them, else the bytes of the
table, which equal the decoded bytes (checked document by document).
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from golfbook import activity
from golfbook.config.schema import Config
from golfbook.data import pydocs
from golfbook.data.cache import cached, copy
from golfbook.data.documents import Split, read_corpus, split_documents, text_files
from golfbook.data.fineweb import REPOSITORY, download_fineweb
from golfbook.data.shards import find_shards, read_shard, write_shard
from golfbook.data.tokenizer import (
    BATCH,
    SPACE,
    Tokenizer,
    audit_documents,
    check_documents,
    describe_changes,
    train_tokenizer,
)
from golfbook.errors import ByteAccountingError, DataError
from golfbook.files import atomic_path, cache_root, resolve, sha256_bytes, sha256_file

FORMAT = 2  # raise it whenever equal inputs give another dataset
SHARD_TOKENS = 100_000_000
LEAST_SEQUENCES = 4  # a training split holds at least this many
CHECKED_TRAIN_DOCUMENTS = 1000  # of each foreign training shard; validation shards are checked whole

Array = np.ndarray[Any, Any]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset."""

    folder: Path  # under the cache; holds the tokenizer and dataset.json, and the shards unless they are foreign
    train_shards: list[Path]
    tokenizer: Tokenizer
    fingerprint: str  # SHA-256 of everything: documents in order, or shards; tokenizer; validation cut
    val_tokens: Array  # uint16 (n + 1,)
    val_token_bytes: Array  # (n,) bytes of each target by the table
    val_bytes: int  # denominator of bits per byte
    info: dict[str, Any]
    train_tokens: int


@activity.step("opening the text")
def prepare(config: Config) -> Dataset:
    """Open the dataset of a config; build it first where the cache has none. Equal inputs give equal datasets.

    Raises :class:`DataError` for unusable data and :class:`golfbook.errors.ByteAccountingError` where the bytes of any
    document do not add up.
    """
    if config.data.source in ("shards", "fineweb"):
        return _prepare_shards(config)
    data = config.data
    description: dict[str, Any] = {
        "format": FORMAT,
        "source": data.source,
        "validation_fraction": data.validation_fraction,
        "sentencepiece": metadata.version("sentencepiece"),
    }
    if data.tokenizer:
        given = Tokenizer.load(resolve(data.tokenizer))
        _check_vocabulary(given, config)
        description["tokenizer"] = given.sha256
    else:
        description["vocab_size"] = config.model.vocab_size
    if data.source == "pydocs":
        description["versions"] = pydocs.versions()
    else:
        files = text_files(resolve(data.path))
        description["files"] = sorted((f.suffix.lower(), sha256_file(f)) for f in files)
        description["text_field"] = data.text_field

    def build(folder: Path) -> dict[str, Any]:
        activity.doing("reading documents")
        texts = pydocs.gather() if data.source == "pydocs" else read_corpus(resolve(data.path), data.text_field)
        activity.doing("leaving out duplicates")
        return _build(folder, split_documents(texts, data.validation_fraction), config)

    folder, record = cached(data.source, description, build)
    documents = np.load(folder / "validation_documents.npz")
    tokens = np.array(read_shard(folder / record["validation_shard"]))
    train = [folder / name for name in record["train_shards"]]
    return _open(folder, record, train, tokens, config, documents)


def encode_for_scoring(tokenizer: Tokenizer, documents: Sequence[str]) -> tuple[Array, Array, int, str]:
    """Return tokens (n + 1,) uint16, a BOS before each document; table bytes (n,) of the targets; original UTF-8 bytes;
    and, in words, what the tokenizer changed.

    Raises :class:`golfbook.errors.ByteAccountingError` where table and decoded bytes differ, :class:`DataError` where
    there is no text at all.
    """
    audit = audit_documents(tokenizer, documents, "scored")
    total = int(audit.original_bytes.sum())
    if total == 0 or audit.tokens.size < 2:
        raise DataError("the text to score is empty")
    changes = describe_changes(audit.changed_characters, audit.examples)
    return audit.tokens, tokenizer.token_bytes(audit.tokens), total, changes


def read_shards_for_scoring(tokenizer: Tokenizer, paths: Sequence[Path]) -> tuple[Array, int]:
    """Return the tokens (n + 1,) uint16 of some shards, joined, and the bytes of the n targets by the table.

    Raises :class:`DataError` where a shard is damaged or was made with another tokenizer, and
    :class:`golfbook.errors.ByteAccountingError` where table and decoded bytes differ.
    """
    for path in paths:
        _check_ids(path, tokenizer)
    tokens = np.concatenate([read_shard(path) for path in paths])
    if tokens.size < 2:
        raise DataError("the shards to score hold one token, and the first one is not scored")
    _check_stream(tokens, tokenizer, ", ".join(map(str, paths)))
    return tokens, int(tokenizer.token_bytes(tokens).sum(dtype=np.int64))


def unigram_bits_per_byte(tokens: Array, total_bytes: int) -> float:
    """Return the entropy of the targets ``tokens[1:]``, in bits per byte: what frequencies alone are worth."""
    counts = np.bincount(tokens[1:]).astype(np.float64)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum() * counts.sum() / (math.log(2) * total_bytes))


def _open(
    folder: Path,
    record: dict[str, Any],
    train_shards: list[Path],
    tokens: Array,
    config: Config,
    documents: Mapping[str, Array] | None = None,
) -> Dataset:
    """Cut the validation split to whole documents, count its bytes, and check that both splits are of use.

    ``documents`` holds what is known of each validation document, where the original text is.
    """
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    starts = np.flatnonzero(tokens == tokenizer.bos_id)
    kept, size = _keep_documents(starts, tokens.size, config.data.max_validation_tokens)
    tokens = tokens[:size]
    token_bytes = tokenizer.token_bytes(tokens)
    table = int(token_bytes.sum(dtype=np.int64))
    info = dict(record["info"])
    val_bytes = table
    if documents is not None:
        val_bytes = int(documents["original_bytes"][:kept].sum())
        changed = documents["changed_characters"][:kept]
        info |= {
            "decoded_bytes": int(documents["decoded_bytes"][:kept].sum()),
            "changed_documents": int((changed > 0).sum()),
            "changed_characters": int(changed.sum()),
            "validation_changes": describe_changes(changed, documents["examples"][:kept].tolist()),
        }
    if val_bytes == 0 or tokens.size < 2:
        raise DataError("the validation split holds no text; give more documents or a larger data.validation_fraction")
    train_tokens = sum(int(read_shard(path).size) for path in train_shards)
    least = LEAST_SEQUENCES * (config.train.sequence_length + 1)
    if train_tokens < least:
        raise DataError(
            f"the training split has {train_tokens} tokens, fewer than {LEAST_SEQUENCES} sequences of "
            f"train.sequence_length {config.train.sequence_length}: give more text, or set train.sequence_length lower"
        )
    fingerprint = sha256_bytes(f"{record['fingerprint']}:{tokens.size}".encode())
    info |= {
        "fingerprint": fingerprint,
        "tokenizer_sha256": tokenizer.sha256,
        "validation_documents": kept,
        "train_tokens": train_tokens,
        "validation_tokens": int(tokens.size - 1),
        "validation_bytes": val_bytes,
        "bytes_per_token": val_bytes / (tokens.size - 1),
        "unigram_bpb": unigram_bits_per_byte(tokens, val_bytes),
    }
    return Dataset(
        folder, train_shards, tokenizer, fingerprint, tokens, token_bytes, val_bytes, info, train_tokens=train_tokens
    )


def _keep_documents(starts: Array, size: int, most: int) -> tuple[int, int]:
    """Count the whole documents within ``most`` tokens (0: all; always at least one), and their tokens."""
    ends = np.append(starts[1:], size)
    kept = len(starts) if most == 0 else max(1, int((ends <= most).sum()))
    return kept, int(ends[kept - 1])


def _build(folder: Path, split: Split, config: Config) -> dict[str, Any]:
    """Write tokenizer, shards and byte counts of split documents into ``folder``; return the record about them."""
    path = folder / "tokenizer.model"
    if config.data.tokenizer:
        name = resolve(config.data.tokenizer)  # for messages: ``folder`` is gone by the time they are read
        copy(name, path)
    else:
        activity.doing("training the tokenizer")
        name = Path("the tokenizer trained on this text")
        train_tokenizer(split.train, config.model.vocab_size, path)
    tokenizer = Tokenizer(path.read_bytes(), name)
    _check_vocabulary(tokenizer, config)
    activity.doing("encoding the text")
    train = audit_documents(tokenizer, split.train, "training")
    validation = audit_documents(tokenizer, split.validation, "validation")
    source = config.data.source
    shards = []
    for number, start in enumerate(range(0, train.tokens.size, SHARD_TOKENS)):
        shards.append(f"{source}_train_{number:06d}.bin")
        write_shard(folder / shards[-1], train.tokens[start : start + SHARD_TOKENS])
    write_shard(folder / f"{source}_val_000000.bin", validation.tokens)
    with atomic_path(folder / "validation_documents.npz") as temporary, temporary.open("wb") as stream:
        np.savez(
            stream,
            original_bytes=validation.original_bytes,
            decoded_bytes=validation.decoded_bytes,
            changed_characters=validation.changed_characters,
            examples=np.array(validation.examples),
        )
    return {
        "fingerprint": _fingerprint(split, tokenizer),
        "train_shards": shards,
        "validation_shard": f"{source}_val_000000.bin",
        "info": {
            "source": source,
            "bytes_source": "documents",
            "documents": len(split.train) + len(split.validation),
            "train_documents": len(split.train),
            "duplicates_dropped": split.duplicates,
            "near_duplicates_dropped": split.near_duplicates,
            "train_bytes": int(train.original_bytes.sum()),
            "train_decoded_bytes": int(train.decoded_bytes.sum()),
            "train_changes": describe_changes(train.changed_characters, train.examples),
            "validation_changes": describe_changes(validation.changed_characters, validation.examples),
        },
    }


def _fingerprint(split: Split, tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256(tokenizer.sha256.encode())
    for name, documents in (("train", split.train), ("validation", split.validation)):
        digest.update(f"{name} {len(documents)}\n".encode())
        for text in documents:
            utf8 = text.encode()
            digest.update(b"%d\n" % len(utf8) + utf8)
    return digest.hexdigest()


def _prepare_shards(config: Config) -> Dataset:
    """Open shards that were made elsewhere: the user's, or the challenge's published ones."""
    data = config.data
    extra: dict[str, Any] = {}
    if data.source == "fineweb":
        activity.doing("downloading FineWeb")
        local = download_fineweb(cache_root() / "fineweb", data.fineweb_train_shards)
        train, validation, model = local.train, local.validation, local.tokenizer
        extra = {"repository": REPOSITORY, "revision": local.revision}
    else:
        folder = resolve(data.path)
        train, validation = find_shards(folder, "train"), find_shards(folder, "val")
        model = resolve(data.tokenizer)
    tokenizer = Tokenizer.load(model)
    _check_vocabulary(tokenizer, config)
    for path in (*train, *validation):
        read_shard(path)  # magic, version and size, every time: it costs nothing
    description = {
        "format": FORMAT,
        "source": data.source,
        "tokenizer": tokenizer.sha256,
        "train": [_identity(p) for p in train],
        "validation": [_identity(p) for p in validation],
    }

    def build(target: Path) -> dict[str, Any]:
        activity.doing("checking the shards")
        copy(model, target / "tokenizer.model")
        digest = hashlib.sha256(tokenizer.sha256.encode())
        checked = 0
        for path in (*train, *validation):
            _check_ids(path, tokenizer)
            digest.update(sha256_file(path).encode())
        for path in train:
            checked += _check_stream(np.array(read_shard(path)), tokenizer, str(path), CHECKED_TRAIN_DOCUMENTS)
        _check_stream(
            np.concatenate([read_shard(p) for p in validation]), tokenizer, f"validation ({validation[0].parent})"
        )
        info = {"source": data.source, "bytes_source": "table", "train_documents_checked": checked, **extra}
        info["validation_changes"] = "unknown: these shards hold tokens, and not the text that they were made of"
        return {"fingerprint": digest.hexdigest(), "info": info}

    folder, record = cached(data.source, description, build)
    tokens = np.concatenate([np.array(read_shard(p)) for p in validation])
    dataset = _open(folder, record, train, tokens, config)
    dataset.info["documents"] = None  # not counted: the training shards would have to be read through
    return dataset


def _identity(path: Path) -> list[Any]:
    status = path.stat()
    return [str(path), status.st_size, status.st_mtime_ns]


def _check_vocabulary(tokenizer: Tokenizer, config: Config) -> None:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size} pieces, but model.vocab_size is "
            f"{config.model.vocab_size}: set model.vocab_size to {tokenizer.vocab_size}"
        )


def _check_ids(path: Path, tokenizer: Tokenizer) -> None:
    tokens = read_shard(path)
    for start in range(0, tokens.size, 1 << 24):
        wrong = np.flatnonzero(tokens[start : start + (1 << 24)] >= tokenizer.vocab_size)
        if wrong.size:
            place = start + int(wrong[0])
            raise DataError(
                f"{path}: token {place} has id {int(tokens[place])}, but tokenizer {tokenizer.path} has "
                f"{tokenizer.vocab_size} pieces: data.tokenizer must be the .model these shards were made with"
            )


def _check_stream(tokens: Array, tokenizer: Tokenizer, name: str, most: int | None = None) -> int:
    """Check the bytes of the documents of a token stream, its cut first one apart; return how many were checked."""
    starts = np.flatnonzero(tokens == tokenizer.bos_id)
    if not starts.size:
        raise DataError(
            f"{name}: no BOS token (id {tokenizer.bos_id}), so documents and their bytes cannot be told apart: "
            "data.tokenizer must be the .model these shards were made with"
        )
    last = tokens.size  # the last document may be cut inside a character: leave out the bytes it ends with
    while last > starts[-1] + 1 and tokenizer.is_byte(tokens[last - 1]):
        last -= 1
    bounds = np.append(starts, last)[: None if most is None else most + 1]
    for start in range(0, len(bounds) - 1, BATCH):
        edges = bounds[start : start + BATCH + 1]
        documents = [tokens[a:b] for a, b in itertools.pairwise(edges)]
        if any(SPACE in text for text in check_documents(tokenizer, documents, name, start)):
            raise ByteAccountingError(
                f"{name}: {tokenizer.path} has no piece for a space and spells each one as three bytes, so that bits "
                "per byte would come out too low; use another tokenizer, or the original text with data.source: text"
            )
    return len(bounds) - 1
