"""Muon, the optimiser of all attention and MLP matrices, and the rules that give every parameter to one optimiser.

Muon replaces the momentum of a matrix by its nearest (semi-)orthogonal matrix, found by a few Newton-Schulz steps, so
that every singular direction moves at the same speed. Constants and order of operations: PR 1166, section 14.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from golfbook.config import TrainConfig

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NORM_EPS = 1e-7
BLOCK_MATRICES = (*(f"attn.{n}.weight" for n in ("c_q", "c_k", "c_v", "proj")), "mlp.fc.weight", "mlp.proj.weight")


def newton_schulz(matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Approximate ``U V^T`` of each matrix ``U S V^T`` in ``matrices`` (..., rows, columns) by a quintic iteration.

    ``X <- a X + (b A + c A A) X`` with ``A = X X^T`` on the matrix divided by its Frobenius norm; the singular values
    end between about 0.68 and 1.13. Returns the same shape in ``dtype``. Zero matrices stay zero.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + NORM_EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, Newton-Schulz, decoupled weight decay; matrices of one shape are handled as one batch.

    ``m <- mu m + g; u = g + mu m; W <- (1 - lr wd) W - lr sqrt(max(1, rows/columns)) NS(u)``. Momentum and iteration
    use ``dtype``; parameters keep theirs. Raises ValueError for a parameter that is no matrix.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 0.025,
        momentum: float = 0.99,
        weight_decay: float = 0.04,
        steps: int = 5,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.steps, self.dtype = steps, dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon takes matrices, got a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "Muon does not evaluate a closure"
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, batch in shapes.items():
                self._step_shape(shape, batch, group)

    def _step_shape(self, shape: torch.Size, batch: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad.to(self.dtype) for p in batch if p.grad is not None]
        for parameter, gradient in zip(batch, gradients, strict=True):
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(gradient)
        momenta = [self.state[p]["momentum"] for p in batch]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        nesterov = torch.stack(gradients) + torch.stack(momenta) * group["momentum"]
        updates = newton_schulz(nesterov, self.steps, self.dtype)
        torch._foreach_mul_(batch, 1.0 - group["lr"] * group["weight_decay"])
        scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
        torch._foreach_add_(batch, list(updates.to(batch[0].dtype).unbind(0)), alpha=-scale)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore momenta in the optimiser's own dtype; torch's default would cast them to the parameters' dtype."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["momentum"] = state["momentum"].to(self.dtype)


def parameter_groups(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters each optimiser trains: ``matrix``, ``embed``, ``scalar`` and ``head``.

    PR 1166 section 14.1: block matrices by Muon, the three tables by AdamW at the embedding rate, an untied head by
    Adam, heads of multi-token prediction by Muon (as PR 1170 does; PR 1166's code forgets them), everything else
    (vectors, scalars, small projections, refiners) by AdamW at the scalar rate.
    """
    groups: dict[str, list[str]] = {"matrix": [], "embed": [], "scalar": [], "head": []}
    for name, _ in model.named_parameters():
        if name in ("tok_emb.weight", "bigram.embed.weight", "ve_shared.embed.weight"):
            groups["embed"].append(name)
        elif name == "lm_head.weight":
            groups["head"].append(name)
        elif name.startswith("mtp_heads.") or name.split(".", 2)[-1] in BLOCK_MATRICES:
            groups["matrix"].append(name)
        else:
            groups["scalar"].append(name)
    return groups


def make_optimizers(model: nn.Module, config: TrainConfig) -> tuple[Muon, torch.optim.AdamW]:
    """Build the two optimisers of the published recipe; each group remembers its ``base_lr`` for the schedule."""
    named, names = dict(model.named_parameters()), parameter_groups(model)
    muon = Muon(
        [named[n] for n in names["matrix"]],
        lr=config.matrix_lr,
        momentum=config.muon_momentum,
        weight_decay=config.muon_weight_decay,
        steps=config.newton_schulz_steps,
        dtype=getattr(torch, config.muon_dtype),
    )
    rates = {
        "embed": (config.embed_lr, config.adam_weight_decay),
        "scalar": (config.scalar_lr, config.adam_weight_decay),
        "head": (config.head_lr, 0.0),
    }
    adam = torch.optim.AdamW(
        [
            {"params": [named[n] for n in names[group]], "lr": lr, "weight_decay": decay}
            for group, (lr, decay) in rates.items()
            if names[group]
        ],
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=True,
    )
    for group in (*muon.param_groups, *adam.param_groups):
        group["base_lr"] = group["lr"]
    return muon, adam


def lr_scale(step: int, config: TrainConfig) -> float:
    """Multiplier of every base rate at 0-based ``step``: 1, then linear to 1/warmdown over the last steps (s. 15.1)."""
    left = config.steps - step
    return min(1.0, left / config.warmdown_steps) if config.warmdown_steps else 1.0


def muon_momentum(step: int, config: TrainConfig) -> float:
    """Momentum at 0-based ``step``: linear from its start to its final value over the warm-up (section 14.2)."""
    warmup = config.muon_momentum_warmup_steps
    done = min(step / warmup, 1.0) if warmup else 1.0
    return (1 - done) * config.muon_momentum_start + done * config.muon_momentum
