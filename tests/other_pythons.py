"""Runs some tests under another Python of this machine: ``make test-pythons``.

    python tests/other_pythons.py [--versions 3.12 3.13] [--tests model scoring ...]

Of the Pythons that the project admits (the classifiers of pyproject.toml) it takes the newest that is installed here,
other than the one that runs this; or those named. Each gets an environment of its own, ``.venv-3.X``, kept: with
torch it takes gigabytes. Ends with status 1 where tests fail or a Python that was named is missing, and with status 0,
loudly, where there is no other Python.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# One of each kind: what reads and parses, what starts kernels, what computes, what compiles and stores.
TESTS = (
    *("config", "environment", "imports", "documents", "shards", "tokenizer", "kernels"),
    *("attention", "model", "steps", "scoring", "quantization", "artifact"),
)


def admitted() -> list[str]:
    """Minor versions in the classifiers, oldest first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    versions = [line.rpartition(" ")[2] for line in project["classifiers"] if ":: Python :: 3." in line]
    return sorted(versions, key=lambda version: int(version.partition(".")[2]))


def find(version: str) -> Path | None:
    """Interpreter of a minor version: on PATH, or in a folder of pyenv; None where none of them starts."""
    name = f"python{version}"
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    for path in (shutil.which(name), *sorted(pyenv.glob(f"{version}.*/bin/{name}"))):
        if path is None:
            continue
        # a name on PATH may be a mere switch that finds no interpreter
        done = subprocess.run([path, "-c", "import venv, sys; print(sys.executable)"], capture_output=True, text=True)
        if done.returncode == 0:
            return Path(done.stdout.strip())
    return None


def run(version: str, python: Path, tests: Sequence[str]) -> bool:
    """Make the environment where it is not there, and run the tests in it; whether they passed."""
    folder = ROOT / f".venv-{version}"
    made = subprocess.run(["make", f"VENV={folder.name}", f"PYTHON={python}", f"{folder.name}/.ready"], cwd=ROOT)
    if made.returncode:
        return False
    files = [f"tests/test_{name}.py" for name in tests]
    command = [folder / "bin" / "python", "-m", "pytest", "-m", "not slow", *files]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def main(arguments: list[str]) -> int:
    """Find the Pythons and run the tests; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=[], metavar="3.X", help="default: the newest other one here")
    parser.add_argument("--tests", nargs="+", default=TESTS, metavar="NAME")
    options = parser.parse_args(arguments)
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    others = options.versions or [version for version in reversed(admitted()) if version != here]
    found = {version: path for version in others if (path := find(version))}
    missing = [version for version in others if version not in found]
    if not found or (options.versions and missing):
        print(f"{'!' * 100}\nNO OTHER PYTHON WAS TESTED: {', '.join(missing)} not on PATH nor in pyenv\n{'!' * 100}")
        return int(bool(options.versions))
    chosen = list(found) if options.versions else list(found)[:1]
    passed = {version: run(version, found[version], options.tests) for version in chosen}
    for version, good in passed.items():
        print(f"Python {version} ({found[version]}): {'all tests passed' if good else 'FAILED'}")
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
