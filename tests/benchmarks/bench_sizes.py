"""Bytes at equal quality: published quantisers, the records' recipe and ours, on the models of a study.

    golfbook run papermill_jobs/size_quality.yaml
    python tests/benchmarks/bench_sizes.py FOLDER_OF_THE_STUDY [--out TABLE.csv] [--targets 65536] [--only PATTERN]

Every trained run below the folder is stored in every way at every rate; each artifact is read back and scored. Printed
are bytes at the quality of the published quantiser and of the records' recipe, as ratios seed by seed. With --out the
table is written, and rows that are there already are not measured again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch

from golfbook.analysis import frontier
from golfbook.analysis.statistics import describe
from golfbook.compress.calibration import calibrate
from golfbook.data import dataset
from golfbook.provenance import processor
from golfbook.run import open_run
from golfbook.train.checkpoints import load_model

FINE = (2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)
COARSE = (2.0, 3.0, 3.5, 4.0, 5.0)
WHOLE = (3, 4, 5, 6, 7, 8)
MAIN = ("PR 1166, xz", "no floor, xz", "records: k sigma, GPTQ", "equal slope, trellis 8, small matrices too")


def rates(recipe: str, parts: bool) -> tuple[float, ...]:
    """The rates at which a recipe is measured; none where only the main ones are asked for."""
    if not parts and recipe not in MAIN:
        return ()
    if frontier.RECIPES[recipe]["quantizer"] == "percentiles":
        return WHOLE
    return tuple(bits + ("records" in recipe) for bits in (FINE if parts else COARSE))


def models(folder: Path, only: str) -> list[Path]:
    """The run folders below ``folder`` that have finished training, in order."""
    found = sorted(path.parent for path in folder.glob("*/result.training.json") if only in path.parent.name)
    if not found:
        raise SystemExit(f"no trained run below {folder}: run papermill_jobs/size_quality.yaml first")
    return found


def measured(path: Path, parts: bool, known: pd.DataFrame, targets: int) -> pd.DataFrame:
    """The rows of one run that are not known yet."""
    run = open_run(path)
    config = run.config.model_copy(update={"data": run.config.data.model_copy(update={"max_validation_tokens": 0})})
    data, model = dataset.prepare(config), load_model(run)
    named = {"steps": config.train.steps, "seed": config.seed}
    mine = known[(known["steps"] == config.train.steps) & (known["seed"] == config.seed)] if len(known) else known
    done = set(mine["recipe"]) if len(mine) else set()
    asked = {recipe: rates(recipe, parts) for recipe in frontier.RECIPES if recipe not in done}
    asked = {recipe: bits for recipe, bits in asked.items() if bits}
    if not asked:
        return pd.DataFrame()
    chosen = frontier.settings(config, "equal slope", 3.0)
    statistics = calibrate(model, chosen, data)
    assert statistics is not None
    table = frontier.measure(model, config, data, statistics, asked, targets)
    return table.assign(**named)[[*named, *table.columns]]


def compare(table: pd.DataFrame) -> None:
    """Print the bytes of every recipe at the quality of two others, as ratios seed by seed."""
    for reference, bits in (("PR 1166, xz", 6), ("no floor, xz", 6), ("records: k sigma, GPTQ", 4.0)):
        for steps, group in table.groupby("steps"):
            print(f"\nat the divergence of '{reference}' at {bits} bits, {steps} steps: bytes over its bytes")
            for recipe in frontier.RECIPES:
                ratios = []
                for _, rows in group.groupby("seed"):
                    at = rows[(rows["recipe"] == reference) & (rows["bits"] == bits)]
                    own = rows[rows["recipe"] == recipe]
                    if len(at) and len(own):
                        size = "memoryless_bytes" if "records" in reference else "artifact_bytes"
                        needed = frontier.bytes_at(own, float(at["divergence_bpb"].iloc[0]))
                        ratios.append(needed / float(at[size].iloc[0]))
                found = describe(ratios)
                if found.n:
                    print(f"  {recipe:45s} {found.mean:.3f} [{found.low:.3f}, {found.high:.3f}] n = {found.n}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--targets", type=int, default=65536)
    parser.add_argument("--only", default="", help="runs whose names contain this")
    parser.add_argument("--parts", default="steps_1600", help="runs that are stored in every way, by their names")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{processor()}, one thread, torch {torch.__version__}")
    table = pd.read_csv(given.out) if given.out and given.out.is_file() else pd.DataFrame()
    for path in models(given.folder, given.only):
        more = measured(path, given.parts in path.name, table, given.targets)
        table = pd.concat([table, more], ignore_index=True)
        print(f"{path.name}: {len(more)} artifacts", flush=True)
        if given.out and len(more):
            table.to_csv(given.out, index=False, float_format="%.7g")
    compare(table)


if __name__ == "__main__":
    main()
