"""Modules that refine the normalised state just before the output head: TTT-Linear and FlowRefiner (PR 1166).

"TTT-Linear" is an architecture: a layer whose weights take gradient steps inside the forward pass. It is not the
test-time training of whole models on text that has been scored already.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from golfbook.config import ModelConfig
from golfbook.scan import LN_EPS, ttt_scan


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
        return F.pad(refined, (0, 0, 0, time - used))


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
