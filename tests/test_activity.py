"""Notes of what a run is doing: shown while it works, added up afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from golfbook import activity


class Clock:
    now = 1000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    made = Clock()
    monkeypatch.setattr(activity, "time", made)
    yield made
    activity.record_in(None)


def test_what_is_done_now(tmp_path: Path, clock: Clock) -> None:
    assert activity.now(tmp_path, 0.0) == ""
    activity.record_in(tmp_path)
    with activity.step("scoring") as progress:
        for done in range(1, 1001):
            progress(done, 2000)
        assert activity.now(tmp_path, 1000.0) == "scoring 50%"
        activity.doing("drawing")
    assert activity.now(tmp_path, 1000.0) == activity.NOTEBOOK, "what was done before"
    assert activity.now(tmp_path, 1000.1) == "", "of an earlier process"
    assert len((tmp_path / activity.FILE).read_text().splitlines()) <= 10, "a line a tenth"


def test_seconds_of_each_step_of_each_notebook(tmp_path: Path, clock: Clock) -> None:
    def wait(seconds: float) -> None:
        clock.now += seconds

    @activity.step("reading")
    def read() -> None:
        wait(5)
        activity.doing("encoding")
        wait(6)

    with activity.notebook(tmp_path, "training"):
        wait(2)
        activity.record_in(tmp_path)
        wait(1)
        read()
        wait(3)
    wait(1000)  # between two notebooks
    with activity.notebook(tmp_path, "quantization"):
        wait(7)
        clock.now -= 3600  # somebody sets the clock
        activity.record_in(tmp_path)
        read()
    expected = {activity.STARTING: 2, activity.NOTEBOOK: 4, "reading": 5, "encoding": 6}
    found = activity.spent(tmp_path)
    assert found["training"] == expected
    assert found["quantization"] == {activity.STARTING: 0, activity.NOTEBOOK: 0, "reading": 5, "encoding": 6}


def test_a_killed_notebook_takes_no_time_after_its_last_word(tmp_path: Path, clock: Clock) -> None:
    killed = activity.notebook(tmp_path, "training")
    killed.__enter__()
    clock.now += 2
    activity.record_in(tmp_path, "training")
    clock.now += 50_000
    with (tmp_path / activity.FILE).open("a") as stream:
        stream.write('{"at": 1, "doi\n' + json.dumps(["no", "note"]) + "\n")
    with activity.notebook(tmp_path, "training"):
        clock.now += 3
    assert activity.spent(tmp_path) == {"training": {activity.STARTING: 5.0}}


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path, clock: Clock) -> None:
    activity.record_in(tmp_path / "none")
    with activity.notebook(tmp_path / "none", "training"), activity.step("reading"):
        pass
    assert activity.spent(tmp_path / "none") == {}
