"""The model section of the configuration: every component of an architecture, its settings and what they mean.

Defaults are the published PR 1166 system without its two refiners. Layers are counted from 0; negative numbers count
from the last layer, so that one preset fits every depth.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from golfbook.config.section import NonNegative, Positive, Rate, Section


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
    """Multi-token prediction: extra heads for later targets, not exported (PR 1166 section 4 step 11)."""

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
        """Return the width of one attention head."""
        return self.model_dim // self.num_heads

    @property
    def xsa_layers(self) -> tuple[int, ...]:
        """Return the layers with exclusive self-attention, counted from 0, ascending."""
        if isinstance(self.xsa, int):
            return tuple(range(self.num_layers - self.xsa, self.num_layers))
        return self._absolute(self.xsa)

    @property
    def value_embedding_layers(self) -> tuple[int, ...]:
        """Return the layers that add the value embedding, counted from 0, ascending."""
        return self._absolute(self.value_embedding.layers)

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """Return the blocks that run once more, counted from 0, in running order."""
        return tuple(i % self.num_layers for i in self.recurrence)

    def _absolute(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted({i % self.num_layers for i in layers}))
