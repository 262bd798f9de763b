"""Names that settings may take, and where what they name is written: a new one is a module and a line here.

What is named is imported when it is used, so reading a configuration imports nothing heavy.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from golfbook.errors import ConfigError, nearest

# compress.quantizer.Quantizer
QUANTIZERS = {
    "percentiles": "compress.rowwise.percentiles",
    "row_maximum": "compress.rowwise.row_maximum",
    "gptq": "compress.gptq.gptq",
    "rate_distortion": "compress.rate_distortion.rate_distortion",
}
# study.processes.Executor
EXECUTORS = {
    "processes": "study.processes.processes",
}
# evaluate.adaptation.Rule
RULES = {
    "keep": "evaluate.adaptation.keep",
}
# compress.coders.Coder
CODERS = {
    "xz": "compress.coders.XZ",
    "zstd": "compress.coders.ZSTD",
    "brotli": "compress.coders.BROTLI",
    "zlib": "compress.coders.ZLIB",
    "entropy": "compress.entropy.ENTROPY",
}


def require(table: Mapping[str, str], name: str, what: str) -> str:
    """Return ``name`` where ``table`` has it; raises :class:`ConfigError` naming ``what`` and the nearest one."""
    if name not in table:
        raise ConfigError(f"unknown {what} '{name}'{nearest(name, table)} (known: {', '.join(table)})")
    return name


def named(table: Mapping[str, str], name: str) -> Any:
    """Import and return what ``name`` stands for in ``table``; raises :class:`ConfigError` where it has none."""
    module, _, attribute = table[require(table, name, "name")].rpartition(".")
    return getattr(importlib.import_module(f"golfbook.{module}"), attribute)
