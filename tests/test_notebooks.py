"""Notebooks: well formed and stripped as committed; each one runs by papermill at smoke size and leaves its results.

What is asserted are numbers in result files and figures; pictures and tables inside executed notebooks prove nothing.
"""

from __future__ import annotations

import ast
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import papermill
import pytest

from conftest import invent_choices
from golfbook.analysis import frontier
from golfbook.compress.container import read_artifact
from golfbook.config.load import load_config
from golfbook.data import dataset
from golfbook.run import STAGE_NOTEBOOKS, Run, create_run, list_runs
from golfbook.study.plan import STAGE_PARAMETERS

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
VOCABULARY = (
    "alpha beta gamma delta array function returns value element number index list string model token byte matrix "
    "vector scale weight sum product error input output default optional shape dtype axis"
)
SMOKE = {
    "data.source": "text",
    "data.validation_fraction": 0.3,
    "model.vocab_size": 320,
    "model.num_layers": 2,
    "model.model_dim": 32,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.rope_dims": 8,
    "model.xsa": 1,
    "model.bigram": {"vocab_size": 64, "dim": 8},
    "model.value_embedding": {"dim": 8, "layers": [-1]},
    "train.steps": 6,
    "train.batch_tokens": 128,
    "train.sequence_length": 32,
    "train.schedule.warmdown_steps": 3,
    "train.averaging.ema_decay": 0.5,
    "machine.validate_every": 3,
    "machine.log_every": 2,
    "machine.checkpoint_every": 0,
    "quantize.passthrough_numel": 256,
    "score.stride": 8,
}


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code(path: Path) -> list[str]:
    return [cell.source for cell in read(path).cells if cell.cell_type == "code"]


def parameters(path: Path) -> str:
    tagged = [cell for cell in read(path).cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1, "exactly one cell is tagged 'parameters'"
    return str(tagged[0].source)


def test_the_notebooks_of_the_design_are_there() -> None:
    expected = {
        "00_tour",
        "01_data_and_bits_per_byte",
        "02_architecture",
        "10_seeds",
        "13_size_quality",
        *STAGE_NOTEBOOKS.values(),
    }
    assert expected <= set(NAMES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_form(path: Path) -> None:
    raw = json.loads(path.read_text(encoding="utf-8"))
    nbformat.validate(raw)
    assert raw["nbformat"] == 4 and raw["nbformat_minor"] >= 5
    assert set(raw["metadata"]) == {"kernelspec", "language_info"}
    assert raw["metadata"]["kernelspec"]["name"] == "python3"
    assert raw["metadata"]["language_info"] == {"name": "python"}
    ids = [cell["id"] for cell in raw["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in raw["cells"]:
        assert set(cell["metadata"]) <= {"tags"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_size_and_style(path: Path) -> None:
    cells = read(path).cells
    assert len(cells) <= 60
    lines = [line for source in code(path) for line in source.splitlines() if line.strip()]
    assert len(lines) <= 240
    for source in code(path):
        assert not any(isinstance(node, ast.ClassDef) for node in ast.walk(ast.parse(source)))
    card = cells[0].source
    for row in ("**You learn**", "**Time on a CPU**", "**Next**"):
        assert row in card
    assert any("from golfbook" in source for source in code(path))
    assert "panels.show(" in "".join(code(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_links_lead_to_files(path: Path) -> None:
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    targets = [part.split(")")[0] for part in text.split("](")[1:]]
    assert targets or path.stem == "10_seeds"
    for target in targets:
        file, _, heading = target.partition("#")
        assert (FOLDER / (file or path.name)).is_file(), target
        page = FOLDER / (file or path.name)
        texts = [page.read_text()] if page.suffix == ".md" else [cell.source for cell in read(page).cells]
        headings = {line.lstrip("# ") for text in texts for line in text.splitlines() if line.startswith("#")}
        assert not heading or heading.replace("-", " ") in headings, target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_parameters_are_plain_and_papermill_sees_them_all(path: Path) -> None:
    body = ast.parse(parameters(path)).body
    assert all(isinstance(statement, ast.AnnAssign) for statement in body), "write 'name: type = literal  # help'"
    for statement in body:
        assert isinstance(statement, ast.AnnAssign) and statement.value is not None
        ast.literal_eval(statement.value)
        assert statement.lineno == statement.end_lineno, "papermill reads one line a parameter"
    names = [statement.target.id for statement in body]  # type: ignore[union-attr, attr-defined]
    assert set(names) == set(papermill.inspect_notebook(str(path)))
    if path.stem in STAGE_NOTEBOOKS.values():
        assert set(STAGE_PARAMETERS) | {"scale"} <= set(names)
    following = [cell.source for cell in read(path).cells if cell.cell_type == "code"]
    index = following.index(parameters(path))
    if path.stem in STAGE_NOTEBOOKS.values():
        assert "runs.notebook_run(preset, seed, overrides, study, variant, run_dir, scale)" in following[index + 1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs, cache, figures and a small corpus of their own; kernels inherit them from this process."""
    folder = tmp_path_factory.mktemp("notebooks")
    words = random.Random(0)
    invent_choices(folder / "cache")
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as stream:
        for _ in range(300):
            text = " ".join(words.choice(VOCABULARY.split()) for _ in range(words.randint(30, 90)))
            stream.write(json.dumps({"text": text}) + "\n")
    settings = {
        "GOLFBOOK_RUNS": str(folder / "runs"),
        "GOLFBOOK_CACHE": str(folder / "cache"),
        "GOLFBOOK_FIGURES": str(folder / "figures"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "OMP_NUM_THREADS": "1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    yield folder
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def execute(home: Path, name: str, **values: Any) -> nbformat.NotebookNode:
    out = home / "executed" / f"{name}.ipynb"
    out.parent.mkdir(exist_ok=True)
    return papermill.execute_notebook(
        FOLDER / f"{name}.ipynb", out, parameters=values, kernel_name="python3", progress_bar=False, cwd=FOLDER
    )


def smoke(home: Path, **more: Any) -> dict[str, Any]:
    return {**SMOKE, "data.path": str(home / "corpus.jsonl"), **more}


def pictures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", []))


def output_types(notebook: nbformat.NotebookNode) -> set[str]:
    return {kind for cell in notebook.cells for out in cell.get("outputs", []) for kind in out.get("data", {})}


@pytest.fixture(scope="module")
def scored(home: Path) -> tuple[nbformat.NotebookNode, Run]:
    """The notebook of the last stage, executed first: it makes everything it needs."""
    given = {"seed": 7, "study": "smoke", "variant": "base", "overrides": smoke(home)}
    notebook = execute(home, "05_test_time_training", sample_tokens=512, **given)
    (run,) = list_runs("smoke")
    return notebook, run


def test_the_last_stage_alone_leaves_all_results(scored: tuple[nbformat.NotebookNode, Run]) -> None:
    notebook, run = scored
    assert [run.state(stage) for stage in STAGE_NOTEBOOKS] == ["done"] * 3
    assert run.config.seed == 7 and run.variant == "base"
    score, quantized, trained = (
        run.read_result(stage) or {} for stage in ("test_time_training", "quantization", "training")
    )
    assert trained["steps"] == 6
    assert {p["step"] for p in run.read_metrics() if p["kind"] == "validation"} == {0, 3, 6}
    assert quantized["dequantized_val_loss"] == quantized["val_loss"]
    assert score["contiguous_val_bpb"] == pytest.approx(quantized["val_bpb"], abs=1e-12)
    assert score["artifact_bytes"] == quantized["artifact_bytes"] == run.artifact_path.stat().st_size
    assert quantized["total_bytes"] == quantized["code_bytes"] + quantized["artifact_bytes"]
    assert score["unigram_bpb"] == trained["unigram_bpb"]
    assert f"{score['val_bpb']:.4f} bits per byte" in json.dumps(notebook.cells)
    assert pictures(notebook) >= 5
    assert "application/vnd.jupyter.widget-view+json" not in output_types(notebook)


def test_finished_stages_are_shown_and_not_repeated(home: Path, scored: tuple[nbformat.NotebookNode, Run]) -> None:
    _, run = scored
    before = {path: path.read_bytes() for path in run.path.glob("result.*.json")}
    assert len(before) == 3
    for name, least in (("03_training", 5), ("04_quantization", 5)):  # run_dir wins over the other parameters
        notebook = execute(home, name, run_dir=str(run.path), seed=99, study="elsewhere")
        assert pictures(notebook) >= least, name
    assert {path: path.read_bytes() for path in before} == before
    assert list_runs("elsewhere") == []


@pytest.fixture
def without_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project that has no results of our own in ``runs/reference``."""
    for part in ("notebooks", "papermill_jobs", "runs/published"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).symlink_to(FOLDER.parent / part)
    monkeypatch.setenv("GOLFBOOK_ROOT", str(tmp_path))


def test_training_without_the_tables_of_its_study_says_how_to_make_them(
    home: Path, scored: tuple[nbformat.NotebookNode, Run], without_reference: None
) -> None:
    notebook = execute(home, "03_training", run_dir=str(scored[1].path))
    printed = json.dumps(notebook.cells)
    assert "golfbook run papermill_jobs/training.yaml; golfbook collect training --reference" in printed
    assert pictures(notebook) >= 5 and "Reference study" not in json.dumps(notebook.cells[-3].outputs)


@pytest.mark.parametrize(("name", "done"), [("03_training", 1), ("04_quantization", 2)])
def test_each_stage_notebook_starts_from_nothing(
    home: Path, name: str, done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain papermill, no job and no run folder: the notebook makes the stages before it by itself."""
    monkeypatch.setenv("GOLFBOOK_RUNS", str(tmp_path / "runs"))
    study = f"alone{name[:2]}"
    notebook = execute(home, name, preset="quickstart", seed=7, overrides=smoke(home), study=study)
    (run,) = list_runs(study)
    if name == "03_training":  # with everything that a job leaves out
        printed = json.dumps(notebook.cells)
        assert all(f"step {at}: " in printed for at in (" 0", " 3", "30"))
        assert "averaged weights: " in printed and "3 bits: of a tax of " in printed and pictures(notebook) >= 12
    assert run.config == load_config("quickstart", seed=7, overrides=smoke(home))
    states = [run.state(stage) for stage in STAGE_NOTEBOOKS]
    assert states == ["done"] * done + ["missing"] * (3 - done)
    bpb = [(run.read_result(stage) or {})["val_bpb"] for stage in list(STAGE_NOTEBOOKS)[:done]]
    assert all(0.5 < value < 8 for value in bpb)


TRAINING_ONLY = {
    "model.mtp.num_heads": 1,
    "train.qat.start": 0.9,
    "train.averaging.method": "swa",
    "train.averaging.swa_start": 0.9,
    "train.averaging.swa_every": 1,
    "machine.checkpoint_activations": True,
    "score.window": 16,
    "score.stride": 6,  # does not divide the window, and TTT-Linear wants whole mini-batches
    "model.ttt_linear": {"enabled": True, "num_heads": 2, "mini_batch": 8},
}


def test_what_only_training_uses_does_not_stop_the_later_notebooks(home: Path) -> None:
    """Heads, averages and fake quantisation are not in the artifact; its natural window is the training length."""
    execute(home, "05_test_time_training", overrides=smoke(home, **TRAINING_ONLY), study="training_only")
    (run,) = list_runs("training_only")
    notebook = execute(home, "04_quantization", run_dir=str(run.path))
    assert [run.state(stage) for stage in STAGE_NOTEBOOKS] == ["done"] * 3
    artifact = read_artifact(run.artifact_path)
    assert artifact.train_window == 32 and artifact.model_config.mtp.num_heads == 0
    assert not [name for name in artifact.state if name.startswith("mtp_heads")]
    assert pictures(notebook) >= 6


def test_quantization_without_its_reference_study_says_how_to_make_it(
    home: Path, scored: tuple[nbformat.NotebookNode, Run], without_reference: None
) -> None:
    notebook = execute(home, "04_quantization", run_dir=str(scored[1].path))
    printed = json.dumps([cell.get("outputs") for cell in notebook.cells])
    assert "make it: golfbook run papermill_jobs/quantization.yaml" in printed
    assert "At its own size the floor is" not in printed


def test_seeds_plots_finished_runs_and_names_the_others(home: Path, scored: tuple[nbformat.NotebookNode, Run]) -> None:
    _, run = scored
    create_run("smoke", "no_xsa", load_config("quickstart", seed=7, overrides=smoke(home, **{"model.xsa": 0})))
    (home / "runs/smoke/old-s1-0123456789").mkdir()
    (home / "runs/smoke/old-s1-0123456789/config.json").write_text('{"a_setting_of_the_past": 1}')
    notebook = execute(home, "10_seeds", study="smoke")
    table = pd.read_csv(home / "figures" / "smoke_seeds.csv")
    result = run.read_result("test_time_training") or {}
    assert table["variant"].tolist() == ["base"]
    assert table["val_bpb"].tolist() == [pytest.approx(result["val_bpb"])]
    assert {p.suffix for p in (home / "figures").glob("smoke_seeds.*")} == {".png", ".svg", ".csv"}
    printed = json.dumps(notebook.cells)
    assert "1 of 2 runs are not finished" in printed
    assert "passed over: old-s1-0123456789: its config.json is missing, damaged or of an older version" in printed
    assert "no_xsa, seed 7: training missing" in printed
    assert "There is only the variant **base**" in printed


def test_size_quality_draws_the_committed_table(home: Path) -> None:
    notebook = execute(home, "13_size_quality")
    assert pictures(notebook) >= 6
    plotted = pd.read_csv(home / "figures/size_quality.csv")
    shown = plotted[plotted["recipe"] == frontier.OURS].iloc[0]
    table = frontier.read_table()
    rows = table[(table["steps"] == 1600) & (table["recipe"] == frontier.OURS) & (table["bits"] == shown["bits"])]
    assert shown["kilobytes"] == pytest.approx(rows["artifact_bytes"].mean() / 1000)
    for suffix in ("png", "svg", "csv"):  # the picture of the README is that of the committed table
        assert (home / f"figures/size_quality.{suffix}").stat().st_size > 500
    committed = pd.read_csv(FOLDER.parent / "figures/size_quality.csv")
    pd.testing.assert_frame_equal(plotted, committed, rtol=1e-4)


def test_tour(home: Path) -> None:
    notebook = execute(home, "00_tour", seed=3, overrides=smoke(home))
    (run,) = [run for run in list_runs("tour") if run.variant == "tour"]
    (half,) = [run for run in list_runs("tour") if run.variant == "halfway"]
    score, printed = run.read_result("test_time_training"), json.dumps(notebook.cells, ensure_ascii=False)
    assert score is not None and run.is_done("test_time_training")
    assert pictures(notebook) >= 9
    assert f"{score['val_bpb']:.4f}" in json.dumps([cell.get("outputs") for cell in notebook.cells[-4:]])
    curve = {p["step"]: p["val_bpb"] for p in run.read_metrics() if p["kind"] == "validation"}
    assert (half.read_result("training") or {})["val_bpb"] == curve[3], "a shorter run takes the same steps"
    assert all(f"—— {step} steps ——\\nReturn the number of elements ▸" in printed for step in (0, 3, 6))
    by_hand, library = re.findall(r"by hand ([0-9.]+), library ([0-9.]+) bits per byte", printed)[-1]
    assert float(by_hand) == pytest.approx(float(library), abs=2e-4)


def test_tour_of_a_model_with_parts_that_only_training_uses(home: Path) -> None:
    """Heads of multi-token prediction are in no artifact; its window is that of training, whatever is scored with."""
    overrides = smoke(home, **{"model.mtp.num_heads": 1, "score.window": 16})
    execute(home, "00_tour", seed=4, overrides=overrides)
    (run,) = [run for run in list_runs("tour") if run.variant == "tour" and run.config.seed == 4]
    assert [run.state(stage) for stage in STAGE_NOTEBOOKS] == ["done"] * 3
    assert read_artifact(run.artifact_path).train_window == 32


def test_data(home: Path) -> None:
    notebook = execute(
        home, "01_data_and_bits_per_byte", overrides=smoke(home), vocabularies=[300, 320], sample_documents=100
    )
    data = dataset.prepare(load_config("quickstart", overrides=smoke(home)))
    printed = json.dumps(notebook.cells)
    assert data.fingerprint in printed
    assert f"{data.info['unigram_bpb']:.4f} bits per byte" in printed
    assert f"{data.val_bytes:,} bytes" in printed
    assert pictures(notebook) >= 6
    assert "the challenge's: boundaries ['<pad>', '<s>', '</s>', '<unk>']" in printed
    unigram, pairs = re.findall(r"frequencies ([0-9.]+) .bound: [0-9.]+., pairs ..([0-9.]+)", printed)[-1]
    assert float(pairs) < float(unigram) > data.info["unigram_bpb"]


def test_data_without_the_challenges_tokenizer_says_so(home: Path) -> None:
    given = {"vocabularies": [300, 320], "sample_documents": 100, "challenge": "nowhere.model"}
    printed = json.dumps(execute(home, "01_data_and_bits_per_byte", overrides=smoke(home), **given).cells)
    assert "nowhere.model is not there, so the challenge's tokenizer is not among those compared" in printed
    assert "the challenge's: boundaries" not in printed


def test_architecture(home: Path) -> None:
    notebook = execute(home, "02_architecture", overrides=smoke(home), study="smoke_architecture")
    assert pictures(notebook) >= 10


def test_seeds_without_a_finished_run_says_what_to_do(home: Path) -> None:
    with pytest.raises(papermill.PapermillExecutionError, match="there is no study 'nothing'"):
        execute(home, "10_seeds", study="nothing")


def test_a_wrong_override_names_the_nearest_key(home: Path) -> None:
    with pytest.raises(papermill.PapermillExecutionError, match=r"did you mean 'train\.steps'"):
        execute(home, "03_training", overrides={"train.step": 3})
