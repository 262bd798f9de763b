"""What a model costs before it exists: arithmetic and activation memory.

>>> from golfbook.config.load import load_config
>>> from golfbook.model import costs
>>> costs.per_token(load_config("pr1232_base").model, length=2048).training  # operations a token, forward and backward

A multiplication and its addition are two operations; only matrix products are counted, as ``torch.utils.flop_counter``
does, and its numbers are met exactly. Attention between positions is counted **full** (every query with every key) to
compare with that counter and with published figures, and **causal** (each query with itself and what came before),
which is what the fused kernels compute.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from golfbook.config.architecture import ModelConfig
from golfbook.model.attention import causal_attention
from golfbook.model.component import Component
from golfbook.model.gpt import GPT, exported
from golfbook.model.ttt_scan import GROUP


@dataclass(frozen=True)
class Flops:
    """Operations by component, forward and backward; all of a sequence, or a token's share of them."""

    forward: Mapping[str, float]
    backward: Mapping[str, float]

    @property
    def training(self) -> float:
        """Add up all components, forward and backward."""
        return sum(self.forward.values()) + sum(self.backward.values())

    @property
    def inference(self) -> float:
        """Add up all components, forward."""
        return sum(self.forward.values())

    def __truediv__(self, tokens: float) -> Flops:
        return Flops(*({k: v / tokens for k, v in part.items()} for part in (self.forward, self.backward)))


def per_sequence(model: ModelConfig, length: int, *, causal: bool = False, training: bool = True) -> Flops:
    """Count the operations of one sequence of ``length`` tokens; whole numbers.

    Each component says what it computes. ``training`` adds what only a training step does: the flow-matching loss and
    heads for later targets. What is computed once a call (NativeFlowMatcher's time embedding) counts once a sequence.
    """
    pairs = length * (length + 1) // 2 if causal else length * length
    forward: dict[str, float] = {}
    backward: dict[str, float] = {}
    for module in _network(model).modules():
        for work in module.work(length, pairs, training) if isinstance(module, Component) else ():
            if work.forward:
                forward[work.label] = forward.get(work.label, 0) + work.forward
                backward[work.label] = backward.get(work.label, 0) + work.backward
    return Flops(forward, backward)


@functools.lru_cache(maxsize=256)
def _network(model: ModelConfig) -> GPT:
    with torch.device("meta"):
        return GPT(model)


def per_token(model: ModelConfig, length: int, *, causal: bool = False, training: bool = True) -> Flops:
    """Return the mean operations a token in sequences of ``length`` tokens."""
    return per_sequence(model, length, causal=causal, training=training) / length


def scoring(model: ModelConfig, window: int, stride: int) -> float:
    """Count the operations a target in sliding windows: a window for ``stride`` targets, the head for them only."""
    parts = dict(per_sequence(exported(model), window, training=False).forward)
    head = parts.pop("head")
    return sum(parts.values()) / stride + head / window


def saved_bytes(model: ModelConfig, rows: int, length: int, dtype: torch.dtype = torch.float32) -> int:
    """Count the bytes autograd keeps for the backward pass of one training step, without computing anything.

    The model runs on the meta device; every storage that is saved and is no weight counts once. Attention is counted
    as a fused kernel saves it: its inputs, its output and one float32 a query. In float32 this is what a CPU keeps. In
    bfloat16 it is an estimate: weights and stream are all bfloat16, the TTT-Linear scan float32, nothing is fused;
    ``torch.compile`` keeps less.
    """
    return sum(_nbytes(t) for t in _saved(model, rows, length, dtype))


def activation_bytes(model: ModelConfig, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Estimate :func:`saved_bytes` of ``tokens`` tokens in a row from a short sequence: a constant and so much each."""
    constant, each = _saved_line(model, dtype)
    return round(constant + each * tokens)


@functools.lru_cache(maxsize=256)
def _saved_line(model: ModelConfig, dtype: torch.dtype) -> tuple[int, float]:
    # few mini-batches: they are steps
    length = GROUP * model.ttt_linear.mini_batch if model.ttt_linear.enabled else 512
    if length == model.vocab_size:
        length *= 2
    kept = _saved(model, 1, length, dtype)
    # The loss keeps the gradient of its head, the one large thing that does not grow with the tokens.
    constant = sum(_nbytes(t) for t in kept if t.shape == (model.vocab_size, model.model_dim))
    return constant, (sum(map(_nbytes, kept)) - constant) / length


def _saved(model: ModelConfig, rows: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    with torch.device("meta"):
        network = GPT(model).to(dtype)
        tokens = torch.empty(rows, length, dtype=torch.int64)
    given = {_storage(t) for t in (tokens, *network.parameters())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[_storage(tensor)] = tensor  # holding it keeps its storage's address its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _FusedAttention():
        network.loss(tokens, tokens)
    return [tensor for key, tensor in kept.items() if key not in given]


def _nbytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _KeepsAttention(torch.autograd.Function):
    """Stands for fused attention on the meta device: right shape out, right tensors saved."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.size(-1)).transpose(1, 2).contiguous().transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is causal_attention:
            return _KeepsAttention.apply(*args[:3])
        return func(*args, **(kwargs or {}))
