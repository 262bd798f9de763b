"""One frozen, validated configuration tree, and the three ways to fill it: a preset, a scale, dotted overrides.

>>> from golfbook.config.load import load_config
>>> config = load_config("quickstart", seed=7, overrides={"model.xsa": 0, "train.steps": 100})

An unknown key or a value of the wrong type raises :class:`golfbook.errors.ConfigError` naming the key and the nearest
valid one. The settings themselves are in :mod:`golfbook.config.schema`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from golfbook.config.schema import Config
from golfbook.config.section import LARGEST
from golfbook.errors import ConfigError, DataError, nearest
from golfbook.files import decode_text, resolve

PARAMETERS: dict[str, type | tuple[type, ...]] = {  # of the notebooks, as papermill may give them
    **dict.fromkeys(("scale", "study", "variant", "run_dir", "reference", "challenge"), str),
    **dict.fromkeys(("sample_tokens", "look_tokens", "sample_documents"), int),
    "overrides": (Mapping, type(None)),
    "vocabularies": list,
}
PRESETS = resources.files("golfbook.config") / "presets"
SCALES = PRESETS / "scales"


def preset_names() -> list[str]:
    """List the presets that ship with the package."""
    return _yaml_names(PRESETS)


def load_config(
    preset: str | Mapping[str, Any] = "quickstart",
    *,
    scale: str = "published",
    seed: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """Build a config from a preset, a scale and dotted or nested overrides, in this order.

    ``preset`` is the name of a shipped preset, a path of a YAML file, or a mapping; it may name one it ``extends``.
    ``scale`` "tiny" (seconds on a CPU) or "small" (minutes) shrinks any preset and keeps its layers and switches;
    "published" leaves it as it is. ``overrides`` maps keys such as ``"train.steps"`` (or nested mappings) to values.
    Raises :class:`ConfigError` for an unknown preset, scale or key, a value of the wrong type, or settings that
    contradict each other.
    """
    check_parameters(scale=scale, overrides=overrides)
    tree = _extended(preset) if isinstance(preset, Mapping) else _read_preset(str(preset))
    if scale != "published":
        overlay = _read_scale(scale)
        if (tree.get("data") or {}).get("source", "pydocs") in ("text", "shards"):
            del overlay["data"]  # your own text stays your own text
        if "calibration" not in (tree.get("quantize") or {}):
            overlay["quantize"].pop("calibration", None)  # a quantiser that looks at weights alone takes none
        _overlay(tree, overlay)
        tree["preset"] = f"{tree.get('preset', 'custom')}-{scale}"
    for key, value in (overrides or {}).items():
        if not isinstance(key, str):
            raise ConfigError(f"override key {key!r} is not text; write keys as 'section.name'")
        _assign(tree, key.split("."), value, key)
    if seed is not None:
        tree["seed"] = seed
    return validate(tree)


def check_parameters(**given: Any) -> None:
    """Check the kinds of parameters of a notebook, which papermill takes from a command line as it guesses them.

    Raises :class:`ConfigError` naming the parameter and how to write it.
    """
    for name, value in given.items():
        kind = PARAMETERS[name]
        if kind is str and not isinstance(value, str):
            what, hint = "text", f"papermill takes text as it is written after -r: -r {name} {value}"
        elif kind is int and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            what, hint = "a whole number of at least 1", f"for papermill -p {name} 100"
        elif name == "overrides" and not isinstance(value, kind):
            what, hint = "a mapping of keys to values", 'for papermill -y "overrides: {train.steps: 4}"'
        elif kind is list and not (isinstance(value, list) and value and all(type(item) is int for item in value)):
            what, hint = "a list of whole numbers", f'for papermill -y "{name}: [384, 1024]"'
        else:
            continue
        raise ConfigError(f"the parameter '{name}' must be {what}, got {value!r}: write {hint}")


def validate(tree: Mapping[str, Any]) -> Config:
    """Validate a nested mapping; raises :class:`ConfigError` listing every wrong key."""
    try:
        text = json.dumps(tree)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the configuration holds a value that is no number, text, list or mapping: {error}"
        ) from None
    try:
        return Config.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; raises :class:`ConfigError` naming the file and, where known, the line."""
    path = Path(path)
    try:
        value = yaml.safe_load(decode_text(path.read_bytes(), path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except DataError as error:
        raise ConfigError(str(error)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    return value


def keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """List all dotted keys of the configuration tree."""
    found: list[str] = []
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += keys(kind, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def scale_names() -> list[str]:
    """List the scales that fit every preset."""
    return ["published", *_yaml_names(SCALES)]


def _read_preset(name: str, path: tuple[str, ...] = ()) -> dict[str, Any]:
    if name in path:
        raise ConfigError(f"presets extend each other in a circle: {' -> '.join((*path, name))}")
    if name.endswith((".yaml", ".yml")):
        return _extended({"preset": Path(name).stem, **read_yaml(resolve(name))}, (*path, name))
    known = preset_names()
    if name not in known:
        raise ConfigError(f"unknown preset '{name}'{nearest(name, known)} (known: {', '.join(known)}, or a .yaml file)")
    text = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8")
    return _extended({"preset": name, **yaml.safe_load(text)}, (*path, name))


def _extended(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Lay ``tree`` over the preset it extends, if it names one."""
    own = {key: value for key, value in tree.items() if key != "extends"}
    if "extends" not in tree:
        return own
    base = _read_preset(str(tree["extends"]), path)
    _overlay(base, own)
    return base


def _overlay(tree: dict[str, Any], top: Mapping[str, Any]) -> None:
    for key, value in top.items():
        _assign(tree, [key], value, key)


def _read_scale(name: str) -> dict[str, Any]:
    known = scale_names()
    if name not in known:
        raise ConfigError(f"unknown scale '{name}'{nearest(name, known)} (known: {', '.join(known)})")
    return yaml.safe_load((SCALES / f"{name}.yaml").read_text(encoding="utf-8"))


def _yaml_names(folder: Traversable) -> list[str]:
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".yaml"))


def _assign(tree: dict[str, Any], path: list[str], value: Any, key: str) -> None:
    if isinstance(value, Mapping):  # a nested override changes the keys it names and leaves the others
        for name, inner in value.items():
            _assign(tree, [*path, *str(name).split(".")], inner, f"{key}.{name}")
        return
    for name in path[:-1]:
        child = tree.get(name)
        if child is not None and not isinstance(child, Mapping):
            raise ConfigError(f"{key}: '{name}' is a value, not a section{nearest(key, keys())}")
        tree[name] = dict(child or {})
        tree = tree[name]
    tree[path[-1]] = value


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors(include_url=False):
        parts = [str(p) for p in item["loc"] if p not in ("tuple[int, ...]", "constrained-int")]
        key, given = ".".join(parts), item.get("input")
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key '{key}'{nearest(key, keys())}")
        elif item["type"] == "value_error":
            lines.append(str(item["msg"]).removeprefix("Value error, "))
        elif isinstance(given, str) and item["type"] in ("float_type", "int_type", "float_parsing", "int_parsing"):
            number = _yaml_number(given, item["type"])
            hint = f"; YAML reads '{given}' as text: write {number}" if number else ""
            lines.append(f"{key}: expected a number, got the text '{given}'{hint}")
        elif item["type"] == "less_than_equal" and item["ctx"]["le"] == LARGEST:
            lines.append(f"{key}: must be at most 2**63 - 1 ({LARGEST}), or no table could hold it, got {given!r}")
        else:
            lines.append(f"{key}: {item['msg'].lower()}, got {given!r}")
    return "wrong configuration: " + "; ".join(dict.fromkeys(lines))


def _yaml_number(text: str, kind: str) -> str:
    """Return how to write a number that YAML reads as text; empty where it is none."""
    try:
        value = float(text)
    except ValueError:
        return ""
    return str(int(value)) if kind.startswith("int") and value.is_integer() else repr(value)
