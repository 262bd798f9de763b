"""One notebook, executed by papermill in a process of its own, with an end that can be trusted.

Papermill changes the working folder of its whole process, and it marks the cells of a dead kernel as completed; so each
notebook gets its own process (``python -m golfbook.study.notebook stage ...``), and what counts is the exit status
together with the result file the library wrote. The working folder of a notebook is ``notebooks/``, as in JupyterLab.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import psutil
from filelock import FileLock, Timeout

from golfbook import activity, errors
from golfbook.errors import GolfbookError, RunError
from golfbook.files import (
    atomic_write_bytes,
    atomic_write_json,
    figures_root,
    log_tail,
    project_root,
    read_json,
    runs_root,
    sha256_file,
)
from golfbook.provenance import code_sha256
from golfbook.run import STAGE_NOTEBOOKS, Run, exit_with_parent, open_run
from golfbook.study.plan import executed_notebook, notebook_path, stage_finished
from golfbook.study.results import digest, rows
from golfbook.study.writes import noted

TRACEBACK_LINES = 12
SOCKET_PATH = 90  # bytes; operating systems allow little more than 100
START_SECONDS = 3600  # a cold network file system needs minutes for its imports; a kernel that dies is seen at once
PRIVATE = "golfbook-"  # how the folders of sockets under the temporary folder begin


def execute_stage(run_dir: str | Path, stage: str, overrides: Mapping[str, Any], private: Path) -> None:
    """Execute the notebook of a stage for one run folder, unless the stage is finished; ``private`` as in execute.

    A lock of the run folder lets one process at a time do this; a second one waits and then finds the work done.
    Raises :class:`RunError` when the notebook failed or left no result; the failure is then noted in the run folder.
    """
    run = open_run(run_dir)
    if run.is_locked("job"):
        print(f"{run.name}: waiting for another process that works on this run", flush=True)
    with run.lock("job"), activity.notebook(run.path, stage):
        if stage_finished(run, stage):
            print(f"{run.name}: {stage} is already done", flush=True)
            return
        before = run.read_result(stage)
        parameters = {
            "preset": run.config.preset,
            "seed": run.config.seed,
            "study": run.study,
            "variant": run.variant,
            "overrides": dict(overrides),
            "run_dir": str(run.path),
        }
        target = executed_notebook(run, stage)
        try:
            partial = execute(notebook_path(STAGE_NOTEBOOKS[stage]), target, parameters, private)
            if not run.is_done(stage):
                result = run.read_result(stage) or {}
                raise RunError(
                    result.get("message")
                    or f"the notebook ran to its end, but result.{stage}.json does not say 'ok'; see {partial}"
                )
        except RunError as error:
            note_failure(run, stage, before, str(error))
            raise
        partial.replace(target)


def note_failure(run: Run, stage: str, before: Mapping[str, Any] | None, message: str) -> None:
    """Write the failure of a stage into its run folder, unless the stage did so itself since it held ``before``."""
    now = run.read_result(stage)
    noted = now is not None and now.get("status") == "failed" and now != before
    if not noted and not run.is_done(stage):
        run.write_failure(stage, message)


def execute_figure(study: str, name: str, private: Path) -> None:
    """Execute a plotting notebook for a study and note what it was made from in ``figures.<name>.json``."""
    folder = runs_root() / study
    source, target = notebook_path(name), folder / "notebooks" / f"{name}.ipynb"
    found, notebook, code = digest(rows(study)), sha256_file(source), code_sha256(everything=True)
    written = private / "written.txt"
    watch = f"__import__('golfbook.study.writes').study.writes.note_writes({str(figures_root())!r}, {str(written)!r})"
    with activity.notebook(folder, f"figure {name}", activity.FIGURE):
        execute(source, target, {"study": study}, private, watch).replace(target)
    atomic_write_json(
        figure_record(study, name),
        {
            "results_sha256": found,
            "notebook_sha256": notebook,
            "code_sha256": code,
            "outputs": [str(path.relative_to(figures_root())) for path in noted(written)],
        },
    )


def figure_record(study: str, name: str) -> Path:
    """Return the file that says what a figure notebook was last executed on, and which pictures it wrote."""
    return runs_root() / study / f"figures.{name}.json"


def read_figure_record(study: str, name: str) -> dict[str, Any]:
    """Read the file :func:`figure_record`; empty where there is none or it is unreadable."""
    return read_json(figure_record(study, name))


def execute(source: Path, target: Path, parameters: Mapping[str, Any], private: Path, first_line: str = "") -> Path:
    """Execute ``source`` with ``parameters`` into ``<target>.partial.ipynb`` and return that path.

    The caller renames it once it knows that the work is done; after a failure it stays where it is. What the notebook
    prints goes to standard output. ``private`` is a folder for the sockets of this one kernel, which executes
    ``first_line`` before all cells. Raises :class:`RunError` with the cell and the end of the traceback.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config as TraitConfig

    from golfbook.study.interpreter import Interpreter

    partial = target.with_suffix(".partial.ipynb")
    os.environ["JUPYTER_RUNTIME_DIR"] = str(private)
    # Sockets in a private folder: kernels that start at the same moment can take each other's TCP port (a port is
    # chosen, closed, and opened again by the kernel) and then talk to the wrong client.
    sockets = {"transport": "ipc", "ip": str(private / "kernel")}
    if os.name != "posix" or len(os.fsencode(sockets["ip"])) > SOCKET_PATH:
        sockets = {}
    noise, status = private / "kernel.txt", private / "status.txt"
    process = {"errors": str(noise), "status": str(status), "first_line": first_line}
    process["connection_file"] = str(private / "connection.json")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        papermill.execute_notebook(
            _literal(source),
            _literal(partial),
            parameters=dict(parameters),
            kernel_name="python3",  # whatever name the author's machine gave its kernel
            language="python",
            kernel_manager_class=Interpreter,
            start_timeout=START_SECONDS,
            progress_bar=False,
            stdout_file=sys.stdout,
            stderr_file=sys.stdout,
            request_save_on_cell_execute=True,
            cwd=project_root() / "notebooks",
            config=TraitConfig({"Interpreter": {**sockets, **process}}),
        )
    except PapermillExecutionError as error:
        raise RunError(_explain(error, partial)) from None
    except DeadKernelError:
        raise RunError(
            f"the kernel of {source.name} was killed{_last_cell(partial)}, perhaps for lack of memory; "
            f"the notebook up to there is {partial}{log_tail(noise)}"
        ) from None
    except CellTimeoutError as error:
        raise RunError(f"{source.name} took too long: {str(error).splitlines()[0]}; see {partial}") from None
    except RuntimeError as error:  # nbclient's and jupyter_client's word for a kernel that never answered
        cause = describe_exit(int(status.read_text(encoding="utf-8"))) if status.exists() else str(error)
        raise RunError(
            f"{source.name}: no kernel could be started by {sys.executable}: {cause}{log_tail(noise)}"
        ) from error
    except OSError as error:
        raise RunError(
            f"cannot write {partial}: {error.strerror or error}; check free space and permissions of {partial.parent}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            print(noise.read_text(encoding="utf-8", errors="replace"), end="", flush=True)
    return partial


def _literal(path: Path) -> str:
    """Write a path so that papermill, which takes paths for templates, leaves it as it is."""
    return str(path).replace("{", "{{").replace("}", "}}")


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Yield a new folder under the temporary folder that nobody else can read, and remove it at the end.

    Those that killed processes have left are removed first. A lock beside each says whether its process lives, which
    a process id does not say where several machines or containers share a temporary folder. Raises :class:`RunError`
    where the disk refuses.
    """
    base = Path(tempfile.gettempdir())
    for left in base.glob(f"{PRIVATE}*.lock"):
        with contextlib.suppress(OSError, Timeout), FileLock(left, timeout=0):
            shutil.rmtree(left.with_suffix(""), ignore_errors=True)
            left.unlink()
    try:
        handle, name = tempfile.mkstemp(prefix=PRIVATE, suffix=".lock", dir=base)
        os.close(handle)
        lock, folder = Path(name), Path(name).with_suffix("")
        held = FileLock(lock)
        held.acquire()
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise RunError(f"cannot write to {base}: {error.strerror or error}; check space, or set TMPDIR") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # Windows removes no open file; the next call does
            lock.unlink()
        held.release()


def end_kernels(private: Path) -> None:
    """Kill the kernels whose sockets are in this folder: of a process that was killed before it could do so."""
    for process in psutil.process_iter(["cmdline"]):
        if any(word.startswith(f"{private}{os.sep}") for word in process.info["cmdline"] or []):
            with contextlib.suppress(psutil.Error):
                psutil.Process(process.pid).kill()


def child_main(arguments: list[str]) -> NoReturn:
    """Run the subprocess: ``KIND PARENT ERRORS PRIVATE``, then ``RUN_DIR STAGE OVERRIDES`` or ``STUDY NAME``.

    Ends with status 0, or 1 after writing the cause to the file ERRORS, or 3 where the process PARENT has died.
    """
    kind, parent, report, private, *rest = arguments
    signal.signal(signal.SIGTERM, _stop)
    if os.getppid() != int(parent):
        os._exit(3)
    exit_with_parent(_kill_kernel)
    print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {kind} {' '.join(rest[:2])}", flush=True)
    try:
        if kind == "stage":
            execute_stage(rest[0], rest[1], json.loads(rest[2]), Path(private))
        else:
            execute_figure(rest[0], rest[1], Path(private))
    except Exception as error:
        message = str(error) if isinstance(error, GolfbookError) else f"{type(error).__name__}: {error}"
        if not isinstance(error, GolfbookError):
            traceback.print_exc()
        print(f"FAILED: {message}", flush=True)
        atomic_write_bytes(report, message.encode())
        sys.exit(1)
    sys.exit(0)


def _explain(error: Any, partial: Path) -> str:
    """Return the message of a failed cell: that of our own error where it was one, else the end of the traceback."""
    from papermill.exceptions import strip_color

    where = f"in cell {error.cell_index} of {partial}"
    kind = getattr(errors, error.ename, None)
    if isinstance(kind, type) and issubclass(kind, GolfbookError):
        return f"{error.evalue} ({where})"
    lines = [line for line in strip_color("\n".join(error.traceback)).splitlines() if line.strip()]
    head = f"{error.ename}: {error.evalue}".strip().splitlines()[0] if error.ename else "the cell failed"
    return "\n".join([f"{head} ({where})", *(f"    {line}" for line in lines[-TRACEBACK_LINES:])])


def _last_cell(partial: Path) -> str:
    """Return ``" in cell n ('source')"``: the last cell that started, whatever papermill says was completed."""
    import nbformat

    try:
        cells = nbformat.read(partial, as_version=4).cells
    except (OSError, ValueError):
        return ""
    started = [(i, c) for i, c in enumerate(cells) if c.metadata.get("papermill", {}).get("start_time")]
    started = [(i, c) for i, c in started if c.cell_type == "code"]
    if not started:
        return ""
    index, cell = started[-1]
    lines = cell.source.strip().splitlines()
    return f" in cell {index} ('{lines[0][:60]}')" if lines else f" in cell {index}"


def _kill_kernel() -> None:
    """Kill the kernel, the one direct child. A trainer below it is detached on purpose and may go on."""
    for child in psutil.Process().children():
        child.kill()


def _stop(*_: object) -> NoReturn:
    _kill_kernel()
    os._exit(128 + signal.SIGTERM)


def describe_exit(code: int) -> str:
    """Describe the exit status of a subprocess that left no message."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"the process was killed by {name}, perhaps for lack of memory"
    return f"the process ended with status {code}"


def error_path(log: Path) -> Path:
    """Return the file in which a subprocess leaves the cause of its failure, beside its log."""
    return log.with_suffix(".error.txt")


def stage_log(run: Run, stage: str) -> Path:
    """Return the log of the process that executes a stage's notebook."""
    return run.notebooks_path / f"{stage}.log"


if __name__ == "__main__":
    child_main(sys.argv[1:])
