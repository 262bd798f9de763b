"""The challenge's published FineWeb shards and tokenizer, from the Hugging Face hub.

Names, sizes and checksums come from the hub's own listing at one commit; the bytes come over plain HTTP into ``.part``
files, so that a download that was cut, or a process that was killed, goes on where it stopped. A file gets its name
only after its SHA-256 has been compared.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from golfbook.errors import DataError
from golfbook.files import atomic_write_json, read_json

REPOSITORY = "willdepueoai/parameter-golf"
SHARD_FOLDER = "datasets/datasets/fineweb10B_sp1024"
TOKENIZER_FOLDER = "datasets/tokenizers"
TOKENIZER_NAME = "fineweb_1024_bpe.model"
ATTEMPTS = 6  # tries in a row that bring no new byte
TIMEOUT = 60.0  # seconds without an answer
PAUSE = 1.0  # seconds, doubled with each try in vain
CHUNK = 1 << 20
OFFLINE_HINT = "check the connection, or use data.source: shards with files you have, or data.source: pydocs"


@dataclass(frozen=True)
class RemoteFile:
    """One file as the hub lists it. Large files have a SHA-256, small ones a git blob id."""

    path: str
    size: int
    sha256: str | None
    blob_id: str

    @property
    def name(self) -> str:
        """Return the last part of the path."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class FineWeb:
    """Files on this disk, whole and verified."""

    train: list[Path]
    validation: list[Path]
    tokenizer: Path
    revision: str  # commit of the hub's repository


def download_fineweb(folder: str | Path, train_shards: int) -> FineWeb:
    """Make sure the tokenizer, all validation shards and the first ``train_shards`` training shards lie in ``folder``.

    Once they do, it needs no connection and writes nothing, so that a read-only folder is of use. ``HF_ENDPOINT``
    is the hub's address (default: the public hub).
    Raises :class:`DataError` without a connection, for a wrong checksum, and when fewer shards are published.
    """
    folder = Path(folder)
    found = _complete(folder, train_shards)  # its note is written last, so this needs no lock
    if found is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            return _complete(folder, train_shards) or _download(folder, train_shards)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}; check space and permissions") from None


def list_files() -> tuple[str, list[RemoteFile]]:
    """Ask for the repository's commit, shards and tokenizer files. Raises :class:`DataError` without a connection."""
    from huggingface_hub import HfApi  # slow to import, and only this source needs it
    from huggingface_hub.hf_api import RepoFile

    try:
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=False)
        revision = str(api.dataset_info(REPOSITORY, timeout=TIMEOUT).sha)
        found = []
        for part in (SHARD_FOLDER, TOKENIZER_FOLDER):
            for entry in api.list_repo_tree(REPOSITORY, part, revision=revision, repo_type="dataset"):
                if isinstance(entry, RepoFile):
                    sha256 = entry.lfs.sha256 if entry.lfs else None
                    found.append(RemoteFile(entry.path, entry.size, sha256, entry.blob_id))
    except Exception as error:  # the library's HTTP layer, and so its exceptions, differ between versions
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"no connection to the hub, or no dataset {REPOSITORY} there ({reason}); {OFFLINE_HINT}"
        ) from None
    return revision, found


def fetch(url: str, target: Path, file: RemoteFile, progress: Any) -> None:
    """Download ``file`` from ``url`` to ``target``, going on with an earlier ``.part`` file, and verify it.

    ``progress`` has tqdm's ``update``. Raises :class:`DataError` when the server stops answering or sends wrong bytes.
    """
    # the checksum in the name: parts of another version of the file are never continued
    part = target.with_name(f"{target.name}.{(file.sha256 or file.blob_id)[:12]}.part")
    for last in (False, True):
        resumed = _transfer(url, part, file, progress)
        if _matches(part, file):
            part.replace(target)
            return
        part.unlink()
        if last or not resumed:  # a part left by an earlier process may be damaged: one new start
            break
    raise DataError(
        f"{file.path}: the downloaded bytes do not have the checksum the hub lists ({file.sha256 or file.blob_id}); "
        "the damaged file was removed: try again, and without a proxy that changes files"
    )


def _complete(folder: Path, train_shards: int) -> FineWeb | None:
    """Return the files, if all that are needed were downloaded before, with the sizes noted then."""
    try:
        note = read_json(folder / "source.json")
        names = _needed(note["listed"], train_shards)
        if any((folder / name).stat().st_size != note["files"][name]["bytes"] for name in names):
            return None
        return _result(folder, names, str(note["revision"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _download(folder: Path, train_shards: int) -> FineWeb:
    from huggingface_hub import hf_hub_url
    from tqdm.auto import tqdm

    revision, listed = list_files()
    files = {file.name: file for file in listed}
    names = _needed(list(files), train_shards)
    note: dict[str, Any] = {"repository": REPOSITORY, "revision": revision, "listed": sorted(files), "files": {}}
    with tqdm(
        total=sum(files[n].size for n in names),
        unit="B",
        unit_scale=True,
        unit_divisor=1000,
        desc="FineWeb",
        mininterval=0.2 if sys.stderr.isatty() else 15,
    ) as bar:
        for name in names:
            file, target = files[name], folder / name
            bar.set_postfix_str(name, refresh=False)
            if target.is_file() and _matches(target, file):
                bar.update(file.size)
            else:
                hub = os.environ.get("HF_ENDPOINT")
                url = hf_hub_url(REPOSITORY, file.path, repo_type="dataset", revision=revision, endpoint=hub)
                fetch(url, target, file, bar)
            note["files"][name] = {"bytes": file.size, "sha256": file.sha256, "blob_id": file.blob_id}
    atomic_write_json(folder / "source.json", note)
    return _result(folder, names, revision)


def _needed(names: list[str], train_shards: int) -> list[str]:
    """Choose tokenizer, all validation shards, first training ones; raises :class:`DataError` where one is missing."""
    train = sorted(n for n in names if n.startswith("fineweb_train_") and n.endswith(".bin"))
    validation = sorted(n for n in names if n.startswith("fineweb_val_") and n.endswith(".bin"))
    if TOKENIZER_NAME not in names or not validation:
        raise DataError(
            f"the hub's {REPOSITORY} lists no {TOKENIZER_NAME} or no validation shard; its layout has changed"
        )
    if train_shards > len(train):
        raise DataError(
            f"data.fineweb_train_shards is {train_shards}, but {REPOSITORY} holds {len(train)} training shards"
        )
    return [TOKENIZER_NAME, *validation, *train[:train_shards]]


def _result(folder: Path, names: list[str], revision: str) -> FineWeb:
    paths = [folder / n for n in names]
    return FineWeb(
        train=[p for p in paths if p.name.startswith("fineweb_train_")],
        validation=[p for p in paths if p.name.startswith("fineweb_val_")],
        tokenizer=folder / TOKENIZER_NAME,
        revision=revision,
    )


def _transfer(url: str, part: Path, file: RemoteFile, progress: Any) -> bool:
    """Append the missing bytes to ``part``; True when it went on with bytes from before."""
    had = part.stat().st_size if part.exists() else 0
    if had > file.size:
        part.unlink()
        had = 0
    progress.update(had)
    done, fruitless, reason = had, 0, "the connection was cut"
    while done < file.size:
        request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
        before = done
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                if done and answer.status != 206:  # the server ignores ranges: from the start
                    done = 0
                with part.open("r+b" if done else "wb") as stream:
                    stream.seek(done)
                    while done < file.size and (chunk := answer.read(min(CHUNK, file.size - done))):
                        stream.write(chunk)
                        done += len(chunk)
                        progress.update(len(chunk))
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise DataError(f"the hub refuses {url}: HTTP {error.code} {error.reason}") from None
            reason = f"HTTP {error.code}"
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reason = str(getattr(error, "reason", error))
        fruitless = 0 if done > before else fruitless + 1
        time.sleep(PAUSE * min(2**fruitless - 1, 30))
        if fruitless >= ATTEMPTS:
            raise DataError(
                f"no connection to the hub: {file.path} stopped at {done} of {file.size} bytes ({reason}); "
                f"what has arrived is kept, so try again later; {OFFLINE_HINT}"
            )
    if file.size == 0:
        part.touch()
    return had > 0


def _matches(path: Path, file: RemoteFile) -> bool:
    """Return whether a file has the size and the checksum of the listing."""
    if path.stat().st_size != file.size:
        return False
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == (file.sha256 or file.blob_id)
