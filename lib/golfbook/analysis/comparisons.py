"""Studies cut into comparisons.

Tables of results are those of :func:`golfbook.study.results.reference_tables`: a row a run, with a column for every
setting in which runs differ (``train.optimizer.matrix_lr``). Comparisons are chosen by these settings and not by the
names of variants, so further rates, warmdowns or batch sizes may join the job; all are compared with ``base``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from golfbook.analysis.statistics import paired_difference
from golfbook.errors import GolfbookError
from golfbook.study.results import reference_folder

RUN = ["system", "variant", "seed"]  # what tells published runs apart
SYSTEMS = {  # how the published tables name a system -> how we do
    **{f"S{number}": f"PR {number}" for number in (1166, 1170, 1232, 1406)},
    "GEPA": "GEPA (PR 612 to 668)",
}
OPTIMIZER, RATE = "train.optimizer.matrix_optimizer", "train.optimizer.matrix_lr"
WARMDOWN, SHAPE = "train.schedule.warmdown_steps", "train.schedule.warmdown_shape"
METHOD, BATCH = "train.averaging.method", "train.batch_tokens"
SNAPSHOTS = ("train.averaging.swa_start", "train.averaging.swa_every")
SETTINGS = {OPTIMIZER, RATE, WARMDOWN, SHAPE, METHOD, *SNAPSHOTS, BATCH}  # that comparisons of training are chosen by
OPTIMIZERS = {"muon": "Muon", "adamw": "AdamW"}


def read_reference(study: str, base: str = "base") -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Return the committed ``results`` and ``curves`` of a study, or None where there are none; scores as ``val_bpb``.

    Raises :class:`GolfbookError` where the table has no variant named ``base`` to compare with.
    """
    folder = reference_folder(study)
    if not (folder / "results.csv").is_file() or not (folder / "curves.csv").is_file():
        return None
    results = pd.read_csv(folder / "results.csv").rename(columns={"training_val_bpb": "val_bpb"})
    if base not in set(results["variant"]):
        raise GolfbookError(f"{folder / 'results.csv'} has no variant '{base}' to compare the others with")
    return results, pd.read_csv(folder / "curves.csv")


def about(results: pd.DataFrame) -> str:
    """Return what a study is, in two lines: its runs, the size of its base, and what made them."""
    base = results[results["variant"] == "base"]
    made = [" / ".join(map(str, results[key].unique())) for key in ("torch_version", "precision", "processor")]
    return (
        f"{len(results)} runs of {results['variant'].nunique()} variants, n = {len(base)} seeds of the base, "
        f"{results['train_seconds'].sum() / 60:.0f} minutes of training in all; the base: {base['steps'].max()} steps, "
        f"{base['tokens_seen'].max():,} tokens, {base['parameters'].max():,} parameters\n"
        f"torch {made[0]}, {made[1]}, {made[2]}"
    )


def differing_in(results: pd.DataFrame, *settings: str) -> pd.DataFrame:
    """Return the runs of ``base`` and of all variants that differ from it in nothing but ``settings``."""
    others = [name for name in results.columns if "." in name and name not in settings]
    base = results.loc[results["variant"] == "base", others].iloc[0]
    return results[(results[others] == base).all(axis=1)]


def by_learning_rate(results: pd.DataFrame) -> pd.DataFrame:
    """Return runs that differ from the base in optimiser and rate of the matrices; adds ``series`` and ``x``."""
    rows = differing_in(results, OPTIMIZER, RATE)
    rows = rows.assign(series=rows[OPTIMIZER].map(OPTIMIZERS), x=rows[RATE])
    return rows.sort_values(["series", "x", "seed"], ascending=[False, True, True])


def optimizer_differences(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the paired difference Muon - AdamW of :func:`by_learning_rate`, in two ways, with 95 % t-intervals.

    First each at the rate with the best mean over all seeds: chosen and judged on the same seeds, which flatters both a
    little. Then, for every seed, each at the rate that is best on the *other* seeds; no score takes part in choosing
    its own rate. Columns ``label``, ``mean``, ``low``, ``high``, ``n``, ``p_value``.
    """
    sides = (runs[runs["series"] == name] for name in ("Muon", "AdamW"))
    wide = [side.pivot(index="x", columns="seed", values="val_bpb").dropna() for side in sides]
    seeds = wide[0].columns.intersection(wide[1].columns)
    scores = [table[seeds].to_numpy(float) for table in wide]  # (rates, seeds)
    rows = [_difference("each at its best rate", *(s[s.mean(axis=1).argmin()] for s in scores))]
    if len(seeds) > 1:
        held = [[s[np.delete(s, k, 1).mean(axis=1).argmin(), k] for k in range(len(seeds))] for s in scores]
        rows.append(_difference("rates chosen on\nthe other seeds", *held))
    return pd.DataFrame(rows)


def by_warmdown(results: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return runs that differ from the base in length and shape of the warmdown, and paired differences from it."""
    rows = differing_in(results, WARMDOWN, SHAPE)
    words = rows[SHAPE] + ", last " + rows[WARMDOWN].astype(str) + " of " + rows["steps"].astype(str) + " steps"
    rows = rows.assign(label=words.where(rows[WARMDOWN] > 0, "none: constant rate"))
    rows = rows.sort_values([WARMDOWN, SHAPE, "seed"], ascending=[True, False, True])
    return rows, _differences(rows, rows["variant"] == "base")


def by_averaging(results: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return runs that differ from the base in averaging, with its warmdown and at a constant rate, and differences.

    Adds ``group`` and ``label``; differences are paired, from the last weights within each group. A rate that falls by
    less than a tenth counts as constant: snapshots are taken below a threshold of the rate, so SWA needs a little fall.
    """
    rows = differing_in(results, METHOD, *SNAPSHOTS, WARMDOWN, "train.schedule.min_lr_scale")
    base = results[results["variant"] == "base"].iloc[0]
    constant = (rows[WARMDOWN] == 0) | (rows.get("train.schedule.min_lr_scale", 0.0) > 0.9)
    order = rows[METHOD].map({"none": 0, "ema": 1, "swa": 2, "swa_of_ema": 3})
    group = np.where(constant, "constant rate", "with the warmdown")
    rows = rows.assign(label=rows["weights"], group=group, order=order)
    rows = rows[constant | (rows[WARMDOWN] == base[WARMDOWN])]
    alike = rows.groupby(["group", "label"])["variant"].transform("nunique") > 1
    rows["label"] = rows["label"].where(~alike, rows["label"] + " (" + rows["variant"] + ")")
    rows = rows.sort_values(["group", "order", "label", "seed"], ascending=[False, True, True, True])
    return rows.drop(columns="order"), _differences(rows, rows[METHOD] == "none")


def averaging_and_warmdown(results: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the runs with and without a moving average and the warmdown, and what each alone and both change.

    Runs are those of :func:`by_averaging`. Differences are paired over seeds: the first three from neither; the last is
    that of both from the better one alone, negative where they add something to each other. Both tables are empty
    where the study lacks one of the four cells.
    """
    rows = by_averaging(results)[0]
    rows = rows[rows[METHOD].isin(["none", "ema"])].sort_values("group", kind="stable")
    wide = rows.pivot_table(index="seed", columns=["group", METHOD], values="val_bpb").dropna()
    if wide.shape[1] != 4 or wide.empty:
        return rows[:0], pd.DataFrame(columns=["label", "mean", "low", "high", "n", "p_value"])
    cells = (wide[group][method] for group in ("constant rate", "with the warmdown") for method in ("none", "ema"))
    neither, average, warmdown, both = cells
    better = min(average, warmdown, key=lambda scores: scores.mean())
    pairs = {"averaging alone": (average, neither), "warmdown alone": (warmdown, neither), "both": (both, neither)}
    pairs["both, from the\nbetter one alone"] = both, better
    return rows, pd.DataFrame([_difference(label, *pair) for label, pair in pairs.items()])


def by_batch_size(results: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return runs with another batch size than the base (which is part of every series), and paired differences.

    All of them must have seen as many tokens as the base; others are left out. Adds ``series``, by whether the learning
    rate is the base's, and ``x``, the tokens of a step.
    """
    base = results[results["variant"] == "base"]
    first = base.iloc[0]
    equal = (results["tokens_seen"] / first["tokens_seen"] - 1).abs() < 0.01
    others = results[(results[BATCH] != first[BATCH]) & equal]
    kept = others[RATE] == first[RATE]
    parts = {"rates as they are": others[kept], "rates times root of the batch": others[~kept]}
    rows = pd.concat([pd.concat([part, base]).assign(series=name) for name, part in parts.items() if len(part)])
    rows = rows.assign(x=rows[BATCH]).sort_values(["series", "x", "seed"])
    ending = (rows[RATE] != first[RATE]).map({True: ", rates times root", False: ""})
    rows = rows.assign(label=rows["x"].map("{:,}".format) + ending)
    return rows, _differences(rows, rows["variant"] == "base")


def changes(results: pd.DataFrame) -> pd.DataFrame:
    """Return one row a variant: what it changes in the base's settings, its seeds, and its minutes of training."""
    settings = [name for name in results.columns if "." in name]
    base, found = results[results["variant"] == "base"].iloc[0], []
    for variant, mine in results.groupby("variant", sort=False):
        changed = {name: mine[name].iloc[0] for name in settings if mine[name].iloc[0] != base[name]}
        words = ", ".join(f"{name}: {v if isinstance(v, str) else f'{v:g}'}" for name, v in changed.items())
        found.append((variant, words or "nothing", len(mine), mine["train_seconds"].sum() / 60))
    return pd.DataFrame(found, columns=["variant", "changes", "seeds", "minutes"])


def findings(results: pd.DataFrame) -> list[str]:
    """Return what the study found, a sentence a comparison: in words, then in numbers with n and intervals.

    Every word comes from the table, and what the table has no runs for is left out. A study that does not vary all of
    :data:`SETTINGS` is told variant by variant.
    """
    if not set(results) >= SETTINGS:
        effects = switch_effects(results)
        return [switch_in_words(effects, variant) for variant in effects["variant"]]
    optimizers, four = optimizer_differences(by_learning_rate(results)), averaging_and_warmdown(results)[1]
    averages, warmdowns, sizes = by_averaging(results)[1], by_warmdown(results)[1], by_batch_size(results)
    muon = _clear(optimizers.iloc[-1], "ends better than", "ends worse than", "cannot be told from")
    parts = {_of_both(four): four, f"Muon {muon} AdamW on these matrices": optimizers}
    parts[_of_all("length and shape of the warmdown", "the base's", warmdowns)] = warmdowns
    for group, mine in averages.groupby("group", sort=False):
        where = "at a constant rate" if group == "constant rate" else str(group)
        parts[_of_all(f"way of averaging, {where},", "the last weights", mine)] = mine
    parts[_of_batches(sizes[0])] = sizes[1]
    parts = {words: table for words, table in parts.items() if len(table)}
    found = []
    for words, table in parts.items():
        numbers = "{label} {mean:+.4f} [{low:+.4f}, {high:+.4f}]"
        clauses = "; ".join(
            numbers.format_map(row) for row in table.replace(r"\s+", " ", regex=True).to_dict("records")
        )
        found.append(f"**{words}.** Bits per byte, n = {table['n'].min()} pairs: {clauses}.")
    values = pd.concat([table["p_value"] for table in parts.values()]).round(15).drop_duplicates()  # each once
    strict = int((values < 0.05 / max(len(values), 1)).sum())
    found.append(
        f"**Luck alone would make about {len(values) / 20:.0f} of these {len(values)} comparisons look real.** "
        f"{strict} have p below 0.05/{len(values)}, which allows for that."
    )
    return found


def _of_both(four: pd.DataFrame) -> str:
    """Return what averaging and warmdown do together, in words."""
    if four.empty:
        return ""
    average, warmdown, both, more = four.to_dict("records")
    fall = f"{-average['mean']:.2f} and {-warmdown['mean']:.2f}"
    if not (average["high"] < 0 and warmdown["high"] < 0):
        return "Averaging and warmdown are not both of use here"
    if more["high"] < 0:
        return f"Averaging and warmdown help each other: alone they remove {fall}, together {-both['mean']:.2f}"
    return f"Averaging and warmdown do the same work: alone they remove {fall}, together {-both['mean']:.2f}, no more"


def _of_all(what: str, reference: str, table: pd.DataFrame) -> str:
    """Return how all rows of differences lie to their reference, in words."""
    better, worse = int((table["high"] < 0).sum()), int((table["low"] > 0).sum())
    for count, word in ((better, "better"), (worse, "worse")):
        if count and count == len(table):
            return f"Every other {what} is {word} than {reference}"
    if not better:
        return f"No other {what} is better than {reference}"
    verb = "is" if better == 1 else "are"
    return f"{better} of {len(table)} ways to change the {what} {verb} better than {reference}"


def _of_batches(runs: pd.DataFrame) -> str:
    if runs.empty:
        return ""
    table = runs.groupby(["series", "x"])["val_bpb"].mean()
    means = [part.tolist() for _, part in table.groupby("series")]
    rising, falling = (all(m == sorted(m, reverse=down) for m in means) for down in (False, True))
    which = "the smaller the batch, the better" if rising else "the larger the batch, the better"
    return f"At equal tokens, {which if rising or falling else 'neither small nor large batches always win'}"


def _clear(difference: Any, lower: str, higher: str, neither: str) -> str:
    """Return one of three words: the interval lies below 0, above it, or on both sides (or cannot be known)."""
    return lower if difference["high"] < 0 else higher if difference["low"] > 0 else neither


def warmdown_gains(points: pd.DataFrame, events: pd.DataFrame) -> pd.DataFrame:
    """Return what each published run gained in its warmdown: a row a run, bits per byte before it and at the end.

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


def _differences(rows: pd.DataFrame, reference: pd.Series) -> pd.DataFrame:
    """Return the paired difference of every label from the reference runs of its group (if there are groups)."""
    rows = rows if "group" in rows else rows.assign(group="")
    found = []
    for (group, label), mine in rows.groupby(["group", "label"], sort=False):
        other = rows[reference & (rows["group"] == group)]
        values, others = (part.drop_duplicates("seed").set_index("seed")["val_bpb"] for part in (mine, other))
        if reference[mine.index].all() or other.empty:
            continue
        pairs = pd.concat([values, others], axis=1, join="inner").to_numpy(float)
        found.append({"group": group, **_difference(str(label), *pairs.T)})
    return pd.DataFrame(found, columns=["group", "label", "mean", "low", "high", "n", "p_value"])


def _difference(label: str, a: Any, b: Any) -> dict[str, Any]:
    d = paired_difference(a, b)
    return {"label": label, "mean": d.mean, "low": d.low, "high": d.high, "n": d.n, "p_value": d.p_value}


def switch_effects(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the paired difference of every variant from ``base`` over equal seeds, with its 95 % t-interval.

    A row a variant; ``parameters`` is what it has more than ``base``.
    """
    effects = _differences(runs.assign(label=runs["variant"]), runs["variant"] == "base")
    effects = effects.rename(columns={"label": "variant"}).drop(columns="group")
    size = runs.groupby("variant")["parameters"].first()
    return effects.assign(parameters=effects["variant"].map(size) - size["base"])


def switch_in_words(effects: pd.DataFrame, variant: str) -> str:
    """Return what one switch of :func:`switch_effects` did: the finding, then numbers; a sentence in Markdown."""
    if variant not in set(effects["variant"]):
        return f"`{variant}` is not in this study"
    row = effects.set_index("variant").loc[variant]
    clear = _clear(row, "**better** than", "**worse** than", "not to be told apart from")
    return (
        f"`{variant}` is {clear} the base model: {row['mean']:+.4f} bits per byte "
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
