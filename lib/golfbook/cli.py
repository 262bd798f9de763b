"""The command line: ``golfbook run | status | collect | presets | score | export | lab``.

Commands import what they need when they are called, so that ``golfbook --help`` and a job with nothing to do are quick.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from golfbook import __version__
from golfbook.config.tables import EXECUTORS, require
from golfbook.errors import ConfigError, GolfbookError, RunError
from golfbook.terminal import make_console, prepare_streams, say, show_pairs, show_path, show_table, write_json

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
COST_KEYS = (  # of the first values of speed.totals
    *("forward_mflop_a_token", "training_mflop_a_token", "causal_training_mflop_a_token", "scoring_mflop_a_token"),
    *("artifact_bytes", "activation_kb_a_token"),
)
FAILED, USER_ERROR, INTERRUPTED = 1, 2, 130
Json = Annotated[bool, typer.Option("--json", help="Write one JSON document instead; progress goes to stderr.")]


def main() -> None:
    """Run the command line; problems a user can fix are printed without a traceback and end with status 2."""
    prepare_streams()
    debug = "--debug" in sys.argv[1:]
    if debug:
        sys.argv.remove("--debug")
    try:
        app(prog_name="golfbook")
    except GolfbookError as error:
        if debug:
            raise
        for line in f"golfbook: {error}".splitlines():
            say(make_console(stderr=True), line, "red")
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
    executor: Annotated[
        str, typer.Option(help="Where notebooks are executed: processes, or what config/tables.py has been given.")
    ] = "processes",
    as_json: Json = False,
) -> None:
    """Run a job: every variant with every seed, then the tables and the figures.

    Everything is checked before anything runs. What is finished is skipped, what failed is tried again, what was
    stopped or killed goes on, so the same command is the way to start, to repeat and to resume. Ctrl-C stops in order,
    a second one at once.

    Ends with status 0, 1 when a run or figure failed, 2 when the job or its settings are wrong, 130 after Ctrl-C.
    """
    from golfbook import reports
    from golfbook.analysis import summaries
    from golfbook.study import pool
    from golfbook.study.interrupts import Interrupts
    from golfbook.study.plan import plan as make_plan

    console = make_console(stderr=as_json)
    require(EXECUTORS, executor, "executor")
    plan = make_plan(job, workers=workers)
    if dry_run and as_json:
        write_json(summaries.plan_data(plan))
        return
    reports.show_plan(console, plan)
    if dry_run:
        return
    with Interrupts() as interrupts:  # also while the last words are printed
        with reports.follow(console) as follow:
            report = pool.run(plan, follow, redraw=redraw, interrupts=interrupts, executor=executor)
        if as_json:
            write_json(summaries.report_data(report))
        else:
            reports.show_report(console, report)
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
    if report.failures:
        raise typer.Exit(FAILED)


@app.command(epilog="Examples: `golfbook status`, `golfbook status quickstart --seconds`")
def status(
    study: Annotated[str | None, typer.Argument(help="A study; without one, all studies are listed.")] = None,
    seconds: Annotated[bool, typer.Option("--seconds", help="Show where the seconds went, by stage and part.")] = False,
    as_json: Json = False,
) -> None:
    """Show which runs of a study are done, failed, stale or still to do, and why they failed."""
    from golfbook import reports
    from golfbook.analysis import summaries
    from golfbook.files import runs_root
    from golfbook.study import results

    console = make_console()
    if study is not None:
        results.current_runs(study)  # raises for an unknown study
    studies = results.studies() if study is None else [study]
    if as_json:
        found = [summaries.study_data(name, seconds) for name in studies]
        write_json({"studies": found} if study is None else found[0])
    elif seconds:
        for name in studies:
            reports.show_seconds(console, name)
    elif study is not None:
        reports.show_status(console, study, last=False)
        reports.show_study(console, study)
    elif not studies:
        say(console, f"No studies yet under {runs_root()}. Begin with: golfbook run papermill_jobs/quickstart.yaml")
    else:
        for name in studies:
            reports.show_status(console, name)


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
    from golfbook import reports
    from golfbook.files import runs_root
    from golfbook.study import results

    console = make_console()
    frame = results.collect(study)
    reports.show_study(console, study)
    written = [runs_root() / study / name for name in ("results.parquet", "metrics.parquet")]
    note = f"{len(frame)} runs"
    if reference:
        tables, count = results.export_reference(study)
        written += tables
        note += f", {count} of them finished and in the reference tables"
    for path in written:
        say(console, show_path(path))
    say(console, note)


@app.command(epilog="Examples: `golfbook presets`, `golfbook presets quickstart`")
def presets(
    name: Annotated[str | None, typer.Argument(help="Show one preset by groups of parameters.")] = None,
    cost: Annotated[
        bool, typer.Option("--cost", help="Show arithmetic, memory, artifact bytes and step time on named GPUs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the presets with their sizes, or one preset in detail. Nothing is allocated."""
    if cost:
        _show_costs(name, as_json)
        return

    from golfbook.config.load import load_config, preset_names
    from golfbook.model.gpt import parameter_table

    if name is not None:
        groups = parameter_table(load_config(name).model)
        if as_json:
            write_json({"preset": name, "parameters": groups})
            return
        rows = [(group, f"{count:,}", f"{count / groups['total']:.1%}") for group, count in groups.items()]
        heads = ("parameters of", "count", "share")
        show_table(make_console(), heads, rows, title=name, right=heads[1:])
        return
    found = []
    for preset in preset_names():
        c = load_config(preset)
        found.append(
            {
                "preset": preset,
                "parameters": parameter_table(c.model)["total"],
                "layers": c.model.num_layers,
                "width": c.model.model_dim,
                "steps": c.train.steps,
                "tokens_a_step": c.train.batch_tokens,
                "data": c.data.source,
            }
        )
    if as_json:
        write_json({"presets": found})
        return
    names = [key.replace("_", " ") for key in found[0]]
    lines = [tuple(v if isinstance(v, str) else f"{v:,}" for v in one.values()) for one in found]
    show_table(make_console(), names, lines, right=names[1:-1])


@app.command(epilog="Example: `golfbook score runs/quickstart/RUN/artifact.golf --text my_notes.txt --stride 64`")
def score(
    artifact: Annotated[Path, typer.Argument(help="An artifact.golf file.", metavar="ARTIFACT")],
    text: Annotated[Path, typer.Option("--text", help="A .txt or .jsonl file, a folder of them, or a .bin shard.")],
    stride: Annotated[int, typer.Option(min=1, help="Targets scored a window; smaller: more context, slower.")] = 64,
    window: Annotated[int | None, typer.Option(min=2, help="Tokens a window. Default: as in training.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The SentencePiece .model. Default: tokenizer.model beside the artifact.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Key of the text in a .jsonl line.")] = "text",
    as_json: Json = False,
) -> None:
    """Give the bits per byte of an artifact on any text, with sliding windows, each token scored once.

    The tokenizer lies beside the artifact and is checked against the hash inside it; as in the challenge, its bytes do
    not count towards the size. The bytes that divide are the UTF-8 bytes of the text as it is in the file.
    """
    from rich.progress import Progress

    from golfbook.compress import budget
    from golfbook.config.schema import BudgetConfig
    from golfbook.train import script

    with contextlib.ExitStack() as shown:
        bar = Progress(console=make_console(stderr=True), transient=True)
        task = bar.add_task("windows")

        def show(done: int, total: int) -> None:
            if not bar.live.is_started:  # not before: a message about a wrong file stands alone
                shown.enter_context(bar)
            bar.update(task, completed=done, total=total)

        values = script.score_files(
            artifact, [text], stride=stride, window=window, tokenizer=tokenizer, text_field=text_field, progress=show
        )
    values |= budget.size_report(values["artifact_bytes"], BudgetConfig().limit_bytes)
    if as_json:
        write_json(values)
    else:
        show_pairs(make_console(), _score_text(values))


@app.command(epilog="Example: `golfbook export runs/quickstart/RUN --author 'A. Name' --github-id name`")
def export(
    folder: Annotated[Path, typer.Argument(help="A run folder whose stages are all done.", metavar="RUN")],
    to: Annotated[Path | None, typer.Option(help="Folder to write. Default: submission/ in the run folder.")] = None,
    author: Annotated[str, typer.Option(help="For submission.json.")] = "",
    github_id: Annotated[str, typer.Option(help="For submission.json.")] = "",
    name: Annotated[str, typer.Option(help="For submission.json. Default: study, variant and seed.")] = "",
    blurb: Annotated[str, typer.Option(help="For submission.json. Default: size, preset and windows.")] = "",
    modules: Annotated[bool, typer.Option("--modules", help="Show what each module adds to the script.")] = False,
) -> None:
    """Write a run as a submission to the challenge: one small script, the artifact, and what belongs to them.

    The script holds the library code that trains, exports and scores, minified and compressed, and needs no golfbook.
    """
    from golfbook.compress import packing, submission
    from golfbook.run import open_run

    run = open_run(folder)
    target = to or run.path / "submission"
    found = submission.export_submission(run, target, author=author, github_id=github_id, name=name, blurb=blurb)
    if modules:
        rows = [(module, f"{cost:,}") for module, cost in packing.costs(packing.unpack(packing.script())).items()]
        show_table(make_console(), ("module", "bytes saved without it"), rows, right=("bytes saved without it",))
    show_pairs(make_console(), {key: str(value) for key, value in found.items()})
    say(make_console(), f"written to {show_path(target.resolve())}")


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


def _show_costs(name: str | None, as_json: bool) -> None:
    from golfbook.config.load import load_config, preset_names
    from golfbook.model import costs
    from golfbook.model.gpt import parameter_table
    from golfbook.train import speed

    console = make_console()
    totals = {preset: speed.totals(load_config(preset)) for preset in ([name] if name else preset_names())}
    if as_json:
        found = []
        for preset, values in totals.items():
            left = iter(values.values())
            one = {"preset": preset, **dict(zip(COST_KEYS, left, strict=False))}
            found.append({**one, "step_ms": dict(zip(speed.GPUS, left, strict=True))})
        write_json({"presets": found})
        return
    if name is not None:
        config = load_config(name)
        rows = [(label, _three_digits(value)) for label, value in totals[name].items()]
        for label, value in costs.per_token(config.model, config.train.sequence_length).forward.items():
            rows.append((f"forward: {label}, MFLOP a token", f"{value / 1e6:,.3f}"))
        show_table(console, ("cost of", "value"), rows, title=name, right=("value",))
    else:
        heads = ("preset", "params", "fwd", "train", "score", "file", "KB", "A100", "H100", "H200")
        lines = []
        for preset, values in totals.items():
            parameters = parameter_table(load_config(preset).model)["total"]
            forward, train, _, score, size, saved, a100, _, h100, h200 = values.values()
            numbers = (parameters / 1e6, forward, train, score, size / 1e6, saved, a100, h100, h200)
            lines.append((preset, *map(_three_digits, numbers)))
        show_table(console, heads, lines, right=heads[1:])
    say(
        console,
        "params: million. fwd, train, score: million operations a token (a product and its sum are two), attention "
        "counted in full. file: artifact in MB, estimated within 10 %. KB: activations a token in bfloat16, not "
        "compiled. A100 (PCIe, 40 GB), H100, H200: milliseconds of a step of train.batch_tokens on one GPU, by two "
        "constants chosen on two published runs; on four others the error is 1 to 11 %. "
        "More about one: golfbook presets NAME --cost",
    )


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.3g}"


def _score_text(found: dict[str, Any]) -> dict[str, str]:
    return {
        "bits per byte": f"{found['val_bpb']:.6f}",
        "loss (nats a token)": f"{found['val_loss']:.6f}",
        "tokens": f"{found['tokens']:,}",
        "bytes": f"{found['bytes']:,} in {found['documents']:,} documents",
        "normalisation": found["normalisation"],
        "window, stride": f"{found['window']}, {found['stride']}",
        "seconds": f"{found['seconds']:.1f}",
        "tokenizer": f"{found['tokenizer']} (not counted in the size, as in the challenge)",
        "artifact": f"{found['artifact_bytes']:,} bytes; with {found['code_bytes']:,} bytes of code "
        f"{found['total_bytes']:,}, {'within' if found['within_budget'] else 'OVER'} the limit of "
        f"{found['limit_bytes']:,}",
    }


if __name__ == "__main__":
    main()
