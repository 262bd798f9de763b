"""The one model definition: a GPT assembled from :class:`golfbook.config.architecture.ModelConfig`.

Training, quantisation, scoring and adaptation all use this class, so they cannot drift apart. State-dict names are the
published systems' export names (one matrix a tensor, PR 1166 section 13), in the published order.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from golfbook.compute import Backend
from golfbook.config.architecture import ModelConfig
from golfbook.model.cache import Cache
from golfbook.model.component import ZERO, Component, Facts, Work, facts_of, normal, product
from golfbook.model.cross_entropy import softcapped_cross_entropy
from golfbook.model.kernels import add_scaled, rms_norm
from golfbook.model.layers import CONTROL, Attention, BigramHash, Block, SmearGate, ValueEmbedding, table
from golfbook.model.refiners import FlowRefiner, LaterTargets, NativeFlowMatcher, Refiner, TTTLinear

# Added to the final state in this order, where the configuration wants them.
REFINERS: dict[str, type[Refiner]] = {
    "ttt_refiner": TTTLinear,
    "flow_refiner": FlowRefiner,
    "native_flow": NativeFlowMatcher,
}
BOS_ID = 1  # the id that starts every document, in the challenge's tokenizer and in ours


class GPT(Component):
    """Decoder-only transformer with U-Net skips, hashed bigrams and optional refiners (PR 1166 section 4).

    Built with the values of :func:`initialise` still to be drawn; on the meta device this costs nothing.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False  # recompute each block in backward: less memory, a third more arithmetic
        layers, dim = config.num_layers, config.model_dim
        self.encoder_layers = layers // 2
        skips = min(self.encoder_layers, layers - self.encoder_layers)
        if config.unet_skips and skips:
            self.skip_weights = nn.Parameter(torch.ones(skips, dim))
        self.tok_emb = nn.Embedding(config.vocab_size, dim)
        if config.bigram.vocab_size:
            self.bigram = BigramHash(config)
        if config.smear:
            self.smear = SmearGate(config)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(layers))
        if config.value_embedding_layers:
            self.ve_shared = ValueEmbedding(config)
            self.ve_layer_scales = nn.ParameterList(torch.ones(1) for _ in config.value_embedding_layers)
        for name, refiner in REFINERS.items():
            if refiner.wanted(config):
                self.add_module(name, refiner(config))
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(dim, config.vocab_size, bias=False)
        if config.mtp.num_heads:
            self.mtp_heads = LaterTargets(config)

    def facts(self) -> dict[str, Facts]:
        found = {"tok_emb.weight": table(normal(self.config.tied_embed_init_std))}
        if hasattr(self, "skip_weights"):
            found["skip_weights"] = CONTROL
        found |= {f"ve_layer_scales.{i}": CONTROL for i in range(len(self.config.value_embedding_layers))}
        return found if self.config.tie_embeddings else found | {"lm_head.weight": Facts("head", draw=ZERO)}

    def work(self, length: int, pairs: int, training: bool) -> Iterable[Work]:
        for block in self.config.recurrent_layers:  # each block's own work is counted once already
            for module in self.blocks[block].modules():
                if isinstance(module, Component):
                    yield from module.work(length, pairs, training)
        yield product("head", length, self.config.model_dim, self.config.vocab_size)

    @property
    def refiners(self) -> list[Refiner]:
        """Return the refiners that the model has, in the order in which they are added."""
        return [cast(Refiner, getattr(self, name)) for name in REFINERS if hasattr(self, name)]

    @property
    def draws_numbers(self) -> bool:
        """Return whether the training loss takes random numbers."""
        return any(refiner.draws_numbers for refiner in self.refiners)

    def use_attention(self, backend: Backend) -> None:
        """Let all blocks compute attention by ``backend``, see :mod:`golfbook.model.attention`."""
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend

    def hidden(self, tokens: Tensor, length: int | None = None, cache: Cache | None = None) -> Tensor:
        """Map token ids (B, T) int64 to the refined final state (B, T, D) that the output head reads.

        ``length`` >= T computes what the first T positions of an input of that length have: the rotary base depends on
        it. With TTT-Linear T must be a multiple of its mini-batch for that.

        With a ``cache``, ``tokens`` follow those that it has read, and the result is what their positions have in an
        input of the cache's length. Raises :class:`golfbook.errors.RunError` where they do not fit.
        """
        x = self._trunk(tokens, length, cache)
        for i, refiner in enumerate(self.refiners):
            x = x + (refiner.further(x, cache.of(f"refiner {i}")) if cache else refiner(x))
        if cache:
            cache.position += tokens.size(1)
        return x

    def _trunk(self, tokens: Tensor, length: int | None = None, cache: Cache | None = None) -> Tensor:
        config = self.config
        if cache:
            cache.check(tokens.size(1))
        x = self.tok_emb(tokens)
        if config.bigram.vocab_size:
            x = x + self.bigram(tokens, cache and cache.of("bigram"))
        kind = x.device.type
        if not x.is_meta and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))  # the whole residual stream, as in the published runs
        x = rms_norm(x)
        if config.smear:
            starts = tokens == BOS_ID if config.smear_document_mask else None
            x = self.smear(x, starts, cache and cache.of("smear"))
        x0 = x
        embeddings = self._value_embeddings(tokens)
        again = config.recurrent_layers
        first: Tensor | None = None
        stack: list[Tensor] = []
        passes = itertools.count()

        def run(i: int, x: Tensor) -> tuple[Tensor, Tensor]:
            memory = cache and cache.of(f"pass {next(passes)}")  # its own for each pass of a block that runs twice
            inputs = (x, x0, embeddings.get(i), first if i else None, length, memory)
            if self.checkpoint_activations and torch.is_grad_enabled():
                return checkpoint(self.blocks[i], *inputs, use_reentrant=False)
            return self.blocks[i](*inputs)

        for i in range(config.num_layers):
            j = i - self.encoder_layers
            if j >= 0 and stack:
                x = add_scaled(x, self.skip_weights[j], stack.pop())
            x, values = run(i, x)
            if config.value_residual != "none" and i == 0:
                first = values
            if config.recurrence_place == "in_place":
                for _ in range(again.count(i)):
                    x, _ = run(i, x)
            if j < 0 and config.unet_skips:
                stack.append(x)
        if config.recurrence_place == "after":
            for i in again:
                x, _ = run(i, x)
        return rms_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Map states (..., D) to soft-capped float32 logits (..., V)."""
        return self.capped(F.linear(hidden, self.head.to(hidden.dtype)).float())

    def capped(self, z: Tensor) -> Tensor:
        """Return the soft-capped logits ``cap * tanh(z / cap)``."""
        return self.config.logit_softcap * torch.tanh(z / self.config.logit_softcap)

    @property
    def head(self) -> Tensor:
        """Return the weights (V, D) of the output head: the token embedding, or its own."""
        return self.tok_emb.weight if self.config.tie_embeddings else self.lm_head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids (B, T) to logits (B, T, V) in float32."""
        return self.logits(self.hidden(tokens))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats of ``targets`` (B, T) given ``tokens`` (B, T); float32 scalar.

        In training mode the auxiliary losses are added: flow matching and multi-token prediction, each by its weight.
        """
        x = self._trunk(tokens)
        auxiliary = torch.zeros((), device=x.device)
        for refiner in self.refiners:
            own = refiner.auxiliary_loss(x) if self.training else None
            auxiliary = auxiliary if own is None else auxiliary + own
            x = x + refiner(x)
        if self.config.mtp.num_heads and self.training:
            auxiliary = auxiliary + self.mtp_heads.loss(x, targets)
        return softcapped_cross_entropy(x, self.head, targets, self.config.logit_softcap) + auxiliary

    def _value_embeddings(self, tokens: Tensor) -> dict[int, Tensor]:
        layers = self.config.value_embedding_layers
        if not layers:
            return {}
        shared = self.ve_shared(tokens)
        return {i: scale.to(shared.dtype) * shared for i, scale in zip(layers, self.ve_layer_scales, strict=True)}


@torch.no_grad()
def initialise(model: GPT, seed: int) -> GPT:
    """Draw the published initial weights (PR 1166 section 12) from ``seed``; returns ``model``.

    Matrices of linear maps are semi-orthogonal, output projections zero, token embeddings N(0, 0.005^2): each component
    says so of its own tensors. The generator is local, so the same seed gives the same weights whatever ran before.
    Below the published sizes this differs from the published code in one place: it would leave the two ``proj`` of the
    hashed and value embeddings at zero, where the zero table behind the first would never get a gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    linear = {f"{n}.{p}" for n, m in model.named_modules() if isinstance(m, nn.Linear) for p, _ in m.named_parameters()}
    facts = facts_of(model)
    for name in (*(n for n in facts if n in linear), *(n for n in facts if n not in linear)):
        draw = facts[name].draw
        if draw is not None:
            draw(model.get_parameter(name), generator)
    return model


def exported(config: ModelConfig) -> ModelConfig:
    """Return the architecture without what only training uses: the heads of multi-token prediction."""
    return config.model_copy(update=LaterTargets.OFF)


def exported_state(model: GPT) -> dict[str, Tensor]:
    """Return the model's tensors that :func:`exported` needs, by name."""
    facts = facts_of(model)
    return {name: value for name, value in model.state_dict().items() if not facts[name].training_only}


@functools.lru_cache(maxsize=64)
def model_facts(config: ModelConfig) -> dict[str, Facts]:
    """Return the facts of every tensor of a model by name; nothing is allocated."""
    with torch.device("meta"):
        return facts_of(GPT(config))


def parameter_table(config: ModelConfig) -> dict[str, int]:
    """Count the parameters by group, with their total; nothing is allocated."""
    with torch.device("meta"):
        model = GPT(config)
    table: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        group = f"blocks.{parts[2]}" if parts[0] == "blocks" else parts[0]
        if parts[0] == "blocks" and parts[2] not in ("attn", "mlp"):
            group = "blocks.scales"
        table[group] = table.get(group, 0) + parameter.numel()
    return {**table, "total": sum(table.values())}
