"""The run folder: parameters as a command line gives them, and reading without write access."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from golfbook.config.load import check_parameters, load_config
from golfbook.errors import ConfigError
from golfbook.run import create_run, notebook_run, open_run
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
