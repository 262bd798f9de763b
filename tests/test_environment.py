"""environment.yml and constraints.txt cannot drift from pyproject.toml; a result names what it was computed with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import other_pythons

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"] + EXTRAS["notebook"] + EXTRAS["test"]]
NAMES = {canonicalize_name(requirement.name) for requirement in REQUIREMENTS}


def conda_packages() -> dict[str, str]:
    """Name and version of each conda package."""
    found = {}
    for entry in ENVIRONMENT["dependencies"]:
        if isinstance(entry, str):
            name, _, version = entry.partition("=")
            found[canonicalize_name(name)] = version
    return found


def test_conda_gives_python_and_pip_only() -> None:
    assert ENVIRONMENT["name"] == PROJECT["name"]
    assert ENVIRONMENT["channels"] == ["conda-forge", "nodefaults"]
    assert set(conda_packages()) == {"python", "pip"}
    assert not set(conda_packages()) & NAMES


def test_python_is_pinned_to_a_minor_that_the_project_takes() -> None:
    pin = conda_packages()["python"]
    assert re.fullmatch(r"3\.\d+", pin)
    assert Version(f"{pin}.99") in SpecifierSet(PROJECT["requires-python"])


def test_every_python_of_the_classifiers_is_admitted() -> None:
    versions = other_pythons.admitted()
    after_last = int(versions[-1].partition(".")[2]) + 1
    assert PROJECT["requires-python"] == f">={versions[0]},<3.{after_last}"
    assert conda_packages()["python"] in versions


def test_a_name_on_path_that_starts_no_python_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    switch, real = tmp_path / "bin" / "python3.99", tmp_path / "versions" / "3.99.1" / "bin" / "python3.99"
    for path, text in ((switch, "exit 127"), (real, f'exec "{sys.executable}" "$@"')):
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{switch.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "nowhere"))
    assert other_pythons.find("3.99") is None
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert other_pythons.find("3.99") == Path(sys.executable)


def test_no_other_python_is_said_loudly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(other_pythons, "find", lambda version: None)
    assert other_pythons.main([]) == 0 and "NO OTHER PYTHON WAS TESTED" in capsys.readouterr().out
    assert other_pythons.main(["--versions", "3.99"]) == 1


def test_pip_installs_the_project_last_and_nothing_else() -> None:
    assert ENVIRONMENT["dependencies"][-1] == {"pip": ["-e .[all]"]}


def test_the_extra_all_is_all_extras() -> None:
    [line] = EXTRAS["all"]
    assert Requirement(line).extras == set(EXTRAS) - {"all"}


def constraints() -> dict[str, Version]:
    """Pinned version of each package in constraints.txt."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        line = line.partition("#")[0].strip()
        if line and not line.startswith("-"):
            pin = re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;]+)(\s*;.*)?", line)
            assert pin, f"constraints.txt: '{line}' is not an exact pin"
            found[canonicalize_name(pin[1])] = Version(pin[2])
    return found


def test_torch_is_pinned_to_the_version_of_the_reference_values() -> None:
    assert constraints()["torch"].base_version == "2.13.0"


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.name)
def test_constraints_pin_each_package_within_its_range(requirement: Requirement) -> None:
    assert constraints()[canonicalize_name(requirement.name)] in requirement.specifier


def recorded(folder: Path, **environment: str) -> dict[str, str | None]:
    """What a result would say about torch, told by a process that must not import it."""
    code = """
import json, sys
from golfbook.provenance import provenance
print(json.dumps(provenance()))
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder,
        env={**os.environ, **environment},
    )  # fmt: skip
    found = json.loads(done.stdout)
    return {name: found[name] for name in ("torch", "cuda")}


def test_a_result_names_torch_as_torch_does(tmp_path: Path) -> None:
    import torch

    assert recorded(tmp_path) == {"torch": torch.__version__, "cuda": torch.version.cuda}


def test_a_result_names_the_build_and_not_the_package(tmp_path: Path) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('not to be imported')\n")
    (package / "version.py").write_text("__version__ = '9.9.9+cu999'\ncuda: Optional[str] = '99.9'\nhip = None\n")
    assert recorded(tmp_path, PYTHONPATH=str(tmp_path)) == {"torch": "9.9.9+cu999", "cuda": "99.9"}
