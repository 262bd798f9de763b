"""Which files a process writes, noted by Python itself: those of another writer are never taken for its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any


def note_writes(folder: str, record: str) -> None:
    """Append to the file ``record`` the path of each file below ``folder`` that this process writes from now on.

    A file counts that is opened for writing or renamed to that place; the library that does so does not matter.
    """
    inside, notes = os.path.realpath(folder) + os.sep, Path(record)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            path = arguments[0]
        elif event == "os.rename":
            path = arguments[1]
        else:
            return
        if isinstance(path, str | bytes | os.PathLike):
            real = os.path.realpath(os.fsdecode(path))
            if real.startswith(inside):
                with notes.open("ab") as stream:
                    stream.write(os.fsencode(real) + b"\0")

    sys.addaudithook(hook)


def noted(record: Path) -> list[Path]:
    """Read the files of a record that are there, in the order they were first written."""
    try:
        names = record.read_bytes().split(b"\0")
    except FileNotFoundError:
        return []
    paths = [Path(os.fsdecode(name)) for name in dict.fromkeys(names) if name]
    return [path for path in paths if path.is_file()]
