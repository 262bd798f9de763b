"""Settings of training by their own names, whichever section they stand in: what many tests write often."""

from __future__ import annotations

from typing import Any

from golfbook.config.load import keys, load_config
from golfbook.config.schema import TrainConfig


def train_config(base: TrainConfig | None = None, **values: Any) -> TrainConfig:
    """Return the published training section (or ``base``) with changes such as ``swa_every=2``."""
    tree = {} if base is None else {"train": base.model_dump(mode="json")}
    places = {"averaging": "averaging.method", "qat_start": "qat.start", "qat_rule": "qat.rule"}
    changes = {}
    for name, value in values.items():
        ending = places.get(name, name)
        (key,) = (key for key in keys() if key.startswith("train.") and key.endswith(f".{ending}"))
        changes[key] = value
    return load_config(tree, overrides={"score.stride": 1, **changes}).train
