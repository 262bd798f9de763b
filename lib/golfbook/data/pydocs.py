"""The built-in corpus: English prose from documentation that is installed with the project's own dependencies.

Docstrings of Python's standard library and of six packages, ``add_docstr`` texts of torch, and the language reference
in ``pydoc_data``. Files are parsed, never imported. Interpreter sessions and tables are cut out; what is left and reads
like prose is a document. Equal versions of Python and of the packages give equal documents.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from golfbook.errors import DataError

PACKAGES = ("torch", "numpy", "sympy", "networkx", "scipy", "matplotlib")
# Tests, vendored copies and generated code: slow to parse, and little prose or none of the package's own.
SKIPPED_FOLDERS = frozenset(
    (
        *("test", "tests", "testing", "idle_test", "idlelib", "lib2to3"),
        *("site-packages", "dist-packages", "_vendor", "_inductor", "__pycache__"),
    )
)
SHORTEST, LONGEST = 200, 20_000  # characters of a document
LEAST_PROSE = 0.85  # share of letters and spaces
LEAST_SHARE = 0.2  # of a file, in long strings: parsing the others takes half the time and yields an eighth of the text

_STRING = re.compile(r"(\"\"\"|''')(.*?)\1", re.DOTALL)
_TABLE = re.compile(r"^\s*([-=+|]{3,}|[-=+]+([ |+]+[-=+]+)+|\|.*\|)\s*$")
_UNDERLINE = re.compile(r"^\s*([-=~])\1*\s*$")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the documents' packages; raises :class:`DataError` where one is missing."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise DataError(
                f"the built-in corpus needs the package '{name}', which is not installed: pip install -e ."
            ) from None
    return found


def gather(folders: Iterable[Path] | None = None) -> list[str]:
    """Gather all documents, sorted, without exact duplicates. ``folders`` limits the search to folders or files."""
    found: set[str] = set()
    for path in _sources(default_folders() if folders is None else folders):
        found.update(documents_of(path))
    if not found:
        raise DataError("the built-in corpus is empty: the installed packages hold no docstrings (python -OO builds?)")
    return sorted(found)


def default_folders() -> list[Path]:
    """Find the folders of the standard library and of the packages without importing them."""
    folders = [Path(sysconfig.get_path("stdlib"))]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"the built-in corpus needs the package '{name}', which is not installed: pip install -e .")
        folders.append(Path(next(iter(spec.submodule_search_locations))))
    return folders


def documents_of(path: Path) -> list[str]:
    """Return the documents of one Python file; none where it cannot be read or parsed."""
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    topics = path.parent.name == "pydoc_data"
    if not topics:
        lengths = (match.end(2) - match.start(2) for match in _STRING.finditer(source))
        if sum(n for n in lengths if n >= SHORTEST) < max(LEAST_SHARE * len(source), 1):
            return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the strings of others
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    texts = (clean(text) for text in _strings(tree, topics))
    return [text for text in texts if is_prose(text)]


def clean(docstring: str) -> str:
    """Dedent a docstring, drop its paragraphs with interpreter sessions and its tables, and trim line ends."""
    text = inspect.cleandoc(docstring.replace("\r\n", "\n").replace("\r", "\n"))
    kept = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        lines = [line.rstrip() for line in paragraph.split("\n")]
        if ">>>" in paragraph or sum(bool(_TABLE.match(line)) for line in lines) >= 2:
            continue
        kept.append("\n".join(lines).strip("\n"))
    # a heading whose section went with its examples says nothing
    following = [*kept[1:], "\n="]
    whole = [p for p, after in zip(kept, following, strict=False) if not (_is_heading(p) and _begins_section(after))]
    return "\n\n".join(p for p in whole if p.strip()).strip()


def is_prose(text: str) -> bool:
    """Return whether a cleaned text is of reasonable length and mostly letters and spaces."""
    if not SHORTEST <= len(text) <= LONGEST:
        return False
    if any("\ud800" <= c <= "\udfff" for c in text):  # lone surrogates have no UTF-8
        return False
    plain = sum(c.isalpha() or c.isspace() for c in text)
    # runs of spaces are the mark of code, signatures and columns
    return plain >= LEAST_PROSE * len(text) and text.count("  ") <= 0.05 * len(text)


def _begins_section(paragraph: str) -> bool:
    lines = paragraph.split("\n", 2)
    return len(lines) > 1 and _UNDERLINE.match(lines[1]) is not None


def _is_heading(paragraph: str) -> bool:
    return _begins_section(paragraph) and paragraph.count("\n") == 1


def _sources(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        if folder.is_file():
            yield folder
            continue
        for path in sorted(folder.rglob("*.py")):
            if SKIPPED_FOLDERS.isdisjoint(path.relative_to(folder).parts[:-1]):
                yield path


def _strings(tree: ast.Module, topics: bool) -> Iterator[str]:
    if topics:
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                yield from (v.value for v in node.values if isinstance(v, ast.Constant) and isinstance(v.value, str))
        return
    # Docstrings stand in bodies; expressions are entered only for calls such as add_docstr(f, r"""...""").
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for name in ("body", "orelse", "finalbody", "handlers"):
            stack += getattr(node, name, [])
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield text
        for statement in body:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
                yield from _docstr_arguments(statement.value)


def _docstr_arguments(call: ast.Call) -> Iterator[str]:
    """List the texts given to ``add_docstr`` and ``add_docstr_all``, with or without a ``.format(...)`` behind them."""
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    if "add_docstr" not in str(name):
        return
    for argument in call.args:
        for node in ast.walk(argument):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= SHORTEST:
                yield node.value
