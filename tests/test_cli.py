"""The command line: help, messages, exit statuses, presets, and the score of an artifact."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from rich.console import Console

from fixture_project import Project, wait_for
from golfbook import __version__, cli, reports, terminal
from golfbook.config.load import load_config
from golfbook.errors import RunError
from golfbook.run import Run, create_run, skipped_runs
from golfbook.study import results
from golfbook.study.progress import Progress

DATA = Path(__file__).parent / "data"
COMMANDS = ("run", "status", "collect", "presets", "score", "export", "lab")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("GOLFBOOK_ROOT", str(tmp_path))
    monkeypatch.setenv("GOLFBOOK_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Call the command line in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["golfbook", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_each_command_does_with_an_example(
    command: str, project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, command, "--help") == 0
    text = capsys.readouterr().out
    assert f"Usage: golfbook {command}" in text and re.search(rf"Examples?: golfbook {command}", text)


def test_bare_call_lists_the_commands(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch)
    text = capsys.readouterr().out
    assert all(re.search(rf"│ {command} ", text) for command in COMMANDS)
    assert "golfbook run papermill_jobs/quickstart.yaml" in text
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.strip() == __version__


def test_dry_run_shows_the_plan_and_writes_nothing(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "run", "papermill_jobs/job.yaml", "--dry-run", "--workers", "1") == 0
    text = capsys.readouterr().out
    assert "model.xsa=0" in text and "6 of 6 stages, 1 runs at a time" in text and "of memory" in text
    assert not project.runs.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "none.yaml"), "cannot read none.yaml"),
        (("collect", "none"), "there is no study 'none'"),
        (("status", "none"), "there is no study 'none'"),
        (("presets", "quikstart"), "did you mean 'quickstart'?"),
        (("score", "none.golf", "--text", "none.txt"), "none.golf"),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_mistakes_end_with_status_2_and_no_traceback(
    arguments: tuple[str, ...],
    message: str,
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, *arguments) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.startswith("golfbook: ") and "Traceback" not in output.err
    assert output.out == ""


def test_a_mistake_in_an_option_ends_with_status_2(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "run", "papermill_jobs/job.yaml", "--workers", "0") == 2
    assert "--workers" in capsys.readouterr().err


def test_debug_shows_the_traceback(project: Project) -> None:
    for arguments in (("--debug", "run", "none.yaml"), ("run", "none.yaml", "--debug")):
        done = project.call(*arguments)
        assert (
            done.returncode == 1 and "Traceback" in done.stderr and "ConfigError: cannot read none.yaml" in done.stderr
        )
    assert "Traceback" not in project.call("run", "none.yaml").stderr


def test_status_without_and_with_studies(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "status") == 0
    assert "No studies yet" in capsys.readouterr().out
    run = create_run("mine", "base", load_config("quickstart", seed=4))
    run.write_failure("training", "the disk is full\nmore")
    assert call(monkeypatch, "status") == 0
    text = capsys.readouterr().out
    assert run.path.name in text and "failed" in text
    assert f"{run.path.name}, training: the disk is full" in text and "more" not in text


def test_collect_prints_the_table_and_the_files(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (1, 2, 3):
        run = create_run("mine", "base", load_config("quickstart", seed=seed))
        run.checkpoint_path.write_text("x")
        values = {"val_bpb": 2.0 + seed / 10, "train_seconds": 60.0}
        run.write_result("training", values, reads={}, writes=run.checkpoint_path)
    assert call(monkeypatch, "collect", "mine") == 0
    text = capsys.readouterr().out
    assert "2.2000 ± 0.1000" in text and "BPB after training" in text and "runs/mine/results.parquet" in text
    assert not (project.root / "runs/reference").exists()
    create_run("mine", "base", load_config("quickstart", seed=4))
    assert call(monkeypatch, "collect", "mine", "--reference") == 0
    text = capsys.readouterr().out
    assert "runs/reference/mine/results.csv" in text and "runs/reference/mine/curves.csv" in text
    assert "4 runs, 3 of them finished and in the reference tables" in text


@pytest.mark.parametrize("study", ["..", ".", "published", "published/quickstart", "../elsewhere", "empty"])
def test_collect_writes_only_where_runs_are(
    study: str, project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    create_run("mine", "base", load_config("quickstart", seed=1))
    for folder in ("runs/published/quickstart/base-s1-0123456789", "runs/empty", "elsewhere/base-s1-0123456789"):
        (project.root / folder).mkdir(parents=True)
    (project.root / "elsewhere/base-s1-0123456789/config.json").write_text("{}")
    (project.root / "runs/published/quickstart/base-s1-0123456789/config.json").write_text("{}")
    before = sorted(project.root.rglob("*"))
    assert call(monkeypatch, "collect", study) == 2
    output = capsys.readouterr()
    assert f"there is no study '{study}'" in output.err and "(studies: mine)" in output.err and output.out == ""
    assert sorted(project.root.rglob("*")) == before


def test_runs_of_an_older_version_are_counted(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = create_run("mine", "base", load_config("quickstart", seed=1)).path / "config.json"
    old.write_text(json.dumps({**json.loads(old.read_text()), "a_setting_of_the_past": 1}))
    note = f"Passed over: {old.parent.name}: its config.json is missing, damaged or of an older version."
    for arguments in (("status",), ("status", "mine")):
        assert call(monkeypatch, *arguments) == 0
        assert capsys.readouterr().out.count(note) == 1
    assert call(monkeypatch, "collect", "mine") == 2, "there is no row to write"
    assert f"has no run to collect ({old.parent.name} was passed over: its config.json" in capsys.readouterr().err
    assert not list(project.runs.rglob("*.parquet"))
    create_run("mine", "base", load_config("quickstart", seed=2))
    assert call(monkeypatch, "collect", "mine") == 0
    assert note in capsys.readouterr().out


def test_brackets_and_an_output_in_ascii_end_no_command(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.runs = project.root / "x[/old]y[red]"
    for name, value in (("GOLFBOOK_RUNS", str(project.runs)), ("PYTHONIOENCODING", "ascii")):
        monkeypatch.setenv(name, value)
    done = project.call("status")
    assert done.returncode == 0 and f"No studies yet under {project.runs}." in done.stdout, done.stderr
    run = create_run("mine", "base", load_config("quickstart", seed=4))
    run.write_failure("training", "[/no] é ± …")
    done = project.call("collect", "mine")
    assert done.returncode == 0 and "BPB mean +- std" in done.stdout and done.stderr == ""
    assert f"{project.runs.name}/mine/results.parquet" in done.stdout
    done = project.call("run", "papermill_jobs/job[/1].yaml")
    assert done.returncode == 2 and "cannot read papermill_jobs/job[/1].yaml" in done.stderr
    done = project.call("status", "mine")
    assert done.returncode == 0 and "training: [/no] \\xe9 +- ..." in done.stdout


def copied(run: Run, name: str) -> Path:
    """Copy a run folder within its study; returns the copy."""
    return shutil.copytree(run.path, run.path.with_name(name))


def test_copied_folders_are_named_and_counted_once(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create_run("mine", "base", load_config("quickstart", seed=1))
    run.checkpoint_path.write_text("x")
    run.write_result("training", {"val_bpb": 2.5}, reads={}, writes=run.checkpoint_path)
    other = load_config("quickstart", seed=2)
    names = [
        f"base-s2-{run.config.hash}",  # looks like another seed
        f"base-s2-{other.hash}",  # has even the name of another run
        f"{run.path.name}-old",
        f"copy_of_{run.path.name}",  # looks like another variant
        "kept",
    ]
    for name in names:
        copied(run, name)
    (run.path.parent / "link-s1-0123456789").symlink_to(run.path)
    for command in (("status", "mine"), ("collect", "mine"), ("status",)):
        assert call(monkeypatch, *command) == 0
        text = capsys.readouterr().out
        for name in [*names, "link-s1-0123456789"]:
            assert text.count(f"Passed over: {name}: a copy of {run.path.name}.") == 1, (command, text)
    assert list(results.collect("mine")["run"]) == [run.path.name]
    with pytest.raises(RunError, match="is that of another run"):
        create_run("mine", "base", other)
    shutil.rmtree(run.path)  # without the original, only a folder of the right name is a run
    for name in names[:3]:
        shutil.rmtree(run.path.parent / name)
    reasons = {folder.name: reason for folder, reason in skipped_runs("mine").items()}
    assert f"a copy of copy_of_{run.path.name}" == reasons["kept"]
    assert [row["variant"] for row in results.rows("mine")] == [f"copy_of_{run.variant}"], "renamed by hand"


def test_json_of_status_and_plan(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, value in ((1, 2.0), (2, 2.5)):
        run = create_run("mine", "base", load_config("quickstart", seed=seed))
        run.checkpoint_path.write_text("x")
        numbers = {"val_bpb": value, "train_seconds": 60.0}
        run.write_result("training", numbers, reads={}, writes=run.checkpoint_path)
    run.write_failure("quantization", "the disk is full")
    copied(run, "copy")
    assert call(monkeypatch, "status", "mine", "--json", "--seconds") == 0
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert output.err == "" and found["study"] == "mine" and len(found["runs"]) == 2
    assert found["runs"][1]["states"] == {"training": "done", "quantization": "failed", "test_time_training": "missing"}
    assert found["runs"][1]["messages"] == {"quantization": "the disk is full"}
    [variant] = found["variants"]
    assert (variant["n"], variant["val_bpb_mean"], variant["artifact_bytes"]) == (2, 2.25, None)
    assert found["passed_over"][0]["reason"] == f"a copy of {run.path.name}"
    assert found["seconds"] == [{"stage": "training", "part": "training", "runs": 2, "seconds": 120.0}]
    assert call(monkeypatch, "status", "--json") == 0
    assert [study["study"] for study in json.loads(capsys.readouterr().out)["studies"]] == ["mine"]

    assert call(monkeypatch, "run", "papermill_jobs/job.yaml", "--dry-run", "--json", "--workers", "1") == 0
    output = capsys.readouterr()
    made = json.loads(output.out)
    assert output.err == "" and (made["study"], made["workers"]) == ("small", 1) and made["memory_bytes"] > 0
    assert made["runs"][1]["overrides"] == {"model.xsa": 0} and made["runs"][1]["to_do"] == made["stages"]
    assert call(monkeypatch, "run", "none.yaml", "--json") == 2
    assert capsys.readouterr().out == ""


def test_status_says_where_the_seconds_went(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = create_run("mine", "base", load_config("quickstart", seed=1))
    lines = [
        (0, "starting the kernel", "training"),
        (10, "encoding the text", None),
        (40, "training", None),
        (100, "", ""),
    ]
    with (run.path / "activity.jsonl").open("w") as stream:
        for at, doing, stage in lines:
            stream.write(json.dumps({"at": at, "doing": doing} | ({} if stage is None else {"stage": stage})) + "\n")
    results.update_record("mine", lambda record: {**record, "seconds": {"a.yaml": 125.0}})
    assert call(monkeypatch, "status", "mine", "--seconds") == 0
    text = capsys.readouterr().out
    assert re.search(r"training +encoding the text +1 +30\.0 +30%", text), text
    assert re.search(r"training +training +1 +60\.0 +60%", text)
    assert "The last call of a.yaml that had something to do took 2 min 5 s." in text


def test_presets(project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "presets") == 0
    text = capsys.readouterr().out
    assert "25,749,398" in text and "quickstart" in text  # the published count of PR 1166
    assert call(monkeypatch, "presets", "pr1166_e2e_ttt_flow") == 0
    _, _, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    counts = {name: int(count.replace(",", "")) for name, count, _ in rows}
    assert counts.pop("total") == sum(counts.values()) == 25_749_398
    assert call(monkeypatch, "presets", "--json") == 0
    found = {one["preset"]: one for one in json.loads(capsys.readouterr().out)["presets"]}
    assert found["pr1166_e2e_ttt_flow"]["parameters"] == 25_749_398 and found["quickstart"]["data"] == "pydocs"
    assert call(monkeypatch, "presets", "quickstart", "--cost", "--json") == 0
    [cost] = json.loads(capsys.readouterr().out)["presets"]
    assert cost["artifact_bytes"] > 1000 and all(value > 0 for value in cost["step_ms"].values())


def artifact(folder: Path) -> Path:
    """A tiny quantised model with random weights, and the challenge's tokenizer beside it."""
    import torch

    from golfbook.compress.container import write_artifact
    from golfbook.compress.export import quantize_model
    from golfbook.files import sha256_file
    from golfbook.model.gpt import GPT, initialise

    torch.set_num_threads(1)
    config = load_config("quickstart", overrides={"model.num_layers": 2, "model.model_dim": 32, "model.rope_dims": 4})
    model = initialise(GPT(config.model), 1)
    tokenizer = folder / "tokenizer.model"
    tokenizer.write_bytes((DATA / "fineweb_1024_bpe.model").read_bytes())
    quantized = quantize_model(model, config.quantize)
    write_artifact(folder / "artifact.golf", config.model, quantized, sha256_file(tokenizer), config.quantize, 64)
    return folder / "artifact.golf"


def scores(text: str) -> dict[str, str]:
    """Name and value of each printed line; names end where two spaces do."""
    lines = (re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in text.splitlines())
    return {parts[0]: parts[1] for parts in lines if len(parts) == 2}


def test_score_gives_the_bits_per_byte_of_any_text(
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    read_only: Callable[[Path], AbstractContextManager[None]],
) -> None:
    from golfbook.compress.container import read_artifact
    from golfbook.data.tokenizer import Tokenizer
    from golfbook.evaluate.scoring import bits_per_byte, score

    path = artifact(project.root)
    text = "Bits per byte divide by the bytes of the text — these too: é, 漢字." * 4
    (project.root / "mine.txt").write_text(text, encoding="utf-8")
    assert call(monkeypatch, "score", "artifact.golf", "--text", "mine.txt", "--stride", "16") == 0
    values = scores(capsys.readouterr().out)
    tokens = Tokenizer.load(project.root / "tokenizer.model").encode_document(text)
    nll = score(read_artifact(path).build(), tokens, window=64, stride=16)
    size = len(text.encode())
    assert values["bits per byte"] == f"{bits_per_byte(nll, size):.6f}"
    assert values["tokens"] == str(len(nll)) and values["bytes"] == f"{size} in 1 documents"
    assert values["window, stride"] == "64, 16" and "not counted in the size" in values["tokenizer"]
    assert values["normalisation"] == "nothing; each of 1 documents decodes to what it was"
    assert "seconds" in values and f"{path.stat().st_size:,} bytes" in values["artifact"]
    uniform = 10 * len(nll) / size  # a model that knows nothing spends 10 bits on one of 1,024 pieces
    assert float(values["bits per byte"]) == pytest.approx(uniform, rel=0.05)

    assert call(monkeypatch, "score", "artifact.golf", "--text", "mine.txt", "--stride", "16", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert f"{found['val_bpb']:.6f}" == values["bits per byte"] and found["tokens"] == len(nll)
    assert (found["bytes"], found["documents"], found["artifact_bytes"]) == (size, 1, path.stat().st_size)

    (project.root / "mine.jsonl").write_text(json.dumps({"body": text}) + "\n", encoding="utf-8")
    options = ("--text-field", "body", "--window", "32", "--stride", "32")
    with read_only(project.root):
        assert call(monkeypatch, "score", "artifact.golf", "--text", "mine.jsonl", *options) == 0
    other = scores(capsys.readouterr().out)
    assert other["window, stride"] == "32, 32" and other["bits per byte"] != values["bits per byte"]

    (project.root / "mine.txt").write_text("one line\nand a second", encoding="utf-8")
    assert call(monkeypatch, "score", "artifact.golf", "--text", "mine.txt", "--stride", "16") == 0
    assert (
        r"1 characters in 1 of 1 documents decode to something else, for example '\n' became ' '"
        in (scores(capsys.readouterr().out)["normalisation"])
    )


def test_score_refuses_what_would_give_a_wrong_number(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = artifact(project.root)
    (project.root / "mine.txt").write_text("some text")
    (project.root / "empty.txt").write_text("")
    (project.root / "other.model").write_bytes((DATA / "fineweb_1024_bpe.model").read_bytes() + b"\x00")
    flipped = bytearray(path.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (project.root / "flipped.golf").write_bytes(flipped)
    for arguments, message in (
        (("artifact.golf", "--text", "mine.txt", "--tokenizer", "other.model"), "is not the tokenizer of"),
        (("artifact.golf", "--text", "mine.txt", "--stride", "65"), "--stride 65 is more than the window of 64"),
        (("artifact.golf", "--text", "mime.txt"), "mime.txt"),
        (("artifact.golf", "--text", "empty.txt"), "empty"),
        (("flipped.golf", "--text", "mine.txt"), "flipped.golf"),
    ):
        assert call(monkeypatch, "score", *arguments) == 2, arguments
        output = capsys.readouterr()
        assert message in output.err and "Traceback" not in output.err and output.out == ""


def test_lab_listens_on_this_machine_only_and_wants_a_token(project: Project) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = project.root / "lab.log"
    with log.open("wb") as stream:
        server = subprocess.Popen(
            project.command("lab", "--no-browser", "--port", str(port)), env=project.environment(), stdout=stream,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(lambda: re.search(r"http://127\.0\.0\.1:\d+/lab\?token=", log.read_text()), "JupyterLab is up")
        found = re.search(r"http://127\.0\.0\.1:(\d+)/lab\?token=([0-9a-f]{16,})", log.read_text())
        assert found
        url = f"http://127.0.0.1:{found[1]}/api/contents"
        wait_for(lambda: not socket.socket().connect_ex(("127.0.0.1", int(found[1]))), "the server answers")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(url, timeout=10)
        with urllib.request.urlopen(f"{url}?token={found[2]}", timeout=10) as answer:
            names = {entry["name"] for entry in json.load(answer)["content"]}
        assert "03_training.ipynb" in names
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(20)


def test_lab_without_a_notebooks_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLFBOOK_ROOT", str(tmp_path))
    assert call(monkeypatch, "lab") == 2


def test_progress_bar_on_a_terminal() -> None:
    console = Console(force_terminal=True, width=100, record=True)
    with reports.follow(console) as follow:
        follow(Progress(0.25, 130.0, 61.0, ("xsa-s1 training 75/300",)))
    console = Console(force_terminal=False, width=100, record=True)
    with reports.follow(console) as follow:
        for fraction in (0.1, 0.2, 0.3):
            follow(Progress(fraction, 130.0, 61.0, ("xsa-s1 training 75/300",)))
        for share in (10, 20):
            follow(Progress(0.3, 130.0, 61.0, (f"xsa-s1 quantization: scoring {share}%",)))
    lines = console.export_text().splitlines()
    assert [line.split("  ")[-1] for line in lines] == ["xsa-s1 training 75/300", "xsa-s1 quantization: scoring 10%"]
    assert "1 min 1 s, about 2 min 10 s left" in lines[0]


def test_units() -> None:
    texts = [terminal.duration(seconds) for seconds in (0, 59.4, 59.6, 125, 7320)]
    assert texts == ["0 s", "59 s", "1 min 0 s", "2 min 5 s", "2 h 2 min"]
    assert [terminal.size(n) for n in (12, 1500, 2_340_000, 5e12)] == ["12 B", "1.5 kB", "2.3 MB", "5000.0 GB"]
