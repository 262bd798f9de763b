"""What the command line writes: whole names, foreign text as it is, plain tables in pipes, any encoding."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from fixture_project import Project
from golfbook import reports, terminal
from golfbook.config.load import load_config
from golfbook.run import create_run

LONG = "a_variant_with_a_name_that_is_longer_than_half_of_a_terminal"
ROWS = [[LONG, "1,000", ""], ["x[/old]y", "20", ""]]


def shown(rows: list[list[str]], *, width: int, is_terminal: bool, encoding: str = "utf-8", **options: object) -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=stream, width=width, force_terminal=is_terminal, color_system=None)  # its markup is on
    terminal.show_table(console, ["name", "n ± 1", "remark"], rows, right=["n ± 1"], **options)  # type: ignore[arg-type]
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def test_a_pipe_gets_plain_text_with_whole_names_one_row_a_line() -> None:
    text = shown(ROWS, width=20, is_terminal=False, title="all [of] them")
    assert text.splitlines() == [
        "all [of] them",
        f"{'name':{len(LONG)}}  n ± 1",
        f"{LONG}  1,000",
        f"{'x[/old]y':{len(LONG)}}     20",
    ]
    assert "a remark" in shown([*ROWS, ["z", "3", "a remark\nof two lines"]], width=20, is_terminal=False)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_terminal_never_cuts_a_name(width: int) -> None:
    text = shown(ROWS, width=width, is_terminal=True)
    assert LONG in text and "x[/old]y" in text and "…" not in text and "remark" not in text
    assert ("│" in text) == (width > len(LONG) + 10), "lines around the table where there is room for them"
    words = [["x", "1", " ".join(["some", "words"] * 20)]]
    assert "│" in shown(words, width=80, is_terminal=True, wrap=["remark"]), "text may take several lines"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_tables_in_characters_that_the_encoding_has(encoding: str, is_terminal: bool) -> None:
    rows = [["ä — 漢", "2 ± –", ""]]
    lines = shown(rows, width=80, is_terminal=is_terminal, encoding=encoding).splitlines()
    [row] = [line for line in lines if "\\u6f22" in line]
    assert "2 " in row and ("+-" in row) == (encoding == "ascii" or "±" not in row)
    assert ("ä" in row) == (encoding != "ascii")
    if is_terminal:
        assert len({len(line) for line in lines}) == 1, "columns stay straight"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_commands_end_well_whatever_the_output_can_show(encoding: str, project: Project) -> None:
    """Names of files that are not UTF-8, too: they hold characters that no encoding has."""
    run = create_run("mine", "base", load_config("quickstart", seed=4))
    run.checkpoint_path.write_text("x")
    run.write_result("training", {"val_bpb": 2.5}, reads={}, writes=run.checkpoint_path)
    run.write_failure("quantization", "the folder '\udce9 — [/b] 漢' is full")
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        terminal.prepare_streams()
        console = terminal.make_console()
        reports.show_status(console, "mine")
        reports.show_study(console, "mine")
        print("by any other means: 漢 ±")
        streams[0].flush()
    text = streams[0].buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "'\\udce9 " in text and "[/b]" in text and "base" in text and "2.5000" in text
    assert ("漢" in text) == (encoding == "utf-8") and ("±" in text) == (encoding != "ascii")


def test_json_is_one_document_without_numbers_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.write_json({"a": float("nan"), "b": [1.5, Path("x[y]"), (True, None)], "c": {"é": float("inf")}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, "x[y]", [True, None]], "c": {"é": None}}


def test_long_lines_are_wrapped_between_words_only() -> None:
    for text, whole in (("some words " * 12, False), (f"words and {LONG * 2} more", True)):
        stream = io.StringIO()
        terminal.say(Console(file=stream, width=80, force_terminal=True, color_system=None), text.strip())
        lines = stream.getvalue().splitlines()
        assert (len(lines) == 1) == whole and " ".join(line.strip() for line in lines) == text.strip()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("GOLFBOOK_ROOT", str(tmp_path))
    monkeypatch.setenv("GOLFBOOK_RUNS", str(tmp_path / "runs"))
    return Project(tmp_path)
