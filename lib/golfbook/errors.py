"""The one exception family whose message is written for the person at the keyboard.

Everything a user can cause (a misspelt key, a truncated shard, a damaged artifact, a full disk) raises a subclass of
:class:`GolfbookError`; the command line prints its message without a traceback and exits with status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GolfbookError(Exception):
    """Base of all errors whose message names what to fix."""


class ConfigError(GolfbookError):
    """A configuration, preset or job file is wrong; the message names the key."""


class DataError(GolfbookError):
    """A corpus, shard or tokenizer file is missing, damaged or does not fit."""


class ByteAccountingError(DataError):
    """Token bytes and decoded bytes differ, so a bits-per-byte value would be wrong."""


class ArtifactError(GolfbookError):
    """An artifact is damaged, hostile or does not fit its tokenizer."""


class CheckpointError(GolfbookError):
    """A checkpoint is damaged or belongs to another configuration."""


class RunError(GolfbookError):
    """A run folder cannot be used, or a stage of a run failed."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of ``choices``, or an empty string."""
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
