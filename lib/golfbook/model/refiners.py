"""Modules that refine the normalised state just before the output head: TTT-Linear, FlowRefiner, NativeFlowMatcher.

"TTT-Linear" is an architecture: a layer whose weights take gradient steps inside the forward pass. It is not the
test-time training of whole models on text that has been scored already.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golfbook.config.schema import ModelConfig
from golfbook.model.ttt_scan import LN_EPS, ttt_scan


class TTTLinear(nn.Module):
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

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to the correction (B, T, D) that is added to ``x``. T below one mini-batch gives zeros."""
        batch, time, dim = x.shape
        size = self.mini_batch
        used = time - time % size
        if not used:
            return torch.zeros_like(x)

        def split(linear: nn.Linear) -> Tensor:  # (mini-batches, B * heads, size, width)
            y = linear(x[:, :used]).view(batch, used // size, size, self.heads, self.width)
            return y.permute(1, 0, 3, 2, 4).flatten(1, 2)

        def rows(parameter: Tensor) -> Tensor:  # (heads, ., width) -> (B * heads, ., width)
            return parameter.expand(batch, -1, -1, -1).flatten(0, 1)

        outputs = ttt_scan(
            split(self.theta_Q), split(self.theta_K), split(self.theta_V), rows(self.W1), rows(self.b1),
            rows(self.ttt_ln_w.unsqueeze(1)), rows(self.ttt_ln_b.unsqueeze(1)), self.eta,
        )  # fmt: skip
        joined = outputs.unflatten(1, (batch, self.heads)).permute(1, 0, 3, 2, 4).reshape(batch, used, dim)
        refined = torch.sigmoid(self.gate) * self.o_proj(self.post_norm(joined).to(x.dtype))
        return F.pad(refined, (0, 0, 0, time - used)) if used < time else refined


class FlowRefiner(nn.Module):
    """Gated low-rank residual map ``sigmoid(gate) W_u (z + W_2 gelu(W_1 z + b_1) + b_2)``, z = W_d x (PR 1166 s. 9).

    Despite its name it has no flow-matching objective and no time variable.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, latent, hidden = config.model_dim, config.flow.latent_dim, config.flow.hidden_dim
        self.gate = nn.Parameter(torch.tensor(-5.0))
        self.down_proj = nn.Linear(dim, latent, bias=False)
        self.velocity_net = nn.Sequential(nn.Linear(latent, hidden), nn.GELU(), nn.Linear(hidden, latent))
        self.up_proj = nn.Linear(latent, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to the correction (B, T, D) that is added to ``x``."""
        z = self.down_proj(x)
        return torch.sigmoid(self.gate) * self.up_proj(z + self.velocity_net(z))


class NativeFlowMatcher(nn.Module):
    """Velocity field ``v(x, t) = W_out gelu(W_in x + b_in + gelu(W_t e(t) + b_t))`` (PR 1170 section 10).

    The correction is one Euler step at t = 1, ``sigmoid(gate) v(x, 1)``. Training adds the conditional flow-matching
    loss along ``x_t = (1-t) z + t x``. At t = 1 that loss has its optimum at v = x, so it pulls the correction towards
    a mere rescaling; the published runs were worse with it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, hidden = config.model_dim, config.native_flow.hidden_dim
        self.dim = dim
        self.gate = nn.Parameter(torch.tensor(-5.0))
        self.time_proj = nn.Sequential(nn.Linear(dim, hidden), nn.GELU())
        self.v_in = nn.Linear(dim, hidden)
        self.v_out = nn.Linear(hidden, dim, bias=False)

    def time_embedding(self, t: Tensor) -> Tensor:
        """Map times (...) to ``[sin(t f_k), cos(t f_k)]`` (..., D), f_k from 1 down to 1/10000, in float32."""
        half = self.dim // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device) / max(half - 1, 1)
        angles = t.float().unsqueeze(-1) * torch.exp(-math.log(10000.0) * steps)
        return F.pad(torch.cat((angles.sin(), angles.cos()), dim=-1), (0, self.dim % 2))

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Velocity (B, T, D) at states ``x`` (B, T, D) and times ``t`` that broadcast to (B, T)."""
        time = self.time_proj(self.time_embedding(t).to(x.dtype))
        return self.v_out(F.gelu(self.v_in(x) + time))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to the correction (B, T, D) that is added to ``x``."""
        return torch.sigmoid(self.gate) * self.velocity(x, torch.ones((), device=x.device))

    def matching_loss(self, x: Tensor, t: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        """Mean squared error of the velocity at random times against ``x - z``; float32 scalar, no gradient to ``x``.

        ``t`` (B, T) and ``z`` (B, T, D) are drawn from torch's global generator where not given.
        """
        x = x.detach().float()
        t = torch.rand(x.shape[:2], device=x.device) if t is None else t
        z = torch.randn_like(x) if z is None else z
        path = (1 - t).unsqueeze(-1) * z + t.unsqueeze(-1) * x
        return (self.velocity(path, t).float() - (x - z)).square().mean()
