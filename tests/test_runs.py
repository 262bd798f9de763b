"""The run folder: parameters as a command line gives them, and reading without write access."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from golfbook.config.load import check_parameters, load_config
from golfbook.errors import ConfigError, RunError
from golfbook.run import create_run, list_runs, notebook_run, open_run, skipped_runs
from golfbook.study import estimates, results

GIVEN: dict[str, Any] = {"preset": "quickstart", "seed": 1, "overrides": {}, "study": "s", "variant": "v"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("study", 2024, "parameter 'study' must be text, got 2024: .*-r study 2024"),
        ("variant", 1.0, "parameter 'variant' must be text, got 1.0"),
        ("run_dir", 5, "parameter 'run_dir' must be text"),
        ("scale", True, "parameter 'scale' must be text, got True"),
        ("scale", "tinny", "unknown scale 'tinny'; did you mean 'tiny'"),
        ("preset", 1166, "unknown preset '1166'.*pr1166_11l_base"),
        ("overrides", "{'train.steps': 4}", r"'overrides' must be a mapping .*-y \"overrides: \{train.steps: 4\}\""),
        ("overrides", ["train.steps", 4], "'overrides' must be a mapping"),
        ("seed", "x", "seed: expected a number, got the text 'x'"),
        ("seed", True, "seed: input should be a valid integer, got True"),
        ("seed", 1.5, "seed: input should be a valid integer.*got 1.5"),
        ("seed", -1, "seed: input should be greater than or equal to 0, got -1"),
        ("seed", 2**63, re.escape("seed: must be at most 2**63 - 1")),
    ],
)
def test_parameters_as_papermill_guesses_them(golfbook_home: Path, name: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        notebook_run(**(GIVEN | {name: value}))
    assert not (golfbook_home / "runs").exists()


def test_other_parameters_of_notebooks() -> None:
    check_parameters(vocabularies=[384], sample_tokens=1, reference="", overrides=None)
    for name, value in (("vocabularies", 384), ("vocabularies", []), ("vocabularies", ["384"]), ("sample_tokens", 0)):
        with pytest.raises(ConfigError, match=f"the parameter '{name}' must be .*: write for papermill -"):
            check_parameters(**{name: value})


@pytest.mark.parametrize("key", ["seed", "train.steps", "train.micro_batches", "data.max_validation_tokens"])
def test_no_setting_is_larger_than_a_table_can_hold(key: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{key}: must be at most 2**63 - 1")):
        load_config(overrides={key: 10**30})


def test_the_largest_seed_works_everywhere() -> None:
    import pandas as pd
    import torch

    seed = load_config(seed=2**63 - 1).seed
    torch.Generator().manual_seed(seed)
    assert pd.DataFrame({"seed": [seed]}).to_parquet()


def test_reading_needs_no_write_access(
    golfbook_home: Path, read_only: Callable[[Path], AbstractContextManager[None]]
) -> None:
    run = create_run("s", "v", load_config())
    with pytest.raises(Exception, match="Permission denied"), read_only(golfbook_home):
        (run.path / "new").touch()
    with read_only(golfbook_home):
        again = notebook_run(**GIVEN)
        assert again == open_run(run.path) == run
        assert not again.is_locked("job") and again.state("training") == "missing"
        assert [row["run"] for row in results.rows("s")] == [run.path.name]
        assert estimates.read_history().training == ()
    assert not again.is_locked("job")
    assert sorted(path.name for path in run.path.iterdir()) == ["config.json", "env.json"]  # looking leaves no lock
    with again.lock("job"):
        assert again.is_locked("job")


def test_a_run_may_be_logged_otherwise_and_keeps_its_folder(golfbook_home: Path) -> None:
    first = create_run("s", "v", load_config("quickstart"))
    again = create_run("s", "v", load_config("quickstart", overrides={"machine.log_every": 3}))
    assert again.path == first.path and open_run(first.path).config.machine.log_every == 3
    assert create_run("s", "v", load_config("quickstart", seed=2)).path != first.path


def test_folders_of_an_older_version_are_named_and_not_misread(golfbook_home: Path) -> None:
    """A configuration as written before training had sections."""
    run = create_run("s", "v", load_config("quickstart"))
    tree = json.loads((run.path / "config.json").read_text())
    optimizer, machine = tree["train"].pop("optimizer"), tree.pop("machine")
    tree["train"] |= {**optimizer, **machine}
    (run.path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(RunError, match=r"another version of golfbook.*'train.matrix_lr'.*delete the folder, or use"):
        open_run(run.path)
    assert list_runs("s") == [] and "of an older version" in skipped_runs("s")[run.path]
