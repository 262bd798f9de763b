"""Exercises of notebook 10: intervals by hand, many looks, and the score to judge a quantiser by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from golfbook.analysis.statistics import describe, null_intervals, paired_by_seed, seeds_for, welch
from golfbook.exercises.check import Misconception, compare

Floats = NDArray[np.float64]
LOOKS = 23  # switches of the table in notebook 02


def by_hand(answer: Callable[[Floats, Floats], Any]) -> str:
    """Judge ``answer(a, b) -> ((low, high) paired, (low, high) unpaired)`` for scores a and b of the same seeds."""
    rng = np.random.default_rng()
    for n in rng.integers(3, 8, size=5):
        luck = rng.normal(1.97, 0.004, n)
        a, b = luck + rng.normal(0.004, 0.001, n), luck
        runs = [("a", i, x) for i, x in enumerate(a)] + [("b", i, x) for i, x in enumerate(b)]
        frame = pd.DataFrame(runs, columns=["variant", "seed", "val_bpb"])
        pair, apart = paired_by_seed(frame, "val_bpb", "a", "b"), welch(a, b)
        paired, unpaired = (np.asarray(x, float) for x in answer(a.copy(), b.copy()))
        one, two = describe(a), describe(b)
        mistakes = {
            "the first interval must use that a[i] and b[i] share a seed": (apart.low, apart.high),
            "the sign is turned round: asked is a minus b": (-pair.high, -pair.low),
        }
        otherwise = f"the paired interval of {n} seeds is not {paired.round(5).tolist()}"
        compare(paired, (pair.low, pair.high), otherwise, mistakes)
        overlap = "ends minus ends asks whether the bars overlap, which is stricter than 95 %"
        otherwise = "the second interval is not Welch's (unequal spreads; scipy.stats.ttest_ind has it)"
        mistakes = {overlap: (one.low - two.high, one.high - two.low)}
        compare(unpaired, (apart.low, apart.high), otherwise, mistakes, rtol=1e-3)
    share = (pair.high - pair.low) / (apart.high - apart.low)
    return f"they are those of paired_by_seed and welch; pairing leaves {share:.0%} of the width in the last draw"


def many_looks(answer: Callable[[int], float]) -> str:
    """Judge ``answer(k)``: the chance that at least one of k switches without an effect looks real."""
    rng = np.random.default_rng()
    for looks in (int(rng.integers(LOOKS + 1, 60)), LOOKS):
        found = float(answer(looks))
        mistakes = {
            "5 % is the chance of one look; there are many": 0.05,
            f"adding gives {found:.0%}; two alarms in one study are counted twice that way": 0.05 * looks,
            "that is the chance that none looks real": 0.95**looks,
        }
        compare(found, 1 - 0.95**looks, f"for {looks} switches it is not {found:.3f}", mistakes, rtol=1e-3)
    low, high = null_intervals(4, 4000 * LOOKS, int(rng.integers(2**31))).reshape(4000, LOOKS, 2).transpose(2, 0, 1)
    alarm = ((low > 0) | (high < 0)).any(axis=1).mean()
    return f"of 4,000 invented studies of {LOOKS} switches, four seeds each, {alarm:.0%} raise an alarm"


def right_stage(answer: Callable[[float, Mapping[str, float]], int]) -> str:
    """Judge ``answer(difference, spreads) -> seeds`` that show a quantiser's effect with a chance of 80 %.

    ``spreads`` has the standard deviation of paired differences of the ``"final score"`` and of the ``"tax"``.
    """
    rng = np.random.default_rng()
    drawn = {"final score": rng.uniform(6e-4, 9e-4), "tax": rng.uniform(2.5e-4, 4e-4)}
    for spreads in (drawn, {"final score": 0.0007, "tax": 0.0003}):
        found = int(answer(0.0005, dict(spreads)))
        needed = {name: seeds_for(0.0005, spread) for name, spread in spreads.items()}
        right = needed["tax"]
        if found == needed["final score"]:
            raise Misconception("a quantiser cannot change what training drew; its own score has a smaller spread")
        if found < right:
            raise Misconception(f"{found} seeds are too few: the spread is estimated from them too, so t and not 1.96")
        if found > right:
            raise Misconception(f"fewer than {found} seeds are enough")
    more = needed["final score"]
    return f"{right} seeds show it by the tax; the final score, which holds training's luck too, would take {more}"


EXERCISES: dict[str, Callable[[Any], str]] = {"10.1": by_hand, "10.2": many_looks, "10.3": right_stage}
