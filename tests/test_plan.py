"""Planning: every mistake in a job file is found before anything runs, and the message names what to fix."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
import yaml

from fixture_project import Project, notebook
from golfbook.config.load import load_config, preset_names
from golfbook.errors import ConfigError, GolfbookError, RunError
from golfbook.run import STAGE_NOTEBOOKS, create_run
from golfbook.study import estimates
from golfbook.study.estimates import History, estimate, rough_parameters
from golfbook.study.plan import check_notebook, flatten, plan, variant_hash

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("GOLFBOOK_ROOT", str(tmp_path))
    monkeypatch.setenv("GOLFBOOK_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path)


def test_runs_come_seed_by_seed_and_differ(project: Project) -> None:
    made = plan(project.write_job(seeds=[7, 8]))
    assert [run.name for run in made.runs] == ["xsa-s7", "no_xsa-s7", "xsa-s8", "no_xsa-s8"]
    assert len({run.path for run in made.runs}) == 4
    assert [run.config.model.xsa == 0 for run in made.runs] == [False, True, False, True]
    assert made.variants == ("xsa", "no_xsa") and made.stages == tuple(STAGE_NOTEBOOKS)
    assert variant_hash(made.runs[0].config) == variant_hash(made.runs[2].config) != variant_hash(made.runs[1].config)
    assert not project.runs.exists(), "planning writes nothing"


def test_a_variant_changes_single_keys_of_the_shared_overrides(project: Project) -> None:
    overrides = {"train": {"steps": 20, "schedule": {"warmdown_steps": 10}}, "model.bigram": {"dim": 16}}
    made = plan(project.write_job(overrides=overrides, variants={"a": {}, "b": {"train": {"steps": 30}}}))
    first, second = made.runs[0].config, made.runs[1].config
    assert (first.train.steps, second.train.steps) == (20, 30)
    assert first.train.schedule.warmdown_steps == second.train.schedule.warmdown_steps == 10
    assert (
        second.model.bigram.dim == 16
        and second.model.bigram.vocab_size == load_config("quickstart").model.bigram.vocab_size
    )
    assert made.runs[1].overrides == {"train.steps": 30, "train.schedule.warmdown_steps": 10, "model.bigram.dim": 16}


def test_an_empty_variant_may_be_left_blank(project: Project) -> None:
    project.job.write_text("study: s\npreset: quickstart\nstages: [training]\nseeds: [1]\nvariants:\n  base:\n")
    made = plan(project.job)
    assert made.runs[0].config == load_config("quickstart", seed=1) and made.figures == ()


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"sedes": [1]}, r"unknown key 'sedes'; did you mean 'seeds'\?"),
    ({"scales": "tiny"}, r"unknown key 'scales'; did you mean 'scale'"),
    ({"preset": None}, r"the key 'preset' is missing"),
    ({"preset": "quickstrat"}, r"unknown preset 'quickstrat'; did you mean 'quickstart'\?"),
    ({"preset": "mine.yaml"}, r"cannot read .*mine\.yaml"),
    ({"study": 3}, r"study must be text, got 3"),
    ({"study": "../elsewhere"}, r"study name '../elsewhere' may hold letters"),
    ({"variants": {"a b": {}}}, r"variant name 'a b' may hold letters"),
    ({"variants": {True: {}}}, r"the name True is not text; put it in quotes"),
    ({"variants": {}}, r"variants must map each variant's name"),
    ({"variants": {"a": 3}}, r"'a' must be a mapping of overrides"),
    ({"variants": {"a": {"model.xas": 0}}}, r"variant 'a'.*unknown key 'model\.xas'; did you mean 'model\.xsa'\?"),
    (
        {"variants": {"a": {"train.optimizer.matrix_lr": "1e-3"}}},
        r"train\.optimizer.matrix_lr.*YAML reads '1e-3' as text: write 0\.001",
    ),
    ({"variants": {"a": {"model": {"xsa": 99}}}}, r"variant 'a'.*model\.xsa 99 is more than model\.num_layers \d"),
    ({"variants": {"a": {"seed": 5}}}, r"'seed' is no override: use the key 'seeds'"),
    ({"variants": {"a": {}, "b": {"model": {}}}}, r"variants 'a' and 'b' are the same configuration"),
    ({"overrides": ["model.xsa"]}, r"overrides must be a mapping"),
    ({"seeds": ["1e2"]}, r"seeds must be a list of whole numbers, got '1e2'; YAML reads it as text: write 100"),
    ({"seeds": [1.5]}, r"seeds must be a list of whole numbers, got 1\.5"),
    ({"seeds": [True]}, r"got True"),
    ({"seeds": [1, 2, 1]}, r"seeds names 1 twice"),
    ({"seeds": [-1]}, r"seeds must not be negative, got -1"),
    ({"seeds": [2**63]}, r"seed: must be at most 2\*\*63 - 1"),
    ({"seeds": 3}, r"seeds must be a list of whole numbers, got 3"),
    ({"seeds": []}, r"seeds must be a list of whole numbers, got \[\]"),
    ({"stages": ["quantization"]}, r"stages must be the first of training, quantization"),
    ({"stages": ["training", "quantisation"]}, r"unknown stage 'quantisation'; did you mean 'quantization'\?"),
    ({"figures": ["10_seed"]}, r"there is no notebook .*10_seed\.ipynb; did you mean '10_seeds'\?"),
    ({"workers": 0}, r"workers must be a whole number of at least 1, got 0"),
    ({"overrides": {"data.source": "text", "data.path": "no/such.txt"}}, r"data\.path: there is no /.*/no/such\.txt"),
    ({"overrides": {"data.tokenizer": "no.model"}}, r"data\.tokenizer: there is no /.*/no\.model"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=lambda x: str(x)[:40])
def test_mistakes_are_named_before_anything_runs(project: Project, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GolfbookError, match=message) as caught:
        plan(project.write_job(**changes))
    assert "job.yaml" in str(caught.value) or "notebook" in str(caught.value)
    assert not project.runs.exists()


def test_several_mistakes_are_named_at_once(project: Project) -> None:
    with pytest.raises(GolfbookError, match=r"unknown key 'sedes'.*workers must be"):
        plan(project.write_job(sedes=[1], workers="two"))
    with pytest.raises(GolfbookError, match=r"variant 'a'.*variant 'b'"):
        plan(project.write_job(variants={"a": {"x": 1}, "b": {"y": 1}, "c": {}}))


def test_a_key_written_twice_is_an_error_with_its_line(project: Project) -> None:
    project.job.write_text(project.job.read_text().replace("no_xsa:", "xsa:"))
    with pytest.raises(GolfbookError, match=r"job\.yaml, line \d+: the key 'xsa' is there twice"):
        plan(project.job)


def test_unreadable_job_files(project: Project) -> None:
    with pytest.raises(GolfbookError, match=r"cannot read .*none\.yaml"):
        plan(project.root / "none.yaml")
    project.job.write_text("study: [")
    with pytest.raises(GolfbookError, match=r"not valid YAML"):
        plan(project.job)
    project.job.write_text("- study")
    with pytest.raises(GolfbookError, match=r"must hold a mapping"):
        plan(project.job)


def test_a_byte_order_mark(project: Project) -> None:
    mark = b"\xef\xbb\xbf"
    project.job.write_bytes(mark + project.job.read_bytes())
    assert plan(project.job).runs
    path = project.root / "notebooks/03_training.ipynb"
    path.write_bytes(mark + path.read_bytes())
    with pytest.raises(GolfbookError, match=r"03_training\.ipynb is not a notebook: .*save it as UTF-8 without one"):
        plan(project.job)


def test_missing_stage_notebook(project: Project) -> None:
    (project.root / "notebooks/04_quantization.ipynb").unlink()
    with pytest.raises(GolfbookError, match=r"there is no notebook .*04_quantization\.ipynb"):
        plan(project.job)
    plan(project.write_job(stages=["training"]))  # not asked for, not missed


def test_a_parameter_the_notebook_does_not_set_is_refused(project: Project) -> None:
    path = project.root / "notebooks/03_training.ipynb"
    notebook(path, "preset = 'a'\nsead: int = 1  # x\nstudy = variant = 's'\noverrides = {}\nrun_dir = ''", [])
    with pytest.raises(GolfbookError, match=r"does not set 'seed'; did you mean 'sead'\?"):
        plan(project.job)


def test_notebooks_that_cannot_take_parameters(project: Project) -> None:
    path = project.root / "notebooks/03_training.ipynb"
    book = nbformat.read(path, as_version=4)
    book.cells[0].metadata.tags = []
    nbformat.write(book, path)
    with pytest.raises(GolfbookError, match=r"0 cells tagged 'parameters'"):
        plan(project.job)
    notebook(path, "%time seed = 1", [])
    with pytest.raises(GolfbookError, match=r"not plain Python"):
        plan(project.job)
    path.write_text("{}")
    with pytest.raises(GolfbookError, match=r"is not a notebook"):
        plan(project.job)


def test_workers(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("golfbook.study.plan.available_cores", lambda: 8)
    monkeypatch.setattr("golfbook.study.plan.visible_gpus", lambda: [])
    monkeypatch.setattr("golfbook.study.estimates.visible_gpus", lambda: [])
    seeds = list(range(20))
    assert plan(project.write_job(seeds=seeds)).workers == 8
    threads = {"machine.threads": 2, "machine.processes": 2}
    assert plan(project.write_job(seeds=seeds, overrides=threads)).workers == 2
    assert plan(project.write_job(seeds=seeds, workers=3)).workers == 3
    assert plan(project.job, workers=5).workers == 5
    assert plan(project.write_job()).workers == 2, "no more than there are runs"
    monkeypatch.setattr("golfbook.study.plan.available_cores", lambda: 1)
    assert plan(project.write_job(overrides=threads)).workers == 1
    monkeypatch.setattr("golfbook.study.plan.visible_gpus", lambda: ["0", "1", "2"])
    monkeypatch.setattr("golfbook.study.estimates.visible_gpus", lambda: ["0", "1", "2"])
    assert plan(project.write_job(seeds=seeds)).workers == 3


def test_workers_fit_into_a_container(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("golfbook.study.plan.visible_gpus", lambda: [])
    monkeypatch.setattr("golfbook.study.estimates.visible_gpus", lambda: [])
    job = project.write_job(seeds=list(range(20)))
    monkeypatch.setattr("golfbook.study.plan.available_cores", lambda: 3.5)
    monkeypatch.setattr("golfbook.study.plan.available_memory", lambda: 10**12)
    assert plan(job).workers == 3
    monkeypatch.setattr("golfbook.study.plan.available_cores", lambda: 0.5)
    assert plan(job).workers == 1
    monkeypatch.setattr("golfbook.study.plan.available_cores", lambda: 64.0)
    need = plan(job).runs[0].estimate.memory_bytes
    monkeypatch.setattr("golfbook.study.plan.available_memory", lambda: int(2.5 * need))
    assert plan(job).workers == 2
    seconds = []
    for cores in (1.0, 0.5):
        monkeypatch.setattr("golfbook.study.estimates.available_cores", lambda cores=cores: cores)
        seconds.append(plan(job).runs[0].estimate.seconds["training"] - estimates.NOTEBOOK_SECONDS)
    assert seconds[1] == pytest.approx(2 * seconds[0]), "half a core takes twice as long"


def test_workers_fit_the_largest_variant(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("golfbook.study.plan.available_cores", lambda: 8)
    monkeypatch.setattr("golfbook.study.plan.visible_gpus", lambda: [])
    monkeypatch.setattr("golfbook.study.estimates.visible_gpus", lambda: [])
    seeds = list(range(20))
    assert plan(project.write_job(seeds=seeds, variants={"a": {}, "b": {"machine.threads": 64}})).workers == 1
    assert plan(project.write_job(seeds=seeds, variants={"a": {}, "b": {"machine.processes": 4}})).workers == 2
    monkeypatch.setattr("golfbook.study.plan.visible_gpus", lambda: ["0", "1", "2", "3"])
    monkeypatch.setattr("golfbook.study.estimates.visible_gpus", lambda: ["0", "1", "2", "3"])
    assert plan(project.job).workers == 1
    variants = {"auto": {}, "host": {"machine.device": "cpu"}}
    with pytest.raises(
        ConfigError, match=r"job\.yaml: variants 'auto' .*auto\) and 'host' .*cpu\).*same machine\.device"
    ):
        plan(project.write_job(variants=variants))
    monkeypatch.setattr("golfbook.study.estimates.visible_gpus", lambda: [])
    assert len(plan(project.job).runs) == 2, "without a GPU both train on the CPU"


def test_estimates_follow_the_work_and_say_where_they_come_from(project: Project) -> None:
    config = load_config("quickstart", seed=1)
    longer = load_config("quickstart", seed=1, overrides={"train.steps": 2 * config.train.steps})
    stages = tuple(STAGE_NOTEBOOKS)
    rule = estimate(config, stages, History())
    assert "rule of thumb" in rule.source and set(rule.seconds) == set(stages)
    fixed = estimates.NOTEBOOK_SECONDS
    twice = estimate(longer, stages, History())
    assert twice.seconds["training"] - fixed == pytest.approx(2 * (rule.seconds["training"] - fixed))
    run = create_run("earlier", "base", config)
    run.checkpoint_path.write_text("x")
    run.write_result("training", {"train_seconds": 100.0}, reads={}, writes=run.checkpoint_path)
    known = estimate(longer, ["training"], estimates.read_history())
    assert known.seconds["training"] - fixed == pytest.approx(200.0)
    assert known.source == "the speed of earlier runs here"
    assert "partly" in estimate(longer, stages, estimates.read_history()).source
    (run.path / "env.json").write_text("{}")  # another machine
    assert estimates.read_history() == History()


def test_short_runs_and_those_of_another_device_do_not_spoil_the_estimate(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("golfbook.study.estimates.visible_gpus", lambda: [])
    fixed = estimates.NOTEBOOK_SECONDS

    def expected(steps: int, *earlier: tuple[int, float, str], planned: int = 0) -> float:
        for count, seconds, device in earlier:
            overrides = {"train.steps": planned or count, "train.schedule.warmdown_steps": 1}
            run = create_run("earlier", "base", load_config("quickstart", overrides=overrides))
            run.checkpoint_path.write_text("x")
            values = {"train_seconds": seconds, "device": device, "steps": count}
            run.write_result("training", values, reads={}, writes=run.checkpoint_path)
        config = load_config("quickstart", overrides={"train.steps": steps})
        return estimate(config, ["training"], estimates.read_history()).seconds["training"] - fixed

    unknown = expected(600)
    assert expected(600, (6, 1.9, "cpu")) == unknown, "six steps say nothing"
    assert expected(600, (300, 30.0, "cpu")) == pytest.approx(60.0)
    assert expected(600, (400, 2.5, "cuda:0")) == pytest.approx(60.0)
    assert expected(600, (10, 10.0, "cpu")) == pytest.approx(600 * (30 + 10) / (300 + 10)), "each by its work"
    stopped = expected(600, (90, 10.0, "cpu"), planned=9000)  # by the clock
    assert stopped == pytest.approx(600 * (30 + 10 + 10) / (300 + 10 + 90))


@pytest.mark.parametrize("preset", preset_names())
def test_rough_parameters_are_near_the_real_count(preset: str) -> None:
    from golfbook.model.gpt import parameter_table

    model = load_config(preset).model
    assert rough_parameters(model) == pytest.approx(parameter_table(model)["total"], rel=0.05)


def test_flatten() -> None:
    assert flatten({"a": {"b.c": 1, "d": {"e": []}}, "f.g": None}) == {"a.b.c": 1, "a.d.e": [], "f.g": None}
    with pytest.raises(GolfbookError, match="override key 3"):
        flatten({"a": {3: 1}})


def test_the_folder_is_named_by_the_hash(project: Project) -> None:
    [run, _] = plan(project.job).runs
    assert run.path == project.runs / "small" / f"xsa-s1-{run.config.hash}"
    with pytest.raises(RunError, match="unknown stage"):
        run.run.state("plotting")


def committed(name: str) -> str:
    """A file as it was committed: `make run` draws the figure again, and another machine has other numbers."""
    shown = subprocess.run(
        ["git", "-C", str(ROOT), "show", f"HEAD:{name}"], capture_output=True, text=True, check=False
    )
    return shown.stdout if shown.returncode == 0 else (ROOT / name).read_text(encoding="utf-8")


def test_committed_figure_and_results_are_those_of_the_shipped_job() -> None:
    job = yaml.safe_load((ROOT / "papermill_jobs" / "quickstart.yaml").read_text(encoding="utf-8"))
    wanted = {(variant, seed) for variant in job["variants"] for seed in job["seeds"]}
    reference = pd.read_csv(io.StringIO(committed("runs/reference/quickstart/results.csv")))
    plotted = pd.read_csv(io.StringIO(committed("figures/quickstart_seeds.csv")))
    for table, column in ((reference, "test_time_training_val_bpb"), (plotted, "val_bpb")):
        assert set(zip(table["variant"], table["seed"], strict=True)) == wanted
        assert (table[column] < 0.7 * reference["unigram_bpb"].iloc[0]).all()
    merged = plotted.merge(reference, on=["variant", "seed"])
    assert (merged["val_bpb"] - merged["test_time_training_val_bpb"]).abs().max() < 1e-6


def test_scale_shrinks_the_preset_and_is_checked(project: Project) -> None:
    project.job.write_text(
        "study: scaled\npreset: pr1406\nscale: tiny\nstages: [training]\nseeds: [1]\nvariants: {base: {}}\n",
        encoding="utf-8",
    )
    [run] = plan(project.job).runs
    assert (run.config.preset, run.config.model.model_dim, run.config.model.num_layers) == ("pr1406-tiny", 64, 11)
    project.job.write_text(project.job.read_text().replace("scale: tiny", "scale: tinny"), encoding="utf-8")
    with pytest.raises(ConfigError, match="unknown scale 'tinny'; did you mean 'tiny'"):
        plan(project.job)


def test_shipped_jobs_are_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GOLFBOOK_ROOT", str(ROOT))
    monkeypatch.setenv("GOLFBOOK_RUNS", str(tmp_path / "runs"))
    jobs = {path.stem: plan(path) for path in sorted((ROOT / "papermill_jobs").glob("*.yaml"))}
    assert {"quickstart", "fineweb_docs"} <= set(jobs)
    quick, web = jobs["quickstart"], jobs["fineweb_docs"]
    assert len(quick.runs) == 4 and quick.stages == tuple(STAGE_NOTEBOOKS) and quick.figures == ("10_seeds",)
    for one, other in zip(quick.runs, web.runs, strict=True):  # only the data differs
        assert one.config.data != other.config.data
        assert one.config.model_copy(update={"data": other.config.data}) == other.config


def test_planning_imports_nothing_heavy(project: Project) -> None:
    code = (
        "import sys; from golfbook.study.plan import plan; plan(sys.argv[1]); "
        "print(*(set(sys.modules) & {'torch', 'papermill', 'pandas', 'scipy'}))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(project.job)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_check_notebook_counts_plain_and_annotated_names(project: Project) -> None:
    notebook(project.root / "notebooks/x.ipynb", "a = b = 1\nc: int = 2\nd, e = 1, 2\nf['g'] = 1", [])
    check_notebook("x", ("a", "b", "c"))
    with pytest.raises(GolfbookError, match=r"does not set 'g' \(it sets a, b, c, d, e\)"):
        check_notebook("x", ("g",))
