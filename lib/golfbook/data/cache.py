"""Folders that are made once and kept: prepared datasets, with the hashes of their files."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock

from golfbook import activity
from golfbook.errors import DataError, RunError
from golfbook.files import atomic_path, atomic_write_json, cache_root, canonical_json, sha256_bytes, sha256_file

log = logging.getLogger(__name__)


def cached(
    name: str, description: dict[str, Any], build: Callable[[Path], dict[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """Return folder and record of the dataset that ``description`` names; ``build`` fills a new one, locked."""
    root = cache_root() / "datasets"
    key = sha256_bytes(canonical_json(description).encode())[:16]
    folder = root / f"{name}-{key}"
    record = _read_record(folder)  # whole or absent, so this needs no lock, and a read-only cache is of use
    if record is not None:
        return folder, record
    try:
        root.mkdir(parents=True, exist_ok=True)
        activity.doing("waiting for another process that prepares the text")
        with FileLock(root / f".{folder.name}.lock"):
            record = _read_record(folder)
            if record is not None:
                return folder, record
            for left in root.glob(f".{folder.name}.building-*"):  # of a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.building-", dir=root))
            try:
                record = build(temporary) | {"description": description}
                record["info"]["versions"] = {
                    "sentencepiece": metadata.version("sentencepiece"),
                    **description.get("versions", {}),
                }
                record["files"] = _sums(temporary.iterdir())
                atomic_write_json(temporary / "dataset.json", record)
                temporary.chmod(0o755)
                if folder.exists():
                    shutil.rmtree(folder)
                temporary.replace(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, RunError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error  # of one file in a temporary folder
        raise DataError(
            f"cannot write the cache {root}: {getattr(cause, 'strerror', None) or cause}; check space and permissions, "
            "or set GOLFBOOK_CACHE to another folder"
        ) from error
    return folder, record


def _sums(paths: Iterable[Path]) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(paths)}


def _read_record(folder: Path) -> dict[str, Any] | None:
    """Read the record of a cached dataset whose files all have the noted hashes, else None."""
    try:
        record = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        if _sums(folder / name for name in record["files"]) == record["files"]:
            return dict(record)
        log.warning("cached dataset %s is damaged; it is built again", folder)
    except FileNotFoundError:
        if folder.exists():
            log.warning("cached dataset %s is incomplete; it is built again", folder)
    except (OSError, ValueError, KeyError, TypeError):
        log.warning("cached dataset %s is unreadable; it is built again", folder)
    return None


def copy(source: Path, target: Path) -> None:
    """Copy a file atomically."""
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
