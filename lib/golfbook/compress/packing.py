"""The one script that trains, exports and scores: ``train_gpt.py`` with the needed library code inside.

The code is what :mod:`golfbook.train.script` imports, minified and compressed. The script is text in Latin-1, so that
256 values of a byte are 256 letters, and no base64 is paid for; it loads its modules from memory and writes no file.
"""

from __future__ import annotations

import ast
import bz2
import contextlib
import functools
import re
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from golfbook.compress.minify import minify
from golfbook.config.tables import CODERS, QUANTIZERS
from golfbook.errors import GolfbookError
from golfbook.files import atomic_write_bytes, cache_root, canonical_json, sha256_bytes
from golfbook.provenance import code_sha256

PACKAGE = Path(__file__).parents[1]
ENTRY, FUNCTION = "train.script", "run_script"
# The first line is the mark of a script of ours. A "\r" in the data would be read as a line end, so it is escaped.
LOADER = """\
# coding: latin-1 -- golfbook, packed: bz2.decompress() of the long text gives names and sources, \\0 between them
import sys
if sys.version_info<{needed}:sys.exit('train_gpt.py needs Python {python} or newer')
import bz2,importlib.abc,importlib.util as u
S=bz2.decompress('''{data}'''.encode('latin-1')).decode().split('\\0')
S=dict(zip(S[::2],S[1::2]))
class L(importlib.abc.ExecutionLoader):
 def find_spec(s,n,*_):return u.spec_from_loader(n,s)if n in S or s.is_package(n)else None
 def is_package(s,n):return any(k.startswith(n+'.')for k in S)
 def get_source(s,n):return S.get(n,'')
 def get_filename(s,n):return __file__+'/'+n.replace('.','/')+'.py'
sys.meta_path.insert(0,L())
if __name__=='__main__':
 from {entry} import {function} as f
 sys.exit(f(__file__))
"""
MARK = LOADER.partition("\n")[0].encode()


@functools.cache
def script() -> bytes:
    """Return the bytes of ``train_gpt.py``; the same code gives the same bytes under one minor version of Python.

    Packing takes seconds, so the result is kept in the cache under the hash of the code.
    """
    key = [code_sha256(), metadata.version("python-minifier"), version()]
    path = cache_root() / "scripts" / f"{sha256_bytes(canonical_json(key).encode())[:16]}.py"
    if path.is_file():
        return path.read_bytes()
    made = pack(small_modules())
    with contextlib.suppress(GolfbookError):  # a read-only cache: packed again by the next process
        atomic_write_bytes(path, made)
    return made


def version() -> str:
    """Return the oldest Python that runs a script packed here: this one, whose syntax the minifier may use."""
    return "{}.{}".format(*sys.version_info)


def pack(modules: Mapping[str, str]) -> bytes:
    """Return a script that holds ``modules``, text by dotted name."""
    data = bz2.compress(_joined(modules))
    text = LOADER.format(
        data=_quoted(data),
        python=version(),
        needed=sys.version_info[:2],
        entry=f"{PACKAGE.name}.{ENTRY}",
        function=FUNCTION,
    )
    return text.encode("latin-1")


def small_modules() -> dict[str, str]:
    """Return the minified text of the modules in the script by their full names."""
    sources = {
        f"{PACKAGE.name}.{name}".removesuffix(".__init__"): path.read_text(encoding="utf-8")
        for name, path in code_modules().items()
    }
    return minify(sources, f"{PACKAGE.name}.{ENTRY}.{FUNCTION}")


def costs(modules: Mapping[str, str]) -> dict[str, int]:
    """Return what each module adds to the compressed code: bytes that would be saved without it."""
    total = len(bz2.compress(_joined(modules)))
    rest = {name: {other: text for other, text in modules.items() if other != name} for name in modules}
    return {name: total - len(bz2.compress(_joined(others))) for name, others in rest.items()}


def is_ours(data: bytes) -> bool:
    """Return whether a file is a script that :func:`pack` has made, of whatever version."""
    return data.startswith(MARK)


def unpack(data: bytes) -> dict[str, str]:
    """Return the modules in a script, text by dotted name: what :func:`pack` was given."""
    [text] = (
        node.value
        for node in ast.walk(ast.parse(data))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("BZh")
    )
    parts = bz2.decompress(text.encode("latin-1")).decode().split("\0")
    return dict(zip(parts[::2], parts[1::2], strict=True))


def requirements() -> list[str]:
    """Return the third-party packages that the script imports, with the versions that the library asks for, sorted."""
    imported: set[str] = set()
    for text in unpack(script()).values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    owners = metadata.packages_distributions()
    names = {owner.lower() for name in imported for owner in owners.get(name, [])}
    return sorted(
        (line for line in metadata.requires(PACKAGE.name) or [] if line.partition(">")[0].lower() in names),
        key=str.lower,
    )


def code_modules() -> dict[str, Path]:
    """Return all modules that the script may need, those that settings name included, by dotted name."""
    by_name = [place.rpartition(".")[0] for table in (QUANTIZERS, CODERS) for place in table.values()]
    return import_closure([ENTRY, *by_name], PACKAGE)


def import_closure(roots: Iterable[str], package: Path) -> dict[str, Path]:
    """Return the modules of the folder ``package`` that ``roots`` import, directly or not, themselves included.

    Found in the sources, wherever an import stands, without importing anything. Keys are dotted names below the
    package (``"train.loop"``; a package's own ``__init__`` counts with every module in it), sorted.
    """
    found: dict[str, Path] = {}
    waiting = ["__init__", *roots]
    while waiting:
        name = waiting.pop()
        path = package / f"{name.replace('.', '/')}.py"
        if name in found or not path.is_file():
            continue
        found[name] = path
        if "." in name:
            waiting.append(f"{name.rpartition('.')[0]}.__init__")
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            below = [name.removeprefix(f"{package.name}.") for name in names if name.startswith(f"{package.name}.")]
            waiting += [*below, *(f"{name}.__init__" for name in below)]
    return dict(sorted(found.items()))


def _quoted(data: bytes) -> str:
    """Return bytes as the inside of a text between triple quotes, as few of them escaped as Python allows."""
    text = data.decode("latin-1").replace("\\", "\\\\").replace("\r", "\\r")
    text = re.sub(r"\0(?=[0-7])", r"\\000", text).replace("\0", r"\0")  # a digit would be read as part of \0
    return re.sub("'(?='|$)", r"\\'", text)


def _joined(modules: Mapping[str, str]) -> bytes:
    return "\0".join(part for item in modules.items() for part in item).encode()
