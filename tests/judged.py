"""What every test of exercises asserts of an answer; inputs are drawn anew each time, so some ask several times."""

from __future__ import annotations

from typing import Any

from golfbook.exercises.check import judge


def right_and_open(name: str, answer: Any, times: int = 1) -> None:
    """Assert that an answer is told to be right, and why, and that no answer leaves the exercise open."""
    for _ in range(times):
        verdict = judge(name, answer)
        assert verdict.state == "right" and verdict.reason, verdict
    assert judge(name, ...).state == "open"


def wrong_because(name: str, answer: Any, reason: str, times: int = 1) -> None:
    """Assert that an answer is told to be wrong, with a reason that names the mistake."""
    for _ in range(times):
        verdict = judge(name, answer)
        assert verdict.state == "wrong" and reason in verdict.reason, verdict
