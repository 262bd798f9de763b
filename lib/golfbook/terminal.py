"""How the command line writes: whole names, foreign text as it is, and only characters that can be shown.

On a terminal a table has lines around it, as long as it fits; in a pipe, and where names would have to be cut, it is
aligned plain text, one row a line. Nothing is read as markup: square brackets in a path stay.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

SUBSTITUTES = {"±": "+-", "–": "-", "—": "-", "−": "-", "…": "...", "×": "x", "‘": "'", "’": "'", "“": '"', "”": '"'}
Cell = str | Text


def prepare_streams() -> None:
    """Let standard output and error write something for every character, whatever encoding they have.

    What the encoding cannot express is written as its ASCII substitute, else as its escape sequence.
    """
    codecs.register_error("golfbook", _substitute)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="golfbook")


def make_console(stderr: bool = False) -> Console:
    """Return a console that prints text as it is: no markup, no names of pictures, no colours by guessing."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def say(console: Console, text: Cell, style: str = "") -> None:
    """Print a line. Where it is too long for a terminal it is wrapped between words; no word is cut by a line's end."""
    shown = _shown(console, text, style)
    whole = any(cell_len(word) > console.width for word in shown.plain.split())
    console.print(shown, soft_wrap=whole or not console.is_terminal)


def show_table(
    console: Console,
    heads: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    title: str = "",
    right: Collection[str] = (),
    wrap: Collection[str] = (),
) -> None:
    """Print a table under its title; ``right`` names columns of numbers, ``wrap`` those that may take several lines.

    A column without any content is left out.
    """
    cells = [[_shown(console, cell) for cell in row] for row in rows]
    kept = [i for i in range(len(heads)) if not rows or any(row[i].plain for row in cells)]
    columns = [[_shown(console, heads[i], "bold"), *(row[i] for row in cells)] for i in kept]
    widths = [max(cell.cell_len for cell in column) for column in columns]
    if title:
        say(console, title, "italic")
    if console.is_terminal:
        table = Table()
        for i, column, width in zip(kept, columns, widths, strict=True):
            fixed = heads[i] not in wrap
            table.add_column(
                column[0],
                justify="right" if heads[i] in right else "left",
                no_wrap=fixed,
                min_width=width if fixed else None,
            )
        for row in cells:
            table.add_row(*(row[i] for i in kept))
        if console.measure(table, options=console.options.update(max_width=10**6)).minimum <= console.width:
            console.print(table)
            return
    for line in zip(*columns, strict=True):
        parts = []
        for i, cell, width in zip(kept, line, widths, strict=True):
            cell.align("right" if heads[i] in right else "left", width)
            parts.append(cell)
        joined = Text("  ").join(parts)
        joined.rstrip()
        console.print(joined, soft_wrap=True)


def show_pairs(console: Console, values: Mapping[str, str]) -> None:
    """Print names and values, one pair a line."""
    width = max(len(name) for name in values)
    for name, value in values.items():
        say(console, Text.assemble((f"{name:>{width}}", "dim"), "  ", value))


def write_json(value: Any) -> None:
    """Write one JSON document to standard output; a number that is not finite becomes null."""
    sys.stdout.write(json.dumps(_plain(value), indent=2) + "\n")


def duration(seconds: float) -> str:
    """Return ``8 s``, ``2 min 5 s``, ``3 h 20 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """Return ``1.3 GB``, decimal as in the challenge."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def show_path(path: Path) -> str:
    """Return a path as short as it can be written from the working folder."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _shown(console: Console, text: Cell, style: str = "") -> Text:
    """Copy ``text`` in one line, in characters that the console can show, so that widths are counted in them."""
    made = text.copy() if isinstance(text, Text) else Text(text, style)
    plain = "".join(c if _expressible(c, console.encoding) else _ascii(c) for c in " ".join(made.plain.splitlines()))
    if plain != made.plain:
        made = Text(plain, made.style)
    return made


def _expressible(character: str, encoding: str) -> bool:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _ascii(text: str) -> str:
    return "".join(SUBSTITUTES.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text)


def _substitute(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return _ascii(error.object[error.start : error.end]), error.end


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
