"""Muon, the optimiser of all attention and MLP matrices, and the rules that give every parameter to one optimiser.

Muon replaces the momentum of a matrix by its nearest (semi-)orthogonal matrix, found by a few Newton-Schulz steps, so
that every singular direction moves at the same speed. Constants and order of operations: PR 1166, section 14.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from golfbook.config.schema import TrainConfig
from golfbook.model.component import facts_of

Coefficients = Literal["quintic", "polar_express"]
QUINTIC = (3.4445, -4.7750, 2.0315)
# Amsel, Persson, Musco and Gower, "The Polar Express" (2025, arXiv 2505.16932), Algorithm 1: the best odd quintic of
# each step for singular values that start between 0.001 and 1, before the safety factor; the last one repeats.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
SAFETY = 1.01  # keeps rounded values inside the interval that the next polynomial was made for
NORM_EPS = 1e-7
GRAM_RATIO = 3  # long sides per short side from which several steps are taken on the small Gram matrix together
# How many of the first steps: float32 is safe for all of them, bfloat16 errors of a Gram matrix grow with each step
GRAM_STEPS = {torch.float32: 100, torch.bfloat16: 2}
CPU_BATCH_BYTES = 2**20  # of matrices in one batch on a CPU: the iteration's buffers then stay in the cache


def iteration_coefficients(steps: int, coefficients: Coefficients = "quintic") -> list[tuple[float, float, float]]:
    """Return the (a, b, c) of each of ``steps`` Newton-Schulz steps ``X <- a X + b (X X^T) X + c (X X^T)^2 X``.

    "quintic" is the published constant triple. "polar_express" changes it from step to step; each polynomial but the
    last of its table is p(x / 1.01), as in the paper.
    """
    if coefficients == "quintic":
        return [QUINTIC] * steps
    table = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]]
    return (table + [POLAR_EXPRESS[-1]] * steps)[:steps]


def newton_schulz(
    matrices: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16, coefficients: Coefficients = "quintic"
) -> Tensor:
    """Approximate ``U V^T`` of each matrix ``U S V^T`` in ``matrices`` (..., rows, columns).

    ``X <- a X + (b A + c A A) X`` with ``A = X X^T`` on the matrix divided by its Frobenius norm (for Polar Express by
    1.01 times it). After five steps singular values lie between about 0.68 and 1.13 with the quintic. Returns the same
    shape in ``dtype``. Zero matrices stay zero.
    """
    x = matrices.to(dtype, copy=True, memory_format=torch.contiguous_format).view(-1, *matrices.shape[-2:])
    return _orthogonalise(x, iteration_coefficients(steps, coefficients), coefficients).view(matrices.shape)


def _orthogonalise(x: Tensor, table: list[tuple[float, float, float]], coefficients: Coefficients) -> Tensor:
    """Apply :func:`newton_schulz` to a batch (n, rows, columns), which is used up; never transposes a matrix in memory.

    A is the Gram matrix on the shorter side. For long matrices the first steps share their products with X: with
    ``Z = a I + b A + c A A`` the next X is ``Z X`` and its Gram matrix ``Z A Z``. In exact arithmetic nothing changes;
    in float32 singular values of a millionth come out right to about 1 %, and bfloat16 stays within twice the error
    that it makes step by step.
    """
    tall = x.size(-2) > x.size(-1)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x.div_((norm if coefficients == "quintic" else SAFETY * norm) + NORM_EPS)
    long = max(x.shape[-2:]) >= GRAM_RATIO * min(x.shape[-2:])
    together = GRAM_STEPS.get(x.dtype, 1) if long else 1
    for steps in (table[:together], *([step] for step in table[together:])):
        gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)
        alpha, w = _gram_steps(gram, steps)
        x = torch.baddbmm(x, x, w, beta=alpha) if tall else torch.baddbmm(x, w, x, beta=alpha)
    return x


def _gram_steps(gram: Tensor, steps: list[tuple[float, float, float]]) -> tuple[float, Tensor]:
    """Multiply the Z of ``steps`` to ``alpha I + W``; the multiples of I stay apart, so that they are not rounded.

    All matrices are polynomials of ``gram``, so they are symmetric and commute.
    """
    (a, b, c), *others = steps
    w = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    alpha, product = a, w
    for following in others:
        half = torch.baddbmm(gram, w, gram, beta=a)
        gram = torch.baddbmm(half, half, w, beta=a)
        a, b, c = following
        w = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product = torch.baddbmm((alpha * w).add_(product, alpha=a), w, product)
        alpha *= a
    return alpha, product


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, Newton-Schulz, decoupled weight decay; matrices of one shape are handled as one batch.

    ``m <- mu m + g; u = g + mu m; W <- (1 - lr wd) W - lr sqrt(max(1, rows/columns)) NS(u)``. Parameters keep their
    dtype. ``dtype`` is that of the iteration; ``momentum_dtype`` is that of g, m and u: bfloat16 in PR 1166 and 1406,
    where the gradient is rounded before anything else, float32 in PR 1170 and 1232, where only u is rounded. PR 1170
    and 1232 also round the update once more after the shape factor; here, as in PR 1166, the factor is part of the
    float32 step, which differs by at most half a bfloat16 unit (0.2 %) of the update and is closer to the formula.

    ``row_norm`` divides each row of u by ``max(its norm, 1e-7)`` before the iteration (MuonEq-R, as PR 1217 and 1260
    do it; PR 1406 describes it, section 11.6); the norm is taken in float32 and momenta stay as they are.

    On a CPU a batch is cut so that it stays in the cache. A matrix without a gradient is left alone, decay included.
    Raises ValueError for a parameter that is no matrix.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 0.025,
        momentum: float = 0.99,
        weight_decay: float = 0.04,
        steps: int = 5,
        dtype: torch.dtype = torch.bfloat16,
        *,
        momentum_dtype: torch.dtype | None = None,
        coefficients: Coefficients = "quintic",
        row_norm: bool = False,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype, self.momentum_dtype = dtype, momentum_dtype or dtype
        self.coefficients, self.row_norm = coefficients, row_norm
        self.table = iteration_coefficients(steps, coefficients)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon takes matrices, got a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None, "Muon does not evaluate a closure"
        for group in self.param_groups:
            for batch in self._batches(group["params"]):
                self._step_batch(batch, group)

    def _batches(self, parameters: list[Tensor]) -> Iterator[list[Tensor]]:
        shapes: dict[torch.Size, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                shapes.setdefault(parameter.shape, []).append(parameter)
        for shape, same in shapes.items():
            fits = len(same)
            if same[0].device.type == "cpu":
                fits = max(1, CPU_BATCH_BYTES // (shape.numel() * self.dtype.itemsize))
            for start in range(0, len(same), fits):
                yield same[start : start + fits]

    def _step_batch(self, batch: list[Tensor], group: dict[str, Any]) -> None:
        rows, columns = batch[0].shape
        bank = torch.empty(len(batch), rows, columns, dtype=self.momentum_dtype, device=batch[0].device)
        nesterov = list(bank.unbind(0))  # first the gradients
        torch._foreach_copy_(nesterov, [p.grad for p in batch if p.grad is not None])
        for parameter in batch:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter, dtype=self.momentum_dtype)
        momenta = [self.state[p]["momentum"] for p in batch]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, nesterov)
        torch._foreach_add_(nesterov, momenta, alpha=group["momentum"])
        if self.row_norm:
            normalise_rows_(bank)
        updates = _orthogonalise(bank.to(self.dtype), self.table, self.coefficients).to(batch[0].dtype)
        torch._foreach_mul_(batch, 1.0 - group["lr"] * group["weight_decay"])
        scale = group["lr"] * max(1.0, rows / columns) ** 0.5
        torch._foreach_add_(batch, list(updates.unbind(0)), alpha=-scale)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore momenta in their own dtype; torch's default would cast them to the parameters' dtype."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["momentum"] = state["momentum"].to(self.momentum_dtype)


def normalise_rows_(matrices: Tensor) -> Tensor:
    """Divide rows of ``matrices`` (..., rows, columns) by ``max(norm, 1e-7)`` in place; norms are taken in float32."""
    norm = torch.linalg.vector_norm(matrices, dim=-1, keepdim=True, dtype=torch.float32)
    return matrices.div_(norm.clamp_min_(NORM_EPS))


def parameter_groups(model: nn.Module, config: TrainConfig) -> dict[str, list[str]]:
    """List the parameters each optimiser trains: ``matrix``, ``embed``, ``scalar`` and ``head``.

    The rules are those of the components (PR 1166 section 14.1). ``muon_bigram_proj`` moves the projection of the
    hashed bigrams to Muon (PR 1170, PR 1232). The published scripts train the token table of an untied model at 0.6; no
    published run is untied, so ``embed_lr`` holds for both cases here.
    """
    groups: dict[str, list[str]] = {"matrix": [], "embed": [], "scalar": [], "head": []}
    moved = {"bigram.proj.weight"} if config.optimizer.muon_bigram_proj else set()
    for name, facts in facts_of(model).items():
        groups["matrix" if name in moved else facts.group].append(name)
    return groups


def make_optimizers(model: nn.Module, config: TrainConfig) -> dict[str, torch.optim.Optimizer]:
    """Build the optimisers of the published recipe by name, "muon" and "adam"; with ``matrix_optimizer`` "adamw" the
    matrices join the second, and there is no first. Each group remembers its ``base_lr`` for the schedule.
    """
    named, names = dict(model.named_parameters()), parameter_groups(model, config)
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if config.optimizer.matrix_optimizer == "muon":
        optimizers["muon"] = Muon(
            [named[n] for n in names.pop("matrix")],
            lr=config.optimizer.matrix_lr,
            momentum=config.optimizer.muon_momentum,
            weight_decay=config.optimizer.muon_weight_decay,
            steps=config.optimizer.newton_schulz_steps,
            dtype=getattr(torch, config.optimizer.muon_dtype),
            momentum_dtype=getattr(torch, config.optimizer.muon_momentum_dtype),
            coefficients=config.optimizer.newton_schulz_coefficients,
            row_norm=config.optimizer.muon_row_norm,
        )
    rates = {
        "matrix": (config.optimizer.matrix_lr, config.optimizer.adam_weight_decay),
        "embed": (config.optimizer.embed_lr, config.optimizer.adam_weight_decay),
        "scalar": (config.optimizer.scalar_lr, config.optimizer.adam_weight_decay),
        "head": (config.optimizer.head_lr, 0.0),
    }
    optimizers["adam"] = torch.optim.AdamW(
        [
            {"params": [named[n] for n in members], "lr": rates[group][0], "weight_decay": rates[group][1]}
            for group, members in names.items()
            if members
        ],
        betas=(config.optimizer.adam_beta1, config.optimizer.adam_beta2),
        eps=config.optimizer.adam_eps,
        fused=True,
    )
    for optimizer in optimizers.values():
        for param_group in optimizer.param_groups:
            param_group["base_lr"] = param_group["lr"]
    return optimizers
