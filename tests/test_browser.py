"""The tour in a real browser: JupyterLab as ``golfbook lab`` starts it, all cells run, a slider moved.

Screenshots are left in ``tests/screenshots/`` to be looked at. Without Chromium or playwright the test is skipped, with
a warning. ``GOLFBOOK_CHROMIUM`` names another Chromium than the ``chromium`` on the path.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import psutil
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

PROJECT = Path(__file__).parents[1]
SCREENSHOTS = PROJECT / "tests" / "screenshots"
DATA = PROJECT / "tests" / "data"
SECONDS = 240  # for any one thing to happen, on a busy machine
STEPS = 20
# The tour's own model on a small real text with its tokenizer: nothing to prepare, few steps.
OVERRIDES = {
    "data.source": "text",
    "data.path": str(DATA / "fineweb_docs_100.jsonl"),
    "data.tokenizer": str(DATA / "fineweb_1024_bpe.model"),
    "data.max_validation_tokens": 4096,
    "train": {"steps": STEPS, "warmdown_steps": 10, "ema_decay": 0.8, "validate_every": 10, "log_every": 2},
}
QUIET = {"fetchNews": "false", "checkForUpdates": False}  # a first start would ask, and go to the internet
WIDE = {"width": 1280, "height": 900}
IMAGE = "img.jupyter-widgets"
SLIDER = ".widget-slider .noUi-handle"
IMAGE_BYTES = """
async image => {
    if (!image.complete || !image.naturalWidth) return null;
    const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
    return Array.from(bytes);
}
"""


def missing() -> str:
    """What is not installed, or nothing."""
    if importlib.util.find_spec("playwright") is None:
        return "the Python package playwright is not installed"
    if importlib.util.find_spec("jupyterlab") is None:
        return "JupyterLab is not installed"
    if chromium() is None:
        return "there is no Chromium: install Debian's package chromium, or set GOLFBOOK_CHROMIUM to one"
    return ""


def chromium() -> str | None:
    return shutil.which(os.environ.get("GOLFBOOK_CHROMIUM") or "chromium")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def copy_of_the_tour(root: Path) -> Path:
    """A project folder with nothing in it but the tour, its parameters made small."""
    (root / "notebooks").mkdir(parents=True)
    (root / "papermill_jobs").mkdir()
    book = nbformat.read(PROJECT / "notebooks" / "00_tour.ipynb", as_version=4)
    (parameters,) = (cell for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
    kept = [line for line in parameters.source.splitlines() if not line.startswith("overrides")]
    parameters.source = "\n".join([*kept, f"overrides: dict = {OVERRIDES!r}"])
    path = root / "notebooks" / "00_tour.ipynb"
    nbformat.write(book, path)
    return path


def end(root: Path) -> None:
    """Kill the server, its kernels and what they started: kernels lead sessions of their own, so go by the mark."""
    own = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("GOLFBOOK_ROOT") == str(root):
                process.kill()
                own.append(process)
        except psutil.Error:
            continue
    psutil.wait_procs(own, timeout=10)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A running ``golfbook lab`` on the copy: what Jupyter wrote about its server, the notebook, and the log."""
    if reason := missing():
        warnings.warn(pytest.PytestWarning(f"THE BROWSER TEST DID NOT RUN: {reason}"), stacklevel=1)
        pytest.skip(reason)
    root, own = tmp_path / "project", tmp_path / "jupyter"
    notebook = copy_of_the_tour(root)
    settings = own / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(QUIET))
    environment = {
        **os.environ,
        "GOLFBOOK_ROOT": str(root),
        "GOLFBOOK_RUNS": str(root / "runs"),
        "GOLFBOOK_CACHE": str(root / "cache"),
        "GOLFBOOK_FIGURES": str(root / "figures"),
        "JUPYTER_CONFIG_DIR": str(own / "config"),
        "JUPYTER_DATA_DIR": str(own / "data"),
        "JUPYTER_RUNTIME_DIR": str(own / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(own / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"),
    }
    environment.pop("GOLFBOOK_STATIC", None)
    environment.pop("JUPYTER_TOKEN", None)
    log = tmp_path / "server.log"
    command = [sys.executable, "-m", "golfbook.cli", "lab", "--no-browser", "--port", str(free_port())]
    try:
        with log.open("wb") as stream:
            server = subprocess.Popen(
                command, env=environment, cwd=root, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
                start_new_session=True,
            )  # fmt: skip
        limit = time.monotonic() + SECONDS
        while not (found := list((own / "runtime").glob("jpserver-*.json"))):
            assert server.poll() is None and time.monotonic() < limit, f"no server:\n{log.read_text()[-3000:]}"
            time.sleep(0.1)
        yield {**json.loads(found[0].read_text()), "notebook": notebook, "log": log, "root": root}
    finally:
        end(root)


@pytest.fixture
def page(lab: dict[str, Any]) -> Iterator[Page]:
    """A page of a fresh Chromium, closed in every case."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        try:
            page = browser.new_page(viewport=WIDE)
            page.set_default_timeout(SECONDS * 1000)
            yield page
        finally:
            browser.close()


def outputs(path: Path) -> list[dict[str, Any]]:
    """All outputs of a saved notebook."""
    book = nbformat.read(path, as_version=4)
    return [out for cell in book.cells if cell.cell_type == "code" for out in cell.outputs]


def picture(image: Locator) -> str:
    """Hash of the bytes an image element shows; empty while it shows none."""
    data = image.evaluate(IMAGE_BYTES)
    return hashlib.sha256(bytes(data)).hexdigest() if data else ""


def changed(image: Locator, before: str) -> str:
    """Wait until an image shows another picture than the one of the hash; the new one's hash."""
    limit = time.monotonic() + SECONDS
    while (now := picture(image)) in ("", before):
        assert time.monotonic() < limit, "the picture did not change"
        time.sleep(0.1)
    return now


def run_all_cells(page: Page, count: int) -> None:
    """Run > Run All Cells; wait until the last cell has its number and the kernel is idle."""
    idle = page.locator("#jp-bottom-panel, #jp-main-statusbar").get_by_text("| Idle")
    idle.wait_for()  # before its kernel is connected, a notebook that is run asks which kernel to take
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    error = page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]')
    last = page.locator(".jp-InputPrompt", has_text=f"[{count}]:")
    last.or_(error).first.wait_for(state="attached")
    idle.wait_for()


def save(page: Page, path: Path) -> None:
    """File > Save, and wait until the file is written."""
    before = path.stat().st_mtime_ns
    page.get_by_role("menuitem", name="File", exact=True).click()
    page.get_by_role("menuitem", name="Save Notebook", exact=True).click()
    limit = time.monotonic() + SECONDS
    while path.stat().st_mtime_ns == before:
        assert time.monotonic() < limit, "the notebook was not saved"
        page.wait_for_timeout(100)
    page.locator(".jp-DirtyIndicator").wait_for(state="detached")


@pytest.mark.browser
def test_the_tour_runs_in_a_browser_and_its_slider_moves_the_picture(lab: dict[str, Any], page: Page) -> None:
    SCREENSHOTS.mkdir(exist_ok=True)
    assert lab["hostname"] == "127.0.0.1" and lab["token"], "the server is to listen on loopback and ask for a token"
    assert page.request.get(f"{lab['url']}api/contents").status == 403
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))

    page.goto(f"{lab['url']}lab/tree/00_tour.ipynb?token={lab['token']}")
    book = nbformat.read(lab["notebook"], as_version=4)
    count = sum(cell.cell_type == "code" for cell in book.cells)
    run_all_cells(page, count)
    save(page, lab["notebook"])
    page.screenshot(path=SCREENSHOTS / "tour_end.png")
    found = outputs(lab["notebook"])
    assert [out for out in found if out["output_type"] == "error" or out.get("name") == "stderr"] == []
