"""Bytes at equal quality: published quantisers, the records' recipe and ours, on the models of a study.

    golfbook run papermill_jobs/size_quality.yaml
    python tests/benchmarks/bench_sizes.py [runs/size_quality] [--out TABLE.csv] [--targets 65536] [--only PATTERN]

Every trained run below the folder is stored in every way at every rate; each artifact is read back and scored. Printed
are bytes at the quality of the published quantiser and of the records' recipe, as ratios seed by seed. With --out the
table is written, and rows that are there already are not measured again. With --pieces the bytes of the first run's
artifacts are written part by part, at their rates and at the divergence of PR 1166 at 6 bits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch

from golfbook.analysis import frontier
from golfbook.compress.calibration import calibrate
from golfbook.compress.quantizer import Statistics
from golfbook.config.schema import Config
from golfbook.data import dataset
from golfbook.files import runs_root
from golfbook.model.gpt import GPT
from golfbook.provenance import processor
from golfbook.run import open_run
from golfbook.train.checkpoints import load_model

FINE = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)
COARSE = (2.0, 3.0, 3.5, 4.0, 5.0)
WHOLE = (3, 4, 5, 6, 7, 8)
FEW = (2.5, 3.5, 4.5)  # of what did not stay


def rates(recipe: str, every: bool) -> tuple[float, ...]:
    """Return the rates at which a recipe is measured; none where only the main ones are asked for."""
    if not every and recipe not in frontier.MAIN:
        return ()
    if frontier.RECIPES[recipe]["quantizer"] == "percentiles":
        return WHOLE
    if recipe in [after for _, _, after in frontier.SIDEWAYS[1:]]:
        return FEW
    return tuple(bits + (recipe == frontier.RECORDS) for bits in (FINE if every else COARSE))


def models(folder: Path, only: str) -> list[Path]:
    """Return the run folders below ``folder`` that have finished training, in order."""
    return sorted(path.parent for path in folder.glob("*/result.training.json") if only in path.parent.name)


def opened(path: Path) -> tuple[Config, dataset.Dataset, GPT]:
    """Return what a run was trained with, with all of the validation text, and its model."""
    run = open_run(path)
    config = run.config.model_copy(update={"data": run.config.data.model_copy(update={"max_validation_tokens": 0})})
    return config, dataset.prepare(config), load_model(run)


def statistics_of(config: Config, data: dataset.Dataset, model: GPT) -> Statistics:
    """Return what the calibrated recipes need to know of a model."""
    found = calibrate(model, frontier.settings(config, frontier.OURS, 3.0), data)
    assert found is not None
    return found


def measured(path: Path, every: bool, known: pd.DataFrame, targets: int) -> pd.DataFrame:
    """Return the rows of one run that are not known yet."""
    config, data, model = opened(path)
    mine = known[(known["steps"] == config.train.steps) & (known["seed"] == config.seed)]
    done = set(mine["recipe"])
    asked = {recipe: rates(recipe, every) for recipe in frontier.RECIPES if recipe not in done}
    asked = {recipe: bits for recipe, bits in asked.items() if bits}
    if not asked:
        return pd.DataFrame()
    table = frontier.measure(model, config, data, statistics_of(config, data, model), asked, targets)
    return table.assign(steps=config.train.steps, seed=config.seed)[list(frontier.COLUMNS)]


def pieces(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Return the parts of one run's artifacts by the main recipes: at their rates, and at PR 1166's divergence."""
    config, data, model = opened(path)
    statistics, rows = statistics_of(config, data, model), []
    mine = table[(table["steps"] == config.train.steps) & (table["seed"] == config.seed)]
    goal = mine[(mine["recipe"] == frontier.ANCHOR[0]) & (mine["bits"] == frontier.ANCHOR[1])]["divergence_bpb"]
    for recipe in frontier.MAIN:
        own = mine[mine["recipe"] == recipe]
        equal = frontier.needed(mine, recipe, frontier.ANCHOR, size="bits").iloc[0]
        asked = [*zip(own["bits"], own["divergence_bpb"], [False] * len(own), strict=True)]
        if recipe != frontier.NO_FLOOR:  # which knows whole bits only
            asked.append((equal, goal.iloc[0], True))
        for bits, divergence, at_anchor in asked:
            artifact = frontier.stored(model, config, data, statistics, recipe, float(bits))
            named = {"steps": config.train.steps, "seed": config.seed, "recipe": recipe, "bits": round(bits, 4)}
            found = {"at_anchor": at_anchor, "divergence_bpb": divergence, **frontier.parts(artifact)}
            rows.append(named | found)
    return pd.DataFrame(rows)


def compare(table: pd.DataFrame) -> None:
    """Print the bytes of every recipe at the quality of others, as ratios seed by seed."""
    for recipe in frontier.RECIPES:
        for row in frontier.by_length(table, frontier.REFERENCES, recipe).itertuples():
            if row.n:
                over = f"'{row.reference}' at {row.bits:g} bits, {row.size}"
                print(f"{row.steps:5} steps, {recipe} over {over}: {row.mean:.3f} "
                      f"[{row.low:.3f}, {row.high:.3f}] n = {row.n}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=runs_root() / "size_quality")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pieces", type=Path)
    parser.add_argument("--targets", type=int, default=65536)
    parser.add_argument("--only", default="", help="runs whose names contain this")
    parser.add_argument("--parts", default="steps_1600", help="runs that are stored in every way, by their names")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{processor()}, one thread, torch {torch.__version__}")
    known = given.out and given.out.is_file()
    table = pd.read_csv(given.out) if known else pd.DataFrame(columns=list(frontier.COLUMNS))
    paths = models(given.folder, given.only)
    if not paths:
        print(f"no trained run below {given.folder}: run papermill_jobs/size_quality.yaml first")
        return
    for path in paths:
        more = measured(path, given.parts in path.name, table, given.targets)
        table = more if table.empty else pd.concat([table, more], ignore_index=True)
        print(f"{path.name}: {len(more)} artifacts", flush=True)
        if given.out and len(more):
            table.to_csv(given.out, index=False, float_format="%.7g")
    compare(table)
    if given.pieces:
        first = next(path for path in paths if given.parts in path.name)
        pieces(first, table).to_csv(given.pieces, index=False, float_format="%.7g")


if __name__ == "__main__":
    main()
