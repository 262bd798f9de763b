"""The command line: ``golfbook run | status | collect | presets | score | lab``.

Commands import what they need when they are called, so that ``golfbook --help`` and a job with nothing to do are quick.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from golfbook import __version__
from golfbook.errors import ConfigError, GolfbookError, RunError

if TYPE_CHECKING:
    from golfbook.artifact import Artifact

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130


def main() -> None:
    """Run the command line; problems a user can fix are printed without a traceback and end with status 2."""
    debug = "--debug" in sys.argv[1:]
    if debug:
        sys.argv.remove("--debug")
    try:
        app(prog_name="golfbook")
    except GolfbookError as error:
        if debug:
            raise
        Console(stderr=True).print(f"golfbook: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(USER_ERROR)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """A workbook for very small language models: train, quantise and score them from notebooks, over many seeds.

    Begin with `golfbook run papermill_jobs/quickstart.yaml` (a few minutes on a CPU), or open the notebooks with
    `golfbook lab`.
    """
    if version:
        print(__version__)
        raise typer.Exit


@app.command(
    epilog="Examples: `golfbook run papermill_jobs/quickstart.yaml`, `golfbook run my_job.yaml --workers 1 --dry-run`"
)
def run(
    job: Annotated[
        Path, typer.Argument(help="A job file: study, preset, stages, seeds, variants.", metavar="JOB.yaml")
    ],
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Runs in hand at a time. Default: as many as cores, GPUs and memory allow."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and show the plan, run nothing.")] = False,
    redraw: Annotated[bool, typer.Option("--redraw", help="Only draw the figures again, all of them.")] = False,
) -> None:
    """Run a job: every variant with every seed, then the tables and the figures.

    Everything is checked before anything runs. What is finished is skipped, what failed is tried again, what was
    stopped or killed goes on, so the same command is the way to start, to repeat and to resume. Ctrl-C stops in order.

    Ends with status 0, 1 when a run or figure failed, 2 when the job or its settings are wrong, 130 after Ctrl-C.
    """
    from golfbook import jobs, reports

    console = Console()
    plan = jobs.plan(job, workers=workers)
    reports.show_plan(console, plan)
    if dry_run:
        return
    previous = signal.signal(signal.SIGTERM, _interrupt)  # a job scheduler's word for Ctrl-C
    try:
        with reports.follow(console) as follow:
            report = jobs.run(plan, follow, redraw=redraw)
    finally:
        signal.signal(signal.SIGTERM, previous)
    reports.show_report(console, report)
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
    if report.failures:
        raise typer.Exit(FAILED)


@app.command(epilog="Examples: `golfbook status`, `golfbook status quickstart`")
def status(
    study: Annotated[str | None, typer.Argument(help="A study; without one, all studies are listed.")] = None,
) -> None:
    """Show which runs of a study are done, failed, stale or still to do, and why they failed."""
    from golfbook import reports, results
    from golfbook.files import runs_root

    console = Console()
    known = results.studies()
    if study is None:
        if not known:
            console.print(
                f"No studies yet under {runs_root()}. Begin with: golfbook run papermill_jobs/quickstart.yaml"
            )
        for name in known:
            reports.show_status(console, name)
        return
    results.current_runs(study)  # raises for an unknown study
    reports.show_status(console, study, last=False)
    reports.show_study(console, study)


@app.command(epilog="Examples: `golfbook collect quickstart`, `golfbook collect training --reference`")
def collect(
    study: Annotated[str, typer.Argument(help="Name of a study: a folder under runs/.")],
    reference: Annotated[
        bool, typer.Option("--reference", help="Also write the small tables of runs/reference/STUDY/, to be committed.")
    ] = False,
) -> None:
    """Gather the results of a study into results.parquet (a row a run) and metrics.parquet (a row a point).

    With `--reference` also into `results.csv` and `curves.csv` under `runs/reference/`, from which the notebooks draw
    what the project's own studies found: settings that differ, scores, validation curves, and what made them.
    """
    from golfbook import reports, results
    from golfbook.files import runs_root

    console = Console()
    frame = results.collect(study)
    reports.show_study(console, study)
    written = [runs_root() / study / name for name in ("results.parquet", "metrics.parquet")]
    note = f"{len(frame)} runs"
    if reference:
        tables, count = results.export_reference(study)
        written += tables
        note += f", {count} of them finished and in the reference tables"
    for path in written:
        console.print(reports.show_path(path), soft_wrap=True, highlight=False)
    console.print(note)


@app.command(epilog="Examples: `golfbook presets`, `golfbook presets quickstart`")
def presets(
    name: Annotated[str | None, typer.Argument(help="Show one preset by groups of parameters.")] = None,
    cost: Annotated[
        bool, typer.Option("--cost", help="Show arithmetic, memory, artifact bytes and step time on named GPUs.")
    ] = False,
) -> None:
    """List the presets with their sizes, or one preset in detail. Nothing is allocated."""
    from rich.table import Table

    if cost:
        _show_costs(Console(), name)
        return

    from golfbook.config import load_config, preset_names
    from golfbook.model import parameter_table

    console = Console()
    if name is None:
        table = Table("preset", "parameters", "layers", "width", "steps", "tokens a step", "data")
        for preset in preset_names():
            c = load_config(preset)
            total = parameter_table(c.model)["total"]
            numbers = (c.model.num_layers, c.model.model_dim, c.train.steps, c.train.batch_tokens)
            table.add_row(preset, f"{total:,}", *(f"{n:,}" for n in numbers), c.data.source)
        console.print(table)
        return
    groups = parameter_table(load_config(name).model)
    table = Table("parameters of", "count", "share", title=name, title_justify="left")
    for group, count in groups.items():
        table.add_row(group, f"{count:,}", f"{count / groups['total']:.1%}")
    console.print(table)


@app.command(epilog="Example: `golfbook score runs/quickstart/RUN/artifact.golf --text my_notes.txt --stride 64`")
def score(
    artifact: Annotated[Path, typer.Argument(help="An artifact.golf file.", metavar="ARTIFACT")],
    text: Annotated[Path, typer.Option("--text", help="A .txt or .jsonl file, or a folder of them.")],
    stride: Annotated[int, typer.Option(min=1, help="Targets scored a window; smaller: more context, slower.")] = 64,
    window: Annotated[int | None, typer.Option(min=2, help="Tokens a window. Default: as in training.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The SentencePiece .model. Default: tokenizer.model beside the artifact.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Key of the text in a .jsonl line.")] = "text",
) -> None:
    """Give the bits per byte of an artifact on any text, with sliding windows, each token scored once.

    The tokenizer lies beside the artifact and is checked against the hash inside it; as in the challenge, its bytes do
    not count towards the size. The bytes that divide are the UTF-8 bytes of the text as it is in the file.
    """
    from golfbook import artifact as artifacts
    from golfbook import reports

    loaded = artifacts.read_artifact(artifact)
    reports.show_score(Console(), _score(artifact, loaded, text, stride, window, tokenizer, text_field))


@app.command(epilog="Example: `golfbook lab --port 8890`")
def lab(
    port: Annotated[int, typer.Option(help="First port to try.")] = 8888,
    browser: Annotated[bool, typer.Option(help="Open a browser window.")] = True,
) -> None:
    """Open JupyterLab in notebooks/, on this machine only (127.0.0.1) and with a token."""
    import importlib.util

    from golfbook.files import project_root

    folder = project_root() / "notebooks"
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; call golfbook inside the project, or set GOLFBOOK_ROOT")
    if importlib.util.find_spec("jupyterlab") is None:
        raise RunError("JupyterLab is not installed; install the project with its extra: pip install -e .[notebook]")
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={folder}", "--ServerApp.ip=127.0.0.1"]
    command += [f"--ServerApp.port={port}", *([] if browser else ["--no-browser"])]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # in a container; the server still listens on this machine only
    sys.stdout.flush()
    # the server takes this process's place, so that Ctrl-C and every other signal reach it alone
    os.execve(sys.executable, command, {**os.environ, "GOLFBOOK_ROOT": str(project_root())})


def _show_costs(console: Console, name: str | None) -> None:
    from rich.table import Column, Table

    from golfbook import costs
    from golfbook.config import load_config, preset_names
    from golfbook.model import parameter_table

    if name is not None:
        config = load_config(name)
        table = Table("cost of", "value", title=name, title_justify="left")
        for label, value in costs.totals(config).items():
            table.add_row(label, f"{value:,.0f}" if value >= 100 else f"{value:,.3g}")
        for label, value in costs.per_token(config.model, config.train.sequence_length).forward.items():
            table.add_row(f"forward: {label}, MFLOP a token", f"{value / 1e6:,.3f}")
    else:
        heads = ("params", "fwd", "train", "score", "file", "KB", "A100", "H100", "H200")
        columns = (Column(head, justify="right", no_wrap=True) for head in heads)
        table = Table(Column("preset", no_wrap=True), *columns, box=None, padding=(0, 1, 0, 0), pad_edge=False)
        for preset in preset_names():
            config = load_config(preset)
            parameters = parameter_table(config.model)["total"]
            forward, train, _, score, size, saved, a100, _, h100, h200 = costs.totals(config).values()
            values = (parameters / 1e6, forward, train, score, size / 1e6, saved, a100, h100, h200)
            table.add_row(preset, *(f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in values))
    console.print(table)
    console.print(
        "params: million. fwd, train, score: million operations a token (a product and its sum are two), attention "
        "counted in full. file: artifact in MB, estimated within 10 %. KB: activations a token in bfloat16, not "
        "compiled. A100 (PCIe, 40 GB), H100, H200: milliseconds of a step of train.batch_tokens on one GPU, by two "
        "constants chosen on two published runs; on four others the error is 1 to 11 %. "
        "More about one: golfbook presets NAME --cost",
        highlight=False,
    )


def _score(
    path: Path, artifact: Artifact, text: Path, stride: int, window: int | None, tokenizer: Path | None, field: str
) -> dict[str, str]:
    from rich.progress import Progress

    from golfbook import artifact as artifacts
    from golfbook import corpus, documents, scoring
    from golfbook.config import BudgetConfig

    pieces = artifacts.find_tokenizer(path, artifact, tokenizer)
    window = window or artifact.train_window
    if stride > window:
        raise ConfigError(f"--stride {stride} is more than the window of {window} tokens")
    texts = documents.read_documents(text, field)
    tokens, _, total_bytes, changes = corpus.encode_for_scoring(pieces, texts)
    started = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("windows")

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        nll = scoring.score(artifact.build(), tokens, window=window, stride=stride, progress=show)
    seconds = time.monotonic() - started
    values: dict[str, Any] = scoring.summarize(nll, total_bytes)
    report = artifacts.size_report(artifact.bytes, BudgetConfig().limit_bytes)
    return {
        "bits per byte": f"{values['val_bpb']:.6f}",
        "loss (nats a token)": f"{values['val_loss']:.6f}",
        "tokens": f"{values['tokens']:,}",
        "bytes": f"{total_bytes:,} in {len(texts):,} documents",
        "normalisation": changes,
        "window, stride": f"{window}, {stride}",
        "seconds": f"{seconds:.1f}",
        "tokenizer": f"{pieces.path} (not counted in the size, as in the challenge)",
        "artifact": f"{artifact.bytes:,} bytes; with {report['code_bytes']:,} bytes of code {report['total_bytes']:,}, "
        f"{'within' if report['within_budget'] else 'OVER'} the limit of {report['limit_bytes']:,}",
    }


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
