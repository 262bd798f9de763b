"""The sequential part of TTT-Linear: exact, with bounded memory and a hand-written backward pass.

The LayerNorm inside the inner gradient rules out an associative scan, so mini-batches run one after the other. All that
does not depend on the fast weights is computed for a group of mini-batches at once, and only the fast weights at group
borders are kept; the backward pass recomputes one group at a time. The formulae are those of PR 1166, section 8.1.

Symbols: per mini-batch and head, with fast weights (W, b) and rate eta, ``z = k W + b``, ``n = LN(z)``,
``p = gamma (gamma n + delta - v + k)``, ``G = LN'(z) p`` (the inner gradient), ``c = tril(q k^T + 1)``,
``y = q W + b - eta c G``, output ``q + gamma LN(y) + delta``; then ``W -= eta k^T G`` and ``b -= eta sum(G)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LN_EPS = 1e-6
GROUP = 8  # mini-batches between kept states: more saves memory between groups and costs it within one


def ttt_scan(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, delta: Tensor, eta: float):
    """Run the inner loop over all mini-batches; returns outputs shaped like ``q``, float32.

    ``q``, ``k``, ``v`` are (mini-batches, N, size, width) with N = batch times heads, ``weight`` (N, width, width),
    ``bias``, ``gamma`` and ``delta`` (N, 1, width). Fast weights are float32 whatever the inputs are.
    """
    tensors = [t.float().contiguous() for t in (q, k, v, weight, bias, gamma, delta)]
    if q.is_meta:  # costs are counted there; autocast does not know it
        return _Scan.apply(*tensors, eta)
    with torch.autocast(q.device.type, enabled=False):
        if torch.compiler.is_compiling():
            return _scan_op(*tensors, eta)[0]
        return _Scan.apply(*tensors, eta)


def ttt_continue(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, delta: Tensor, eta: float, whole: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`ttt_scan` does, and the fast weights and biases after the first ``whole`` mini-batches.

    Keeps the states of all mini-batches for a moment; no gradient.
    """
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, weight, bias, gamma, delta = (t.float() for t in (q, k, v, weight, bias, gamma, delta))
        group = _Group(q, k, v, weight, bias, gamma, delta, eta)
        if whole < len(q):
            return group.outputs(), group.weights[whole].clone(), group.biases[whole].clone()
        return group.outputs(), group.weight, group.bias


def _norm(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return normalised rows, their means and reciprocal deviations."""
    return torch.native_layer_norm(z, (z.size(-1),), None, None, LN_EPS)


def _norm_backward(gradient: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Return the gradient at ``z`` of a loss whose gradient at LN(z) is ``gradient``; a symmetric linear map."""
    return torch.ops.aten.native_layer_norm_backward(
        gradient, z, (z.size(-1),), mean, rstd, None, None, [True, False, False]
    )[0]


class _Group:
    """One group of mini-batches: its states and inner gradients, from the fast weights at its start."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, delta: Tensor, eta: float
    ) -> None:
        self.q, self.k, self.gamma, self.delta, self.eta = q, k, gamma, delta, eta
        count, n, size, width = k.shape
        self.offset = delta - v + k
        self.weights = k.new_empty(count, n, width, width)
        self.biases = k.new_empty(count, n, 1, width)
        self.z, self.normed, self.gradients = (torch.empty_like(k) for _ in range(3))
        self.mean, self.rstd = (k.new_empty(count, n, size, 1) for _ in range(2))
        square, constant = gamma * gamma, gamma * self.offset
        for m in range(count):
            self.weights[m], self.biases[m] = weight, bias
            z = torch.baddbmm(bias, k[m], weight)
            normed, mean, rstd = _norm(z)
            p = torch.addcmul(constant[m], square, normed)
            gradient = _norm_backward(p, z, mean, rstd)
            self.z[m], self.normed[m], self.mean[m], self.rstd[m], self.gradients[m] = z, normed, mean, rstd, gradient
            weight = torch.baddbmm(weight, k[m].mT, gradient, alpha=-eta)
            bias = bias - eta * gradient.sum(1, keepdim=True)
        self.weight, self.bias = weight, bias

    def mixed(self) -> tuple[Tensor, Tensor]:
        """Return the causal products ``c`` (M, N, size, size) and the values ``y`` (M, N, size, width)."""
        causal = (self.q @ self.k.mT + 1).tril_()
        return causal, self.q @ self.weights + self.biases - self.eta * (causal @ self.gradients)

    def outputs(self) -> Tensor:
        """Return the outputs of the group's mini-batches."""
        return torch.addcmul(self.q + self.delta, self.gamma, _norm(self.mixed()[1])[0])

    def backward(
        self, d_out: Tensor, d_weight: Tensor, d_bias: Tensor, d_gamma: Tensor, d_delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of q, k, v and of the states at the group's start, given those at its end.

        ``d_gamma`` and ``d_delta`` (N, 1, width) are added to in place.
        """
        gamma, eta, square = self.gamma, self.eta, self.gamma * self.gamma
        causal, y = self.mixed()
        normed, mean, rstd = _norm(y)
        d_y = _norm_backward(d_out * gamma, y, mean, rstd)
        d_gamma += (d_out * normed).sum((0, 2)).unsqueeze(1)
        d_delta += d_out.sum((0, 2)).unsqueeze(1)
        d_causal = (d_y @ self.gradients.mT).tril_().mul_(-eta)
        d_q = d_out + d_y @ self.weights.mT + d_causal @ self.k
        d_k = d_causal.mT @ self.q
        d_gradients = -eta * (causal.mT @ d_y)
        d_weights = self.q.mT @ d_y
        d_biases = d_y.sum(2, keepdim=True)
        p = torch.addcmul(gamma * self.offset, square, self.normed)
        p_mean = (p * self.normed).mean(-1, keepdim=True)
        d_p, d_z = torch.empty_like(p), torch.empty_like(p)
        width = p.size(-1)
        for m in reversed(range(len(p))):
            k, z, mean, rstd, n = self.k[m], self.z[m], self.mean[m], self.rstd[m], self.normed[m]
            g = d_gradients[m] - eta * torch.baddbmm(d_bias, k, d_weight)
            d_k[m] -= eta * (self.gradients[m] @ d_weight.mT)
            d_p[m] = _norm_backward(g, z, mean, rstd)
            d_n = square * d_p[m] - rstd * (g * p_mean[m] + p[m] * (g * n).mean(-1, keepdim=True))
            d_spread = -rstd * (g * self.gradients[m]).sum(-1, keepdim=True)
            d_z[m] = torch.addcmul(_norm_backward(d_n, z, mean, rstd), n, d_spread / width)
            d_weight = torch.baddbmm(d_weight + d_weights[m], k.mT, d_z[m])
            d_bias = d_bias + d_biases[m] + d_z[m].sum(1, keepdim=True)
        d_target = gamma * d_p
        # p = gamma^2 n + gamma offset with offset = delta - v + k, so dp/dgamma = 2 gamma n + offset
        d_gamma += (d_p * (2 * gamma * self.normed + self.offset)).sum((0, 2)).unsqueeze(1)
        d_delta += d_target.sum((0, 2)).unsqueeze(1)
        return d_q, d_k + d_target + d_z @ self.weights.mT, -d_target, d_weight, d_bias


def _run(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, delta: Tensor, eta: float
) -> tuple[Tensor, list[Tensor]]:
    """Compute the outputs, and the fast weights and biases at the start of each group, in turn."""
    outputs, states = torch.empty_like(q), []
    for start in range(0, len(q), GROUP):
        states += [weight, bias]
        part = slice(start, start + GROUP)
        group = _Group(q[part], k[part], v[part], weight, bias, gamma, delta, eta)
        outputs[part] = group.outputs()
        weight, bias = group.weight, group.bias
    return outputs, states


def _run_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, delta: Tensor, states: Sequence[Tensor], eta: float
) -> tuple[Tensor, ...]:
    """Return the gradients of all tensors that :func:`_run` took, in its order."""
    d_q, d_k, d_v = (torch.empty_like(q) for _ in range(3))
    d_gamma, d_delta = torch.zeros_like(gamma), torch.zeros_like(delta)
    d_weight, d_bias = torch.zeros_like(states[0]), torch.zeros_like(states[1])
    for index in reversed(range(len(states) // 2)):
        part = slice(index * GROUP, (index + 1) * GROUP)
        weight, bias = states[2 * index : 2 * index + 2]
        group = _Group(q[part], k[part], v[part], weight, bias, gamma, delta, eta)
        d_q[part], d_k[part], d_v[part], d_weight, d_bias = group.backward(
            d_out[part], d_weight, d_bias, d_gamma, d_delta
        )
    return d_q, d_k, d_v, d_weight, d_bias, d_gamma, d_delta


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        q, k, v, _, _, gamma, delta, ctx.eta = inputs
        outputs, states = _run(*inputs)
        ctx.save_for_backward(q, k, v, gamma, delta, *states)
        return outputs

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, gamma, delta, *states = ctx.saved_tensors
        return (*_run_backward(d_outputs[0].contiguous(), q, k, v, gamma, delta, states, ctx.eta), None)


# The same for torch.compile, as one opaque step: it would unroll the loop, which took the published runs minutes.
@torch.library.custom_op("golfbook::ttt_scan", mutates_args=())
def _scan_op(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, delta: Tensor, eta: float
) -> list[Tensor]:
    outputs, states = _run(q, k, v, weight, bias, gamma, delta, eta)
    return [outputs, *(state.clone() for state in states)]  # an operator's outputs may not be its inputs


@_scan_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, delta: Tensor, eta: float
) -> list[Tensor]:
    groups = -(-len(q) // GROUP)
    return [torch.empty_like(q), *(torch.empty_like(x) for _ in range(groups) for x in (weight, bias))]


@torch.library.custom_op("golfbook::ttt_scan_backward", mutates_args=())
def _scan_backward_op(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, delta: Tensor, states: list[Tensor], eta: float
) -> list[Tensor]:
    return list(_run_backward(d_out, q, k, v, gamma, delta, states, eta))


@_scan_backward_op.register_fake
def _(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, delta: Tensor, states: list[Tensor], eta: float
) -> list[Tensor]:
    return [torch.empty_like(x) for x in (q, k, v, *states[:2], gamma, delta)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, _, _, gamma, delta, ctx.eta = inputs
    ctx.save_for_backward(q, k, v, gamma, delta, *output[1:])


def _backward(ctx: Any, gradients: list[Tensor]) -> tuple[Tensor | None, ...]:
    q, k, v, gamma, delta, *states = ctx.saved_tensors
    return (*_scan_backward_op(gradients[0].contiguous(), q, k, v, gamma, delta, states, ctx.eta), None)


_scan_op.register_autograd(_backward, setup_context=_keep)
