"""The job runner on small notebooks: what it leaves behind, what it skips, and how it fails."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from rich.console import Console

from fixture_project import Project, start_trainer, trainers
from golfbook import activity, reports
from golfbook.config.load import load_config
from golfbook.errors import RunError
from golfbook.files import sha256_file
from golfbook.run import STAGES, create_run
from golfbook.study import notebook as notebook_process
from golfbook.study import plan as planning
from golfbook.study import pool, progress, results, writes
from golfbook.study.interrupts import Interrupts
from golfbook.study.processes import Processes, Stage
from golfbook.study.progress import RunStatus


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A job that has been run to its end, with what it printed. The folder's name looks like a template."""
    project = Project(tmp_path_factory.mktemp("finished") / "a {seed} {} $$")
    done = project.call("run", "papermill_jobs/job.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    project.output = done.stdout
    return project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("GOLFBOOK_ROOT", str(tmp_path))
    monkeypatch.setenv("GOLFBOOK_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path)


def training_only(project: Project, **changes: object) -> Project:
    """Cut the job down to one stage and no figure."""
    project.write_job(**{"stages": ["training"], "figures": None, "variants": {"xsa": {}}, **changes})
    return project


def test_every_stage_is_done_and_executed_with_its_parameters(finished: Project) -> None:
    values = finished.results()
    assert len(values) == 6 and all(value["status"] == "ok" for value in values.values())
    for variant, overrides in (("xsa-s1", {}), ("no_xsa-s1", {"model.xsa": 0})):
        folder = finished.folder(variant)
        books = sorted(path.name for path in (folder / "notebooks").glob("*.ipynb"))
        assert books == ["03_training.ipynb", "04_quantization.ipynb", "05_test_time_training.ipynb"]
        book = nbformat.read(folder / "notebooks/03_training.ipynb", as_version=4)
        [injected] = [c for c in book.cells if "injected-parameters" in c.metadata.get("tags", [])]
        given: dict[str, object] = {}
        exec(injected.source, given)
        assert (given["seed"], given["study"], given["overrides"]) == (1, "small", overrides)
        assert given["run_dir"] == str(folder) and given["preset"] == "quickstart"
        # one execution a stage, each with the threads of the config
        assert (folder / "executions.txt").read_text() == "1\n" * 3


def test_the_table_and_the_places_are_printed(finished: Project) -> None:
    text = finished.output
    assert "2 runs of preset quickstart" in text and "rule of thumb" in text
    [line] = [line for line in text.splitlines() if line.startswith("no_xsa ") and "30" in line]
    bpb = finished.results()[f"{finished.folder('no_xsa-s1').name}/result.test_time_training.json"]["val_bpb"]
    assert f"{bpb:.4f} ± –" in line and line.endswith(" 8")
    assert "unigram entropy of the validation text is 4.5000 BPB" in text
    assert "What the tokenizer changed in this text: 1 characters in 1 of 2 documents: '[A]' became '[a]'." in text
    assert "at most 100 bytes, all within the limit of 16,000,000" in text
    for place in ("runs/small/results.parquet", "runs/small/metrics.parquet", "figures/small_seeds.png", "notebooks"):
        assert place in text
    assert (finished.root / "figures/small_seeds.png").read_text() == "2 runs"


def test_progress_lines_without_a_terminal(finished: Project) -> None:
    lines = [line for line in finished.output.splitlines() if line[:4].strip().endswith("%")]
    assert 3 <= len(lines) <= 40 and any("xsa-s1 training" in line for line in lines) and "left" in lines[-1]
    assert "\x1b" not in finished.output


def test_results_parquet_has_a_row_a_run(finished: Project) -> None:
    table = pd.read_parquet(finished.runs / "small/results.parquet")
    assert list(table["variant"]) == ["no_xsa", "xsa"] and list(table["seed"]) == [1, 1]
    assert table["artifact_bytes"].tolist() == [30, 30], "equal in two stages, so not prefixed"
    assert (table["test_time_training_val_bpb"] < table["quantization_val_bpb"]).all()
    assert "val_bpb" not in table and (table["training_state"] == "done").all()
    for name in (
        "config_hash",
        "variant_hash",
        "torch_version",
        "processor",
        "git_commit",
        "train_seconds",
        "parameters",
    ):
        assert name in table
    assert json.loads(table["config_json"][0])["model"]["xsa"] == 0
    curves = pd.read_parquet(finished.runs / "small/metrics.parquet")
    assert len(curves) == 8 and set(curves["variant"]) == {"xsa", "no_xsa"} and {"step", "loss", "kind"} <= set(curves)


def test_a_second_run_does_nothing_and_says_so(finished: Project) -> None:
    def written() -> dict[Path, int]:
        files = [path for path in finished.root.rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files if path.suffix != ".lock"}  # taking a lock may touch it

    before = written()
    done = finished.call("run", "papermill_jobs/job.yaml")
    assert done.returncode == 0 and "Nothing to do: every stage and figure of this job is done." in done.stdout
    as_json = finished.call("run", "papermill_jobs/job.yaml", "--json")
    found = json.loads(as_json.stdout)
    assert found["nothing_done"] and [one["state"] for one in found["runs"]] == ["done", "done"]
    assert found["figures"][0]["state"] == "current" and len(found["variants"]) == 2 and "2 runs" in as_json.stderr
    assert written() == before


def test_figures_are_drawn_again_when_results_notebook_or_picture_changed(finished: Project) -> None:
    count = finished.root / "figure_count.txt"
    assert count.read_text() == "x"
    (finished.root / "figures/small_seeds.png").unlink()
    assert finished.call("run", "papermill_jobs/job.yaml").returncode == 0
    assert count.read_text() == "xx"
    assert (finished.root / "figures/small_seeds.png").is_file()


def test_figures_are_drawn_again_when_the_library_changed(finished: Project) -> None:
    count, record = finished.root / "figure_count.txt", finished.runs / "small/figures.10_seeds.json"
    drawn = len(count.read_text())
    values = json.loads(record.read_text())
    record.write_text(json.dumps({**values, "code_sha256": "of another version"}))
    assert finished.call("run", "papermill_jobs/job.yaml").returncode == 0
    assert len(count.read_text()) == drawn + 1 and json.loads(record.read_text()) == values
    done = finished.call("run", "papermill_jobs/job.yaml", "--redraw")
    assert done.returncode == 0 and "Nothing to do" not in done.stdout
    assert len(count.read_text()) == drawn + 2, "drawn again though it is current"


def test_a_figure_lists_what_its_own_notebook_wrote(finished: Project) -> None:
    assert (finished.root / "figures/of_another.png").is_file(), "written meanwhile, by another process"
    record = json.loads((finished.runs / "small/figures.10_seeds.json").read_text())
    assert record["outputs"] == ["small_seeds.png"] and "of_another" not in finished.output


def test_the_files_a_process_writes_are_noted_whatever_writes_them(tmp_path: Path) -> None:
    code = """
import pathlib, sys
from golfbook.files import atomic_write_bytes
from golfbook.study.writes import note_writes
folder = pathlib.Path(sys.argv[1])
note_writes(sys.argv[1], sys.argv[2])
atomic_write_bytes(folder / "renamed.png", b"1")
(folder / "opened.png").write_text("2")
(folder / "gone.png").write_text("3")
(folder / "gone.png").unlink()
(folder.parent / "elsewhere.png").write_text((folder / "opened.png").read_text())
"""
    folder, record = tmp_path / "figures", tmp_path / "record"
    folder.mkdir()
    (folder / "before.png").touch()
    assert writes.noted(record) == []
    subprocess.run([sys.executable, "-c", code, str(folder), str(record)], check=True)
    assert writes.noted(record) == [folder / "renamed.png", folder / "opened.png"]


def test_nothing_is_left_in_the_temporary_folder(finished: Project) -> None:
    assert not list(finished.temporary.iterdir())


def test_private_folders_of_dead_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead = tmp_path / "golfbook-dead"
    (dead / "kernel").mkdir(parents=True)
    dead.with_suffix(".lock").touch()
    with notebook_process.private_folder() as living, notebook_process.private_folder() as second:
        assert not dead.exists() and living.is_dir() and second.is_dir() and living != second
        assert living.stat().st_mode & 0o777 == 0o700
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("ending", "cause"), [("exit 7", "ended with status 7"), ("kill -9 $$", "killed by SIGKILL")])
def test_a_kernel_that_does_not_start_is_explained(
    project: Project, monkeypatch: pytest.MonkeyPatch, ending: str, cause: str
) -> None:
    python = project.root / "python"
    python.write_text(f"#!/bin/sh\necho 'the disk is on fire' >&2\n{ending}\n")
    python.chmod(0o755)
    monkeypatch.setattr("golfbook.study.interpreter.sys", types.SimpleNamespace(executable=str(python)))
    with pytest.raises(RunError, match=f"(?s)no kernel could be started by .*{cause}.*the disk is on fire") as error:
        notebook_process.execute(
            project.root / "notebooks/10_seeds.ipynb", project.root / "out.ipynb", {}, project.root
        )
    assert "is ipykernel installed" not in str(error.value)


def test_a_slow_disk_has_time_to_start_a_kernel(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("papermill.execute_notebook", lambda *paths, **options: given.update(options))
    notebook_process.execute(project.root / "notebooks/10_seeds.ipynb", project.root / "out.ipynb", {}, project.root)
    assert given["start_timeout"] >= 30 * 60


def test_trainers_of_an_earlier_call_come_first_and_are_never_too_many(project: Project) -> None:
    """Of a job with one worker, two runs are being trained; and one of no job any more, and one by hand."""
    training_only(project, seeds=[1, 2, 3])
    made = dataclasses.replace(planning.plan(project.job), workers=1)
    job = pool._Job(made, print, Interrupts())
    config = load_config("quickstart", seed=9)
    former, by_hand = (create_run("small", name, config) for name in ("former", "by_hand"))
    processes = [start_trainer(planned.path) for planned in made.runs[1:]]
    processes += [start_trainer(former.path), start_trainer(by_hand.path, job=False)]
    try:
        order = job._take_up(job.statuses)
        assert [status.planned.run.config.seed for status in order] == [2, 3, 1]
        assert trainers(project.runs) == {made.runs[1].path.name, by_hand.path.name}
        assert (former.path / "saved.txt").exists() and (made.runs[2].path / "saved.txt").exists()
        notes = "\n".join(job.notes)
        assert f"{former.name}, which is no longer part of this job, was stopped" in notes and by_hand.name in notes
    finally:
        for process in processes:
            process.kill()


def test_redraw_executes_no_run(project: Project) -> None:
    report = pool.run(planning.plan(project.job), redraw=True)
    assert [status.executed for status in report.runs] == [[], []] and project.results() == {}
    assert [(figure.state, figure.message) for figure in report.figures] == [("skipped", "no run has finished")]


def test_failures_do_not_stop_the_others_and_are_tried_again(project: Project) -> None:
    """A killed kernel, a broken cell, an error of ours, and a cell that fails after the result was written."""
    variants = {
        name: {"train.optimizer.grad_clip": i / 8}
        for i, name in enumerate(("killed", "broken", "data", "plot", "good"))
    }
    training_only(project, variants=variants)
    faults = [
        project.fault("kill", "killed-s1"),
        project.fault("error", "broken-s1"),
        project.fault("data", "data-s1"),
        project.fault("plot", "plot-s1"),
    ]
    report = pool.run(planning.plan(project.job))
    states = {status.planned.variant: status for status in report.runs}
    assert {name: status.state for name, status in states.items()} == {
        "killed": "failed", "broken": "failed", "data": "failed", "plot": "failed", "good": "done"
    }  # fmt: skip
    killed, broken, data, plot = (states[name].message for name in ("killed", "broken", "data", "plot"))
    assert killed.startswith("the kernel of 03_training.ipynb was killed in cell 3 ('if fault(\"kill\"):')")
    assert broken.startswith("ValueError: a broken cell (in cell 4 of ") and "\x1b" not in broken
    assert broken.splitlines()[-1].strip() == "ValueError: a broken cell"
    assert data.startswith("shard 7 is one byte short; download it again (in cell ") and len(data.splitlines()) == 1
    assert plot.startswith("ValueError: a plot failed")
    for name in ("killed", "broken", "data"):
        run = states[name].planned.run
        assert run.state("training") == "failed"
        assert (run.read_result("training") or {})["message"] == states[name].message
    for status in states.values():
        log = status.log
        assert log is not None and log.is_file()
        partial = status.planned.path / "notebooks/03_training.partial.ipynb"
        assert partial.is_file() == (status.state == "failed")
    assert states["plot"].planned.run.is_done("training"), "its result is kept"
    table = pd.read_parquet(project.runs / "small/results.parquet").set_index("variant")
    assert table["training_val_bpb"].notna().to_dict() == {
        "broken": False, "data": False, "good": True, "killed": False, "plot": True
    }  # fmt: skip

    for path in faults:
        path.unlink()
    again = pool.run(planning.plan(project.job))
    assert all(status.state == "done" for status in again.runs) and not again.failures
    assert {status.planned.variant for status in again.runs if status.executed} == {"killed", "broken", "data", "plot"}
    assert not list(project.runs.rglob("*.partial.ipynb"))
    assert all(value["status"] == "ok" for value in project.results().values())


def test_a_failed_job_ends_with_status_1_and_names_the_log(project: Project) -> None:
    training_only(project, figures=["10_seeds"])
    project.fault("kill")
    done = project.call("run", "papermill_jobs/job.yaml")
    assert done.returncode == 1
    assert "FAILED xsa-s1, training: the kernel of 03_training.ipynb was killed" in done.stdout
    assert f"log: {project.folder()}/notebooks/training.log" in done.stdout
    assert "1 failed" in done.stdout and "Figure 10_seeds was not drawn" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    status = project.call("status", "small")
    assert status.returncode == 0 and "training: the kernel of 03_training.ipynb was killed" in status.stdout


def test_runs_folder_that_is_a_file(project: Project) -> None:
    project.runs.write_text("")
    done = project.call("run", "papermill_jobs/job.yaml")
    assert done.returncode == 2
    assert "cannot write" in done.stderr and str(project.runs) in done.stderr and "permissions" in done.stderr
    assert "Traceback" not in done.stderr


def test_full_disk_while_a_job_is_prepared(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    made = planning.plan(training_only(project).job)
    monkeypatch.setattr("golfbook.files.tempfile.mkstemp", full)
    with pytest.raises(RunError, match=r"cannot write .*job\.json: No space left on device; check free space"):
        pool.run(made)


def test_full_disk_while_a_notebook_runs(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from papermill.iorw import papermill_io

    from golfbook.study.notebook import execute_stage

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    run = create_run("small", "xsa", load_config("quickstart", seed=1))
    monkeypatch.setattr(papermill_io, "write", full)
    with pytest.raises(RunError, match=r"cannot write .*03_training\.partial\.ipynb: No space left on device"):
        execute_stage(run.path, "training", {}, project.root)
    assert run.state("training") == "failed"


def test_a_notebook_that_leaves_no_result_has_failed(project: Project) -> None:
    training_only(project)
    book = nbformat.read(project.root / "notebooks/03_training.ipynb", as_version=4)
    book.cells = book.cells[:1]
    nbformat.write(book, project.root / "notebooks/03_training.ipynb")
    [status] = pool.run(planning.plan(project.job)).runs
    assert status.state == "failed" and "result.training.json does not say 'ok'" in status.message


def test_two_jobs_at_once_do_the_work_once(project: Project) -> None:
    training_only(project)
    both = [project.start("run", "papermill_jobs/job.yaml") for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert (project.folder() / "executions.txt").read_text() == "1\n"


def test_each_worker_has_gpus_of_its_own(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pool", "plan", "estimates"):
        monkeypatch.setattr(f"golfbook.study.{module}.visible_gpus", lambda: ["0", "3", "5", "7"])
    overrides = {"machine.processes": 2}
    made = planning.plan(training_only(project, seeds=[1, 2, 3, 4], overrides=overrides).job)
    assert made.workers == 2
    started: list[tuple[str, str]] = []
    both = threading.Barrier(2)

    def submit(self: object, stage: Stage) -> int:
        environment = stage.environment
        started.append((environment["CUDA_VISIBLE_DEVICES"], environment["OMP_NUM_THREADS"]))
        both.wait(20)  # two runs are in hand at a time
        return 1

    monkeypatch.setattr(Processes, "submit", submit)
    report = pool.run(made)
    assert sorted(started) == [("0,3", "1")] * 2 + [("5,7", "1")] * 2
    assert [status.message for status in report.runs] == ["the process ended with status 1"] * 4


def test_slots_and_workers_fit_the_largest_run(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pool", "plan", "estimates"):
        monkeypatch.setattr(f"golfbook.study.{module}.visible_gpus", lambda: ["0", "3", "5", "7"])
    variants = {"one": {}, "two": {"machine.processes": 2}}
    made = planning.plan(training_only(project, variants=variants, seeds=[1, 2]).job)
    assert made.workers == 2
    started: list[tuple[str, str, str]] = []
    both = threading.Barrier(2)

    def submit(self: object, stage: Stage) -> int:
        seen = stage.environment["CUDA_VISIBLE_DEVICES"]
        started.append((Path(stage.arguments[0]).name.partition("-")[0], seen, stage.gpus[0]))
        both.wait(20)
        return 1

    monkeypatch.setattr(Processes, "submit", submit)
    pool.run(made)
    pairs = {"0": "0,3", "5": "5,7"}
    assert len(started) == 4
    for variant, seen, first in started:
        assert seen == (first if variant == "one" else pairs[first])


def test_a_busy_run_says_what_it_does(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = planning.plan(project.job).runs[0]
    run = create_run("small", planned.variant, planned.config)
    status = RunStatus(planned, "running", "training", since=1000.0)
    steps = planned.config.train.steps
    activity.record_in(run.path)
    try:
        found = []
        for what, step in (("training the tokenizer", 0), ("training", 0), ("training", 20), ("validating", 20)):
            if step:
                run.append_metrics({"kind": "train", "step": step, "loss": 1.0})
            activity.doing(what)
            found.append(progress.doing(status))
    finally:
        activity.record_in(None)
    assert found == [
        "training: training the tokenizer",
        f"training 0/{steps}",
        f"training 20/{steps}",
        f"training 20/{steps}: validating",
    ]
    status.since = time.time() + 60
    assert progress.doing(status) == f"training 20/{steps}", "nothing noted since this stage began"


def test_a_notebook_gets_all_folders_absolute(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative ones start at the folder the command is called in, not at that of the notebook or the trainer."""
    elsewhere = project.root / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for name, value in (("ROOT", ".."), ("RUNS", "r"), ("CACHE", "c"), ("FIGURES", "f")):
        monkeypatch.setenv(f"GOLFBOOK_{name}", value)
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # of this terminal; the logs are not it
    environment = Stage("stage", (), elsewhere / "log", 1).environment
    assert environment["PYTHONIOENCODING"] == "utf-8"
    assert {name: environment[f"GOLFBOOK_{name}"] for name in ("ROOT", "RUNS", "CACHE", "FIGURES")} == {
        "ROOT": str(project.root),
        "RUNS": str(elsewhere / "r"),
        "CACHE": str(elsewhere / "c"),
        "FIGURES": str(elsewhere / "f"),
    }


def finish_training(project: Project, job: Path | None = None) -> pd.DataFrame:
    """Write the training results of a job without running it; returns the collected table."""
    made = planning.plan(job or project.job)
    results.note_variants(made)
    for planned in made.runs:
        run = create_run(made.study, planned.variant, planned.config)
        run.checkpoint_path.write_text("x")
        run.write_result("training", {"val_bpb": 2.0}, reads={}, writes=run.checkpoint_path)
    return results.collect(made.study)


def test_renamed_and_removed_variants_leave_the_tables(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert set(finish_training(project)["variant"]) == {"xsa", "no_xsa"}
    project.write_job(variants={"renamed": {}, "other": {"model.xsa": 1}})
    assert set(finish_training(project)["variant"]) == {"renamed", "other"}
    assert set(pd.read_parquet(project.runs / "small/results.parquet")["variant"]) == {"renamed", "other"}
    project.write_job(variants={"other": {"model.xsa": 1}})
    assert set(finish_training(project)["variant"]) == {"other"}
    reports.show_study(Console(), "small")
    assert "renamed" not in capsys.readouterr().out
    project.write_job(variants={"xsa": {}})
    assert set(finish_training(project)["variant"]) == {"xsa"}, "a variant that comes back is there again"
    assert len(list((project.runs / "small").glob("*-s1-*"))) == 4, "nothing is deleted"

    second = project.job.with_name("second.yaml")
    second.write_text(project.job.read_text().replace("xsa: {}", "also: {model.xsa: 1}"))
    assert set(finish_training(project, second)["variant"]) == {"xsa", "also"}, "two job files may share a study"
    by_hand = create_run("small", "by_hand", load_config("quickstart", seed=1, overrides={"train.steps": 9}))
    assert by_hand.path.name in {row["run"] for row in results.rows("small")}


def test_reference_tables_hold_settings_scores_and_curves(project: Project) -> None:
    project.write_job(seeds=[1, 2], variants={"base": {}, "wide": {"model.xsa": [0, 1], "train.batch_tokens": 4096}})
    made = planning.plan(project.job)
    for index, planned in enumerate(made.runs):
        run = create_run(made.study, planned.variant, planned.config)
        if index == 3:
            run.write_failure("training", "the loss is nan")
            continue
        run.checkpoint_path.write_text("x")
        values = {"val_bpb": 2.0 + index / 3, "steps": 10, "weights": "moving average", "log": "not kept"}
        run.write_result("training", values, reads={}, writes=run.checkpoint_path)
        run.append_metrics({"kind": "train", "step": 5, "loss": 3.0, "seconds": 1.0})
        for step in (0, 10):
            bpb = 3.0 - step / 10 + index / 3
            run.append_metrics({"kind": "validation", "step": step, "val_bpb": bpb, "seconds": step / 4})
    files, count = results.export_reference(made.study)
    assert files == [project.root / "runs/reference" / made.study / name for name in ("results.csv", "curves.csv")]
    table, curves = map(pd.read_csv, files)
    assert count == len(table) == 3, "what did not finish is not in the tables"
    first = [
        "variant",
        "seed",
        "config_hash",
        "train.batch_tokens",
        "model.xsa",
        "training_val_bpb",
        "steps",
        "weights",
    ]
    assert set(first) <= set(table) and "log" not in table and "train.steps" not in table and "preset" not in table
    wide = table[table["variant"] == "wide"].iloc[0]
    assert (wide["model.xsa"], wide["train.batch_tokens"]) == ("[0,1]", 4096)
    assert table["golfbook_version"].nunique() == 1 and table["code_sha256"].str.len().eq(64).all()
    assert list(curves) == ["variant", "seed", "step", "tokens_seen", "seconds", "val_bpb"]
    mine = curves[curves["variant"] == "wide"]
    assert mine["tokens_seen"].tolist() == [0, 40960] and mine["seconds"].tolist() == [0.0, 2.5]
    by_run = table.set_index(["variant", "seed"])["training_val_bpb"]
    last = curves[curves["step"] == 10].set_index(["variant", "seed"])["val_bpb"]
    assert last.to_dict() == pytest.approx(by_run.to_dict(), abs=1e-6)
    before = [path.read_bytes() for path in files]
    results.export_reference(made.study)
    assert [path.read_bytes() for path in files] == before
    assert made.study in results.studies() and "reference" not in results.studies()


def test_a_study_without_a_finished_run_has_no_reference_tables(project: Project) -> None:
    create_run("mine", "base", load_config("quickstart", seed=1))
    with pytest.raises(RunError, match="has no finished run"):
        results.export_reference("mine")
    assert not results.reference_folder("mine").exists()


def test_one_name_for_two_configurations_is_never_averaged(
    project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    for seed in (1, 2):
        for xsa, steps, value in ((0, 100, 2.0), (2, 200, 3.0)):
            overrides = {"model.xsa": xsa, "train.steps": steps}
            run = create_run("notebook", "default", load_config("quickstart", seed=seed, overrides=overrides))
            run.checkpoint_path.write_text("x")
            run.append_metrics({"kind": "train", "step": 1, "loss": value})
            values = {"val_bpb": value + seed / 10}
            run.write_result("training", values, reads={}, writes=run.checkpoint_path)
    table = results.collect("notebook")
    means = table.groupby("variant")["training_val_bpb"].mean()
    assert sorted(means) == pytest.approx([2.15, 3.15])
    assert set(table["variant"]) == set("default@" + table["variant_hash"])
    curves = pd.read_parquet(project.runs / "notebook/metrics.parquet")
    assert set(curves["variant"]) == set(table["variant"])
    reports.show_study(Console(), "notebook")
    text = capsys.readouterr().out
    assert "2.1500 ± 0.0707" in text and "3.1500 ± 0.0707" in text and "several configurations" in text


def test_collect_takes_what_made_a_run_from_its_results(project: Project) -> None:
    run = create_run("s", "v", load_config("quickstart", seed=1))
    env = json.loads((run.path / "env.json").read_text())
    env |= {"git_commit": "old", "processor": "first machine", "packages": {"torch": "1.0"}}
    (run.path / "env.json").write_text(json.dumps(env))
    run.checkpoint_path.write_text("x")
    sha = sha256_file(run.checkpoint_path)

    def write(stage: str, environment: dict[str, object] | None, **reads: str) -> None:
        run.write_result(stage, {}, reads=reads, writes=run.checkpoint_path)
        result = {**(run.read_result(stage) or {}), "environment": environment}
        run.result_path(stage).write_text(json.dumps(result))

    write("training", None)
    [row] = results.rows("s")
    assert (row["git_commit"], row["torch_version"], row["processor"]) == ("old", "1.0", "first machine")
    made_by = {"git_commit": "new", "git_dirty": True, "torch": "2.0", "golfbook": "0.2", "processor": "second machine"}
    write("training", made_by)
    [row] = results.rows("s")
    assert (row["git_commit"], row["torch_version"], row["processor"]) == ("new", "2.0", "second machine")
    assert row["git_dirty"] is True and row["golfbook_version"] == "0.2" and "environment" not in row
    write("quantization", {**made_by, "git_commit": "newer"}, **{run.checkpoint_path.name: sha})
    [row] = results.rows("s")
    assert (row["git_commit"], row["training_git_commit"], row["quantization_git_commit"]) == ("newer", "new", "newer")
    assert row["torch_version"] == "2.0" and "training_torch_version" not in row


def test_edited_jobs_leave_old_runs_out_of_the_tables(project: Project) -> None:
    def finish() -> list[str]:
        frame = finish_training(project)
        return [f"{row.variant}-s{row.seed}-{row.config_hash}" for row in frame.itertuples()]

    first = finish()
    assert len(first) == 2
    project.write_job(seeds=[2])
    assert len(finish()) == 4, "further seeds of the same configuration belong to the study"
    project.write_job(seeds=[1], variants={"xsa": {"train.steps": 7}, "no_xsa": {"model.xsa": 0}})
    assert len(third := finish()) == 3 and not set(third) >= set(first)
    assert len(list((project.runs / "small").glob("xsa-*"))) == 3, "nothing is deleted"


def test_collected_names_are_prefixed_where_stages_differ(project: Project) -> None:
    run = create_run("s", "v", load_config("quickstart", seed=1))
    run.checkpoint_path.write_text("x")
    common = {"note": ["a"], "kept": 1}
    run.write_result("training", {**common, "val_bpb": 2.0, "rate": 1}, reads={}, writes=run.checkpoint_path)
    sha = (run.read_result("training") or {})["writes"]["sha256"]
    run.write_result(
        "quantization", {**common, "rate": 2}, reads={run.checkpoint_path.name: sha}, writes=run.checkpoint_path
    )
    [row] = results.rows("s")
    assert (row["training_rate"], row["quantization_rate"], row["kept"], row["note"]) == (1, 2, 1, '["a"]')
    assert row["training_val_bpb"] == 2.0 and "rate" not in row
    assert [row[f"{stage}_state"] for stage in STAGES] == ["done", "done", "missing"]
    run.checkpoint_path.write_text("changed")
    [row] = results.rows("s")
    assert row["training_state"] == "stale" and "training_val_bpb" not in row


def test_collecting_twice_gives_the_same_files(finished: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOLFBOOK_RUNS", str(finished.runs))
    path = finished.runs / "small/results.parquet"
    before = path.read_bytes()
    results.collect("small")
    assert path.read_bytes() == before


def test_unknown_study(project: Project) -> None:
    create_run("quickstart", "v", load_config("quickstart", seed=1))
    with pytest.raises(RunError, match=r"no study 'quikstart'; did you mean 'quickstart'\?"):
        results.collect("quikstart")
