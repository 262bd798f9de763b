"""Folders named by the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from golfbook import files
from golfbook.errors import RunError


@pytest.mark.parametrize("name", ["ROOT", "RUNS", "CACHE", "FIGURES"])
def test_a_tilde_in_an_environment_variable_is_the_home_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(f"GOLFBOOK_{name}", "~/golf")
    folder = {"ROOT": files.project_root}.get(name) or getattr(files, f"{name.lower()}_root")
    assert folder() == tmp_path / "golf"
    assert files.folders()[f"GOLFBOOK_{name}"] == str(tmp_path / "golf")
    monkeypatch.setenv(f"GOLFBOOK_{name}", "~nobody-of-this-name/golf")
    with pytest.raises(RunError, match=f"GOLFBOOK_{name} .*no home folder"):
        folder()
