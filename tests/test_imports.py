"""The library is a house of rooms one level deep: modules are short, imports go down, importing does no work."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import golfbook

PACKAGE = Path(golfbook.__file__).parent
# A room imports only from rooms above it in this list and from itself.
ROOMS = [
    *(
        "errors",
        "files",
        "activity",
        "machine",
        "config",
        "provenance",
        "run",
        "compute",
        "data",
        "model",
        "published",
        "evaluate",
    ),
    *("compress", "train", "plain", "study", "analysis", "plots", "panels", "exercises", "terminal", "reports", "cli"),
]
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
)
LONGEST = 420
HEAVY = ("torch", "numpy", "pandas", "scipy", "matplotlib", "papermill", "IPython", "sentencepiece", "pyarrow")


def imported(module: str) -> set[str]:
    """Modules of the package that a module imports anywhere in its text, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} uses a relative import"
            if node.module and node.module.split(".")[0] == "golfbook":
                name = node.module.removeprefix("golfbook").removeprefix(".")
                found |= {name, *(f"{name}.{alias.name}".removeprefix(".") for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("golfbook.") for alias in node.names if "golfbook." in alias.name}
    return found & set(MODULES)


def room(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    assert room(module) in ROOMS, f"give {room(module)} a place in ROOMS"
    up = {name for name in imported(module) if ROOMS.index(room(name)) > ROOMS.index(room(module))}
    assert not up, f"{module} imports {', '.join(sorted(up))}, which stand above it"


def test_the_plain_code_shares_nothing_with_what_it_is_the_reference_for() -> None:
    """A mistake in the fast code can then not hide in the code that it is compared with."""
    modules = [module for module in MODULES if room(module) == "plain"]
    found = {room(name) for module in modules for name in imported(module)}
    assert len(modules) >= 5 and found - {"plain"} <= {"config", "errors", "files"}


def test_no_modules_import_each_other() -> None:
    waiting = {module: imported(module) - {module} for module in MODULES}
    while free := [module for module, needs in waiting.items() if not needs & set(waiting)]:
        for module in free:
            del waiting[module]
    assert not waiting, f"imported in a circle: {', '.join(sorted(waiting))}"


def test_the_check_sees_imports() -> None:
    assert {"errors", "files", "config.schema"} <= imported("run")
    assert {"compress.submission", "study.results"} <= imported("cli")  # inside functions


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short_and_say_what_they_are(module: str) -> None:
    path = PACKAGE / f"{module.replace('.', '/')}.py"
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    assert ast.get_docstring(ast.parse(text))
    assert len(path.relative_to(PACKAGE).parts) <= 2, "packages are one level deep"


def test_a_package_hands_nothing_on() -> None:
    """Every name has one place: a package's own file only says what the package is for."""
    for path in PACKAGE.glob("*/__init__.py"):
        assert len(ast.parse(path.read_text(encoding="utf-8")).body) == 1, path


def test_command_line_and_planning_import_nothing_heavy() -> None:
    code = "import sys, golfbook.cli, golfbook.study.pool; print(*(set(sys.modules) & set(sys.argv[1:])))"
    done = subprocess.run([sys.executable, "-c", code, *HEAVY], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_importing_everything_does_no_work(tmp_path: Path) -> None:
    """No output, no file, no thread, no child process, no seed, no thread setting."""
    code = f"""
import importlib, threading, torch, psutil
threads, state, workers = threading.active_count(), torch.get_rng_state(), torch.get_num_threads()
for module in {MODULES!r}:
    importlib.import_module("golfbook." + module)
assert threading.active_count() == threads
assert torch.equal(torch.get_rng_state(), state)
assert torch.get_num_threads() == workers
assert not psutil.Process().children()
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "MPLCONFIGDIR": str(tmp_path.parent)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
