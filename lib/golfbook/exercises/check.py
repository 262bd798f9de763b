"""How an exercise of a notebook is judged: by the library itself, on inputs drawn at that moment.

>>> from golfbook.exercises.check import check
>>> answer = ...
>>> check("03.1", answer)
03.1 is open

An exercise is a function of the answer. It returns why the answer is right, or raises :class:`Misconception`, whose
text names the likely mistake and not the solution. So there is no file of solutions.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from golfbook.errors import ConfigError, nearest
from golfbook.panels.base import interactive

NOTEBOOKS = {
    **{"00": "tour", "01": "data", "02": "architecture", "03": "training"},
    **{"04": "quantization", "05": "scoring", "10": "seeds", "13": "frontier"},
}


class Misconception(Exception):
    """Say in which way an answer is wrong."""


@dataclass(frozen=True)
class Verdict:
    """Hold what became of an answer, and why."""

    state: Literal["open", "right", "wrong"]
    reason: str = ""


def check(name: str, answer: Any) -> None:
    """Show whether the answer to exercise ``name`` ("03.1") is open, right or wrong, and why.

    Says nothing where nobody sits at the notebook (papermill, nbconvert), and never raises for a wrong answer. Raises
    :class:`ConfigError` for an exercise that does not exist.
    """
    verdict = judge(name, answer)
    if interactive():
        words = {"open": "is open", "right": "is right, because ", "wrong": "not yet: "}
        print(f"{name} {words[verdict.state]}{verdict.reason}")


def judge(name: str, answer: Any) -> Verdict:
    """Judge an answer by the library; ``...`` is no answer yet. What the answer raises makes it wrong."""
    exercise = exercises(name[:2]).get(name)
    if exercise is None:
        raise ConfigError(f"there is no exercise '{name}'{nearest(name, exercises(name[:2]))}")
    if answer is ...:
        return Verdict("open")
    try:
        return Verdict("right", exercise(answer))
    except Misconception as misconception:
        return Verdict("wrong", str(misconception))
    except Exception as error:  # an answer is anybody's code
        return Verdict("wrong", f"your answer stops with {type(error).__name__}: {error}")


def exercises(notebook: str) -> dict[str, Callable[[Any], str]]:
    """Return the exercises of a notebook ("03") by name; raises :class:`ConfigError` where it has none."""
    if notebook not in NOTEBOOKS:
        raise ConfigError(f"notebook '{notebook}' has no exercises (those that have: {', '.join(NOTEBOOKS)})")
    module = importlib.import_module(f"golfbook.exercises.{NOTEBOOKS[notebook]}")
    return dict(module.EXERCISES)


def compare(
    found: ArrayLike,
    right: ArrayLike,
    otherwise: str,
    mistakes: Mapping[str, Any] | None = None,
    *,
    rtol: float = 1e-6,
    near: float = 0.0,
) -> None:
    """Raise :class:`Misconception` where ``found`` is not ``right`` to a share of ``rtol``.

    ``mistakes`` maps a reason to what that mistake gives, or to a list of what it may give; the first within ``near``
    (default: ``rtol``) of ``found`` names it. What none of them explains is told as ``otherwise``.
    """
    given = np.asarray(found, float)
    if np.allclose(given, right, rtol=rtol, atol=0):
        return
    for reason, values in (mistakes or {}).items():
        close = np.isclose(given, values, rtol=near or rtol, atol=0)
        if close.reshape(-1, given.size).all(axis=1).any():
            raise Misconception(reason)
    raise Misconception(otherwise)
