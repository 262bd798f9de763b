"""One frozen, validated configuration tree, and the three ways to fill it: a preset, a scale, dotted overrides.

>>> from golfbook.config import load_config
>>> config = load_config("quickstart", seed=7, overrides={"model.xsa": 0, "train.steps": 100})

An unknown key or a value of the wrong type raises :class:`golfbook.errors.ConfigError` naming the key and the nearest
valid one. Layers of a model are counted from 0; negative numbers count from the last layer, so that one preset fits
every depth.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from golfbook.errors import ConfigError, nearest
from golfbook.files import canonical_json, sha256_bytes

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Rate = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """Base of all sections: frozen, strict about types, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DataConfig(Section):
    """Where documents come from and how they become tokens."""

    source: Literal["pydocs", "text", "shards", "fineweb"] = Field("pydocs", description="kind of corpus")
    path: str = Field("", description="text: file or folder of .txt/.jsonl; shards: folder of .bin; from project root")
    text_field: str = Field("text", description="key that holds the document in a .jsonl line")
    tokenizer: str = Field("", description="a SentencePiece .model; empty: trained on the training documents")
    validation_fraction: Annotated[float, Field(gt=0.0, lt=0.9)] = Field(0.1, description="share of documents held out")
    max_validation_tokens: NonNegative = Field(0, description="keep whole documents up to this many tokens; 0: all")
    fineweb_train_shards: Positive = Field(1, description="published training shards to download (100 M tokens each)")

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        given = self.model_fields_set
        if self.source in ("text", "shards") and not self.path:
            raise ValueError(f"data.source '{self.source}' needs data.path")
        if self.source in ("pydocs", "fineweb") and self.path:
            raise ValueError(f"data.path has no effect with data.source '{self.source}'; remove it")
        if self.source == "shards" and not self.tokenizer:
            raise ValueError("data.source 'shards' needs data.tokenizer, the .model the shards were made with")
        if self.source == "fineweb" and self.tokenizer:
            raise ValueError("data.tokenizer has no effect with data.source 'fineweb'; its own tokenizer is downloaded")
        if self.source != "fineweb" and "fineweb_train_shards" in given and self.fineweb_train_shards != 1:
            raise ValueError(f"data.fineweb_train_shards has no effect with data.source '{self.source}'")
        return self


class BigramConfig(Section):
    """Hashed table of (previous, current) token pairs, added to the token embedding (PR 1166 section 4)."""

    vocab_size: NonNegative = Field(1536, description="rows of the table, the last one for 'no predecessor'; 0: off")
    dim: Positive = Field(128, description="width of a row before its projection to the model width")


class ValueEmbeddingConfig(Section):
    """Token embedding added to the values of some layers (PR 1166 section 7)."""

    dim: Positive = 128
    layers: tuple[int, ...] = Field((-2, -1), description="layers that add it; empty: off")


class TTTLinearConfig(Section):
    """End-to-end TTT-Linear refiner after the final norm (PR 1166 section 8)."""

    enabled: bool = False
    num_heads: Positive = 8
    mini_batch: Positive = 16
    base_lr: Rate = 1.0


class FlowConfig(Section):
    """FlowRefiner: gated low-rank residual map after the final norm (PR 1166 section 9)."""

    enabled: bool = False
    latent_dim: Positive = 64
    hidden_dim: Positive = 256
    init_scale: Rate = 0.01


class ModelConfig(Section):
    """Architecture. Defaults are the published PR 1166 model without its two refiners."""

    vocab_size: Positive = 1024
    num_layers: Positive = 10
    model_dim: Positive = 512
    num_heads: Positive = 8
    num_kv_heads: Positive = 4
    mlp_mult: Annotated[float, Field(gt=0)] = 3.0
    tie_embeddings: bool = True
    tied_embed_init_std: Rate = 0.005
    rope_base: Annotated[float, Field(gt=1)] = 10000.0
    rope_dims: NonNegative = Field(16, description="rotated dimensions of each head, even; 0: all of them")
    rope_train_length: Positive = Field(1024, description="longer inputs rescale the base (NTK rule)")
    logit_softcap: Annotated[float, Field(gt=0)] = 30.0
    qk_gain_init: float = 1.5
    ln_scale: bool = Field(True, description="multiply normed inputs of layer i by 1/sqrt(i+1)")
    xsa: NonNegative | tuple[int, ...] = Field(4, description="exclusive self-attention: last n layers, or a list")
    smear: bool = Field(True, description="mix each embedding with its predecessor by a learned gate")
    unet_skips: bool = Field(True, description="add outputs of the first half to inputs of the second half")
    gated_attention: bool = Field(False, description="per-head output gate computed from the attention input")
    value_residual: bool = Field(False, description="mix the values of layer 0 into all later layers")
    recurrence: tuple[int, ...] = Field((), description="blocks run once more after the last block, in this order")
    bigram: BigramConfig = BigramConfig()
    value_embedding: ValueEmbeddingConfig = ValueEmbeddingConfig()
    ttt_linear: TTTLinearConfig = TTTLinearConfig()
    flow: FlowConfig = FlowConfig()

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.model_dim % self.num_heads:
            raise ValueError(f"model.model_dim {self.model_dim} is not a multiple of model.num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.num_kv_heads}"
            )
        rotated = self.rope_dims or self.head_dim
        if rotated % 2 or rotated > self.head_dim or rotated == 2:
            raise ValueError(f"model.rope_dims must be even, at least 4 and at most the head width {self.head_dim}")
        if self.ttt_linear.enabled and self.model_dim % self.ttt_linear.num_heads:
            raise ValueError("model.model_dim is not a multiple of model.ttt_linear.num_heads")
        if self.bigram.vocab_size == 1:
            raise ValueError("model.bigram.vocab_size must be 0 (off) or at least 2")
        for name, layers in (
            ("xsa", self.xsa if isinstance(self.xsa, tuple) else ()),
            ("recurrence", self.recurrence),
            ("value_embedding.layers", self.value_embedding.layers),
        ):
            wrong = [i for i in layers if not -self.num_layers <= i < self.num_layers]
            if wrong:
                raise ValueError(f"model.{name} names layer {wrong[0]} of a model with {self.num_layers} layers")
        if isinstance(self.xsa, int) and self.xsa > self.num_layers:
            raise ValueError(f"model.xsa {self.xsa} is more than model.num_layers {self.num_layers}")
        return self

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.model_dim // self.num_heads

    @property
    def xsa_layers(self) -> tuple[int, ...]:
        """Layers with exclusive self-attention, counted from 0, ascending."""
        if isinstance(self.xsa, int):
            return tuple(range(self.num_layers - self.xsa, self.num_layers))
        return self._absolute(self.xsa)

    @property
    def value_embedding_layers(self) -> tuple[int, ...]:
        """Layers that add the value embedding, counted from 0, ascending."""
        return self._absolute(self.value_embedding.layers)

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """Blocks that run once more after the last block, counted from 0, in running order."""
        return tuple(i % self.num_layers for i in self.recurrence)

    def _absolute(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted({i % self.num_layers for i in layers}))


class TrainConfig(Section):
    """Optimisation. Defaults are those of the published PR 1166 run except for the step count."""

    steps: Positive = 7185
    batch_tokens: Positive = Field(786432, description="tokens of one optimiser step, over all processes")
    sequence_length: Positive = 2048
    matrix_lr: Rate = Field(0.025, description="Muon")
    scalar_lr: Rate = Field(0.025, description="AdamW: vectors, scalars, small projections, refiners")
    embed_lr: Rate = Field(0.035, description="AdamW: embedding tables")
    head_lr: Rate = Field(0.008, description="Adam: untied output head, without weight decay")
    warmdown_steps: NonNegative = Field(4311, description="last steps over which the learning rate falls to 0, linear")
    muon_momentum: Fraction = 0.99
    muon_momentum_start: Fraction = 0.92
    muon_momentum_warmup_steps: NonNegative = 1500
    newton_schulz_steps: Positive = 5
    muon_dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="momentum and Newton-Schulz arithmetic")
    muon_weight_decay: Rate = 0.04
    adam_weight_decay: Rate = 0.04
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    grad_clip: Rate = Field(0.3, description="global L2 norm; 0: no clipping")
    ema_decay: Fraction = Field(0.997, description="moving average of the weights, used in the end; 0: last weights")
    validate_every: NonNegative = Field(500, description="steps between validations; 0: only at the end")
    log_every: Positive = 10
    checkpoint_every: NonNegative = Field(1000, description="steps between checkpoints; 0: only at the end")
    processes: Positive = Field(1, description="data-parallel processes; one GPU each, or threads of the CPU")
    threads: Positive = Field(1, description="CPU threads of each process; part of what makes a run repeatable")
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        rows, rest = divmod(self.batch_tokens, self.sequence_length)
        if rest or rows % self.processes:
            raise ValueError(
                f"train.batch_tokens {self.batch_tokens} must be train.sequence_length {self.sequence_length} "
                f"times a multiple of train.processes {self.processes}"
            )
        return self


class QuantizeConfig(Section):
    """Post-training quantisation and the coder of the artifact (PR 1166 section 17)."""

    matrix_bits: Annotated[int, Field(ge=3, le=8)] = Field(6, description="attention and MLP matrices")
    other_bits: Annotated[int, Field(ge=3, le=8)] = Field(8, description="embedding tables and other large matrices")
    clip_search: bool = Field(True, description="try five clip percentiles a tensor (PR 1166); off: row maximum")
    scale_floor: bool = Field(
        True, description="published rule: no row scale below 1/qmax; off: the scale the row needs"
    )
    passthrough_numel: NonNegative = Field(65536, description="tensors up to this size are stored as float16")
    lzma_preset: Annotated[int, Field(ge=0, le=9)] = 6


class ScoreConfig(Section):
    """Sliding-window scoring in bits per byte (PR 1166 section 18)."""

    window: NonNegative = Field(0, description="tokens a window; 0: train.sequence_length")
    stride: Positive = Field(64, description="targets scored a window after the first one")
    batch_windows: Positive = Field(32, description="windows of one forward pass; changes speed, not the score")


class BudgetConfig(Section):
    """The challenge's limit: bytes of code plus bytes of the artifact."""

    limit_bytes: Positive = 16_000_000


class Config(Section):
    """Everything that decides what a run computes; equal configs have equal hashes and share a run folder."""

    preset: str = Field("custom", description="name of the preset this config started from")
    seed: NonNegative = 1
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    score: ScoreConfig = ScoreConfig()
    budget: BudgetConfig = BudgetConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.score.stride > self.window:
            raise ValueError(f"score.stride {self.score.stride} is more than the window of {self.window} tokens")
        return self

    @property
    def window(self) -> int:
        """Length of a scoring window in tokens."""
        return self.score.window or self.train.sequence_length

    @property
    def hash(self) -> str:
        """Ten hexadecimal digits naming this config: equal settings, equal hash, on any machine."""
        return sha256_bytes(canonical_json(self.model_dump(mode="json", exclude={"preset"})).encode())[:10]


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    folder = resources.files("golfbook") / "presets"
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".yaml"))


def load_config(
    preset: str | Mapping[str, Any] = "quickstart",
    *,
    seed: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """Build a config from a preset and dotted or nested overrides.

    ``preset`` is the name of a shipped preset, a path of a YAML file, or a mapping. ``overrides`` maps keys such as
    ``"train.steps"`` (or nested mappings) to values. Raises :class:`ConfigError` for an unknown preset or key, a value
    of the wrong type, or settings that contradict each other.
    """
    tree = dict(preset) if isinstance(preset, Mapping) else _read_preset(preset)
    for key, value in (overrides or {}).items():
        if not isinstance(key, str):
            raise ConfigError(f"override key {key!r} is not text; write keys as 'section.name'")
        _assign(tree, key.split("."), value, key)
    if seed is not None:
        tree["seed"] = seed
    return validate(tree)


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
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    return value


def keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """All dotted keys of the configuration tree."""
    found: list[str] = []
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += keys(kind, f"{prefix}{name}.")
        else:
            found.append(prefix + name)
    return found


def _read_preset(name: str) -> dict[str, Any]:
    if name.endswith((".yaml", ".yml")):
        tree = read_yaml(name)
        tree.setdefault("preset", Path(name).stem)
        return tree
    if name not in preset_names():
        known = preset_names()
        raise ConfigError(f"unknown preset '{name}'{nearest(name, known)} (known: {', '.join(known)}, or a .yaml file)")
    text = (resources.files("golfbook") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    return {"preset": name, **yaml.safe_load(text)}


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
            hint = ""
            if _is_number(given):
                hint = f"; YAML reads '{given}' as text: write {_yaml_number(given, item['type'])}"
            lines.append(f"{key}: expected a number, got the text '{given}'{hint}")
        else:
            lines.append(f"{key}: {item['msg'].lower()}, got {given!r}")
    return "wrong configuration: " + "; ".join(dict.fromkeys(lines))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _yaml_number(text: str, kind: str) -> str:
    value = float(text)
    return str(int(value)) if kind.startswith("int") and value.is_integer() else repr(value)
