"""Cross-entropy of soft-capped logits, with its gradient computed on the way and no full-size logits kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_LOGITS = 2**18  # logits alive at a time on a CPU: 1 MiB in float32, which stays in a core's cache
CERTAIN_CAP = 35.0  # exp(-2 * 35) / V is a normal float32 for any V, so up to this cap no probability is lost
CHUNK_LOGITS_GPU = 2**26  # enough for a GPU to be busy


def softcapped_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Average ``-log softmax(cap tanh(hidden head^T / cap))[target]`` over all positions; float32 scalar in nats.

    ``hidden`` (..., D), ``head`` (V, D), ``targets`` (...) int64. Equal to the plain formula (PR 1166 section 4, steps
    9-11); but positions go through in chunks, and since the loss is a mean its gradient is known as soon as the logits
    are, so the forward pass already computes it and the logits are never stored.
    """
    if torch.compiler.is_compiling():  # which fuses this by itself, but for the last copy of the logits
        logits = cap * torch.tanh(F.linear(hidden, head.to(hidden.dtype)).float() / cap)
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    keep = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    return _SoftcappedCrossEntropy.apply(hidden.flatten(0, -2), head, targets.flatten(), cap, keep)


class _SoftcappedCrossEntropy(torch.autograd.Function):
    """With s = sigmoid(2 z / cap) a capped logit is ``2 cap s - cap``, its slope ``4 s (1 - s)``: the constant cancels.

    A sigmoid costs a third of a tanh or less, by MKL on an AMD CPU an eighth.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        hidden, head, targets, cap, keep = inputs
        count = len(hidden)
        rows = max(1, (CHUNK_LOGITS_GPU if hidden.is_cuda else CHUNK_LOGITS) // len(head))
        weight = head.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if keep else None
        d_head = torch.zeros_like(head) if keep else None
        for start in range(0, count, rows):
            h, target = hidden[start : start + rows], targets[start : start + rows, None]
            s = F.linear(h, weight).float().mul_(2 / cap).sigmoid_()  # (rows, V)
            if cap <= CERTAIN_CAP:
                likely = torch.softmax(s * (2 * cap), -1)
                total -= likely.gather(1, target).log_().sum()
            else:
                likely = torch.log_softmax(s * (2 * cap), -1)
                total -= likely.gather(1, target).sum()
                likely.exp_()
            if d_hidden is not None and d_head is not None:
                likely.scatter_add_(1, target, likely.new_full((), -1.0).expand(target.shape))
                gradient = likely.mul_(torch.addcmul(s, s, s, value=-1.0)).to(h.dtype)
                torch.mm(gradient, weight, out=d_hidden[start : start + rows])
                d_head += gradient.mT @ h
        if d_hidden is not None and d_head is not None:
            ctx.save_for_backward(d_hidden.mul_(4 / count), d_head.mul_(4 / count))
        return total / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_head = ctx.saved_tensors
        return gradients[0] * d_hidden, gradients[0] * d_head, None, None, None
