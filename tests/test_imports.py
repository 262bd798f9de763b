"""The library is flat, its modules are short, imports flow one way, and importing does no work."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import golfbook

PACKAGE = Path(golfbook.__file__).parent
# A module imports only from modules before it. A new module takes its place here.
ORDER = [
    "errors",
    "machine",
    "activity",
    "terminal",
    "files",
    "settings",
    "config",
    "runs",
    "shards",
    "tokenizer",
    "documents",
    "pydocs",
    "hub",
    "corpus",
    "kernels",
    "attention",
    "layers",
    "losses",
    "scan",
    "refiners",
    "model",
    "published",
    "scoring",
    "schedules",
    "averaging",
    "checkpoints",
    "muon",
    "quantization",
    "qat",
    "loaders",
    "costs",
    "devices",
    "diagnostics",
    "steps",
    "choices",
    "launcher",
    "training",
    "artifact",
    "stages",
    "estimates",
    "plan",
    "results",
    "writes",
    "interpreter",
    "execution",
    "interrupts",
    "jobs",
    "statistics",
    "figures",
    "text_figures",
    "size_figures",
    "architecture_figures",
    "training_figures",
    "panels",
    "architecture_panels",
    "training_panels",
    "summaries",
    "reports",
    "cli",
]
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
LONGEST = 450
HEAVY = ("torch", "numpy", "pandas", "scipy", "matplotlib", "papermill", "IPython", "sentencepiece", "pyarrow")


def imported(module: str) -> set[str]:
    """Modules of the package that a module imports anywhere in its text, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} uses a relative import"
            if node.module == "golfbook":
                found |= {alias.name for alias in node.names}
            elif node.module and node.module.startswith("golfbook."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("golfbook.")}
    return found & set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_flow_one_way(module: str) -> None:
    assert module in ORDER, f"give {module} a place in ORDER"
    late = {name for name in imported(module) if ORDER.index(name) >= ORDER.index(module)}
    assert not late, f"{module} imports {', '.join(sorted(late))}, which come after it"


def test_the_check_sees_imports() -> None:
    assert {"errors", "files", "config"} <= imported("runs")
    assert "artifact" in imported("cli")  # inside a function


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short_and_say_what_they_are(module: str) -> None:
    text = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST
    assert ast.get_docstring(ast.parse(text))


def test_package_is_flat() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert folders <= {"presets", "__pycache__"}


def test_command_line_and_planning_import_nothing_heavy() -> None:
    code = "import sys, golfbook.cli, golfbook.jobs; print(*(set(sys.modules) & set(sys.argv[1:])))"
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
