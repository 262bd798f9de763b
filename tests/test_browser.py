"""The tour in a real browser: JupyterLab as ``golfbook lab`` starts it, all cells run, a slider moved.

Screenshots are left in ``tests/screenshots/`` to be looked at. Without Chromium or playwright the test is skipped, with
a warning. ``GOLFBOOK_CHROMIUM`` names another Chromium than the ``chromium`` on the path.
"""

from __future__ import annotations

import base64
import contextlib
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
    "train": {"steps": STEPS, "schedule": {"warmdown_steps": 10}, "averaging": {"ema_decay": 0.8}},
    "machine": {"validate_every": 10, "log_every": 2},
}
QUIET = {"fetchNews": "false", "checkForUpdates": False}  # a first start would ask, and go to the internet
WIDTH, HEIGHT = 1280, 900
ERROR = '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]'  # exceptions are shown as this too
IMAGE = "img.jupyter-widgets"
SLIDER = ".widget-slider .noUi-handle"
IMAGE_BYTES = """
async image => {
    if (!image.complete || !image.naturalWidth) return null;
    const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
    return Array.from(bytes);
}
"""
BOTTOM = """
async cell => {
    for (let frame = 0; frame < 3; frame++) await new Promise(requestAnimationFrame);
    return cell.getBoundingClientRect().bottom;
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


def server_info(folder: Path) -> dict[str, Any]:
    """What a Jupyter server that listens has written about itself; empty before."""
    for path in folder.glob("jpserver-*.json"):
        with contextlib.suppress(ValueError):  # it is being written
            return dict(json.loads(path.read_text()))
    return {}


def end(root: Path) -> None:
    """Kill the server, its kernels and what they started: kernels lead sessions of their own, so go by the mark."""
    for _ in range(5):
        marked = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # gone meanwhile, or another user's
                if process.environ().get("GOLFBOOK_ROOT") == str(root):
                    process.kill()
                    marked.append(process)
        if not marked:
            return
        psutil.wait_procs(marked, timeout=10)
    raise RuntimeError(f"could not end {marked}")


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A running ``golfbook lab`` on the copy: what Jupyter wrote about its server, and where things are."""
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
        while not (info := server_info(own / "runtime")):
            assert server.poll() is None and time.monotonic() < limit, f"no server:\n{log.read_text()[-3000:]}"
            time.sleep(0.1)
        yield {**info, "notebook": notebook, "root": root}
    finally:
        end(root)


@pytest.fixture
def page(lab: dict[str, Any]) -> Iterator[Page]:
    """A page of a fresh Chromium, closed in every case."""
    from playwright.sync_api import Error, sync_playwright

    SCREENSHOTS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
        try:
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            page.set_default_timeout(SECONDS * 1000)
            yield page
            with contextlib.suppress(Error):
                page.screenshot(path=SCREENSHOTS / "last.png", timeout=10_000)  # what there was to see at a failure
        finally:
            browser.close()


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
    idle = page.locator("#jp-main-statusbar").get_by_text("| Idle")
    idle.wait_for()  # before its kernel is connected, a notebook that is run asks which kernel to take
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    error = page.locator(ERROR, has_text="Traceback")
    last = page.locator(".jp-InputPrompt", has_text=f"[{count}]:")
    last.or_(error).first.wait_for(state="attached")
    assert error.all_text_contents() == []
    idle.wait_for()


def save(page: Page, path: Path) -> None:
    """File > Save, and wait until the file is written."""
    before = path.stat().st_mtime_ns
    page.get_by_role("menuitem", name="File", exact=True).click()
    page.locator('.lm-Menu-item[data-command="docmanager:save"]').click()
    limit = time.monotonic() + SECONDS
    while path.stat().st_mtime_ns == before:
        assert time.monotonic() < limit, "the notebook was not saved"
        page.wait_for_timeout(100)
    page.locator(".jp-DirtyIndicator").wait_for(state="detached")


def photograph(page: Page, path: Path) -> None:
    """The whole notebook in one picture: heights of cells off the screen are guesses, so grow until all is seen."""
    bottom = page.locator(".jp-Notebook .jp-Cell").last
    page.locator(".jp-WindowedPanel-outer").evaluate("outer => outer.scrollTo(0, 0)")
    height = 0
    while height < (needed := int(bottom.evaluate(BOTTOM)) + 100):
        height = needed
        page.set_viewport_size({"width": WIDTH, "height": min(height, 12_000)})
    page.wait_for_function("() => Array.from(document.images).every(image => image.complete)")
    page.locator(".jp-NotebookPanel").screenshot(path=path)


@pytest.mark.browser
def test_the_tour_runs_in_a_browser_and_its_slider_moves_the_picture(lab: dict[str, Any], page: Page) -> None:
    assert lab["hostname"] == "127.0.0.1" and lab["token"], "the server is to listen on loopback and ask for a token"
    assert page.request.get(f"{lab['url']}api/contents").status == 403

    page.goto(f"{lab['url']}lab/tree/00_tour.ipynb?token={lab['token']}")
    cells = [cell for cell in nbformat.read(lab["notebook"], as_version=4).cells if cell.cell_type == "code"]
    run_all_cells(page, len(cells))
    page.screenshot(path=SCREENSHOTS / "end.png")
    save(page, lab["notebook"])
    cells = [cell for cell in nbformat.read(lab["notebook"], as_version=4).cells if cell.cell_type == "code"]
    outputs = [out for cell in cells for out in cell.outputs]
    assert [out for out in outputs if out.output_type == "error"] == []
    assert [out.text for out in outputs if out.output_type == "stream" and "Traceback" in out.text] == []
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    (result,) = (lab["root"] / "runs" / "tour").glob("*/result.test_time_training.json")
    assert f"**{json.loads(result.read_text())['val_bpb']:.4f}**" in outputs[-1].data["text/markdown"]

    # the picture that moved during training ends as the one of the finished run, in the cell below
    (curve,) = (cell.outputs[0].data["image/png"] for cell in cells if cell.source.startswith("monitor.attach("))
    live = page.locator(IMAGE).first
    assert picture(live) == hashlib.sha256(base64.b64decode(curve)).hexdigest()

    printed = "".join(out.text for out in outputs if out.output_type == "stream")
    assert "00.1 is open" in printed and "00.2 is open" in printed
    panels = page.locator(".widget-vbox").filter(has=page.locator(SLIDER))
    panel, image = panels.first, panels.first.locator(IMAGE)  # it has two sliders: a guess, and the bits
    handle, readout = panel.locator(SLIDER).nth(1), panel.locator(".widget-readout").nth(1)
    panel.scroll_into_view_if_needed()
    first, source, value = picture(image), image.get_attribute("src"), readout.inner_text()
    assert first, "the panel shows no picture"
    page.screenshot(path=SCREENSHOTS / "slider_before.png")
    handle.focus()
    handle.press("ArrowRight")
    second = changed(image, first)
    assert image.get_attribute("src") != source
    assert int(readout.inner_text()) == int(value) + 1
    page.screenshot(path=SCREENSHOTS / "slider_after.png")
    handle.press("ArrowLeft")
    assert changed(image, second) == first

    ladder = panels.nth(1)  # its last bar is empty until something is guessed
    ladder.scroll_into_view_if_needed()
    hidden = picture(ladder.locator(IMAGE))
    assert hidden, "the panel shows no picture"
    ladder.locator(SLIDER).focus()
    ladder.locator(SLIDER).press("ArrowRight")
    changed(ladder.locator(IMAGE), hidden)
    page.screenshot(path=SCREENSHOTS / "guess.png")

    photograph(page, SCREENSHOTS / "whole.png")
