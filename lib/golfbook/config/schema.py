"""The configuration: one frozen tree of sections, every setting with its type, its default and what it means.

Defaults are the published PR 1166 system. How the tree is filled: :mod:`golfbook.config.load`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from golfbook.config.architecture import ModelConfig
from golfbook.config.section import Fraction, NonNegative, Positive, Rate, Section
from golfbook.config.tables import CODERS, QUANTIZERS, require
from golfbook.errors import ConfigError
from golfbook.files import canonical_json, sha256_bytes


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
        if self.source in ("text", "shards") and not self.path:
            raise ValueError(f"data.source '{self.source}' needs data.path")
        if self.source in ("pydocs", "fineweb") and self.path:
            raise ValueError(f"data.path has no effect with data.source '{self.source}'; remove it")
        if self.source == "shards" and not self.tokenizer:
            raise ValueError("data.source 'shards' needs data.tokenizer, the .model the shards were made with")
        if self.source == "fineweb" and self.tokenizer:
            raise ValueError("data.tokenizer has no effect with data.source 'fineweb'; its own tokenizer is downloaded")
        if self.source != "text" and self.text_field != "text":
            raise ValueError(f"data.text_field has no effect with data.source '{self.source}'")
        if self.source in ("shards", "fineweb") and self.validation_fraction != 0.1:
            raise ValueError(f"data.validation_fraction has no effect with data.source '{self.source}'; it has its own")
        if self.source != "fineweb" and self.fineweb_train_shards != 1:
            raise ValueError(f"data.fineweb_train_shards has no effect with data.source '{self.source}'")
        return self


class OptimizerConfig(Section):
    """Optimisers of all weights (PR 1166 section 14)."""

    matrix_optimizer: Literal["muon", "adamw"] = Field(
        "muon", description="for attention and MLP matrices; adamw: with matrix_lr and adam_weight_decay, to compare"
    )
    matrix_lr: Rate = Field(0.025, description="of attention and MLP matrices")
    scalar_lr: Rate = Field(0.025, description="AdamW: vectors, scalars, small projections, refiners")
    embed_lr: Rate = Field(0.035, description="AdamW: embedding tables")
    head_lr: Rate = Field(0.008, description="Adam: untied output head, without weight decay")
    muon_momentum: Fraction = 0.99
    muon_momentum_start: Fraction = 0.92
    muon_momentum_warmup_steps: NonNegative = 1500
    newton_schulz_steps: Positive = 5
    newton_schulz_coefficients: Literal["quintic", "polar_express"] = "quintic"
    muon_row_norm: bool = Field(
        False, description="MuonEq-R: rows to unit norm first (in PR 1406's text, not its code)"
    )
    muon_dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Newton-Schulz arithmetic")
    muon_momentum_dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="PR 1170 and 1232: float32")
    muon_bigram_proj: bool = Field(False, description="Muon for the bigram projection (PR 1170, 1232) and not AdamW")
    muon_weight_decay: Rate = 0.04
    adam_weight_decay: Rate = 0.04
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.95
    adam_eps: Annotated[float, Field(gt=0)] = 1e-8
    grad_clip: Rate = Field(0.3, description="global L2 norm; 0: no clipping")


class ScheduleConfig(Section):
    """How the learning rate changes over training; it multiplies all rates (PR 1166 section 15)."""

    lr_warmup_steps: NonNegative = Field(0, description="first steps over which the learning rate rises linearly")
    warmdown_steps: NonNegative = Field(4311, description="last steps over which the learning rate falls")
    warmdown_shape: Literal["linear", "cosine"] = Field(
        "linear", description="linear is what all four systems' code does"
    )
    min_lr_scale: Fraction = Field(0.0, description="share of the base rates that the warmdown ends at")


class AveragingConfig(Section):
    """Averages of the weights over training."""

    method: Literal["none", "ema", "swa", "swa_of_ema"] = Field("ema", description="which weights are handed on")
    ema_decay: Fraction = 0.997
    swa_every: Positive = Field(50, description="steps between the snapshots that SWA averages")
    swa_start: Fraction = Field(0.2, description="SWA starts when the learning-rate scale falls below this")


class QATConfig(Section):
    """Quantisation-aware training."""

    start: Fraction = Field(0.0, description="fake-quantise once the learning-rate scale falls below this; 0: never")
    rule: Literal["exported", "published"] = Field(
        "exported",
        description="exported: what the exporter stores, as it stores it; published: the two projections and the "
        "rounding that PR 1166's and 1406's flag would reach where it takes effect",
    )


class TrainConfig(Section):
    """Optimisation. Defaults are those of the published PR 1166 run except for the step count."""

    steps: Positive = 7185
    batch_tokens: Positive = Field(786432, description="tokens of one optimiser step, over all processes")
    sequence_length: Positive = 2048
    max_seconds: Rate = Field(0.0, description="stop training by the clock, and warm down by it; 0: by steps")
    micro_batches: Positive = Field(1, description="pieces a process cuts its batch into, to save memory")
    loader: Literal["sequential", "coprime"] = Field("sequential", description="order of windows in the shards")
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    averaging: AveragingConfig = AveragingConfig()
    qat: QATConfig = QATConfig()

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.batch_tokens % self.sequence_length:
            raise ValueError(
                f"train.batch_tokens {self.batch_tokens} must be a multiple of train.sequence_length "
                f"{self.sequence_length}"
            )
        return self


class MachineConfig(Section):
    """What computes a run, and what it tells meanwhile."""

    # what changes no result stays out of the hash that names a run
    silent: ClassVar = {
        "checkpoint_activations", "compile_warmup_steps", "log_every", "validate_every", "checkpoint_every",
    }  # fmt: skip

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Positive = Field(1, description="CPU threads of each process; part of what makes a run repeatable")
    processes: Positive = Field(1, description="data-parallel processes; one GPU each, or threads of the CPU")
    precision: Literal["float32", "bfloat16", "auto"] = Field(
        "auto", description="of activations; masters stay float32. auto: bfloat16 where the hardware is fast at it"
    )
    attention: Literal["auto", "blocked", "sdpa", "flex", "flash3"] = Field(
        "auto", description="what computes attention; auto: the fastest that runs here"
    )
    compile: bool = Field(
        False, description="torch.compile the loss; eager where there is no compiler, with the reason in the log"
    )
    compile_warmup_steps: Positive = Field(
        2, description="steps on synthetic tokens that compile and fill caches before the first, and are then undone"
    )
    checkpoint_activations: bool = Field(False, description="recompute block activations in backward to save memory")
    log_every: Positive = 10
    validate_every: NonNegative = Field(500, description="steps between validations; 0: only at the end")
    checkpoint_every: NonNegative = Field(1000, description="steps between checkpoints; 0: only at the end")


class CalibrationConfig(Section):
    """The text on which a quantiser measures what the model's inputs and gradients look like; never validation text."""

    source: Literal["training", "generated", "random"] = Field(
        "training", description="windows of training documents, text that the model writes, or uniform token ids"
    )
    sequences: Positive = Field(64, description="windows of train.sequence_length tokens")
    temperature: Annotated[float, Field(gt=0)] = Field(0.8, description="of generated text (PR 1406's relative: 0.8)")
    recurrence: bool = Field(
        True, description="count second passes of recurrent blocks; off: as PR 1406, which forgot them"
    )


class RateConfig(Section):
    """The quantiser that spends bits where the loss needs them (quantizer: rate_distortion)."""

    rule: Literal[
        "row_maximum", "percentiles", "k_sigma", "equal", "tensor", "row", "column", "tensor+row", "tensor+column",
        "row+column", "all",
    ] = Field(
        "all",
        description="what steps follow: row maximum, row quantile, row deviation (the records), nothing, or the loss: "
        "by tensor, row, column; all three: equal slope everywhere",
    )  # fmt: skip
    bits: Annotated[float, Field(ge=0.5, le=12)] = Field(
        3.5, description="entropy of the integers, in bits a weight, that the common step is chosen for"
    )
    states: Literal[1, 4, 8, 16, 32, 64, 128, 256] = Field(8, description="of the trellis; 1: plain rounding")
    feedback: Literal["none", "columns", "both"] = Field(
        "columns", description="what makes up for errors: later columns (GPTQ), or later rows as well"
    )
    damping: Annotated[float, Field(gt=0, le=1)] = Field(
        0.01, description="share of its mean diagonal that is added to each Gram matrix"
    )
    rate_weight: Rate = Field(0.0, description="prefer integers that cost fewer bits; 1: by the slope of the loss")


class QuantizeConfig(Section):
    """Post-training quantisation and the coder of the artifact (PR 1166 section 17)."""

    matrix_bits: Annotated[int, Field(ge=3, le=8)] = Field(6, description="attention and MLP matrices")
    mlp_bits: Literal[0, 3, 4, 5, 6, 7, 8] = Field(0, description="MLP matrices, where they differ; 0: matrix_bits")
    other_bits: Annotated[int, Field(ge=3, le=8)] = Field(8, description="embedding tables and other large matrices")
    quantizer: str = Field(
        "percentiles",
        description="percentiles: try five clips a matrix (PR 1166); row_maximum: no clip (PR 1170, 1232); gptq: five "
        "clips with error feedback (PR 1406); rate_distortion: settings in quantize.rate",
    )
    scale_floor: bool = Field(
        True, description="published rule: no row scale below 1/qmax; off: the scale the row needs"
    )
    passthrough_numel: NonNegative = Field(65536, description="tensors up to this size are stored as float16")
    rate: RateConfig = RateConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    fit: Literal["none", "ladder", "prune", "solve"] = Field(
        "none",
        description="what is done where the artifact is over budget: nothing; layers to 5 bits, one after the other "
        "(PR 1170, 1232); small integers to zero (PR 1406); solve, for rate_distortion: the step that just fills it",
    )
    coder: str = Field(
        "xz",
        description="what compresses the artifact: xz (PR 1166, 1406), zstd (PR 1170, 1232), brotli, zlib, entropy",
    )
    coder_level: Annotated[int, Field(ge=0, le=22)] = Field(6, description="effort of the coder; xz: at most 9")

    @model_validator(mode="after")
    def _check(self) -> QuantizeConfig:
        try:
            require(QUANTIZERS, self.quantizer, "quantize.quantizer")
            require(CODERS, self.coder, "quantize.coder")
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if self.coder == "xz" and self.coder_level > 9:
            raise ValueError(f"quantize.coder_level {self.coder_level} is more than the 9 that xz has")
        self._check_effects()
        return self

    def _check_effects(self) -> None:
        """Refuse settings that would change nothing."""
        default, rate = QuantizeConfig.model_fields, self.quantizer == "rate_distortion"
        if self.rate != RateConfig() and not rate:
            raise ValueError(f"quantize.rate has no effect with quantize.quantizer '{self.quantizer}'")
        if rate and (self.matrix_bits, self.mlp_bits, self.other_bits) != tuple(
            default[name].default for name in ("matrix_bits", "mlp_bits", "other_bits")
        ):
            raise ValueError(
                "quantize.matrix_bits, mlp_bits and other_bits have no effect with rate_distortion: rate.bits"
            )
        if self.calibration != CalibrationConfig() and not self.calibrated:
            raise ValueError("quantize.calibration has no effect: this quantiser looks at weights alone")
        if self.calibration.source != "generated" and self.calibration.temperature != CalibrationConfig().temperature:
            raise ValueError("quantize.calibration.temperature has no effect unless calibration.source is 'generated'")
        fits = {"percentiles": ("none",), "row_maximum": ("none", "ladder"), "gptq": ("none", "prune")}
        if self.fit not in fits.get(self.quantizer, ("none", "solve")):
            raise ValueError(f"quantize.fit '{self.fit}' is not made for quantize.quantizer '{self.quantizer}'")
        if self.fit == "solve" and self.coder != "entropy":
            raise ValueError(f"quantize.fit 'solve' knows sizes under quantize.coder 'entropy', not '{self.coder}'")
        if self.fit == "ladder" and (self.coder != "zstd" or self.matrix_bits <= 5):
            raise ValueError(
                "quantize.fit 'ladder' tries levels of zstd and 5 bits: it needs quantize.coder 'zstd' and "
                "quantize.matrix_bits above 5"
            )

    @property
    def calibrated(self) -> bool:
        """Return whether the quantiser needs statistics of a text."""
        weights_alone = self.rate.rule in ("row_maximum", "percentiles", "k_sigma", "equal")
        rate = self.quantizer == "rate_distortion" and (self.rate.feedback != "none" or not weights_alone)
        return rate or self.quantizer == "gptq"

    @property
    def weights_alone(self) -> bool:
        """Return whether each stored value follows from its tensor alone, so that a training step can rehearse it."""
        return not self.calibrated and (self.quantizer != "rate_distortion" or self.rate.states == 1)


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
    machine: MachineConfig = MachineConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    score: ScoreConfig = ScoreConfig()
    budget: BudgetConfig = BudgetConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        train, processes = self.train, self.machine.processes
        rows = train.batch_tokens // train.sequence_length
        if rows % processes:
            raise ValueError(
                f"train.batch_tokens {train.batch_tokens} must be train.sequence_length {train.sequence_length} "
                f"times a multiple of machine.processes {processes}"
            )
        if rows // processes % train.micro_batches:
            raise ValueError(
                f"train.micro_batches {train.micro_batches} does not divide the {rows // processes} sequences that a "
                "process has in each step"
            )
        if self.score.stride > self.window:
            raise ValueError(f"score.stride {self.score.stride} is more than the window of {self.window} tokens")
        if train.qat.start and train.qat.rule == "exported" and not self.quantize.weights_alone:
            raise ValueError(
                f"train.qat.rule 'exported' cannot rehearse quantize.quantizer '{self.quantize.quantizer}': its "
                "integers depend on a calibration text or on a trellis, not on a step's weights alone; set "
                "train.qat.start: 0, train.qat.rule: published, or quantize.quantizer: percentiles or row_maximum (of "
                "rate_distortion: rate.rule k_sigma, row_maximum, percentiles or equal, rate.feedback: none, "
                "rate.states: 1)"
            )
        return self

    @property
    def window(self) -> int:
        """Return the length of a scoring window in tokens."""
        return self.score.window or self.train.sequence_length

    @property
    def hash(self) -> str:
        """Return ten hexadecimal digits: whatever can change a result changes them, on any machine alike."""
        tree = self.model_dump(mode="json", exclude={"preset": True, "machine": MachineConfig.silent})
        return sha256_bytes(canonical_json(tree).encode())[:10]
