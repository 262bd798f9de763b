"""The sections of the configuration: every setting, its type, its default and what it means.

Defaults are the published PR 1166 system without its two refiners. Layers of a model are counted from 0; negative
numbers count from the last layer, so that one preset fits every depth. How the sections are filled:
:mod:`golfbook.config.load`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from golfbook.config.tables import CODERS, QUANTIZERS, require
from golfbook.errors import ConfigError
from golfbook.files import canonical_json, sha256_bytes

LARGEST = 2**63 - 1  # what a table of results holds in a column of integers; torch and numpy take any seed up to it
Positive = Annotated[int, Field(gt=0, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Rate = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """Base of all sections: frozen, strict about types, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


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


class BigramConfig(Section):
    """Hashed table of (previous, current) token pairs, added to the token embedding (PR 1166 section 4)."""

    vocab_size: NonNegative = Field(1536, description="rows of the table, the last one for 'no predecessor'; 0: off")
    dim: Positive = Field(128, description="width of a row before its projection to the model width")
    trigram: bool = Field(False, description="add a row of the same table for (t-2, t-1, t) triples (PR 1406)")
    scaled_init: bool = Field(False, description="start the projection 1/sqrt(2 layers) smaller (PR 1170, PR 1232)")


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


class NativeFlowConfig(Section):
    """NativeFlowMatcher: a velocity field trained by conditional flow matching (PR 1170 section 10)."""

    enabled: bool = False
    hidden_dim: Positive = 256
    init_scale: Rate = Field(0.01, description="used only where a matrix has a side below 64, as published")
    loss_weight: Rate = 0.1


class CanonConfig(Section):
    """Canon: a short causal convolution of attention and MLP inputs, gated (PR 1170 section 4.1)."""

    last_n: NonNegative = Field(0, description="number of last layers that use it; 0: off")
    kernel: Positive = 4
    gate_init: float = -4.0


class MTPConfig(Section):
    """Multi-token prediction: extra heads for later targets, trained along and not exported (section 4 step 11)."""

    num_heads: NonNegative = 0
    loss_weight: Rate = 0.2


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
    smear_document_mask: bool = Field(False, description="the gate does not look back over a document's start (BOS)")
    unet_skips: bool = Field(True, description="add outputs of the first half to inputs of the second half")
    gated_attention: bool = Field(False, description="per-head output gate computed from the attention input")
    value_residual: Literal["none", "lambda", "alpha"] = Field(
        "none", description="values of layer 0 in later layers: l0 v0 + l1 v (PR 1170) or v + sigmoid(a) v0 (PR 1406)"
    )
    depth_gate: bool = Field(False, description="per-token gate on the update of each block (PR 1166, 'DTG')")
    leaky_slope: Annotated[float, Field(ge=0, le=1)] = Field(0.5, description="MLP: negative slope before squaring")
    recurrence: tuple[int, ...] = Field((), description="blocks that run once more, in this order")
    recurrence_place: Literal["after", "in_place"] = Field(
        "after", description="after the last block (PR 1406), or each right after its own first pass"
    )
    bigram: BigramConfig = BigramConfig()
    value_embedding: ValueEmbeddingConfig = ValueEmbeddingConfig()
    ttt_linear: TTTLinearConfig = TTTLinearConfig()
    flow: FlowConfig = FlowConfig()
    native_flow: NativeFlowConfig = NativeFlowConfig()
    canon: CanonConfig = CanonConfig()
    mtp: MTPConfig = MTPConfig()

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
        if self.bigram.trigram and not self.bigram.vocab_size:
            raise ValueError("model.bigram.trigram has no effect while model.bigram.vocab_size is 0")
        if self.smear_document_mask and not self.smear:
            raise ValueError("model.smear_document_mask has no effect while model.smear is off")
        if self.recurrence_place == "in_place" and not self.recurrence:
            raise ValueError("model.recurrence_place has no effect while model.recurrence is empty")
        if self.canon.last_n > self.num_layers:
            raise ValueError(f"model.canon.last_n {self.canon.last_n} is more than model.num_layers {self.num_layers}")
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
        """Blocks that run once more, counted from 0, in running order."""
        return tuple(i % self.num_layers for i in self.recurrence)

    def _absolute(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted({i % self.num_layers for i in layers}))


class TrainConfig(Section):
    """Optimisation. Defaults are those of the published PR 1166 run except for the step count."""

    steps: Positive = 7185
    batch_tokens: Positive = Field(786432, description="tokens of one optimiser step, over all processes")
    sequence_length: Positive = 2048
    matrix_optimizer: Literal["muon", "adamw"] = Field(
        "muon", description="for attention and MLP matrices; adamw: with matrix_lr and adam_weight_decay, to compare"
    )
    matrix_lr: Rate = Field(0.025, description="of attention and MLP matrices")
    scalar_lr: Rate = Field(0.025, description="AdamW: vectors, scalars, small projections, refiners")
    embed_lr: Rate = Field(0.035, description="AdamW: embedding tables")
    head_lr: Rate = Field(0.008, description="Adam: untied output head, without weight decay")
    lr_warmup_steps: NonNegative = Field(0, description="first steps over which the learning rate rises linearly")
    warmdown_steps: NonNegative = Field(4311, description="last steps over which the learning rate falls")
    warmdown_shape: Literal["linear", "cosine"] = Field(
        "linear", description="linear is what all four systems' code does"
    )
    min_lr_scale: Fraction = Field(0.0, description="share of the base rates that the warmdown ends at")
    max_seconds: Rate = Field(0.0, description="stop training by the clock, and warm down by it; 0: by steps")
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
    averaging: Literal["none", "ema", "swa", "swa_of_ema"] = Field("ema", description="which weights are handed on")
    ema_decay: Fraction = 0.997
    swa_every: Positive = Field(50, description="steps between the snapshots that SWA averages")
    swa_start: Fraction = Field(0.2, description="SWA starts when the learning-rate scale falls below this")
    qat_start: Fraction = Field(
        0.0, description="fake-quantise once the learning-rate scale falls below this; 0: never"
    )
    qat_rule: Literal["exported", "published"] = Field(
        "exported",
        description="exported: what the exporter stores, as it stores it; published: the two projections and the "
        "rounding that PR 1166's and 1406's flag would reach where it takes effect",
    )
    micro_batches: Positive = Field(1, description="pieces a process cuts its batch into, to save memory")
    loader: Literal["sequential", "coprime"] = Field("sequential", description="order of windows in the shards")
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
        if rows // self.processes % self.micro_batches:
            raise ValueError(
                f"train.micro_batches {self.micro_batches} does not divide the {rows // self.processes} sequences "
                "that a process has in each step"
            )
        return self


class QuantizeConfig(Section):
    """Post-training quantisation and the coder of the artifact (PR 1166 section 17)."""

    matrix_bits: Annotated[int, Field(ge=3, le=8)] = Field(6, description="attention and MLP matrices")
    mlp_bits: Literal[0, 3, 4, 5, 6, 7, 8] = Field(0, description="MLP matrices, where they differ; 0: matrix_bits")
    other_bits: Annotated[int, Field(ge=3, le=8)] = Field(8, description="embedding tables and other large matrices")
    quantizer: str = Field(
        "percentiles",
        description="percentiles: try five clips a matrix (PR 1166); row_maximum: no clip (PR 1170, 1232)",
    )
    scale_floor: bool = Field(
        True, description="published rule: no row scale below 1/qmax; off: the scale the row needs"
    )
    passthrough_numel: NonNegative = Field(65536, description="tensors up to this size are stored as float16")
    coder: str = Field("xz", description="what compresses the artifact: xz (PR 1166, 1406) or zstd (PR 1170, 1232)")
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
        return self


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
