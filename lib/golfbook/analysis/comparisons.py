"""Studies cut into comparisons.

Tables of results are those of :func:`golfbook.study.results.reference_tables`: a row a run, with a column for every
setting in which runs differ (``train.optimizer.matrix_lr``). Comparisons are chosen by these settings and not by the
names of variants, so further rates, warmdowns or batch sizes may join the job; all are compared with ``base``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from golfbook.analysis.statistics import paired_difference, summarize
from golfbook.errors import GolfbookError
from golfbook.study.results import reference_folder
from golfbook.train import muon

RUN = ["system", "variant", "seed"]  # what tells published runs apart
OPTIMIZERS = {"muon": "Muon", "adamw": "AdamW"}


def read_reference(study: str) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """The committed ``results`` and ``curves`` of a study, or None where there are none; bits per byte as ``val_bpb``.

    Raises :class:`GolfbookError` where the table has no variant ``base`` to compare with.
    """
    folder = reference_folder(study)
    if not (folder / "results.csv").is_file() or not (folder / "curves.csv").is_file():
        return None
    results = pd.read_csv(folder / "results.csv").rename(columns={"training_val_bpb": "val_bpb"})
    if "base" not in set(results["variant"]):
        raise GolfbookError(f"{folder / 'results.csv'} has no variant 'base' to compare the others with")
    return results, pd.read_csv(folder / "curves.csv")


def differing_in(results: pd.DataFrame, *settings: str) -> pd.DataFrame:
    """Runs of ``base`` and of all variants that differ from it in nothing but ``settings``."""
    others = [name for name in results.columns if "." in name and name not in settings]
    base = results.loc[results["variant"] == "base", others].iloc[0]
    return results[(results[others] == base).all(axis=1)]


def by_learning_rate(results: pd.DataFrame) -> pd.DataFrame:
    """Runs that differ from the base in optimiser and learning rate of the matrices; adds ``series`` and ``x``."""
    rows = differing_in(results, "train.optimizer.matrix_optimizer", "train.optimizer.matrix_lr")
    rows = rows.assign(
        series=rows["train.optimizer.matrix_optimizer"].map(OPTIMIZERS), x=rows["train.optimizer.matrix_lr"]
    )
    return rows.sort_values(["series", "x", "seed"], ascending=[False, True, True])


def best_rates(runs: pd.DataFrame) -> pd.DataFrame:
    """The best learning rate of each series of :func:`by_learning_rate`: rate, mean, interval, n, and ``at_edge``.

    A rate with fewer seeds than another (a run that diverged) is out of the choice. ``at_edge`` says that the best one
    is the smallest or largest tried, so that a better one may lie beyond.
    """
    found = []
    for series, mine in summarize(runs, "val_bpb", ["series", "x"]).groupby("series", sort=False):
        whole = mine[mine["n"] == mine["n"].max()]
        best = whole.sort_values("mean").iloc[0]
        edge = best["x"] in (mine["x"].min(), mine["x"].max())
        found.append({"series": series, "rate": best["x"], "at_edge": edge, **best[["n", "mean", "low", "high"]]})
    return pd.DataFrame(found)


def optimizer_differences(runs: pd.DataFrame, a: str = "Muon", b: str = "AdamW") -> pd.DataFrame:
    """Paired difference ``a - b`` of two series of :func:`by_learning_rate`, in two ways, with 95 % t-intervals.

    First each at the rate with the best mean over all seeds: chosen and judged on the same seeds, which flatters both a
    little. Then, for every seed, each at the rate that is best on the *other* seeds; no score takes part in choosing
    its own rate. Columns ``label``, ``mean``, ``low``, ``high``, ``n``, ``p_value``.
    """
    wide = [runs[runs["series"] == s].pivot(index="x", columns="seed", values="val_bpb").dropna() for s in (a, b)]
    seeds = wide[0].columns.intersection(wide[1].columns)
    scores = [table[seeds].to_numpy(float) for table in wide]  # (rates, seeds)
    rows = [_difference("each at its best rate", *(s[s.mean(axis=1).argmin()] for s in scores))]
    if len(seeds) > 1:
        held = [[s[np.delete(s, k, 1).mean(axis=1).argmin(), k] for k in range(len(seeds))] for s in scores]
        rows.append(_difference("rates chosen on\nthe other seeds", *held))
    return pd.DataFrame(rows)


def by_warmdown(results: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs that differ from the base in length and shape of the warmdown, and their paired differences from it."""
    rows = differing_in(results, "train.schedule.warmdown_steps", "train.schedule.warmdown_shape")
    steps, total = rows["train.schedule.warmdown_steps"], rows["steps"]
    words = (
        rows["train.schedule.warmdown_shape"] + ", last " + steps.astype(str) + " of " + total.astype(str) + " steps"
    )
    rows = rows.assign(label=words.where(steps > 0, "none: constant rate"))
    rows = rows.sort_values(
        ["train.schedule.warmdown_steps", "train.schedule.warmdown_shape", "seed"], ascending=[True, False, True]
    )
    return rows, _differences(rows, rows["variant"] == "base")


def by_averaging(results: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs that differ from the base in averaging, with its warmdown and at a constant rate, and paired differences.

    Adds ``group``, ``label`` and the differences from the last weights within each group. A rate that falls by less
    than a tenth counts as constant: snapshots are taken below a threshold of the rate, so SWA needs a little fall.
    """
    swa = ("train.averaging.swa_start", "train.averaging.swa_every")
    rows = differing_in(
        results, "train.averaging.method", *swa, "train.schedule.warmdown_steps", "train.schedule.min_lr_scale"
    )
    base = results[results["variant"] == "base"].iloc[0]
    floor = (
        rows["train.schedule.min_lr_scale"]
        if "train.schedule.min_lr_scale" in rows
        else pd.Series(0.0, index=rows.index)
    )
    constant = (rows["train.schedule.warmdown_steps"] == 0) | (floor > 0.9)
    like_base = (rows["train.schedule.warmdown_steps"] == base["train.schedule.warmdown_steps"]) & ~constant
    rows = rows.assign(label=rows["weights"], group=np.where(constant, "constant rate", "with the warmdown"))
    rows = rows[constant | like_base]
    alike = rows.groupby(["group", "label"])["variant"].transform("nunique") > 1
    rows = rows.assign(label=rows["label"].where(~alike, rows["label"] + " (" + rows["variant"] + ")"))
    order = rows["train.averaging.method"].map({"none": 0, "ema": 1, "swa": 2, "swa_of_ema": 3})
    rows = rows.assign(order=order).sort_values(
        ["group", "order", "label", "seed"], ascending=[False, True, True, True]
    )
    return rows.drop(columns="order"), _differences(rows, rows["train.averaging.method"] == "none")


def by_batch_size(results: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs with another batch size than the base (which is part of every series), and paired differences from it.

    All of them must have seen as many tokens as the base; others are left out. Adds ``series``, by whether the learning
    rate is the base's, and ``x``, the tokens of a step.
    """
    base = results[results["variant"] == "base"]
    first = base.iloc[0]
    others = results[
        (results["train.batch_tokens"] != first["train.batch_tokens"])
        & ((results["tokens_seen"] / first["tokens_seen"] - 1).abs() < 0.01)
    ]
    kept = others["train.optimizer.matrix_lr"] == first["train.optimizer.matrix_lr"]
    parts = {"rates as they are": others[kept], "rates times root of the batch": others[~kept]}
    rows = pd.concat([pd.concat([part, base]).assign(series=name) for name, part in parts.items() if len(part)])
    rows = rows.assign(x=rows["train.batch_tokens"]).sort_values(["series", "x", "seed"])
    scaled = rows["train.optimizer.matrix_lr"] != first["train.optimizer.matrix_lr"]
    rows = rows.assign(label=rows["x"].map("{:,}".format) + scaled.map({True: ", rates times root", False: ""}))
    return rows, _differences(rows, rows["variant"] == "base")


def in_words(difference: Mapping[Any, Any]) -> str:
    """A row of differences as a clause: mean, 95 % interval, and whether the interval leaves 0 out."""
    low, high = difference["low"], difference["high"]
    clear = "lower" if high < 0 else "higher" if low > 0 else "not to be told apart"
    return f"{difference['mean']:+.4f} [{low:+.4f}, {high:+.4f}], {clear}"


def findings(results: pd.DataFrame) -> list[str]:
    """What the study found, a sentence a comparison, with n and intervals; every sign comes from the table."""
    runs = by_learning_rate(results)
    best, optimizers = best_rates(runs), optimizer_differences(runs)
    edge = " (at the edge of those tried, so perhaps not the best)"
    rates = ", ".join(
        f"{one['series']} {one['rate']:g}{edge if one['at_edge'] else ''}" for one in best.to_dict("records")
    )
    parts = {"Muon minus AdamW": optimizers}
    parts["Warmdown, difference from the base"] = by_warmdown(results)[1]
    averages = by_averaging(results)[1]
    for group, mine in averages.groupby("group", sort=False):
        parts[f"Averaging, {group}, difference from the last weights"] = mine
    parts["Batch size at equal tokens, difference from the base"] = by_batch_size(results)[1]
    found = [f"Best learning rates by the mean of all seeds: {rates}."]
    for name, table in parts.items():
        if len(table):
            clauses = "; ".join(f"{' '.join(d['label'].split())}: {in_words(d)}" for d in table.to_dict("records"))
            found.append(f"**{name}** (n = {table['n'].min()} pairs, bits per byte): {clauses}.")
    values = pd.concat([table["p_value"] for table in parts.values()])
    strict = int((values < 0.05 / max(len(values), 1)).sum())
    found.append(
        f"These are {len(values)} comparisons, of which about {len(values) / 20:.0f} would leave 0 out by luck; "
        f"{strict} remain at p below 0.05/{len(values)}, which allows for that."
    )
    return found


def warmdown_gains(points: pd.DataFrame, events: pd.DataFrame) -> pd.DataFrame:
    """What each published run gained in its warmdown: a row a run, bits per byte before it and at the end.

    ``before`` is the last validation at or before the ``start`` of the warmdown, NaN where none lies in the second half
    of the steps until then; ``gain`` is what the score fell by from there to the end. A run without a seed has -1.
    """
    found = []
    runs = points[(points["metric"] == "val_bpb") & (points["step"] > 0)].fillna({"seed": -1})
    starts = events[events["event"] == "warmdown_start"].fillna({"seed": -1})
    begins = starts.set_index(RUN)["step"].to_dict()
    for key, mine in runs.groupby(RUN, sort=False):
        start, curve = begins.get(key, np.nan), mine.sort_values("step")
        before = curve.loc[(curve["step"] <= start) & (curve["step"] >= start / 2), "value"].to_list()
        row = dict(zip(RUN, key, strict=True))
        found.append(row | {"start": start, "before": [np.nan, *before][-1], "end": curve["value"].iloc[-1]})
    return pd.DataFrame(found).assign(gain=lambda table: table["before"] - table["end"])


def direction_sizes(
    matrix: Tensor,
    steps: int,
    coefficients: muon.Coefficients = "quintic",
    dtype: torch.dtype = torch.float32,
    *,
    row_norm: bool = False,
) -> np.ndarray:
    """Size along each singular direction of ``matrix`` (rows, columns) after 0, 1, ... ``steps`` Newton-Schulz steps.

    Returns float64 (steps + 1, n), n the shorter side, largest singular value first: ``u_i^T X_k v_i`` with the
    singular vectors of the matrix the iteration starts from, whose rows have unit norm with ``row_norm``. In exact
    arithmetic these are the singular values of X_k; in bfloat16 the difference is what rounding does.
    """
    start = matrix.detach().float().clone()
    if row_norm:
        muon.normalise_rows_(start)
    u, s, vh = torch.linalg.svd(start.double(), full_matrices=False)
    norm = torch.linalg.vector_norm(s).clamp_min(muon.NORM_EPS) * (1 if coefficients == "quintic" else muon.SAFETY)
    found = [s / norm]
    for count in range(1, steps + 1):
        x = muon.newton_schulz(start, count, dtype, coefficients).double()
        found.append(((u.mT @ x) * vh).sum(1))
    return torch.stack(found).numpy()


def _differences(rows: pd.DataFrame, reference: pd.Series) -> pd.DataFrame:
    """Paired difference of every label from the reference runs of its group (where there are groups), over seeds."""
    rows = rows if "group" in rows else rows.assign(group="")
    found: list[Mapping[str, Any]] = []
    for (group, label), mine in rows.groupby(["group", "label"], sort=False):
        other = rows[reference & (rows["group"] == group)].drop_duplicates("seed").set_index("seed")["val_bpb"]
        values = mine.drop_duplicates("seed").set_index("seed")["val_bpb"]
        if reference[mine.index].all() or other.empty:
            continue
        pairs = pd.concat([values, other], axis=1, join="inner")
        found.append({"group": group, **_difference(str(label), pairs.iloc[:, 0], pairs.iloc[:, 1])})
    return pd.DataFrame(found, columns=["group", "label", "mean", "low", "high", "n", "p_value"])


def _difference(label: str, a: Any, b: Any) -> dict[str, Any]:
    d = paired_difference(a, b)
    return {"label": label, "mean": d.mean, "low": d.low, "high": d.high, "n": d.n, "p_value": d.p_value}


def switch_effects(runs: pd.DataFrame, *, base: str = "base", value: str = "val_bpb") -> pd.DataFrame:
    """Return the paired difference of every variant from ``base`` over equal seeds, with its 95 % t-interval.

    A row a variant; ``parameters`` is what it has more than ``base``.
    """
    mine = runs[runs["variant"] == base]
    reference, size = mine.set_index("seed")[value], mine["parameters"].iloc[0]
    rows = []
    for variant, group in runs.loc[runs["variant"] != base].groupby("variant", sort=False):
        pairs = pd.concat([group.set_index("seed")[value], reference], axis=1, join="inner")
        more = {"parameters": group["parameters"].iloc[0] - size}
        rows.append({"variant": variant, **_difference("", pairs.iloc[:, 0], pairs.iloc[:, 1]), **more})
    return pd.DataFrame(rows).drop(columns="label")


def switch_in_words(effects: pd.DataFrame, variant: str) -> str:
    """Return what one switch of :func:`switch_effects` did: the finding, then numbers; a sentence in Markdown."""
    if variant not in set(effects["variant"]):
        return f"`{variant}` is not in this study"
    row = effects.set_index("variant").loc[variant]
    clear = "**better** than" if row["high"] < 0 else "**worse** than" if row["low"] > 0 else ""
    return (
        f"`{variant}` is {clear or 'not to be told apart from'} the base model: {row['mean']:+.4f} bits per byte "
        f"[{row['low']:+.4f}, {row['high']:+.4f}], n = {row['n']:.0f} pairs, {row['parameters']:+,.0f} parameters"
    )


def switch_findings(effects: pd.DataFrame) -> list[str]:
    """Return what the study of :func:`switch_effects` found, a sentence a finding, each in words before its numbers."""
    worse, better = (effects[effects["low"] > 0], effects[effects["high"] < 0])
    strict = effects[effects["p_value"] < 0.05 / len(effects)]

    def names(rows: pd.DataFrame) -> str:
        rows = rows.sort_values("mean", key=abs, ascending=False)
        return ", ".join(f"`{row.variant}` ({row.mean:+.4f})" for row in rows.itertuples()) or "none"

    return [
        f"Most switches change nothing that {effects['n'].min()} pairs of seeds can show: "
        f"{len(effects) - len(worse) - len(better)} of {len(effects)} intervals contain 0.",
        f"Faster at first, in bits per byte: {names(better)}. Slower: {names(worse)}.",
        f"Of {len(effects)} intervals about {len(effects) / 20:.0f} would miss 0 by luck alone; what allows for that "
        f"(p below 0.05/{len(effects)}) leaves {names(strict)}.",
        "Do not carry signs from here to the published size: several switches that help in the first steps are the "
        "opposite of what the published systems keep after thousands. Seeds varied, the text did not.",
    ]
