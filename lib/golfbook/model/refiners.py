"""What stands between the last norm and the output head: TTT-Linear, FlowRefiner, NativeFlowMatcher, later targets.

"TTT-Linear" is an architecture: a layer whose weights take gradient steps inside the forward pass. It is not the
test-time training of whole models on text that has been scored already.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golfbook.config.architecture import ModelConfig, MTPConfig
from golfbook.model.cache import Memory
from golfbook.model.component import ZERO, Component, Draw, Facts, Work, normal, orthogonal, product
from golfbook.model.cross_entropy import softcapped_cross_entropy
from golfbook.model.ttt_scan import LN_EPS, ttt_continue, ttt_scan


def matrix(draw: Draw | None = None) -> Facts:
    """Return the facts of a refiner's matrix."""
    return Facts(draw=draw, dtype=torch.bfloat16)


def low_rank(module: nn.Linear, std: float, draw: Draw = orthogonal) -> Facts:
    """Return the facts of a matrix that starts small where a side is below 64.

    The published final sweep over the weights turns only matrices of at least 64 x 64 orthogonal.
    """
    return matrix(normal(std) if draw is orthogonal and min(module.weight.shape) < 64 else draw)


class Refiner(Component):
    """Something that is added to the final state, between the last norm and the output head.

    It is built where ``wanted(config)`` says so. Some have a loss of their own, which joins the model's in training.
    """

    draws_numbers = False  # whether its loss takes random numbers, from torch's global generator

    @classmethod
    def wanted(cls, config: ModelConfig) -> bool:
        """Return whether a model of this configuration has it."""
        return True

    def further(self, x: Tensor, memory: Memory) -> Tensor:
        """Map states (B, T, D) to their corrections, where ``memory`` holds what is needed of the states before them.

        One that looks at each position alone needs none.
        """
        return self(x)

    def auxiliary_loss(self, x: Tensor) -> Tensor | None:
        """Return the weighted loss of its own at states ``x`` (B, T, D) before refinement, a scalar; None: has none."""
        return None


class TTTLinear(Refiner):
    """End-to-end TTT-Linear refiner (PR 1166 section 8): a linear map per head, trained while it reads the sequence.

    Every sequence starts from (W1, b1). In mini-batches of ``mini_batch`` tokens the map takes one gradient step on
    ``0.5 |LN(k W + b) - (v - k)|^2`` with learning rate base_lr / head width; each token's output uses the gradients of
    its own mini-batch up to and including itself. Positions beyond the last whole mini-batch get zeros.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, heads = config.model_dim, config.ttt_linear.num_heads
        width = dim // heads
        self.heads, self.width, self.mini_batch = heads, width, config.ttt_linear.mini_batch
        self.eta = config.ttt_linear.base_lr / width
        self.W1 = nn.Parameter(torch.empty(heads, width, width))
        self.b1 = nn.Parameter(torch.zeros(heads, 1, width))
        self.ttt_ln_w = nn.Parameter(torch.ones(heads, width))
        self.ttt_ln_b = nn.Parameter(torch.zeros(heads, width))
        self.gate = nn.Parameter(torch.tensor(-5.0))
        self.theta_K = nn.Linear(dim, dim, bias=False)
        self.theta_V = nn.Linear(dim, dim, bias=False)
        self.theta_Q = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.post_norm = nn.LayerNorm(dim, eps=LN_EPS)

    @classmethod
    def wanted(cls, config: ModelConfig) -> bool:
        return config.ttt_linear.enabled

    def facts(self) -> dict[str, Facts]:
        maps = {f"theta_{x}.weight": matrix(orthogonal) for x in "KVQ"} | {"o_proj.weight": matrix(ZERO)}
        state = {"W1": matrix(normal(0.02)), "b1": matrix(), "ttt_ln_w": matrix(), "ttt_ln_b": matrix()}
        return maps | state | dict.fromkeys(("gate", "post_norm.weight", "post_norm.bias"), Facts())

    def work(self, length: int, pairs: int, training: bool) -> Iterable[Work]:
        dim, used = self.heads * self.width, length - length % self.mini_batch
        yield product("TTT-Linear", used, dim, 4 * dim)
        steps = used * dim * (6 * self.width + 4 * self.mini_batch)
        yield Work("TTT-Linear", steps, 3 * steps)  # backward: the forward again, and twice as much

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to the correction (B, T, D) that is added to ``x``. T below one mini-batch gives zeros."""
        time = x.size(1)
        used = time - time % self.mini_batch
        if not used:
            return torch.zeros_like(x)
        q, k, v, gamma, delta = self._inputs(x[:, :used])
        outputs = ttt_scan(q, k, v, *self._start(len(x)), gamma, delta, self.eta)
        refined = self._refined(outputs, x)
        return F.pad(refined, (0, 0, 0, time - used)) if used < time else refined

    def further(self, x: Tensor, memory: Memory) -> Tensor:
        """Map states (B, T, D) to their corrections, as if the input went on to the end of its mini-batch.

        Remembers the fast weights at the start of the open mini-batch and its inputs, whose maps are computed anew:
        there are few of them. The positions that fill no mini-batch at the end of the cache get zeros.
        """
        start, time, size = memory.cache.position, x.size(1), self.mini_batch
        opened = start % size
        used = max(0, min(time, memory.cache.length - memory.cache.length % size - start))
        read = memory.last("inputs", x, (start + time) % size)[:, : opened + used]
        if not used:
            return torch.zeros_like(x)
        q, k, v, gamma, delta = self._inputs(F.pad(read, (0, 0, 0, -read.size(1) % size)))
        kept = memory.tensors
        weight, bias = (kept["weight"], kept["bias"]) if kept.keys() >= {"weight", "bias"} else self._start(len(x))
        whole = (opened + used) // size
        outputs, kept["weight"], kept["bias"] = ttt_continue(q, k, v, weight, bias, gamma, delta, self.eta, whole)
        refined = self._refined(outputs, x)[:, opened : opened + used]
        return F.pad(refined, (0, 0, 0, time - used))

    def _inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values (mini-batches, B * heads, size, width), then gamma and delta (., 1, .)."""
        maps = (self.theta_Q(x), self.theta_K(x), self.theta_V(x))
        cut = (y.view(len(x), -1, self.mini_batch, self.heads, self.width).permute(1, 0, 3, 2, 4) for y in maps)
        norm = (self.ttt_ln_w.unsqueeze(1), self.ttt_ln_b.unsqueeze(1))
        return (*(y.flatten(1, 2) for y in cut), *(self._rows(p, len(x)) for p in norm))

    def _start(self, batch: int) -> tuple[Tensor, Tensor]:
        return self._rows(self.W1, batch), self._rows(self.b1, batch)

    def _rows(self, parameter: Tensor, batch: int) -> Tensor:  # (heads, ., width) -> (B * heads, ., width)
        return parameter.expand(batch, -1, -1, -1).flatten(0, 1)

    def _refined(self, outputs: Tensor, x: Tensor) -> Tensor:
        """Map what the scan returned to corrections (B, mini-batches * size, D) in the dtype of ``x``."""
        joined = outputs.unflatten(1, (len(x), self.heads)).permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)
        return torch.sigmoid(self.gate) * self.o_proj(self.post_norm(joined).to(x.dtype))


class FlowRefiner(Refiner):
    """Gated low-rank residual map ``sigmoid(gate) W_u (z + W_2 gelu(W_1 z + b_1) + b_2)``, z = W_d x (PR 1166 s. 9).

    Despite its name it has no flow-matching objective and no time variable.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, latent, hidden = config.model_dim, config.flow.latent_dim, config.flow.hidden_dim
        self.hidden, self.init_scale = hidden, config.flow.init_scale
        self.gate = nn.Parameter(torch.tensor(-5.0))
        self.down_proj = nn.Linear(dim, latent, bias=False)
        self.velocity_net = nn.Sequential(nn.Linear(latent, hidden), nn.GELU(), nn.Linear(hidden, latent))
        self.up_proj = nn.Linear(latent, dim, bias=False)

    @classmethod
    def wanted(cls, config: ModelConfig) -> bool:
        return config.flow.enabled

    def facts(self) -> dict[str, Facts]:
        first, last = self.velocity_net[0], self.velocity_net[2]
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        return {
            "gate": Facts(),
            "down_proj.weight": low_rank(self.down_proj, self.init_scale),
            "velocity_net.0.weight": low_rank(first, self.init_scale),
            "velocity_net.0.bias": Facts(draw=ZERO),
            "velocity_net.2.weight": low_rank(last, self.init_scale, ZERO),
            "velocity_net.2.bias": Facts(draw=ZERO),
            "up_proj.weight": low_rank(self.up_proj, self.init_scale),
        }

    def work(self, length: int, pairs: int, training: bool) -> Iterable[Work]:
        latent, dim = self.down_proj.weight.shape
        yield product("FlowRefiner", length, latent, 2 * dim + 2 * self.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to the correction (B, T, D) that is added to ``x``."""
        z = self.down_proj(x)
        return torch.sigmoid(self.gate) * self.up_proj(z + self.velocity_net(z))


class NativeFlowMatcher(Refiner):
    """Velocity field ``v(x, t) = W_out gelu(W_in x + b_in + gelu(W_t e(t) + b_t))`` (PR 1170 section 10).

    The correction is one Euler step at t = 1, ``sigmoid(gate) v(x, 1)``. Training adds the conditional flow-matching
    loss along ``x_t = (1-t) z + t x``. At t = 1 that loss has its optimum at v = x, so it pulls the correction towards
    a mere rescaling; the published runs were worse with it.
    """

    draws_numbers = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, hidden = config.model_dim, config.native_flow.hidden_dim
        self.dim, self.config = dim, config.native_flow
        self.gate = nn.Parameter(torch.tensor(-5.0))
        self.time_proj = nn.Sequential(nn.Linear(dim, hidden), nn.GELU())
        self.v_in = nn.Linear(dim, hidden)
        self.v_out = nn.Linear(hidden, dim, bias=False)

    @classmethod
    def wanted(cls, config: ModelConfig) -> bool:
        return config.native_flow.enabled

    def facts(self) -> dict[str, Facts]:
        time = self.time_proj[0]
        assert isinstance(time, nn.Linear)
        return {
            "gate": Facts(),
            "time_proj.0.weight": low_rank(time, self.config.init_scale),
            "time_proj.0.bias": Facts(draw=ZERO),
            "v_in.weight": low_rank(self.v_in, self.config.init_scale),
            "v_in.bias": Facts(draw=ZERO),
            "v_out.weight": matrix(ZERO),
        }

    def work(self, length: int, pairs: int, training: bool) -> Iterable[Work]:
        dim, hidden = self.dim, self.config.hidden_dim
        yield product("NativeFlowMatcher", length, dim, 2 * hidden)
        yield product("NativeFlowMatcher", 1, dim, hidden, times=1)  # the embedding of t = 1
        if training:  # the matching loss at random times, whose inputs get no gradient
            yield product("NativeFlowMatcher", length, dim, 2 * hidden, times=1)
            yield product("NativeFlowMatcher", length, dim, hidden)

    def time_embedding(self, t: Tensor) -> Tensor:
        """Map times (...) to ``[sin(t f_k), cos(t f_k)]`` (..., D), f_k from 1 down to 1/10000, in float32."""
        half = self.dim // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device) / max(half - 1, 1)
        angles = t.float().unsqueeze(-1) * torch.exp(-math.log(10000.0) * steps)
        return F.pad(torch.cat((angles.sin(), angles.cos()), dim=-1), (0, self.dim % 2))

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity (B, T, D) at states ``x`` (B, T, D) and times ``t`` that broadcast to (B, T)."""
        time = self.time_proj(self.time_embedding(t).to(x.dtype))
        return self.v_out(F.gelu(self.v_in(x) + time))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to the correction (B, T, D) that is added to ``x``."""
        return torch.sigmoid(self.gate) * self.velocity(x, torch.ones((), device=x.device))

    def auxiliary_loss(self, x: Tensor) -> Tensor:
        return self.config.loss_weight * self.matching_loss(x)

    def matching_loss(self, x: Tensor, t: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        """Average the velocity's squared error against ``x - z`` at random times; float32 scalar, no gradient to ``x``.

        ``t`` (B, T) and ``z`` (B, T, D) are drawn from torch's global generator where not given.
        """
        x = x.detach().float()
        t = torch.rand(x.shape[:2], device=x.device) if t is None else t
        z = torch.randn_like(x) if z is None else z
        path = (1 - t).unsqueeze(-1) * z + t.unsqueeze(-1) * x
        return (self.velocity(path, t).float() - (x - z)).square().mean()


class LaterTargets(nn.ModuleList, Component):
    """Multi-token prediction: a head for each later target, trained along, not exported (PR 1166 section 4 step 11)."""

    OFF: ClassVar = {"mtp": MTPConfig()}  # settings of a model without it

    def __init__(self, config: ModelConfig) -> None:
        heads = range(config.mtp.num_heads)
        super().__init__(nn.Linear(config.model_dim, config.vocab_size, bias=False) for _ in heads)
        self.weight, self.cap = config.mtp.loss_weight, config.logit_softcap

    def facts(self) -> dict[str, Facts]:
        # Muon trains them, as PR 1170 does; PR 1166's code forgets them
        return {f"{i}.weight": Facts("matrix", draw=ZERO, training_only=True) for i in range(len(self))}

    def work(self, length: int, pairs: int, training: bool) -> Iterable[Work]:
        for ahead, head in enumerate(self if training else (), 1):
            assert isinstance(head, nn.Linear)
            yield product("later targets", max(length - ahead, 0), head.in_features, head.out_features)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the weighted mean cross-entropy of all heads at refined states ``x`` (B, T, D), a float32 scalar."""
        losses = [
            softcapped_cross_entropy(x[:, :-ahead], cast(nn.Linear, head).weight, targets[:, ahead:], self.cap)
            for ahead, head in enumerate(self, 1)
        ]
        return self.weight * torch.stack(losses).mean()
