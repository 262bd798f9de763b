"""README and docs: what they say about files, sections, packages and numbers is what is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pandas as pd
import pytest
from pydantic import BaseModel

import golfbook
from golfbook.analysis import frontier
from golfbook.config.schema import Config
from test_imports import ROOMS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(golfbook.__file__).parent
WHERE = ("README.md", "docs/*.md", "runs/published/*.md", "runs/reference/*/README.md", "tests/*/README.md")
PAGES = sorted(path for pattern in WHERE for path in ROOT.glob(pattern))
NUMBER = r"\d+(?:\.\d+)?"
POINTER = re.compile(rf"(?:PR (\d{{4}})[^.()\"]{{0,25}} )?sections? ({NUMBER}(?:(?:, | and | to |-){NUMBER})*)")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def tables(name: str) -> dict[str, list[list[str]]]:
    """Tables of a page by the text of their first head: the cells of each row."""
    found: dict[str, list[list[str]]] = {}
    rows: list[list[str]] = []
    for line in read(name).splitlines():
        if not line.startswith("|"):
            rows = []
        elif rows:
            rows.append([cell.strip() for cell in line.strip("|").split(" |")])
        else:
            rows = found[line.split("|")[1].strip()] = [[]]
    return {head: rows[2:] for head, rows in found.items()}


def anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.strip("# ").lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, heading = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), target
        lines = file.read_text(encoding="utf-8").splitlines() if heading else []
        assert not heading or heading in {anchor(line) for line in lines if line.startswith("#")}, target


def test_readme_leads_to_every_page_of_the_docs_and_every_notebook() -> None:
    missing = [
        path.name
        for path in [*(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
        if f"]({path.relative_to(ROOT).as_posix()}" not in read("README.md")
    ]
    assert not missing


def test_tree_of_readme_has_every_package_and_module_in_the_order_of_imports() -> None:
    tree = read("README.md").partition("lib/golfbook/\n")[2].partition("\nnotebooks/")[0]
    named = [name for line in tree.splitlines() for name in re.split(r"\s{2,}", line.strip())[0].split()]
    packages = [path.parent.name for path in PACKAGE.glob("*/__init__.py")]
    modules = [path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"]
    assert named == ROOMS and sorted(named) == sorted(packages + modules)


def test_headline_table_is_that_of_the_committed_results() -> None:
    results = pd.read_csv(ROOT / "runs/reference/quickstart/results.csv")
    expected = []
    for variant, rows in results.groupby("variant", sort=False):
        bpb = rows["test_time_training_val_bpb"]
        spread = f"{bpb.mean():.4f} ± {bpb.std():.4f}"
        numbers = [f"{rows[key].mean():,.0f}" for key in ("artifact_bytes", "train_seconds")]
        expected.append([variant, str(len(rows)), spread, *numbers])
    assert sorted(tables("README.md")["variant"]) == sorted(expected)
    assert f"is {results['unigram_bpb'].iloc[0]:.4f} BPB" in read("README.md")


def sections(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all sections below one."""
    found = []
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += [prefix + name, *sections(field.annotation, f"{prefix}{name}.")]
    return found


def test_sections_of_the_docs_are_those_of_the_configuration() -> None:
    assert [row[0].strip("`") for row in tables("docs/running.md")["section"]] == sections(Config)


def test_environment_variables_are_in_the_docs() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    used = set(re.findall(r"GOLFBOOK_\w+", text)) - {"GOLFBOOK_JOB"}  # that one is between our own processes
    listed = {row[0].strip("`") for row in tables("docs/running.md")["variable"]}
    assert used == {name for name in listed if name.startswith("GOLFBOOK_")}


def pointers(text: str) -> list[tuple[str, str]]:
    """(pull request or "", section) of each pointer to the description of the published code."""
    found = []
    for system, numbers in POINTER.findall(" ".join(text.split())):
        found += [(system, number) for number in re.findall(NUMBER, numbers)]
    return found


def described() -> dict[str, set[str]]:
    """Sections that the tables of docs/published.md explain, by pull request."""
    found: dict[str, set[str]] = {}
    for head, rows in tables("docs/published.md").items():
        if head.startswith("PR "):
            for system in re.findall(r"\d{4}", head):
                found[system] = {number for row in rows for number in row[0].split(", ")}
    return found


def test_pointers_are_seen() -> None:
    text = "see (PR 1170, section 4.1), PR 1166 sections 6,\n  11 and 17.5; section 3"
    assert pointers(text) == [("1170", "4.1"), ("1166", "6"), ("1166", "11"), ("1166", "17.5"), ("", "3")]


def test_sections_that_docstrings_point_at_are_explained() -> None:
    explained = described()
    assert set(explained) == {"1166", "1170", "1232", "1406"}
    seen = 0
    for path in PACKAGE.rglob("*.py"):
        for system, number in pointers(path.read_text(encoding="utf-8")):
            known = explained[system] if system else set.union(*explained.values())
            assert number in known, f"{path.name}: PR {system} section {number} is not in docs/published.md"
            seen += 1
    assert seen > 50


def test_tables_of_published_sections_name_modules_that_are_there() -> None:
    for head, rows in tables("docs/published.md").items():
        if head.startswith("PR "):
            names = [name for row in rows for name in re.findall(r"`([^`]+)`", row[3])]
            assert names and all((PACKAGE / name).exists() for name in names)


def test_modules_that_pages_name_are_there() -> None:
    for page in PAGES:
        for name in re.findall(r"`((?:lib|tests|papermill_jobs|docs)/[\w/.]+)`", page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_python_in_the_docs_imports() -> None:
    blocks = re.findall(r"```python\n(.*?)```", "".join(page.read_text(encoding="utf-8") for page in PAGES), re.DOTALL)
    assert blocks
    for block in blocks:
        for node in ast.parse(block).body:
            if isinstance(node, ast.ImportFrom):
                exec(compile(ast.Module([node], []), "docs", "exec"), {})


def ours_over(reference: tuple[str, float, str]) -> dict[int, str]:
    """Bytes of ours over those of another recipe by training length, as the pages write them."""
    found = frontier.by_length(frontier.read_table(), [reference])
    return {
        row.steps: f"{row.mean:.3f} [{row.low:.3f}, {row.high:.3f}], n = {row.n}" for row in found.itertuples() if row.n
    }


def test_sizes_at_equal_quality_are_those_of_the_committed_table() -> None:
    expected = [[*ours_over(reference).values()] for reference in frontier.REFERENCES]
    assert [row[1:] for row in tables("docs/benchmarks.md")["ours, over"]] == expected
    readme = " ".join(read("README.md").split())
    for reference in (frontier.REFERENCES[0], frontier.REFERENCES[-1]):
        assert ours_over(reference)[1600] in readme
