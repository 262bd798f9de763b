"""Files that are either there and whole, or not there: atomic writes, hashes, locks, and where things live.

Every file the workbook writes for later reading goes through :func:`atomic_path`: a temporary file beside the target,
flushed to the disk and renamed, so that a killed process or a full disk leaves the old file as it was.
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from golfbook.errors import DataError, RunError

ENCODINGS = (  # signatures of texts that are no UTF-8; those of UTF-32 begin like those of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def project_root() -> Path:
    """Return the folder that holds ``notebooks/``, ``runs/`` and ``figures/``.

    ``GOLFBOOK_ROOT`` wins; else the first folder with both ``notebooks`` and ``papermill_jobs`` at or above the working
    folder; else the checkout this package was installed from in editable mode; else the working folder.
    """
    given = _from_environment("GOLFBOOK_ROOT")
    if given:
        return given
    here = Path.cwd().resolve()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[2]):
        if (folder / "notebooks").is_dir() and (folder / "papermill_jobs").is_dir():
            return folder
    return here


def runs_root() -> Path:
    """Return the folder of all run folders: ``GOLFBOOK_RUNS`` or ``<project>/runs``."""
    return _from_environment("GOLFBOOK_RUNS") or (project_root() / "runs").resolve()


def cache_root() -> Path:
    """Return the folder of datasets and tokenizers, safe to delete: ``GOLFBOOK_CACHE`` or ``<project>/.cache``."""
    return _from_environment("GOLFBOOK_CACHE") or (project_root() / ".cache").resolve()


def figures_root() -> Path:
    """Return the folder of generated pictures: ``GOLFBOOK_FIGURES`` or ``<project>/figures``."""
    return _from_environment("GOLFBOOK_FIGURES") or (project_root() / "figures").resolve()


def folders() -> dict[str, str]:
    """Return the four folders as environment variables, absolute, for a subprocess with another working folder."""
    return {
        "GOLFBOOK_ROOT": str(project_root()),
        "GOLFBOOK_RUNS": str(runs_root()),
        "GOLFBOOK_CACHE": str(cache_root()),
        "GOLFBOOK_FIGURES": str(figures_root()),
    }


def log_tail(path: Path, lines: int = 5) -> str:
    """Read the last ``lines`` lines of a log file, indented, for messages; empty where there is none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "".join(f"\n    {line}" for line in text.strip().splitlines()[-lines:])


def _from_environment(variable: str) -> Path | None:
    """Return the absolute path that an environment variable holds; None where it is unset or empty.

    ``~`` is the home folder also where no shell has replaced it: in a Dockerfile, a .env file, a systemd unit.
    """
    value = os.environ.get(variable)
    return _expanded(value, variable).resolve() if value else None


def _expanded(path: str | Path, what: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise RunError(f"{what} {path}: there is no home folder of that name; write the path out") from None


def remove_partial(target: Path) -> None:
    """Delete what killed processes left of earlier writes of ``target``; call it only while nobody else writes it."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        left.unlink(missing_ok=True)


def resolve(path: str | Path) -> Path:
    """Make a path from a config absolute: relative ones are taken from the project root, not the working folder."""
    path = _expanded(path, "path")
    return path if path.is_absolute() else project_root() / path


@contextlib.contextmanager
def atomic_path(target: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; on success flush it to disk and rename it over ``target``.

    Raises :class:`RunError` naming the file when it cannot be written (read-only folder, full disk); the previous
    ``target`` is then untouched and the temporary file is removed.
    """
    target = Path(target)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
        with contextlib.suppress(OSError):  # not every file system lets a folder be flushed
            descriptor = os.open(target.parent, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    except OSError as error:
        raise RunError(
            f"cannot write {target}: {error.strerror or error}; check free space and permissions of {target.parent}"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def atomic_write_bytes(target: str | Path, data: bytes) -> None:
    """Write ``data`` to ``target`` atomically; raises :class:`RunError` when the disk refuses."""
    with atomic_path(target) as path:
        path.write_bytes(data)


def atomic_write_json(target: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``target`` atomically."""
    atomic_write_bytes(target, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def decode_text(data: bytes, path: str | Path) -> str:
    """Decode the UTF-8 file ``path``. A byte-order mark before its text is the signature of its encoding, and no text.

    Raises :class:`DataError` naming the file and its encoding, or the line that is no UTF-8.
    """
    for signature, encoding in ENCODINGS:
        if data.startswith(signature):
            raise DataError(f"{path} is {encoding}; save it as UTF-8 (iconv -f {encoding} -t UTF-8 does that)")
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: byte {error.start} is no UTF-8; convert the file to UTF-8") from None


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping; empty where it is missing, unreadable or holds something else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def canonical_json(value: Any) -> str:
    """Return compact JSON with sorted keys: the text that hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def sha256_bytes(data: bytes) -> str:
    """Return the hexadecimal SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read in pieces."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
